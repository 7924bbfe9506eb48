#!/usr/bin/env bash
# GPU evidence in two calls of at most 280 s each, or part by part.
#
#   scripts/gpu_evidence.sh first|second|PART...
#
#   first    smoke step bench tests       does every kernel run, is it right, are the targets met
#   second   profile train others sanitizer
#
# One more part, autoencoders, compares ssd_kernels.sae with the libraries that are installed.
#
# Needs python3 with torch, triton, pytest (with xdist, timeout and benchmark), hypothesis, rich and
# matplotlib; the repository need not be installed. Each part has a time limit, cut to what is left of
# the call, and runs whether or not an earlier one failed. Files go to $OUT (default:
# benchmarks/results/<gpu>/) as they grow: evidence-<call>.txt (versions, a line for each part),
# <call>.log (the output of the parts) and the tables of the benchmarks; <call> is first, second or the
# names of the parts. $PYTHON names another interpreter, $SECONDS_ALLOWED the limit of the call, and
# $GIT_COMMIT the commit where there is no git. Exit status: the number of parts that failed or were
# not run.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
allowed=${SECONDS_ALLOWED:-280}

case ${1:-} in
first) call=first parts=(smoke step bench tests) ;;
second) call=second parts=(profile train others sanitizer) ;;
"" | -*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
*) call=$(IFS=-; echo "$*") parts=("$@") ;;
esac
known="smoke step bench tests profile train others sanitizer autoencoders"
for name in "${parts[@]}"; do
    if [[ " $known " != *" $name "* ]]; then
        echo "unknown part: $name (known: $known)" >&2
        exit 2
    fi
done

# Every use of the GPU has a limit, since a broken driver hangs.
out=${OUT:-$(timeout -k 4 40 "$python" -c 'import torch
from benchmarks.record import results_folder
print(results_folder(torch.device("cuda" if torch.cuda.is_available() else "cpu")))')} || out=benchmarks/results/unknown
mkdir -p "$out" || exit 1
summary=$out/evidence-$call.txt log=$out/$call.log
failed=0
: >"$log"

versions() {
    date -u '+date %Y-%m-%dT%H:%M:%SZ'
    timeout -k 4 40 "$python" -c 'import platform, torch
from benchmarks.record import device_name
from ssd.storage.provenance import commit, installed
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print("commit", commit())
print("device", device_name(device), "" if device.type == "cuda" else "(no CUDA device: not GPU evidence)")
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "pytest", "hypothesis", "flashinfer-python", "quack-kernels", "eai-sparsify",
             "sae-lens", "dictionary-learning"):
    print(name, installed(name) or "not installed")'
    if command -v nvidia-smi >/dev/null; then
        timeout -k 4 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    fi
}

GRACE=4 # seconds from the interrupt to the kill
LEAST=8 # a part with less time is not begun

# left LIMIT: the limit, or what is left of the call if that is less.
left() {
    local rest=$((allowed - SECONDS - GRACE - 2))
    echo $((rest < $1 ? rest : $1))
}

# part NAME LIMIT COMMAND...: runs a command under a time limit and notes the outcome.
part() {
    local name=$1 seconds start=$SECONDS status outcome begin
    seconds=$(left "$2")
    shift 2
    if [ "$seconds" -lt "$LEAST" ]; then
        failed=$((failed + 1))
        echo "$name: not run, no time is left" | tee -a "$summary" "$log"
        return
    fi
    echo "== $name, at most $seconds s" | tee -a "$log"
    begin=$(($(wc -l <"$log") + 1))
    # After an interrupt pytest and the benchmarks still report what they have.
    timeout --signal=INT --kill-after=$GRACE "$seconds" "$@" >>"$log" 2>&1
    status=$?
    tail -n +"$begin" "$log" | tail -n 60
    case $status in
    0) outcome=passed ;;
    124 | 137) outcome="ran past its $seconds s" ;;
    *) outcome="failed with status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    local last # line of the part's own output
    last=$(tail -n +"$begin" "$log" | grep -v '^ *$' | tail -n 1 | cut -c1-160)
    echo "$name: $outcome, $((SECONDS - start)) s; $last" | tee -a "$summary"
}

smoke() { part smoke 90 "$python" scripts/smoke.py; }
step() { part step 45 "$python" scripts/step_evidence.py; }
profile() { part profile 45 "$python" scripts/step_evidence.py --profile; }

tests() {
    part tests 150 "$python" -m pytest tests/kernels tests/ssd/ops tests/ssd/test_cuda_graph.py -q -m cuda -n 12 \
        --maxprocesses 12 --tb=short --timeout=30 -p no:cacheprovider --ignore=tests/kernels/test_aot.py
}

# topk NAME LIMIT FILE OPTIONS...: rows of topk_bench, which gets 15 s less than the part.
topk() {
    local name=$1 file=$3 seconds
    seconds=$(left "$2")
    shift 3
    part "$name" "$seconds" "$python" benchmarks/topk_bench.py "$@" --budget $((seconds - 15)) \
        --out "$out/$file.csv"
}

bench() { topk bench 110 topk_bench --rows targets --no-compile; }
others() { topk others 90 topk_bench_others --rows others; }

train() {
    part train 160 "$python" benchmarks/train_bench.py --no-compile --protocol 50 \
        --out "$out/train_bench.csv"
}

autoencoders() {
    part autoencoders 240 "$python" benchmarks/sae_bench.py --budget 200 --out "$out/sae_bench.csv"
}

sanitizer() {
    local checker
    checker=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [ ! -x "$checker" ]; then
        echo "sanitizer: not run, compute-sanitizer is not installed" | tee -a "$summary"
        return
    fi
    # PyTorch's caching allocator would hide an access beyond the end of a tensor.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # Compiles the kernels, so that the checker does not watch the compiler.
    part "sanitizer cases" 30 "$python" scripts/smoke.py --quick
    for tool in memcheck initcheck; do
        part "sanitizer $tool" 60 "$checker" --tool "$tool" --error-exitcode 99 \
            --print-limit 20 "$python" scripts/smoke.py --quick
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

versions | tee "$summary"
for name in "${parts[@]}"; do
    "$name"
done
# Paths of this machine leave the logs, which are kept with the project.
sed -i -E "s#(/[^ :\"']*)?/site-packages/##g; s#$PWD/##g; s#$out/##g; s#/[^ ]*/bin/(python)#\1#g" \
    "$log" "$summary"
sed -i -E "s#/[^ ]*/lib/python[0-9.]*/##g; s#(/tmp|$HOME)/[^ ]*/##g" "$log" "$summary"
cat "$summary"
echo "files in $out:" && ls -l "$out"
exit "$failed"
