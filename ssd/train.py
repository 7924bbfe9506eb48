"""python -m ssd.train: trains one method on one data set and reports it."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from types import FrameType
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssd.checkpoint import write_atomically
from ssd.config import DATASETS, PRESETS, Config, preset
from ssd.data import Dataset, default_root, load
from ssd.errors import UserError
from ssd.report import accuracy_table, seeds_table, write_figures
from ssd.run import CONFIG, SUMMARY, Interrupted, RunOptions, commit, read_json, run, versions
from ssd.trainer import Event, Trainer

GROUPS = {
    "method": ("method", "alpha", "lam", "temperature", "subnetwork", "kl", "hidden", "logits",
               "frequency", "ewc_coefficient", "ewc_beta"),
    "network": ("neurons", "k", "inhibition", "schedule", "anneal_samples"),
    "training": ("epochs", "batch_size", "lr", "momentum", "max_norm", "eval_every"),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line: run control by hand, every setting of Config by itself."""
    parser = _Parser(
        prog="python -m ssd.train",
        description="Train SDMLP / SSD on a class-incremental stream of tasks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m ssd.train --dataset mnist --method ssd+ewc --seeds 3\n"
        "  python -m ssd.train --dataset features --features cifar10.npz --tasks 5\n"
        "  python -m ssd.train --out runs/mine --resume",
        argument_default=argparse.SUPPRESS,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)} (default mnist)")
    data.add_argument("--features", metavar="FILE", help=".npz or .pt, for --dataset features")
    data.add_argument(
        "--data-root", type=Path, help="folder of data sets (default $SSD_DATA or data)"
    )
    data.add_argument("--tasks", type=int, help="number of tasks (default: the paper's)")
    data.add_argument(
        "--validation", type=float, help="evaluate on this share of the training data"
    )
    data.add_argument("--strict-data", action="store_true", help="no fallback to the MNIST subset")
    control = parser.add_argument_group("run")
    control.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default quick)")
    control.add_argument("--out", type=Path, help="folder of the run (default runs/<name>)")
    control.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    control.add_argument(
        "--seed", type=int, help="initialisation, data order, class order (0: ordinal)"
    )
    control.add_argument(
        "--seeds", type=int, metavar="N", help="N runs with seeds seed, seed + 1, .."
    )
    control.add_argument("--device", help="cpu, cuda, cuda:1, .. (default: cuda if there is one)")
    control.add_argument("--checkpoint-every", type=float, metavar="SECONDS", help="default 30")
    control.add_argument("--quiet", action="store_true", help="print the result line alone")
    settings = {f.name: f for f in fields(Config)}
    defaults = Config()
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            default = getattr(defaults, name)
            group.add_argument(
                "-k" if name == "k" else f"--{name.replace('_', '-')}",
                type=type(default),
                choices=settings[name].metadata["choices"],
                metavar=None if settings[name].metadata["choices"] else name.upper()[:8],
                help=f"{settings[name].metadata['help']} ({default})",
            )
    return parser


def resolve(given: dict[str, Any]) -> Config:
    """The settings of a run: defaults, then the preset's, then what the command line names."""
    names = {f.name for f in fields(Config)}
    dataset = given.get("dataset", "features" if "features" in given else "mnist")
    settings = preset(given.get("preset", "quick"), dataset)
    settings |= {name: value for name, value in given.items() if name in names}
    return Config(**{**settings, "dataset": dataset})


def choose_device(name: str | None) -> torch.device:
    """The device to train on; UserError where it is not to be had."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(f"--device {name} is not on this machine; use --device cpu")
    return device


def choose_folder(given: dict[str, Any], config: Config) -> Path:
    """--out, or the first free runs/<dataset>-<method>-seed<n>; with --resume the last one used."""
    if "out" in given:
        return given["out"]
    data = Path(config.features).stem if config.features else config.dataset
    seeds = f"seeds{given['seeds']}" if given.get("seeds", 1) > 1 else f"seed{config.seed}"
    base = Path("runs") / f"{data}-{config.method}-{seeds}"
    folder, number, last = base, 1, None
    while folder.exists():
        number, last = number + 1, folder
        folder = base.with_name(f"{base.name}-{number}")
    return last if given.get("resume") and last is not None else folder


def recorded_settings(given: dict[str, Any]) -> dict[str, Any]:
    """With --resume --out and nothing else, the settings are those of the folder."""
    if not given.get("resume") or "out" not in given:
        return given
    control = {"out", "resume", "device", "quiet", "data_root", "checkpoint_every", "strict_data"}
    path = given["out"] / CONFIG
    if set(given) <= control and path.is_file():
        try:
            recorded = Config(**read_json(path)["config"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not of this version ({error}); use another --out"
            ) from error
        seeds = read_json(path).get("seeds", 1)
        return {**given, **recorded.to_dict(), "seeds": seeds}
    return given


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Ctrl-C sets a flag, so that a step is finished and saved; a second one interrupts at once."""
    flag: list[bool] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


class Display:
    """A progress bar fed by the trainer's events."""

    def __init__(self, console: Console, config: Config, quiet: bool) -> None:
        self.console, self.config = console, config
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.plain = not quiet and not console.is_terminal
        self.bar = self.progress.add_task("starting", total=None)
        self.loss = self.train = self.test = float("nan")

    def watch(self, trainer: Trainer, event: Event) -> None:
        per_epoch = [-(-len(t.y_train) // self.config.batch_size) for t in trainer.tasks]
        if event.kind == "epoch":
            self.loss, self.train = event.record["loss"], event.record["train_accuracy"]
            if "test_accuracy" in event.record:
                self.test = mean(event.record["test_accuracy"][: event.task + 1])
        if event.kind == "task" and self.plain:
            self.console.print(
                f"task {event.task + 1}/{self.config.tasks}: loss {self.loss:.3f}, "
                f"train accuracy {self.train:.3f}, accuracy so far {self.test:.3f}"
            )
        if event.kind == "step" and event.step % 10:
            return
        self.progress.update(
            self.bar,
            description=f"seed {self.config.seed}  task {event.task + 1}/{self.config.tasks}  "
            f"epoch {min(event.epoch + 1, self.config.epochs)}/{self.config.epochs}  "
            f"loss {self.loss:.3f}  train {self.train:.3f}  so far {self.test:.3f}",
            completed=trainer.steps,
            total=self.config.epochs * sum(per_epoch),
        )


def train_one(
    config: Config, data: Dataset, folder: Path, options: RunOptions, console: Console, quiet: bool
) -> dict[str, Any]:
    """One run with its display and figures."""
    display = Display(console, config, quiet)
    with stop_on_interrupt() as flag, display.progress:
        summary = run(config, data, folder, options, display.watch, lambda: bool(flag))
    write_figures(folder)
    return summary


def train_seeds(
    config: Config,
    count: int,
    data: Dataset,
    folder: Path,
    options: RunOptions,
    console: Console,
    quiet: bool,
) -> dict[str, Any]:
    """Runs with seeds seed, seed + 1, .. in folders of their own, and their mean and deviation."""
    described = {"config": config.to_dict(), "seeds": count}
    path = folder / CONFIG
    if path.is_file():
        before = read_json(path)
        if not options.resume:
            raise UserError(f"{folder} already holds a run; add --resume or use another --out")
        if {k: before.get(k) for k in described} != described:
            raise UserError(f"{folder} belongs to another configuration; use another --out")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not the folder of a run; use another --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        described |= {"versions": versions(), "commit": commit()}
        write_atomically(path, json.dumps(described, indent=2) + "\n")
    summaries = []
    for seed in range(config.seed, config.seed + count):
        single = Config(**{**config.to_dict(), "seed": seed})
        summaries.append(train_one(single, data, folder / f"seed{seed}", options, console, quiet))
    aggregate = {
        "dataset": data.name,
        "method": config.method,
        "seeds": [s["seed"] for s in summaries],
        **{
            measure: {
                "mean": mean(s[measure] for s in summaries),
                "std": stdev([s[measure] for s in summaries]),
                "values": [s[measure] for s in summaries],
            }
            for measure in ("mean_accuracy", "bwt", "forgetting", "seconds")
        },
        "device": summaries[0]["device"],
        "versions": versions(),
        "commit": commit(),
        "config": config.to_dict(),
    }
    write_atomically(folder / SUMMARY, json.dumps(aggregate, indent=2) + "\n")
    return aggregate


def execute(arguments: Sequence[str] | None) -> None:
    """Parses, checks, loads, trains and reports; nothing is written before all checks are done."""
    given = recorded_settings(vars(build_parser().parse_args(arguments)))
    config = resolve(given)
    config.validate()
    count, quiet = given.get("seeds", 1), given.get("quiet", False)
    if count < 1:
        raise UserError(f"--seeds {count} must be at least 1")
    options = RunOptions(
        choose_device(given.get("device")),
        given.get("resume", False),
        given.get("checkpoint_every", 30.0),
    )
    console, notices = Console(), Console(stderr=True, soft_wrap=True)
    features = Path(config.features) if config.features else None
    root = given.get("data_root", default_root())
    data = load(
        config.dataset, root, features, given.get("strict_data", False),
        lambda line: notices.print(f"note: {line}", style="yellow"),
    )  # fmt: skip
    if data.name != config.dataset:
        # The subset stands in: everything that is written bears its name and its settings.
        config = resolve({**given, "dataset": data.name})
    if "ssd" in config.parts and config.lam > 0 and round(config.subnetwork * config.k) < 2:
        notices.print("note: a subnetwork of one neuron has nothing to distil; use --subnetwork 2")
    folder = choose_folder(given, config)
    try:
        if count == 1:
            summary = train_one(config, data, folder, options, console, quiet)
            result = f"mean accuracy {summary['mean_accuracy']:.4f}  BWT {summary['bwt']:+.4f}"
            table = accuracy_table(summary)
        else:
            summary = train_seeds(config, count, data, folder, options, console, quiet)
            result = "  ".join(
                f"{label} {summary[m]['mean']:.4f} ± {summary[m]['std']:.4f}"
                for label, m in (("mean accuracy", "mean_accuracy"), ("BWT", "bwt"))
            )
            table = seeds_table(summary)
    except (Interrupted, KeyboardInterrupt):
        notices.print(f"interrupted; go on with: python -m ssd.train --out {folder} --resume")
        raise
    if not quiet:
        console.print(table)
    console.print(f"{data.name} {config.method}  {result}  -> {folder}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake of the user's (one line on stderr), 130 interrupted."""
    try:
        execute(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; use another --out", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
