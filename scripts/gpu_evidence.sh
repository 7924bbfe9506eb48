#!/usr/bin/env bash
# GPU evidence, a quarter of an hour: CUDA tests, benchmark, compute-sanitizer, training benchmark.
#
#   scripts/gpu_evidence.sh [tests|bench|sanitizer|train]...     (no argument: all four)
#
# Run from anywhere; needs python3 with torch, triton, pytest, hypothesis, rich and matplotlib, no
# installation of this repository, no network. Each part has its own time limit and runs whether or
# not an earlier one failed. Files go to $OUT (default: benchmarks/results/<gpu>/): evidence.txt
# (versions and each part's outcome), tests.log, topk_bench.csv/.png/.log, sanitizer.log, train.*.
# $PYTHON names another interpreter, $GIT_COMMIT the commit where there is no git. Exit status: the number of parts that failed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${OUT:-$("$python" -c 'import torch
from benchmarks.record import results_folder
print(results_folder(torch.device("cuda" if torch.cuda.is_available() else "cpu")))')} || exit 1
mkdir -p "$out" || exit 1
summary=$out/evidence.txt
failed=0

versions() {
    date -u '+date %Y-%m-%dT%H:%M:%SZ'
    "$python" -c 'import platform, torch
from benchmarks.record import commit, device_name, installed
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print("commit", commit())
print("device", device_name(device), "" if device.type == "cuda" else "(no CUDA device: not GPU evidence)")
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "pytest", "hypothesis", "flashinfer-python", "quack-kernels", "eai-sparsify"):
    print(name, installed(name) or "not installed")'
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    fi
}

# part NAME LOG SECONDS COMMAND...: runs a command under a time limit and notes how it ended.
part() {
    local name=$1 log=$out/$2 seconds=$3 start=$SECONDS status
    shift 3
    echo "== $name, at most $seconds s" >>"$log"
    timeout --kill-after=10 "$seconds" "$@" >>"$log" 2>&1
    status=$?
    tail -n 40 "$log"
    local outcome=passed
    case $status in
    0) ;;
    124 | 137) outcome="ran past its $seconds s" ;;
    *) outcome="failed with status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    echo "$name: $outcome, $((SECONDS - start)) s" | tee -a "$summary"
}

tests() {
    : >"$out/tests.log"
    part tests tests.log 160 "$python" -m pytest tests/kernels -q -p no:cacheprovider --durations=10
    # Training as CUDA graphs; needs safetensors too.
    part "resident tests" tests.log 200 "$python" -m pytest tests/ssd/test_resident.py -q \
        -p no:cacheprovider
}

bench() {
    : >"$out/topk_bench.log"
    part bench topk_bench.log 230 "$python" benchmarks/topk_bench.py --budget 200 \
        --out "$out/topk_bench.csv"
}

sanitizer() {
    : >"$out/sanitizer.log"
    local checker
    checker=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [ ! -x "$checker" ]; then
        echo "compute-sanitizer is not installed: the cases run without it" | tee -a "$summary"
        part "sanitizer cases" sanitizer.log 40 "$python" scripts/sanitizer_cases.py
        return
    fi
    # PyTorch's caching allocator would hide an access beyond the end of a tensor.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # Compiled before, so that the checker sees the kernels and not the compiler.
    part "sanitizer cases" sanitizer.log 30 "$python" scripts/sanitizer_cases.py
    for tool in memcheck racecheck; do
        part "sanitizer $tool" sanitizer.log 35 "$checker" --tool "$tool" --error-exitcode 99 \
            --print-limit 20 "$python" scripts/sanitizer_cases.py
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

train() {
    if [ ! -f benchmarks/train_bench.py ]; then
        echo "train: benchmarks/train_bench.py does not exist yet" | tee -a "$summary"
        return
    fi
    : >"$out/train_bench.log"
    part train train_bench.log 360 "$python" benchmarks/train_bench.py --out "$out/train_bench.csv"
}

versions | tee "$summary"
[ $# -gt 0 ] || set -- tests bench sanitizer train
for name in "$@"; do
    case $name in
    tests) tests ;;
    bench) bench ;;
    sanitizer) sanitizer ;;
    train) train ;;
    *)
        echo "unknown part: $name (tests, bench, sanitizer, train)" >&2
        failed=$((failed + 1))
        ;;
    esac
done
echo "files in $out:" && ls -l "$out"
exit "$failed"
