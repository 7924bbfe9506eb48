"""python -m ssd.train: trains one method on one data set and reports it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from ssd.cli import (
    ArgumentParser,
    add_common,
    check_seeds,
    choose_device,
    command_line,
    exit_status,
    note,
    resumable,
    stop_on_interrupt,
)
from ssd.config import (
    DEFAULT_NETWORK,
    EVERYDAY,
    JOINT,
    PENALTIES,
    PRESETS,
    Config,
    option,
    penalty_settings,
    resolve,
)
from ssd.data import SOURCES, Dataset, default_root
from ssd.errors import Interrupted, UserError
from ssd.figures import draw
from ssd.page import write_report
from ssd.peers.learners import NearestClassMean, accuracies
from ssd.progress import Display, watcher
from ssd.runs import RunOptions, load_data, make_tasks, require_fit, run, run_together
from ssd.storage.files import read_json, write_json
from ssd.storage.lock import folder_lock
from ssd.storage.provenance import versions
from ssd.storage.run_folder import (
    CHECKPOINT,
    CONFIG,
    SUMMARY,
    claimed,
    describe,
    evaluated_on,
    read_summary,
)
from ssd.study import hints_for, measured
from ssd.tables import accuracy_table, plus_minus, seeds_table

# The settings that have an option of their own, by the group of --help that shows them.
GROUPS = {
    "data": "tasks validation",
    "run": "seed order_seed weight_seed",
    "method": "method alpha lam temperature hidden_loss hidden_weight selection subnetwork kl "
    "hidden logits frequency protection " + " ".join(penalty_settings(*PENALTIES)),
    "network": "neurons k inhibition center schedule anneal_samples",
    "training": "epochs batch_size lr momentum max_norm eval_every",
}
# Below this share of the cross entropy's gradient the hidden term does not act.
DEAD = 0.01
# How the command line reads and shows the types of settings.
KINDS = {"int": (int, "N"), "int | None": (int, "N"), "float": (float, "X"), "str": (str, None)}

# Options that a run may be resumed with: they do not change its numbers.
CONTROL = {"out", "resume", "device", "quiet", "data_root", "checkpoint_every", "strict_data"}


def build_parser() -> argparse.ArgumentParser:
    """The command line: the options of the command, then one for each setting of Config."""
    parser = ArgumentParser(
        prog="python -m ssd.train",
        usage="%(prog)s [options]",
        description="Train SDMLP / SSD on a class-incremental stream of tasks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The defaults shown are those of --preset everyday on MNIST.\n\n"
        "examples:\n"
        "  python -m ssd.train --dataset mnist --method ssd+ewc --seeds 3\n"
        "  python -m ssd.train --dataset features --features cifar10.npz --tasks 5\n"
        "  python -m ssd.train --out runs/mine --resume",
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    add = groups["data"].add_argument
    add("--dataset", metavar="NAME", help=f"{', '.join(SOURCES)} (default mnist)")
    add("--features", metavar="FILE", help=".npz or .pt, for --dataset features")
    add_common(add, "--data-root")
    add("--strict-data", action="store_true", help="no fallback to the MNIST subset")
    add = groups["run"].add_argument
    add("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default {EVERYDAY})")
    add("--out", metavar="DIR", type=Path, help="folder of the run (default runs/<name>)")
    add("--resume", action="store_true", help="go on with the run in the folder")
    add("--seeds", metavar="N", type=int, help="N runs with seeds seed, seed + 1, ..")
    add_common(add, "--device", "--checkpoint-every", "--quiet")
    settings, usual = {setting.name: setting for setting in fields(Config)}, resolve({})
    for title, names in GROUPS.items():
        for name in names.split():
            default, choices = getattr(usual, name), settings[name].metadata["choices"]
            kind, metavar = KINDS[str(settings[name].type)]
            shown = option("seed") if default is None else default
            groups[title].add_argument(
                option(name),
                type=kind,
                choices=choices,
                metavar=metavar,
                help=f"{settings[name].metadata['help']} (default {shown})",
            )
    return parser


def choose_folder(given: dict[str, Any], config: Config) -> Path:
    """--out, or the first free runs/<dataset>-<method>-seed<n>; with --resume the last in use."""
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
    """What was given, with the folder's settings if that is --resume and --out alone."""
    if not given.get("resume") or "out" not in given or not set(given) <= CONTROL:
        return given
    path = given["out"] / CONFIG
    if not path.is_file():
        raise UserError(f"{given['out']} holds no run to resume")
    recorded = read_json(path)
    try:
        settings = Config(**recorded["config"]).to_dict()
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not of this version ({error}); use another --out") from error
    seeds = recorded.get("seeds")
    if not isinstance(seeds, int):
        raise UserError(f"{path} is not of this version (seeds {seeds}); use another --out")
    return {**given, **settings, "seeds": seeds}


def train_one(config: Config, data: Dataset, folder: Path, options: RunOptions) -> dict[str, Any]:
    """Trains one run, draws its figures and writes its page; returns its summary."""
    summary = run(config, data, folder, options)
    with folder_lock(folder):
        draw(folder)
        write_report(folder)
    return summary


def train_seeds(
    config: Config, count: int, data: Dataset, folder: Path, options: RunOptions
) -> dict[str, Any]:
    """Trains seeds seed, seed + 1, .. side by side, each in its folder; returns their summary."""
    make_tasks(config, data)  # complains before there is a folder
    require_fit(config, data, count, options.device)
    configs = [replace(config, seed=seed) for seed in range(config.seed, config.seed + count)]
    folders = [folder / f"seed{config.seed}" for config in configs]
    with claimed(folder, describe(config, data, count), options.resume):
        # The folder is claimed, so the runs in it may be resumed.
        options = replace(options, resume=True)
        summaries = run_together(configs, data, folders, folder / CHECKPOINT, options)
        for seed_folder in folders:
            draw(seed_folder)
            write_report(seed_folder)
            if options.stopped():
                raise Interrupted
        aggregate = summarize_seeds(summaries, config)
        write_json(folder / SUMMARY, aggregate)
    return aggregate


def summarize_seeds(summaries: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """The summary of runs that differ only in their seed: mean and standard deviation."""
    measures = {}
    for measure in ("mean_accuracy", "bwt", "forgetting", "seconds"):
        values = [summary[measure] for summary in summaries]
        measures[measure] = {"mean": mean(values), "std": stdev(values), "values": values}
    return {
        "dataset": summaries[0]["dataset"],
        "method": config.method,
        "seeds": [summary["seed"] for summary in summaries],
        **measures,
        "device": summaries[0]["device"],
        "versions": versions(),
        "commit": ", ".join(sorted({summary["commit"] for summary in summaries})),
        "config": config.to_dict(),
    }


def execute(arguments: Sequence[str] | None) -> None:
    """Parses, checks, loads, trains and reports; nothing is written before all checks are done."""
    given = recorded_settings(vars(build_parser().parse_args(arguments)))
    config = resolve(given)
    config.validate()
    count = given.get("seeds", 1)
    check_seeds(count)
    control = {name: given[name] for name in ("resume", "checkpoint_every") if name in given}
    options = RunOptions(choose_device(given.get("device")), **control)
    if not options.checkpoint_every >= 0:
        raise UserError(f"--checkpoint-every {options.checkpoint_every} must be at least 0")
    root = given.get("data_root", default_root())
    data = load_data(config, root, strict=given.get("strict_data", False), notice=note)
    # The subset may replace MNIST: all files carry its name and its settings.
    config = resolve({**given, "dataset": data.name}, len(data.y_train))
    for hint in hints_for([config], data):
        note(hint)
    folder, console = choose_folder(given, config), Console()
    display = Display(console, given.get("quiet", False))
    place = ["--data-root", str(root)] if "data_root" in given else []
    again = command_line("ssd.train", ["--out", str(folder), *place, "--resume"])
    with resumable(f"go on with: {again}"), stop_on_interrupt() as stopped, display:
        options = replace(options, watch=watcher(display), stopped=stopped)
        if count == 1:
            summary = train_one(config, data, folder, options)
        else:
            summary = train_seeds(config, count, data, folder, options)
    if not display.quiet:
        console.print(seeds_table(summary) if count > 1 else accuracy_table(summary, console.width))
        print(context(config, data, folder))
        if hint := dead_term(summary):
            note(hint)
    print(f"{data.name} {config.method}  {result_line(summary)}  -> {folder}")


def context(config: Config, data: Dataset, folder: Path) -> str:
    """What to compare the mean accuracy with: chance, nearest class mean, joint runs beside it."""
    tasks = make_tasks(replace(config, method=DEFAULT_NETWORK), data)
    peer = NearestClassMean(data.x_train.shape[1], data.classes)
    for task in tasks:
        peer.fit_task(task.x_train, task.y_train)
    scores = peer.predict(torch.cat([task.x_test for task in tasks]))
    known = {
        "chance": 1 / data.classes,
        "nearest class mean": accuracies(scores, tasks).mean().item(),
    }
    joint = None if JOINT in config.parts else joint_accuracy(config, data, folder)
    known |= {} if joint is None else {"joint training": joint}
    return "in context: " + ", ".join(f"{name} {value:.3f}" for name, value in known.items())


def joint_accuracy(config: Config, data: Dataset, folder: Path) -> float | None:
    """The best accuracy of joint runs on these data in folders beside this one, if any."""
    found = []
    for path in sorted(folder.resolve().parent.glob(f"*/{SUMMARY}")):
        with suppress(UserError, KeyError, TypeError):  # what is no run says nothing
            summary = read_summary(path.parent)
            described = read_json(path.parent / CONFIG)["data_crc32"]
            same = described == data.checksum() and summary["evaluated_on"] == evaluated_on(config)
            if same and JOINT in summary["method"].split("+"):
                found.append(summary["mean_accuracy"])
    return max(found, default=None)


def dead_term(summary: Mapping[str, Any]) -> str:
    """A hint where the hidden term's gradient is lost beside that of the cross entropy, or ""."""
    hidden, entropy = (measured(summary, f"{t}_gradient") for t in ("hidden", "cross_entropy"))
    share = mean(hidden) / mean(entropy) if hidden and mean(entropy) > 0 else 1.0
    if share >= DEAD:
        return ""
    return (
        f"the hidden term hardly acts: its gradient has {share:.0e} of the cross entropy's norm; "
        f"raise {option('hidden_weight')} or use {option('hidden_loss')} mse"
    )


def result_line(summary: dict[str, Any]) -> str:
    """Mean accuracy and BWT of one run, or of several with their deviation."""
    if "seeds" not in summary:
        return f"mean accuracy {summary['mean_accuracy']:.4f}  BWT {summary['bwt']:+.4f}"
    texts = [
        f"{label} {plus_minus(summary[measure]['mean'], summary[measure]['std'])}"
        for label, measure in (("mean accuracy", "mean_accuracy"), ("BWT", "bwt"))
    ]
    return "  ".join(texts) + f"  (± std of {len(summary['seeds'])} seeds)"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of training; returns the exit status."""
    return exit_status(lambda: execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
