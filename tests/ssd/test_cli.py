"""What all commands share: output that ends no work, one line for a mistake, the words of each."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kill_resume import ENVIRONMENT, ROOT, write_features
from rich.console import Console

from ssd import cli, sweep, train
from ssd.cli import exit_status, in_words, reword
from ssd.embed import __main__ as embed
from ssd.errors import Interrupted, UserError
from ssd.peers import __main__ as peers
from ssd.peers import learners, study
from ssd.reproduce import __main__ as reproduce
from ssd.reproduce import experiments

Main = Callable[[list[str]], int]
TOML = (
    'features = "f.npz"\nseeds = 2\n[base]\ntasks = 2\nneurons = 24\nk = 2\nepochs = 1\n'
    "validation = 0.2\nanneal_samples = 40\n"
)
SMALL = [
    *("--tasks", "2", "--neurons", "24", "-k", "2", "--epochs", "1", "--device", "cpu"),
    *("--anneal-samples", "40"),
]
# A short form of each command without its --out, and what its --out is.
COMMANDS: dict[str, tuple[Main, list[str], str]] = {
    "train": (train.main, ["--features", "f.npz", *SMALL, "--seeds", "2"], "folder"),
    "sweep": (sweep.main, ["s.toml", "--device", "cpu"], "folder"),
    "peers": (
        peers.main,
        ["--features", "f.npz", "--tasks", "2", "--neurons", "10", "--seeds", "2"],
        "file",
    ),
    "reproduce": (
        reproduce.main,
        ["table1", "--short", "--device", "cpu", "--only", "cifar10", "24", "sdmlp"],
        "folder",
    ),
    "convert": (embed.main, ["--convert", "f.npz"], "file"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with what the commands read; few peers and no figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSD_DATA", "data")
    write_features(Path("f.npz"), 96)
    Path("s.toml").write_text(TOML)
    Path("file").write_text("x")
    Path("data/features").mkdir(parents=True)
    write_features(Path("data/features/cifar10.npz"), 96)
    monkeypatch.setattr(train, "draw", lambda folder: None)
    monkeypatch.setattr("ssd.reproduce.reproduction.draw", lambda *result: [])
    tiny = {"tasks": 2, "epochs": 1, "k": 2, "batch_size": 16, "anneal_samples": 40}
    benchmark = replace(experiments.BENCHMARKS[1], short=tiny)
    monkeypatch.setattr(experiments, "BENCHMARKS", (benchmark,))
    monkeypatch.setattr(experiments, "SIZES", (24, 32))
    monkeypatch.setattr(experiments, "SEEDS", (0, 1))
    few = learners.entries(16, 10)[:2]
    monkeypatch.setattr(peers, "entries", lambda *sizes: few)
    return tmp_path


def arguments(command: str, out: str) -> list[str]:
    given = COMMANDS[command][1]
    return [*given, "--out", f"{out}.npz" if command == "convert" else out]


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_any_encoding(command: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot show is a question mark, at most."""
    bytes_out = io.BytesIO()
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(bytes_out, encoding, errors="strict", write_through=True)
        monkeypatch.setattr(sys, name, stream)
    assert COMMANDS[command][0](arguments(command, "o\u1234t")) == 0
    said = bytes_out.getvalue().decode(encoding)
    assert "-> o?t" in said or command == "peers"  # which names no file
    if command != "convert":
        assert f" {'?' if encoding == 'ascii' else '±'} 0." in said


def test_locale_without_utf8() -> None:
    environment = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    given = arguments("peers", "gr\u00f6\u00dfe.csv")
    command = [sys.executable, "-m", "ssd.peers", *given]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b" ? " in done.stdout
    assert b"\n" + b"-" * 9 in done.stdout or b"+--" in done.stdout  # lines of plain characters
    assert Path("gr\u00f6\u00dfe.csv").is_file()


@pytest.mark.parametrize("command", ["train", "sweep", "peers", "reproduce"])
def test_nobody_reads_stdout(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head -1`: the work goes on to its end."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert COMMANDS[command][0](arguments(command, "out")) == 0
    assert files().keys() & {"out", "out/summary.json", "out/sweep.md", "out/table1.md"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_stdout_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_status(lambda: print("a line")) == 2
    assert capsys.readouterr().err.startswith("error: No space left on device (/dev/full)")


def test_absent_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under pythonw, or with stdout closed by the shell."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert exit_status(lambda: (print("line"), Console().print("line"), cli.note("x"))[0]) == 0


PLACES = {
    "below a file": ("file/out", "Not a directory (file"),
    "not to be made": ("/proc/ssd/out", "(/proc/ssd"),
}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc to fail to write to")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_out_that_cannot_be_written(
    command: str, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, message = PLACES[place]
    if command == "convert":
        message = "there is no folder"
    before = files()
    said = refused(COMMANDS[command][0], arguments(command, out), capsys)
    assert message in said
    assert files() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_out_of_the_wrong_kind(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main, given, kind = COMMANDS[command]
    Path("folder.npz").mkdir()
    out = "folder.npz" if kind == "file" else "file"
    before = files()
    said = refused(main, [*given, "--out", out], capsys)
    assert f"{out} is a folder; name a file" in said or " is not " in said
    assert files() == before


def refused(main: Main, given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, notes apart, with which a command line is refused."""
    capsys.readouterr()
    assert main(given) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    lines = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# What is interrupted, and what is said then after "interrupted; ".
INTERRUPTED = {
    "train": ("ssd.train.run", "go on with: python -m ssd.train --out out --resume"),
    "sweep": (
        "ssd.study.train_batch",
        "go on with: python -m ssd.sweep s.toml --device cpu --out out",
    ),
    "reproduce": (
        "ssd.study.train_batch",
        "out shows what exists; go on with: python -m ssd.",
    ),
    "peers": (
        "ssd.peers.study.evaluate_stream",
        "go on with: python -m ssd.peers --features f.npz --tasks 2",
    ),
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_interruption(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    interrupted, message = INTERRUPTED[command]
    main = COMMANDS[command][0]
    given = [*arguments(command, "out"), *(["--seeds", "1"] if command == "train" else [])]
    with monkeypatch.context() as patch:
        patch.setattr(interrupted, interrupt)
        assert main(given) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"interrupted; {message}")
    again = [*given, "--resume"] if command == "train" else given
    assert main(again) == 0


def test_interruption_of_peers_that_keep_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "evaluate_stream", lambda *given: (_ for _ in ()).throw(Interrupted))
    assert peers.main(COMMANDS["peers"][1]) == 130
    assert capsys.readouterr().err.endswith("interrupted; without --out FILE nothing is kept\n")


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Callable[[], int]:
        def work() -> int:
            raise error

        return work

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 3) == 3
    full = OSError(28, "No space left on device", "a.csv")
    for error, place, line in (
        (UserError("two\nlines"), "", "error: two lines"),
        (full, "--out", "error: No space left on device (a.csv); make room or use another --out"),
        (full, "", "error: No space left on device (a.csv)"),
    ):
        assert exit_status(fail(error), place) == 2
        assert capsys.readouterr().err == f"{line}\n"
    for stop in (Interrupted(), KeyboardInterrupt()):
        assert exit_status(fail(stop)) == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_stderr_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)

        def work() -> None:
            print("note", file=sys.stderr)
            raise UserError("wrong")

        assert exit_status(work) == 2
        assert exit_status(lambda: print("progress", file=sys.stderr)) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_with_nul(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    said = refused(COMMANDS[command][0], arguments(command, "a\0b"), capsys)
    assert "holds a NUL character" in said
    assert files() == before


@pytest.mark.parametrize("command", ["sweep", "reproduce"])
def test_the_folder_of_a_run_holds_no_others(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*COMMANDS["train"][1], "--out", "run"]) == 0
    before = files()
    said = refused(COMMANDS[command][0], arguments(command, "run"), capsys)
    assert said == "error: --out run is the folder of one run; use another --out"
    assert files() == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["train", "sweep", "peers", "reproduce", "embed", "compare"])
def test_interruption_of_imports(module: str) -> None:
    """In the midst of torch's, which a module that sleeps stands in for."""
    Path("slow").mkdir()
    Path("slow/torch.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", f"ssd.{module}"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "PYTHONPATH": f"slow{os.pathsep}{ROOT}"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "interrupted; the same command begins again\n"


def test_words() -> None:
    words = {"--lr": "lr", "-k": "k", "--out": "--runs"}
    text = "-k 5 and --lr-x, --lr 3: use a-k or a/--lr with another --out"
    assert reword(text, words) == "k 5 and --lr-x, lr 3: use a-k or a/--lr with another --runs"
    with pytest.raises(UserError, match=r"^lr 3$"), in_words(words):
        raise UserError("--lr 3")


def test_messages_name_the_options_of_their_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep has settings in its file, a reproduction its runs in --runs."""
    Path("s.toml").write_text(TOML.replace("f.npz", "g.npz"))
    assert refused(sweep.main, ["s.toml"], capsys) == "error: features g.npz is not a file"
    Path("s.toml").write_text(TOML.replace("k = 2", "k = 50"))
    said = refused(sweep.main, ["s.toml"], capsys)
    assert said == "error: s.toml: k 50 must be at most neurons 24"
    few = {n: a[:8] if n[0] == "x" else np.arange(8) // 2 for n, a in np.load("f.npz").items()}
    np.savez("few.npz", **few)
    said = refused(peers.main, ["--features", "few.npz", "--tasks", "2"], capsys)
    assert said.startswith("error: the validation share 0.1 leaves class 0 of features")
    main, given, _ = COMMANDS["reproduce"]
    assert main([*given, "--out", "out"]) == 0
    for path in Path("runs").glob("*/*/summary.json"):
        path.unlink()
        (path.parent / "config.json").write_text("{}")
    assert "; use another --runs" in refused(main, [*given, "--out", "out"], capsys)
    Path("out/command.json").write_text("{")
    assert "command.json is damaged" in refused(main, [*given, "--out", "out"], capsys)
