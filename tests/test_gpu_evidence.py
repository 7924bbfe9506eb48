"""scripts/gpu_evidence.sh as a dry run: a stub stands in for Python, so no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from scripts import smoke, step_evidence
from ssd_kernels import _dispatch

ROOT = Path(__file__).parents[1]
# What the stub is asked to run, by a word of its arguments -> the part.
STUB = """#!/usr/bin/env bash
case "$*" in
    -c*) echo "versions of the stub"; exit 0 ;;
    *scripts/smoke.py*) part=smoke ;;
    *--profile*) part=profile ;;
    *scripts/step_evidence.py*) part=step ;;
    *"--rows targets"*) part=bench ;;
    *"--rows others"*) part=others ;;
    *train_bench.py*) part=train ;;
    *sae_bench.py*) part=autoencoders ;;
    *pytest*) part=tests ;;
esac
echo "$part $*" >>"$STUB_CALLS"
echo "$part began in $PWD/scripts, /opt/lib/site-packages/torch/x.py, /opt/bin/python3"
[ "$part" = "$STUB_CRASHES" ] && { echo "Error: $part fell over" >&2; exit 3; }
# As a process that is stuck in a call to the driver.
[ "$part" = "$STUB_HANGS" ] && { trap '' INT; sleep 60 & wait; sleep 60; }
while [ $# -gt 0 ]; do
    [ "$1" = --out ] && { echo row >"$2"; echo picture >"${2%.csv}.png"; }
    shift
done
echo "$part ended"
"""
# compute-sanitizer's stub runs what it is given.
CHECKER = '#!/usr/bin/env bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'


class Run:
    """One dry run: its exit status, what it left behind, and how long it took."""

    def __init__(
        self, folder: Path, *parts: str, seconds: int = 60, root: Path = ROOT, **stub: str
    ) -> None:
        programs, self.out, calls = folder / "bin", folder / "out", folder / "calls"
        programs.mkdir()
        calls.touch()
        for name, text in (("python-stub", STUB), ("compute-sanitizer", CHECKER)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python-stub"),
            "OUT": str(self.out),
            "STUB_CALLS": str(calls),
            "SECONDS_ALLOWED": str(seconds),
            "STUB_CRASHES": "",
            "STUB_HANGS": "",
            **stub,
        }
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "scripts/gpu_evidence.sh", *parts],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=50,
        )
        self.seconds = time.monotonic() - start
        self.status, self.printed, self.said = done.returncode, done.stdout, done.stderr
        self.calls = [line.split()[0] for line in calls.read_text().splitlines()]

    def summary(self, call: str) -> dict[str, str]:
        """Part -> its line in evidence-<call>.txt."""
        lines = (self.out / f"evidence-{call}.txt").read_text().splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)


def test_first_call(tmp_path: Path) -> None:
    run = Run(tmp_path, "first", seconds=280)
    assert run.status == 0, run.printed + run.said
    assert run.calls == ["smoke", "step", "bench", "tests"]
    limits = [int(n) for n in re.findall(r"at most (\d+) s", run.printed)]
    assert limits[:3] == [90, 45, 110]
    assert sum(limits[:3]) < 280 - 30  # what the last part is left with at least
    assert limits[3] <= 150
    found = run.summary("first")
    assert list(found) == ["smoke", "step", "bench", "tests"]
    assert all(re.fullmatch(rf"passed, \d+ s; {part} ended", found[part]) for part in found)
    log = (run.out / "first.log").read_text()
    assert log.count("began in scripts, torch/x.py, python3\n") == 4  # no path of the machine
    files = {path.name for path in run.out.iterdir()}
    assert files == {"evidence-first.txt", "first.log", "topk_bench.csv", "topk_bench.png"}


def test_second_call(tmp_path: Path) -> None:
    run = Run(tmp_path, "second", seconds=280)
    assert run.status == 0, run.printed + run.said
    # The sanitizer's cases once without it, then under memcheck and initcheck.
    assert run.calls == ["profile", "train", "others", "smoke", "smoke", "smoke"]
    assert "sanitizer memcheck" in run.summary("second")
    assert "sanitizer initcheck" in run.summary("second")
    assert len(list(run.out.iterdir())) == 6  # at most eight files a call


def test_a_part_that_crashes_stops_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path, "first", STUB_CRASHES="smoke")
    assert run.status == 1
    assert run.calls == ["smoke", "step", "bench", "tests"]
    assert run.summary("first")["smoke"].startswith("failed with status 3")
    assert "Error: smoke fell over" in run.summary("first")["smoke"]
    assert "Error: smoke fell over" in (run.out / "first.log").read_text()
    assert run.summary("first")["tests"].startswith("passed")


def test_a_part_that_hangs_is_ended_and_stops_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path, "bench", "smoke", "step", seconds=15, STUB_HANGS="smoke")
    assert run.status == 2
    found = run.summary("bench-smoke-step")
    assert found["bench"].startswith("passed")
    assert re.match(r"ran past its \d s", found["smoke"])
    assert found["step"].startswith("not run, no time is left")
    assert run.calls == ["bench", "smoke"]
    assert "smoke began" in (run.out / "bench-smoke-step.log").read_text()
    assert run.seconds < 16


@pytest.mark.slow
def test_a_short_limit_leaves_time_for_the_next(tmp_path: Path) -> None:
    """A hanging part takes its own limit, not that of the others."""
    script = (
        (ROOT / "scripts/gpu_evidence.sh").read_text().replace("part smoke 90 ", "part smoke 8 ")
    )
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/gpu_evidence.sh").write_text(script)
    run = Run(tmp_path, "first", root=tmp_path, seconds=60, STUB_HANGS="smoke")
    assert run.status == 1
    assert run.calls == ["smoke", "step", "bench", "tests"]
    assert run.summary("first")["smoke"].startswith("ran past its 8 s")
    assert run.summary("first")["tests"].startswith("passed")


def test_single_parts_and_unknown_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, "tests", "smoke")
    assert run.status == 0
    assert run.calls == ["tests", "smoke"]
    assert list(run.summary("tests-smoke")) == ["tests", "smoke"]
    for number, (wrong, said) in enumerate([((), "first|second|PART"), (("all",), "unknown part")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = Run(folder, *wrong)
        assert run.status == 2
        assert said in run.said
        assert not run.out.exists()


@pytest.mark.parametrize("part", ["tests", "bench", "others", "autoencoders"])
def test_what_a_part_runs_exists(part: str, tmp_path: Path) -> None:
    """The stub hides a wrong file name or option, so the names are looked up here."""
    Run(tmp_path, part)
    command = (tmp_path / "calls").read_text().split()
    files = [word for word in command if word.endswith(".py") or word.startswith("tests/")]
    assert files
    assert all((ROOT / file.removeprefix("--ignore=")).exists() for file in files)


def test_smoke_has_every_op() -> None:
    assert {case.op for case in smoke.CASES} == set(_dispatch.TABLES)


def test_smoke_says_what_is_wrong_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(impl: str, draw: smoke.Draw) -> smoke.Results:
        return (draw(3) + (1e-3 if impl == "torch" else 0),)

    def raises(impl: str, draw: smoke.Draw) -> smoke.Results:
        if impl == "torch":
            raise RuntimeError("first line\nlast line")
        return (draw(3),)

    def right(impl: str, draw: smoke.Draw) -> smoke.Results:
        return draw(3), None, torch.arange(3)

    cases = [smoke.Case("distill", f" {f.__name__}", f) for f in (off, raises, right)]
    monkeypatch.setattr(smoke, "CASES", cases)
    monkeypatch.setattr(smoke, "DEVICE", torch.device("cpu"))
    table = dict.fromkeys(("reference", "torch"))
    monkeypatch.setitem(_dispatch.TABLES, "distill", table)
    assert smoke.main(["--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "result 0 is off by 0.00" in lines[0]
    assert "RuntimeError: first line | last line" in lines[1]
    assert lines[2].endswith("ok")
    assert lines[3] == "cpu: 2 wrong of 3"


def test_smoke_goes_on_in_a_new_process_where_the_gpu_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Replaced(Exception):
        pass

    def replaced(program: str, command: list[str]) -> None:
        raise Replaced(*command[2:])

    monkeypatch.setattr(smoke, "_answers", lambda: False)
    monkeypatch.setattr(smoke.os, "execv", replaced)
    with pytest.raises(Replaced) as caught:
        smoke.main(["--quick"])
    assert caught.value.args == ("--quick", "--from", "1", "0")
    monkeypatch.setattr(smoke, "DEVICE", torch.device("cpu"))
    assert smoke.main([*caught.value.args]) == 1
    assert "the device is gone" in capsys.readouterr().out


def test_a_step_with_a_wrong_or_missing_number_is_wrong() -> None:
    before = [torch.ones(3), torch.ones(2)]
    theirs = [2 * p for p in before]
    assert step_evidence.error_of(theirs, theirs, before) == 0
    for last in (theirs[1] + 0.1, theirs[1] * float("nan")):
        assert (
            not step_evidence.error_of([theirs[0], last], theirs, before) <= step_evidence.ALLOWED
        )
