"""One process a folder: the second is refused, and a killed one leaves nothing to clean up."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kill_resume import ENVIRONMENT, write_features

from ssd import sweep, train
from ssd.embed import __main__ as embed
from ssd.errors import UserError
from ssd.peers import __main__ as peers
from ssd.reproduce import __main__ as reproduce
from ssd.storage import lock
from ssd.storage.files import write_atomically
from ssd.storage.lock import LOCK, file_lock, folder_lock

pytest.importorskip("fcntl", reason="locks are POSIX")
HOLD = "import sys; from pathlib import Path; from ssd.storage.lock import {0}\n" + (
    "with {0}(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
)
SMALL = ["--tasks", "2", "--neurons", "16", "-k", "2", "--epochs", "1", "--device", "cpu"]
TOML = 'features = "f.npz"\n[base]\ntasks = 2\nneurons = 16\nk = 2\nepochs = 1\nvalidation = 0.2\n'


@contextmanager
def held(path: Path, kind: str = "folder_lock") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock of a folder or, by file_lock, of a file."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLD.format(kind), str(path)]
    with subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with held(tmp_path) as other:
        with pytest.raises(UserError, match=rf"in use by another process \({other.pid}\)"):
            folder_lock(tmp_path).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).exists()  # it was killed: the file stays, the lock does not
        with folder_lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_nested_and_let_go(tmp_path: Path) -> None:
    """Nothing is left but what came into the folder meanwhile."""
    out = tmp_path / "sub" / "subsub" / "t.csv"
    for _ in range(2):
        with file_lock(out), file_lock(out), folder_lock(out.parent):
            assert {path.name for path in out.parent.iterdir()} == {".t.csv.lock", LOCK}
        assert list(tmp_path.iterdir()) == []
    with file_lock(out):
        out.touch()
    assert list(out.parent.iterdir()) == [out]
    with held(out, "file_lock"), folder_lock(out.parent), file_lock(out.with_name("u.csv")):
        pass


def test_a_link_is_the_file_it_names(tmp_path: Path) -> None:
    file, link = tmp_path / "sub" / "t.csv", tmp_path / "link.csv"
    file.parent.mkdir()
    link.symlink_to(file)
    with held(file, "file_lock"), pytest.raises(UserError, match=r"link\.csv is in use"):
        file_lock(link).__enter__()
    write_atomically(link, "a")
    assert link.is_symlink()
    assert file.read_text() == "a"


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder removes the file between another's opening and locking it."""
    flock, calls = lock.fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", remove_first)
    with folder_lock(tmp_path):
        assert len(calls) == 2
        other = subprocess.run(
            [sys.executable, "-c", HOLD.format("folder_lock"), str(tmp_path)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        assert "in use by another process" in other.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with features, a sweep and a folder of features in it."""
    monkeypatch.chdir(tmp_path)
    write_features(Path("f.npz"), 256)
    Path("s.toml").write_text(TOML)
    Path("features").mkdir()
    write_features(Path("features/cifar10.npz"), 100, classes=5)
    return tmp_path


TRAIN = ["--features", "f.npz", *SMALL, "--out", "out"]
REPRODUCE = ["table2", "--short", "--features-folder", "features", "--data-root", "data"]
CASES: dict[str, tuple[Callable[[list[str]], int], list[str], str]] = {
    "train": (train.main, TRAIN, "out"),
    "train, resumed": (train.main, [*TRAIN, "--resume"], "out"),
    "train, seeds": (train.main, [*TRAIN, "--seeds", "2"], "out"),
    "sweep": (sweep.main, ["s.toml", "--out", "out"], "out"),
    "reproduce, tables": (reproduce.main, [*REPRODUCE, "--out", "out"], "out"),
    "reproduce, runs": (reproduce.main, [*REPRODUCE, "--runs", "out"], "out"),
    "peers": (peers.main, ["--features", "f.npz", "--tasks", "2", "--out", "out/t.csv"], "t.csv"),
    "embed": (
        embed.main,
        ["--dataset", "mnist-5k", "--extractor", "convmixer", "--out", "out/e.npz"],
        "e.npz",
    ),
    "convert": (embed.main, ["--convert", "f.npz", "--out", "out/e.npz"], "e.npz"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_second_process_is_refused_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    main, arguments, what = CASES[case]
    is_file = "." in what
    Path("out").mkdir()
    path, kind = (Path("out", what), "file_lock") if is_file else (Path(what), "folder_lock")
    before = {path for path in folder.rglob("*") if path.is_file()}
    with held(path.resolve(), kind):
        assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "note: " not in line]
    assert len(said) == 1
    assert "is in use by another process" in said[0]
    made = {path for path in folder.rglob("*") if path.is_file()} - before
    assert {path.name for path in made} == {LOCK if kind == "folder_lock" else f".{what}.lock"}


WORKER = """
import time
from concurrent.futures import ProcessPoolExecutor
from torch import multiprocessing
from ssd import study

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, study._begin) as pool:
        running = pool.submit(time.sleep, 0)
        running.result()
        print(*pool._processes, flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc to look for processes")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Or they would train on beside the command that goes on with their runs."""
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _running(child)
        parent.kill()
        # The child holds the other end of the pipe: it closes when the child has ended.
        parent.stdout.read()
    for _ in range(100):
        if not _running(child):
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail(f"process {child} outlives its parent")


def _running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"
