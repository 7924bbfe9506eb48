"""The command line: bad input in one line, good input as a user would expect."""

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from kill_resume import ENVIRONMENT, write_features
from rich.console import Console

from ssd import train
from ssd.config import Config, preset, resolve
from ssd.data import load
from ssd.progress import Display, watcher
from ssd.runs import RunOptions, run
from ssd.storage.checkpoint import load_checkpoint, save_checkpoint
from ssd.storage.run_folder import CHECKPOINT, CONFIG, METRICS, SUMMARY, describe

CPU = torch.device("cpu")
SMALL = [
    *("--tasks", "2", "--neurons", "32", "-k", "3", "--epochs", "2", "--batch-size", "64"),
    *("--anneal-samples", "250", "--method", "ssd+ewc", "--device", "cpu"),
]


# The hidden term of the paper, on the most frequent neurons.
PAPER_TERM = ("--hidden-loss", "kl", "--selection", "frequency")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else: drawing takes longer than a small run."""
    monkeypatch.setattr(train, "draw", lambda folder: None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a feature file f.npz in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSD_DATA", str(tmp_path / "data"))
    write_features(Path("f.npz"), 256)
    return tmp_path


def small(*more: str) -> list[str]:
    return ["--features", "f.npz", *SMALL, *more]


def content(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command line is refused, leaving everything as it was."""
    before = content(folder)
    capsys.readouterr()
    assert train.main(arguments) == 2
    assert content(folder) == before
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("error: ")
    assert said.endswith("\n")
    assert said.count("\n") == 1
    return said


OPTIONS = {
    "unknown data set": (["--dataset", "mnits"], "--dataset mnits is unknown; choose from mnist,"),
    "unknown preset": (["--preset", "fast"], "--preset fast is unknown"),
    "unknown option": (["--epoch", "3"], "unrecognized arguments: --epoch"),
    "argument too many": (["mnist"], "unrecognized arguments: mnist"),
    "missing value": (["--epochs"], "--epochs: expected one argument"),
    "not a number": (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    "not an integer": (["-k", "2.5"], "-k: invalid int value: '2.5'"),
    "no integer for a seed": (["--order-seed", "x"], "--order-seed: invalid int value: 'x'"),
    "negative seed": (["--weight-seed", "-1"], "--weight-seed -1 must be in 0..2^63-1"),
    "unknown method": (["--method", "sgd"], "--method sgd must be any of sdmlp"),
    "k > neurons": (["-k", "33"], "-k 33 must be at most --neurons 32"),
    "k = 0": (["-k", "0"], "-k 0 must be in 1.."),
    "no epochs": (["--epochs", "0"], "--epochs 0 must be in 1.."),
    "NaN": (["--alpha", "nan"], "--alpha nan must be in 0..1"),
    "no seeds": (["--seeds", "0"], "--seeds 0 must be in 1..10000"),
    "too many seeds": (["--seeds", "1000000000"], "--seeds 1000000000 must be in 1..10000"),
    "seeds that do not fit": (
        ["--seeds", "9000", "--neurons", "99999999"],
        "--neurons 99999999, 9000 runs side by side, does not fit into the memory of cpu (",
    ),
    "neurons that do not fit": (["--neurons", "2147483647"], "does not fit into the"),
    "negative interval": (["--checkpoint-every", "-1"], "--checkpoint-every -1.0 must be"),
    "indivisible": (["--tasks", "3"], "--tasks 3 does not divide the 4 classes"),
    "indivisible, seeds": (["--tasks", "3", "--seeds", "2"], "--tasks 3 does not divide"),
    "absent features": (["--features", "absent.npz"], "absent.npz is not a file"),
    "features of mnist": (["--dataset", "mnist"], "--dataset features and --features FILE"),
    "no device": (["--device", "gpu"], "--device gpu is not a device"),
    "other device": (["--device", "meta"], "--device meta is not supported"),
    "absent CUDA device": (["--device", "cuda:99"], "--device cuda:99 is not on this machine"),
    "out is a file": (["--out", "f.npz"], "f.npz exists and is not the folder of a run"),
    "out is below a file": (["--out", "f.npz/run"], "Not a directory (f.npz/run)"),
    "out is foreign": (["--out", "."], "exists and is not the folder of a run"),
    "seeds, out is foreign": (["--out", ".", "--seeds", "2"], "is not the folder of a run"),
    "resume foreign": (["--out", ".", "--resume"], "exists and is not the folder of a run"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, message = OPTIONS[case]
    assert message in refused(folder, capsys, small(*arguments))


def test_cuda_asked_for_and_absent(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda is not on" in refused(folder, capsys, small("--device", "cuda"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc to fail to write to")
def test_unwritable_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "(/proc/ssd" in refused(folder, capsys, small("--out", "/proc/ssd/run"))


def test_damaged_features(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path("f.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[:-100])
    assert "cannot be read" in refused(folder, capsys, [*small(), "--features", "cut.npz"])
    Path("plain.pt").write_bytes(b"\x80\x04cos\nmkdir\n(X\x06\x00\x00\x00brokentR.")
    assert "other than tensors" in refused(folder, capsys, [*small(), "--features", "plain.pt"])
    with np.load("f.npz") as arrays:
        bad = dict(arrays)
    bad["x_train"][2, 1] = np.nan
    np.savez("nan.npz", **bad)
    assert "hold NaN" in refused(folder, capsys, [*small(), "--features", "nan.npz"])


def test_truncated_idx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for file in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{file}-ubyte").write_bytes(b"\0\0\x08\x03\0\0\xea\x60")
    assert f"{raw} is damaged" in refused(folder, capsys, ["--dataset", "mnist"])


@pytest.fixture
def half(folder: Path) -> Path:
    """A run of `small()` that was stopped half-way."""
    events = iter(range(1000))
    config = resolve(vars(train.build_parser().parse_args(small())))
    data = load("features", folder, Path("f.npz"))
    with pytest.raises(train.Interrupted):
        run(config, data, folder / "half", RunOptions(CPU, stopped=lambda: next(events) > 3))
    return folder / "half"


def test_folder_that_holds_a_run(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(half.parent, capsys, small("--out", "half"))
    assert "already holds a run; add --resume or use another --out" in said
    said = refused(half.parent, capsys, small("--out", "half", "--resume", "--lr", "0.1"))
    assert f"belongs to another configuration (lr {resolve({}).lr}, now 0.1)" in said
    said = refused(half.parent, capsys, small("--out", "half", "--resume", "--seeds", "2"))
    assert "belongs to another configuration (seeds 1, now 2)" in said


def damage(path: Path, how: str) -> None:
    whole = bytearray(path.read_bytes())
    if how == "truncated":
        whole = whole[: len(whole) // 2]
    elif how == "flipped":
        whole[-len(whole) // 3] ^= 16
    path.write_bytes(whole if how != "emptied" else b"")


@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied"])
def test_corrupted_checkpoint(half: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    damage(half / CHECKPOINT, how)
    said = refused(half.parent, capsys, ["--resume", "--out", "half"])
    assert f"checkpoint {Path('half') / CHECKPOINT} is damaged" in said


def test_corrupted_config(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = half / CONFIG
    whole = json.loads(path.read_text())

    def with_setting(name: str, value: object) -> str:
        return json.dumps({**whole, "config": {**whole["config"], name: value}})

    for text, message in (
        (path.read_text()[:-9], "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is not of this version"),
        (with_setting("kk", 3), "is not of this version"),
        (with_setting("k", "3"), "-k 3 must be of type int"),
        (with_setting("k", 4), "of another run"),
        (json.dumps({**whole, "seeds": "2"}), "of this version (seeds 2)"),
    ):
        path.write_text(text)
        assert message in refused(half.parent, capsys, ["--resume", "--out", "half"])


@pytest.mark.parametrize(("file", "text"), [(METRICS, ""), (METRICS, "1\n"), (SUMMARY, "{}")])
def test_damaged_end(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, text: str
) -> None:
    assert train.main(small("--out", "r", "--quiet")) == 0
    (folder / "r" / file).write_text(text)
    said = refused(folder, capsys, ["--out", "r", "--resume", "--quiet"])
    assert f"{Path('r') / file} is damaged" in said


@pytest.mark.parametrize("how", ["NUL", "flipped", "truncated"])
def test_corrupted_log(half: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    log = half / METRICS
    if how == "NUL":
        log.write_bytes(bytes(log.stat().st_size))
    else:
        damage(log, how)
    said = refused(half.parent, capsys, ["--resume", "--out", "half"])
    assert f"{Path('half') / METRICS} is damaged" in said


@pytest.mark.parametrize("logs", [[], [{}], [{"bytes": 0, "crc32": "0"}] * 2, 3])
def test_sealed_checkpoint_of_other_logs(
    half: Path, capsys: pytest.CaptureFixture[str], logs: object
) -> None:
    tensors, state = load_checkpoint(half / CHECKPOINT, CPU)
    save_checkpoint(half / CHECKPOINT, tensors, {**state, "logs": logs})
    assert "is not of this model" in refused(half.parent, capsys, ["--resume", "--out", "half"])
    save_checkpoint(half / CHECKPOINT, tensors, [])  # type: ignore[arg-type]
    assert "is damaged" in refused(half.parent, capsys, ["--resume", "--out", "half"])


@pytest.mark.usefixtures("no_figures")
def test_moved_features_are_found_again(half: Path) -> None:
    """Once named, --resume alone finds them."""
    Path("f.npz").rename("g.npz")
    arguments = small("--out", "half", "--resume", "--quiet")
    arguments[arguments.index("f.npz")] = "g.npz"
    assert train.main(arguments) == 0
    assert train.main(["--out", "half", "--resume", "--quiet"]) == 0


def test_nothing_to_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent holds no run" in refused(folder, capsys, ["--resume", "--out", "absent"])


@pytest.mark.usefixtures("no_figures")
def test_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each file in turn is the one that does not fit; with room the run goes on as if never ended.

    A limit on the size of files stands for the full disk: the system refuses the write.
    """
    assert train.main(small("--out", "expected", "--quiet")) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    for size in (100, 2000, 8000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert train.main(small("--out", "full", "--quiet", "--resume")) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        printed, said = capsys.readouterr()
        assert printed == ""
        assert said.startswith(f"error: {os.strerror(errno.EFBIG)} (full")
        assert said.count("\n") == 1
    assert train.main(small("--out", "full", "--quiet", "--resume")) == 0
    assert (folder / "full" / METRICS).read_bytes() == (folder / "expected" / METRICS).read_bytes()


def test_subprocess_gives_one_line(folder: Path) -> None:
    """Nothing else speaks on stderr: no warning of a library, no traceback."""
    Path("trap.npz").write_bytes(b"\x80\x04cos\nmkdir\n(X\x06\x00\x00\x00brokentR.")
    done = subprocess.run(
        [sys.executable, "-m", "ssd.train", *small("--features", "trap.npz")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --features trap.npz cannot be read")
    assert {p.name for p in folder.iterdir()} == {"f.npz", "trap.npz"}


def test_a_run_and_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(small(*PAPER_TERM)) == 0
    printed, said = capsys.readouterr()
    assert said.startswith("note: the hidden term hardly acts: its gradient has ")
    assert said.endswith("use --hidden-loss mse\n")
    assert "task 2/2: loss" in printed
    assert re.search(r"\nin context: chance 0\.250, nearest class mean 1\.000\n", printed)
    assert "after task" in printed
    out = folder / "runs" / "f-ssd+ewc-seed0"
    assert printed.splitlines()[-1].startswith("features ssd+ewc  mean accuracy 0.")
    assert printed.splitlines()[-1].endswith("-> runs/f-ssd+ewc-seed0")
    assert {file.name for file in out.glob("*.png")} == {
        "accuracy_over_time.png",
        "accuracy_matrix.png",
        "activation_heatmap.png",
        "entropy_histogram.png",
        "structure_coverage.png",
        "structure_transfer.png",
    }
    before = content(out)
    assert train.main(small("--quiet")) == 0
    assert (folder / "runs" / "f-ssd+ewc-seed0-2" / SUMMARY).is_file()
    assert content(out) == before
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.usefixtures("no_figures")
def test_the_line_of_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nearest class mean of the classes' means, and the best joint run on the same data."""
    with np.load("f.npz") as arrays:
        noisy = dict(arrays)
    for name in ("x_train", "x_test"):
        noisy[name] = noisy[name] + 3 * np.random.default_rng(0).random(noisy[name].shape)
        noisy[name] = noisy[name].astype(np.float32)
    np.savez("f.npz", **noisy)
    x, y, x_test, y_test = (noisy[n] for n in ("x_train", "y_train", "x_test", "y_test"))
    means = np.stack([x[y == label].mean(0) for label in range(4)])
    nearest = ((x_test[:, None] - means) ** 2).sum(2).argmin(1)
    parts = [(nearest == y_test)[(y_test == a) | (y_test == b)] for a, b in ((0, 1), (2, 3))]
    assert min(p.mean() for p in parts) < 1
    expected = (
        f"in context: chance 0.250, nearest class mean {np.mean([p.mean() for p in parts]):.3f}"
    )
    assert train.main(small("--method", "joint")) == 0
    summary = json.loads((folder / "runs" / "f-joint-seed0" / SUMMARY).read_text())
    joint = summary["mean_accuracy"]
    assert train.main(small("--method", "joint", "--validation", "0.5", "--out", "runs/v")) == 0
    (folder / "runs" / "broken").mkdir()
    (folder / "runs" / "broken" / SUMMARY).write_text("{}")
    capsys.readouterr()
    assert train.main(small("--method", "sdmlp")) == 0
    assert f"\n{expected}, joint training {joint:.3f}\n" in capsys.readouterr().out
    assert train.main(small("--method", "sdmlp", "--out", "elsewhere/run")) == 0
    assert f"\n{expected}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ([None, 0.001, 0.003], "its gradient has 4e-03 of the cross entropy's norm"),
        ([None, 0.01, 0.03], ""),
        ([None, None, None], ""),
    ],
)
def test_a_dead_hidden_term_is_named(hidden: list[float | None], said: str) -> None:
    summary = {"hidden_gradient": hidden, "cross_entropy_gradient": [0.5, 0.5, 0.5]}
    found = train.dead_term(summary)
    assert said in found
    assert bool(found) == bool(said)


@pytest.mark.usefixtures("no_figures")
def test_quiet_is_one_line_however_long_the_path(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "[red]" + 100 * "x"
    assert train.main(small("--quiet", "--out", out)) == 0
    printed, said = capsys.readouterr()
    assert printed.count("\n") == 1
    assert printed.endswith(f"-> {out}\n")
    assert said == ""


@pytest.mark.usefixtures("no_figures")
def test_resume_from_the_folder_alone(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(small("--out", "whole", "--quiet")) == 0
    assert train.main(["--resume", "--out", "half", "--quiet", "--device", "cpu"]) == 0
    whole, resumed = (
        json.loads((half.parent / n / SUMMARY).read_text()) for n in ("whole", "half")
    )
    assert resumed["accuracy_matrix"] == whole["accuracy_matrix"]
    assert resumed["config"] == whole["config"]
    assert (half / METRICS).read_bytes() == (half.parent / "whole" / METRICS).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_features_that_were_moved(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run goes on with the same data by another name, and not with others by the same."""
    Path("f.npz").rename("g.npz")
    moved = ["--features", "g.npz", *SMALL, "--out", "half", "--resume", "--quiet"]
    assert train.main(moved) == 0
    (half / SUMMARY).unlink()
    write_features(Path("g.npz"), 260)
    assert "(data_crc32 " in refused(half.parent, capsys, moved)


@pytest.mark.usefixtures("no_figures")
def test_resume_without_out_takes_the_last_folder(folder: Path) -> None:
    for _ in range(2):
        assert train.main(small("--quiet")) == 0
    before = content(folder / "runs" / "f-ssd+ewc-seed0")
    (folder / "runs" / "f-ssd+ewc-seed0-2" / SUMMARY).unlink()
    assert train.main(small("--quiet", "--resume")) == 0
    assert (folder / "runs" / "f-ssd+ewc-seed0-2" / SUMMARY).is_file()
    assert content(folder / "runs" / "f-ssd+ewc-seed0") == before
    assert len(list((folder / "runs").iterdir())) == 2


@pytest.mark.usefixtures("no_figures")
def test_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(small("--seeds", "3", "--seed", "1", "--out", "s")) == 0
    printed = capsys.readouterr().out
    assert "mean_accuracy" in printed
    aggregate = json.loads((folder / "s" / SUMMARY).read_text())
    singles = [json.loads((folder / "s" / f"seed{i}" / SUMMARY).read_text()) for i in (1, 2, 3)]
    assert aggregate["seeds"] == [1, 2, 3]
    for measure in ("mean_accuracy", "bwt", "forgetting"):
        values = [single[measure] for single in singles]
        assert aggregate[measure]["values"] == values
        assert aggregate[measure]["mean"] == pytest.approx(np.mean(values))
        assert aggregate[measure]["std"] == pytest.approx(np.std(values, ddof=1))
    orders = {str(single["classes_per_task"]) for single in singles}
    assert len(orders) > 1
    mean, std = (aggregate["mean_accuracy"][key] for key in ("mean", "std"))
    assert f"mean accuracy {mean:.4f} ± {std:.4f}" in printed
    assert "(± std of 3 seeds)" in printed
    assert "already holds a run" in refused(folder, capsys, small("--seeds", "3", "--out", "s"))
    (folder / "s" / SUMMARY).unlink()
    (folder / "s" / "seed3" / SUMMARY).unlink()
    assert train.main(["--resume", "--out", "s", "--quiet"]) == 0
    again = json.loads((folder / "s" / SUMMARY).read_text())
    assert again["mean_accuracy"] == aggregate["mean_accuracy"]


@pytest.mark.usefixtures("no_figures")
def test_interrupt_while_figures_are_drawn_is_not_lost(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the figures of a finished seed are drawn."""
    drawn: list[Path] = []
    monkeypatch.setattr(train, "draw", lambda f: (drawn.append(f), os.kill(os.getpid(), 2)))
    assert train.main(small("--seeds", "3", "--out", "s", "--quiet")) == 130
    assert [path.name for path in drawn] == ["seed0"]
    assert "--out s --resume" in capsys.readouterr().err
    monkeypatch.setattr(train, "draw", drawn.append)
    assert train.main(["--out", "s", "--resume", "--quiet"]) == 0
    assert [path.name for path in drawn[1:]] == ["seed0", "seed1", "seed2"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    few = tmp_path_factory.mktemp("few") / "mnist_5k.npz"
    images = np.random.default_rng(0).integers(0, 256, (200, 784), dtype=np.uint8)
    np.savez(few, x=images, y=np.arange(200) % 10)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("ssd.data.MNIST_5K", few)


@pytest.mark.usefixtures("offline", "no_figures")
def test_subset_is_labelled_everywhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--neurons", "32", "-k", "3", "--epochs", "1", "--anneal-samples", "30"]
    assert train.main(["--dataset", "mnist", "--device", "cpu", *arguments]) == 0
    printed, said = capsys.readouterr()
    assert said.count("\n") == 1
    assert said.startswith("note: MNIST is neither in ")
    assert "mnist-5k" in said
    out = folder / "runs" / "mnist-5k-ssd-seed0"
    described = json.loads((out / CONFIG).read_text())
    summary = json.loads((out / SUMMARY).read_text())
    assert described["data"] == described["config"]["dataset"] == "mnist-5k"
    assert summary["dataset"] == summary["config"]["dataset"] == "mnist-5k"
    assert "ssd on mnist-5k" in printed
    assert printed.splitlines()[-1].startswith("mnist-5k ssd ")
    assert train.main(["--resume", "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("offline")
def test_strict_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data").mkdir()
    assert train.main(["--dataset", "mnist", "--strict-data"]) == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1)
    assert said.startswith("error: mnist is neither in ")
    assert "no route to host" in said
    assert not (folder / "runs").exists()


def test_subset_has_settings_of_its_own() -> None:
    given = {"dataset": "mnist", "lr": 0.1}
    own = {**given, "dataset": "mnist-5k", "preset": "paper-1k"}
    subset = resolve(own)
    assert subset.anneal_samples == preset("paper-1k", "mnist-5k")["anneal_samples"]
    assert resolve({**given, "preset": "paper-1k"}).anneal_samples != subset.anneal_samples
    assert resolve({**own, "anneal_samples": 3}).anneal_samples == 3
    assert subset.lr == 0.1


@pytest.mark.usefixtures("no_figures")
def test_hints_are_one_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-k", "1", "--anneal-samples", "257", *PAPER_TERM, "--quiet")
    assert train.main(small(*options)) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("note: a subnetwork of one neuron has nothing to distil")
    assert said[1].startswith("note: --anneal-samples 257 is more than the 256 that the first task")
    assert len(said) == 2


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m ssd.train [options]"
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for option in ("--dataset NAME", "--epochs N", "-k N", "--lr X", "--out DIR", "--resume"):
        assert option in text
    assert "--order-seed N seed of the class order; 0: in order (default --seed)" in " ".join(
        text.split()
    )


def test_every_setting_has_an_option() -> None:
    known = set(vars(train.build_parser().parse_args(small("--features", "f"))))
    destinations = {action.dest for action in train.build_parser()._actions}
    assert set(Config().to_dict()) <= destinations
    assert known <= destinations
    given = resolve(vars(train.build_parser().parse_args(small("--order-seed", "3"))))
    assert (given.seed, given.order_seed, given.weight_seed) == (0, 3, None)


def test_progress_bar(folder: Path) -> None:
    """On a terminal: task, epoch, loss, accuracy so far, time left."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    config = resolve(vars(train.build_parser().parse_args(small())))
    data = load("features", folder, Path("f.npz"))
    with Display(console) as display:
        run(config, data, folder / "r", RunOptions(CPU, watch=watcher(display)))
    last = stream.getvalue().split("\r")[-1]
    assert "task 2/2: loss " in last
    assert " accuracy 0." in last
    assert "100%" in last
    assert "left" in last
    assert describe(config, data)["data"] == "features"
