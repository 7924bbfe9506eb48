"""Studies on executors: equal to runs in this process, whatever happens to the workers."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_resume
import pytest
import torch
from rich.console import Console

from ssd import executors, study, sweep
from ssd.data import Dataset, load
from ssd.errors import Interrupted, UserError
from ssd.executors import EXECUTORS, RayExecutor, SubmititExecutor, executor_maker
from ssd.peers.__main__ import main as peers
from ssd.progress import Display
from ssd.reproduce import experiments
from ssd.reproduce.lines import runs_of
from ssd.runs import RunOptions, run
from ssd.storage.link import Link, alive
from ssd.storage.lock import LOCK
from ssd.storage.run_folder import METRICS
from ssd.study import Run, Study
from tests.ssd.test_together import SMALL

CPU = torch.device("cpu")
EXACT = ("accuracy_matrix", "bwt", "mean_active", "config")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
needs_submitit = pytest.mark.skipif(
    find_spec("submitit") is None, reason="submitit is not installed"
)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    kill_resume.write_features(tmp_path / "f.npz", 256)
    return load("features", tmp_path, tmp_path / "f.npz")


def study_runs(data: Dataset, root: Path, **changed: Any) -> list[Run]:
    """Two programs, of two and one runs."""
    configs = [replace(SMALL, seed=0), replace(SMALL, seed=1), replace(SMALL, k=2)]
    return [Run(f"run {n}", replace(c, **changed), data, root) for n, c in enumerate(configs)]


def train(runs: list[Run], executor: Executor, stopped: Callable[[], bool] = lambda: False) -> None:
    Study(runs, CPU, Display(Console(), quiet=True), executor=executor).train(runs, stopped)


def require_equal_to_single_runs(runs: list[Run], folder: Path) -> None:
    for number, each in enumerate(runs):
        single = run(each.config, each.data, folder / f"single{number}", RunOptions(CPU))
        summary = each.outcome() or {}
        assert {name: single[name] for name in EXACT} == {name: summary[name] for name in EXACT}
        logs = [place / METRICS for place in (folder / f"single{number}", each.folder)]
        assert logs[0].read_text() == logs[1].read_text()
    root = runs[0].root
    left = {path.name for path in root.iterdir() if path.is_file()}
    assert left == set()  # no checkpoint, no data, no word of a study to its workers


@contextmanager
def pool(kind: str, folder: Path) -> Iterator[Executor]:
    """Two workers of a kind."""
    if kind == "threads":
        executor: Executor = ThreadPoolExecutor(2)
    elif kind == "processes":
        executor = ProcessPoolExecutor(2, get_context("spawn"))
    elif kind == "ray":
        executor = RayExecutor({"num_cpus": 1})
    else:
        executor = SubmititExecutor(folder / "jobs", "local", {"timeout_min": 5})
    with executor:
        yield executor


KINDS = [
    "threads",
    "processes",
    pytest.param("ray", marks=needs_ray),
    pytest.param("slurm", marks=needs_submitit),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine with two workers."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _cluster(request: pytest.FixtureRequest) -> None:
    name = request.node.name
    if "[ray]" in name or name.startswith("test_ray"):
        request.getfixturevalue("cluster")


@pytest.mark.parametrize("kind", KINDS)
def test_runs_equal_those_of_this_process(kind: str, data: Dataset, tmp_path: Path) -> None:
    runs = study_runs(data, tmp_path / "runs")
    with pool(kind, tmp_path) as executor:
        train(runs, executor)
    require_equal_to_single_runs(runs, tmp_path)


def test_a_study_that_is_done_trains_nothing(data: Dataset, tmp_path: Path) -> None:
    runs = study_runs(data, tmp_path / "runs")
    with ThreadPoolExecutor(2) as executor:
        train(runs, executor)
        executor.submit = pytest.fail  # type: ignore[method-assign]
        train(runs, executor)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_save_when_stopped(kind: str, data: Dataset, tmp_path: Path) -> None:
    runs = study_runs(data, tmp_path / "runs", epochs=3000)

    def trains() -> bool:
        """Whether some worker has logged an epoch."""
        logs = [each.folder / METRICS for each in runs]
        return any(log.is_file() and log.stat().st_size for log in logs)

    with pool(kind, tmp_path) as executor, pytest.raises(Interrupted):
        train(runs, executor, trains)
    files = {path.suffix for path in (tmp_path / "runs").iterdir() if path.is_file()}
    assert files == {".safetensors"}  # checkpoints alone
    names = [path.name for path in (tmp_path / "runs").iterdir() if path.is_file()]
    assert all(name.startswith("together-") for name in names)
    assert trains()
    assert any(each.outcome() is None for each in runs)


def worker(folder: Path) -> int:
    """The process that trains a run, once it has logged something."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        log, lock = folder / METRICS, folder / LOCK
        if log.is_file() and log.stat().st_size and lock.is_file() and lock.read_text():
            return int(lock.read_text())
        time.sleep(0.01)
    raise AssertionError(f"no worker in {folder}")


@needs_ray
def test_ray_repeats_what_a_killed_worker_did(data: Dataset, tmp_path: Path) -> None:
    runs = study_runs(data, tmp_path / "runs", epochs=100)
    killed = []

    def kill() -> None:
        killed.append(worker(runs[0].folder))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pool("ray", tmp_path) as executor:
        train(runs, executor)
    killer.join()
    assert killed[0] != os.getpid()
    require_equal_to_single_runs(runs, tmp_path)


@needs_submitit
def test_submitit_repeats_a_preempted_job(data: Dataset, tmp_path: Path) -> None:
    runs = study_runs(data, tmp_path / "runs", epochs=100)
    # The signal that Slurm sends before it takes the node away.
    preempt = threading.Thread(target=lambda: os.kill(worker(runs[0].folder), signal.SIGUSR2))
    preempt.start()
    with pool("slurm", tmp_path) as executor:
        train(runs, executor)
    preempt.join()
    logs = [path.read_text() for path in (tmp_path / "jobs").glob("*.out")]
    assert any("Requeued job" in log for log in logs)
    require_equal_to_single_runs(runs, tmp_path)


@pytest.mark.parametrize("kind", ["processes", pytest.param("slurm", marks=needs_submitit)])
def test_a_worker_that_dies_ends_the_study_in_one_line(
    kind: str, data: Dataset, tmp_path: Path
) -> None:
    runs = study_runs(data, tmp_path / "runs", epochs=100)
    killer = threading.Thread(target=lambda: os.kill(worker(runs[0].folder), signal.SIGKILL))
    killer.start()
    with (
        pool(kind, tmp_path) as executor,
        pytest.raises(UserError, match=r"a worker died while it worked on run . \(.*\); the same"),
    ):
        train(runs, executor)
    killer.join()
    with pool(kind, tmp_path) as executor:
        train(runs, executor)
    require_equal_to_single_runs(runs, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_a_worker_keep_their_kind(kind: str, data: Dataset, tmp_path: Path) -> None:
    runs = study_runs(data, tmp_path / "runs")[:1]
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "letter.txt").write_text("not a run's")
    with pool(kind, tmp_path) as executor, pytest.raises(UserError, match="is not the folder of"):
        train(runs, executor)


class Queued:
    """A job that Slurm does not start."""

    state = "PENDING"

    def __init__(self, folder: Path) -> None:
        self.cancelled = 0
        self.paths = SimpleNamespace(stdout=folder / "log")

    def done(self) -> bool:
        return False

    def cancel(self, check: bool) -> None:
        self.cancelled += 1


@needs_submitit
def test_jobs_that_wait_are_cancelled(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, jobs = study_runs(data, tmp_path / "runs"), [Queued(tmp_path), Queued(tmp_path)]
    left = iter(jobs)
    with SubmititExecutor(tmp_path / "jobs", "local", {}) as executor:
        monkeypatch.setattr(executor._executor, "submit", lambda *_: next(left))
        with pytest.raises(Interrupted):
            train(runs, executor, iter([False] * 4 + [True]).__next__)
        end = time.monotonic() + 10
        while executor._jobs and time.monotonic() < end:
            time.sleep(0.01)
    assert [job.cancelled for job in jobs] == [1, 1]
    assert list((tmp_path / "runs").iterdir()) == []


class Strange(Queued):
    """A job whose result submitit does not return."""

    def done(self) -> bool:
        return True

    def result(self) -> None:
        raise AssertionError("several tasks")


@needs_submitit
def test_what_submitit_cannot_do_ends_the_study(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SubmititExecutor(tmp_path / "jobs", "local", {}) as executor:
        monkeypatch.setattr(executor._executor, "submit", lambda *_: Strange(tmp_path))
        with pytest.raises(UserError, match=r"a worker died .* \(several tasks\)"):
            train(study_runs(data, tmp_path / "runs"), executor)


def test_a_worker_on_another_machine_hears_the_study(tmp_path: Path) -> None:
    """The clock of a machine that started later shows less."""
    with alive(tmp_path) as file:
        link = Link(file, tmp_path / "together.safetensors")
        link.look.seconds = link.tell.seconds = 3600.0
        assert not link.is_stopped()
        link.report("here", 1, 2)
        again = pickle.loads(pickle.dumps(link))
    assert again.is_stopped()
    link.clear()
    again.report("there", 1, 2)
    assert link.position() == ("there", 1, 2)


@needs_submitit
def test_a_refused_job_is_told(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from submitit.core.utils import FailedJobError

    def refuse(*_: Any) -> None:
        raise FailedJobError("sbatch: error: invalid partition specified: moon")

    with SubmititExecutor(tmp_path / "jobs", "local", {}) as executor:
        monkeypatch.setattr(executor._executor, "submit", refuse)
        with pytest.raises(UserError, match=r"refuses the job \(sbatch: .* moon\); see --job"):
            train(study_runs(data, tmp_path / "runs"), executor)


@needs_ray
def test_ray_refuses_before_it_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"--on ray: .*colour"),
        executor_maker("ray", ["colour=1"])(tmp_path, CPU),
    ):
        pass


def test_a_worker_without_the_device_says_so(data: Dataset, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    runs = study_runs(data, tmp_path / "runs")
    with ThreadPoolExecutor(1) as executor:
        display = Display(Console(), quiet=True)
        on_cuda = Study(runs, torch.device("cuda"), display, executor=executor)
        with pytest.raises(UserError, match="--device cuda is not on"):
            on_cuda.train(runs, lambda: False)


class Elsewhere(Executor):
    """A worker that writes on a disk of its own."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(None)
        return done


def test_results_out_of_sight_are_told(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "UNSEEN", 0.0)
    monkeypatch.setattr(study, "LOOK", 0.01)
    runs = study_runs(data, tmp_path / "runs")
    with pytest.raises(UserError, match="cannot be seen from here; use a folder that all machines"):
        train(runs, Elsewhere())


def test_every_row_of_a_reproduction_can_travel(data: Dataset, tmp_path: Path) -> None:
    features = {benchmark.name: "f.npz" for benchmark in experiments.BENCHMARKS}
    rows = {row for result in experiments.RESULTS.values() for row in result.rows(True, features)}
    evaluated = 0
    for row in rows:
        for each in runs_of(row, data, tmp_path):
            make = partial(Run, each.name, each.config, root=each.root, evaluation=each.evaluation)
            assert pickle.loads(pickle.dumps(make))(data=data).folder == each.folder
            evaluated += each.evaluation is not None
    assert evaluated > 10


SWEEP = """
features = "f.npz"
[base]
tasks = 2
neurons = 32
k = 3
epochs = 2
anneal_samples = 150
validation = 0.25
[grid]
method = ["sdmlp", "ewc"]
"""


@needs_submitit
def test_a_sweep_on_jobs_has_the_same_table(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(SWEEP)
    tables = []
    for number, where in enumerate([[], ["--on", "slurm", "--job", "cluster=local"]]):
        out = f"out{number}"
        assert sweep.main(["s.toml", "--device", "cpu", "--out", out, *where]) == 0
        tables.append(list(csv.DictReader(Path(out, "sweep.csv").read_text().splitlines())))
    for rows in tables:
        for row in rows:
            del row["seconds"]
    assert tables[0] == tables[1]
    assert Path("out1/slurm").is_dir()


@needs_submitit
@pytest.mark.parametrize("hits", [1, 2])
def test_ctrl_c_of_a_terminal(hits: int, data: Dataset, tmp_path: Path) -> None:
    """It reaches every process of the terminal; the jobs save all the same."""
    (tmp_path / "s.toml").write_text(SWEEP.replace("epochs = 2", "epochs = 3000"))
    where = ["--device", "cpu", "--out", "out", "--on", "slurm", "--job", "cluster=local"]
    command = [sys.executable, "-m", "ssd.sweep", "s.toml", *where]
    study_of = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=kill_resume.ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while len(found := list((tmp_path / "out").glob("features-*"))) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        workers = [worker(folder) for folder in found]
        for _ in range(hits):
            os.killpg(study_of.pid, signal.SIGINT)
            time.sleep(0.2)
        said = study_of.communicate(timeout=60)[0]
    finally:
        study_of.kill()
    assert study_of.returncode == 130
    assert "interrupted; go on with: python -m ssd.sweep s.toml" in said
    for number in workers:  # those of a study that did not wait end by themselves
        while Path(f"/proc/{number}").exists():
            assert time.monotonic() < end + 60
            time.sleep(0.05)
    logs = [path.read_text() for path in (tmp_path / "out/slurm").glob("*.out")]
    assert len(logs) == 2
    assert all("Job completed successfully" in log for log in logs)


@needs_submitit
def test_peers_on_jobs_have_the_same_rows(data: Dataset, tmp_path: Path) -> None:
    command = ["--features", str(tmp_path / "f.npz"), "--tasks", "2", "--neurons", "20"]
    found = []
    for number, where in enumerate([[], ["--on", "slurm", "--job", "cluster=local"]]):
        out = tmp_path / f"peers{number}.csv"
        assert peers([*command, "--seeds", "1", "--out", str(out), *where]) == 0
        rows = list(csv.DictReader(out.read_text().splitlines()))
        keys = ("split", "learner", "settings", "seed", "mean_accuracy", "bwt", "state_mib")
        found.append({json.dumps([row[key] for key in keys]) for row in rows})
    assert found[0] == found[1]
    assert not list(tmp_path.glob("data-*"))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (["--on", "cloud"], "--on cloud is unknown; choose from processes, ray, slurm"),
        (["--job", "num_cpus=2"], "--job num_cpus=2 needs --on ray or slurm"),
        (["--on", "slurm", "--job", "gpus"], "--job gpus is not KEY=VALUE"),
        (["--on", "slurm", "--job", "=1"], "--job =1 is not KEY=VALUE"),
        (["--on", "slurm", "--device", "cuda:1"], "--device cuda:1 is a GPU of this machine; use"),
    ],
)
def test_mistakes_are_told_before_any_work(
    where: list[str],
    said: str,
    data: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(SWEEP)
    assert sweep.main(["s.toml", "--out", "out", *where]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    for name, (_, package) in EXECUTORS.items():
        with pytest.raises(UserError, match=rf"needs {package}: pip install .*\[{name}\]"):
            executor_maker(name, [])


@needs_submitit
@pytest.mark.parametrize("asked", ["cluster=moon", "colour=1"])
def test_what_submitit_refuses_is_told(asked: str, tmp_path: Path) -> None:
    make = executor_maker("slurm", [asked])
    with pytest.raises(UserError, match="--on slurm: "), make(tmp_path, CPU):
        pass


def test_peers_on_jobs_need_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers(["--on", "slurm"]) == 2
    assert "needs --out FILE" in capsys.readouterr().err


@needs_ray
@needs_submitit
def test_the_page_of_a_cluster_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    """Its commands without a GPU, each in a folder of its own."""
    page = (Path(__file__).parents[2] / "docs/cluster.md").read_text(encoding="utf-8")
    (sweep_file,) = re.findall(r"^```toml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    shown = [shlex.split(line)[2:] for line in re.findall(r"^ssd sweep .*", page, re.MULTILINE)]
    small = sweep_file.replace("epochs = 4", "epochs = 1").replace("seeds = 3", "seeds = 1")
    tables = []
    for number, command in enumerate(words for words in shown if "cuda" not in words):
        (tmp_path / f"{number}").mkdir()
        monkeypatch.chdir(tmp_path / f"{number}")
        Path("rates.toml").write_text(small)
        assert sweep.main([*command, "--device", "cpu"]) == 0
        rows = csv.DictReader(Path("runs/sweep-rates/sweep.csv").read_text().splitlines())
        tables.append([(row["method"], row["lr"], row["mean_accuracy"]) for row in rows])
    assert len(tables) == 2
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4
