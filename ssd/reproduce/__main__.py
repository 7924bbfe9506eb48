"""python -m ssd.reproduce: from data to the paper's tables and figures.

Each run lies in a folder named by its settings, so the same command goes on where it was stopped,
and results that share runs train them once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ssd.cli import (
    SETTINGS,
    ArgumentParser,
    check_folder,
    choose_device,
    command_line,
    exit_status,
    in_words,
    note,
    resumable,
    reword,
    stop_on_interrupt,
)
from ssd.config import hints
from ssd.data import default_root
from ssd.errors import Interrupted, UserError
from ssd.figures import save_figure
from ssd.reproduce import experiments
from ssd.reproduce.campaign import Campaign, Job, batches, load_benchmarks
from ssd.reproduce.claims import verdicts
from ssd.reproduce.command_record import COMMANDS, CommandRecord
from ssd.reproduce.display import CampaignDisplay
from ssd.reproduce.experiments import RESULTS, Row
from ssd.reproduce.figures import draw
from ssd.reproduce.lines import NOT_RUN, Line
from ssd.reproduce.tables import (
    csv_text,
    doubts,
    markdown_text,
    provenance,
    records,
    rich_table,
    task_records,
)
from ssd.run import RunOptions, make_tasks
from ssd.storage.files import write_atomically
from ssd.storage.lock import folder_lock
from ssd.storage.provenance import device_name
from ssd.study import processes_for, train_all

ALL = "all"
# What library code calls --out is the folder of a run.
WORDS = {**SETTINGS, "--out": "--runs"}
# Encoder weights up to which several processes share the work, R = 10,000 with d = 784 among them;
# larger ones would push one another out of the cache, and one process uses all cores with them.
SMALL = 2**23
# Runs of a batch where several processes share the work.
SIDE_BY_SIDE = 3


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.reproduce",
        description="Train what the paper's tables and figures need and is not there yet, and "
        "write them. The same command goes on with what was interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m ssd.reproduce all --short\n"
        "  python -m ssd.reproduce table1 bwt --only cifar10 10000 sdmlp ssd ssd+ewc",
    )
    add = parser.add_argument
    add("results", metavar="RESULT", nargs="*", default=[ALL],
        help=f"{', '.join(RESULTS)} or {ALL} (default)")  # fmt: skip
    add("--short", action="store_true", help="scaled down: minutes on a CPU; not the protocol")
    add("--large", action="store_true",
        help="with --short: five class orders in place of two at R = 10,000")  # fmt: skip
    add("--out", metavar="DIR", type=Path,
        help="tables and figures (default results/reproduction, with --short "
        "results/reproduction-short)")  # fmt: skip
    add("--runs", metavar="DIR", type=Path, default=Path("runs/reproduction"),
        help="folders of the runs (default runs/reproduction)")  # fmt: skip
    add("--data-root", metavar="DIR", type=Path, help="data sets (default $SSD_DATA or data)")
    add("--features-folder", metavar="DIR", type=Path,
        help="feature files (default features in the data's folder)")  # fmt: skip
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, .. (default cuda if there is one)")
    add("--only", metavar="NAME", nargs="+", default=[],
        help="train only these benchmarks, sizes, methods or ablated factors; the tables still "
        "show every run that exists")  # fmt: skip
    return parser


@dataclass(frozen=True)
class Selection:
    """What --only lets be trained; an empty set lets all pass."""

    benchmarks: frozenset[str]
    sizes: frozenset[str]
    methods: frozenset[str]
    factors: frozenset[str]

    @classmethod
    def of(cls, names: Sequence[str]) -> Selection:
        """Sorts the names by what they name; UserError for one that names nothing."""
        known = [
            {benchmark.name for benchmark in experiments.BENCHMARKS},
            set(map(str, experiments.SIZES)),
            {*experiments.TABLE1, *experiments.PEERS},
            set(experiments.ABLATIONS),
        ]
        for name in names:
            if not any(name in group for group in known):
                choices = ", ".join(name for group in known for name in sorted(group))
                raise UserError(f"--only {name} is unknown; choose from {choices}")
        return cls(*(frozenset(names) & group for group in known))

    def holds(self, row: Row) -> bool:
        """Whether a row may be trained; a peer without neurons is of every size."""
        return all(
            not names or name in names
            for names, name in (
                (self.benchmarks, row.benchmark.name),
                (self.sizes if row.neurons else (), str(row.neurons)),
                (self.methods, row.method),
                (self.factors, row.factor),
            )
        )


class Reproduction:
    """The results asked for, the runs they need, and their files.

    Args:
        results: rows of each result. selection: of the rows that may be trained.
        campaign: where their runs are. out: folder of the tables and figures.
        short: whether the rows are scaled down. command: that began all this.
        start: time.perf_counter() then.

    Raises:
        UserError: the folder's record of commands is damaged.
    """

    def __init__(
        self,
        results: Mapping[str, Sequence[Row]],
        selection: Selection,
        campaign: Campaign,
        out: Path,
        short: bool,
        command: str,
        start: float,
    ) -> None:
        self.results, self.selection, self.campaign = results, selection, campaign
        self.out, self.short, self.command = out, short, command
        rows = dict.fromkeys(row for rows in results.values() for row in rows)
        found = {row: campaign.refusal(row) for row in rows}
        self.refused = {row: reword(why, WORDS) for row, why in found.items() if why}
        needed, device = self._needed(), device_name(campaign.options.device)
        data = {name: found.checksum() for name, found in campaign.data.items()}
        self.record = CommandRecord(out / COMMANDS, command, device, data, len(needed), start)
        self.trained = 0  # runs

    def _needed(self) -> list[tuple[str, Job]]:
        """Every run that may be trained, once, with the first result that shows it."""
        jobs: dict[Path, tuple[str, Job]] = {}
        for name, rows in self.results.items():
            for row in rows:
                if row not in self.refused and self.selection.holds(row):
                    for job in (Job(row, seed) for seed in row.seeds):
                        jobs.setdefault(self.campaign.folder(job), (name, job))
        return list(jobs.values())

    def hints(self) -> list[str]:
        """What the user should know of the networks that may be trained."""
        rows = dict.fromkeys(job.row for _, job in self._needed())
        networks = [row for row in rows if row.peer is None or row.peer.method]
        streams = {(row.benchmark, row.config.tasks): row for row in networks}
        samples = {
            stream: len(make_tasks(row.config, self.campaign.data[row.benchmark.name])[0].y_train)
            for stream, row in streams.items()
        }
        found = [
            f"{row.benchmark.title}: {reword(hint, WORDS)}"
            for row in networks
            for hint in hints(row.config, samples[row.benchmark, row.config.tasks])
        ]
        return list(dict.fromkeys(found))

    def missing(self) -> dict[str, list[Job]]:
        """What each result needs trained that no earlier one does."""
        waiting = [
            pair for pair in self._needed()
            if self.campaign.find(pair[1]) is None and not self.campaign.diverged(pair[1])
        ]  # fmt: skip
        return {name: [job for n, job in waiting if n == name] for name in self.results}

    def train(self, display: CampaignDisplay, jobs: Sequence[Job]) -> None:
        """Trains the jobs, on a CPU small ones in several processes; Interrupted by Ctrl-C."""
        own = [
            job for job in jobs
            if job.row.peer is None and self.campaign.weights(job) <= SMALL
        ]  # fmt: skip
        work = sum(self.campaign.work(job) for job in own)
        processes = processes_for(work, len(own), self.campaign.options.device)
        with stop_on_interrupt() as stopped, display.progress:
            if processes > 1:
                self._train_apart(display, own, processes, stopped)
                jobs = [job for job in jobs if job not in set(own)]
            for batch in batches(jobs):
                if stopped():
                    raise Interrupted
                display.begin(batch)
                self.campaign.train(batch, display.watch, stopped)
                self._end(display, batch)

    def _train_apart(
        self,
        display: CampaignDisplay,
        jobs: Sequence[Job],
        processes: int,
        stopped: Callable[[], bool],
    ) -> None:
        # Long batches first, and none so long that one process is left alone with it.
        groups = batches(jobs, SIDE_BY_SIDE)
        groups.sort(key=lambda group: -sum(self.campaign.work(job) for job in group))
        train_all(
            [self.campaign.batch(group) for group in groups],
            processes,
            lambda number, share, where: display.report(groups[number], share, where),
            lambda number: self._end(display, groups[number]),
            stopped,
        )

    def _end(self, display: CampaignDisplay, jobs: Sequence[Job]) -> None:
        display.end(jobs, list(map(self.campaign.find, jobs)))
        self.trained += len(jobs)
        self.record.save(self.trained)

    def lines(self, name: str) -> list[Line]:
        """The rows of a result with the runs that exist."""
        return [self._line(row) for row in self.results[name]]

    def _line(self, row: Row) -> Line:
        if row in self.refused:
            return Line(row, (), self.refused[row])
        jobs = [Job(row, seed) for seed in row.seeds]
        found = {job: s for job in jobs if (s := self.campaign.find(job)) is not None}
        missing, diverged = "", sum(map(self.campaign.diverged, jobs))
        if diverged:
            missing = f"{diverged} of {len(jobs)} seeds diverged"
        elif len(found) < len(jobs):
            left_out = "" if self.selection.holds(row) else " (left out by --only)"
            missing = f"{len(jobs) - len(found)} of {len(jobs)} seeds {NOT_RUN}{left_out}"
        return Line(row, tuple(found.values()), missing, tuple(map(self.campaign.folder, found)))

    def write(self, name: str) -> list[Line]:
        """Writes a result's tables and figures, with what exists of its runs."""
        result, lines = RESULTS[name], self.lines(name)
        title = f"{name}: {result.title}"
        if self.short:
            title += " (--short: scaled down, not the protocol of the paper)"
        origin = provenance(self.command, lines)
        self.out.mkdir(parents=True, exist_ok=True)
        tables = {name: records(result, lines)}
        if result.per_task:
            tables[f"{name}_tasks"] = task_records(result, lines)
        for stem, table in tables.items():
            write_atomically(self.out / f"{stem}.csv", csv_text(table, origin))
        text = markdown_text(title, result, lines, origin)
        write_atomically(self.out / f"{name}.md", text)
        for stem, figure in draw(name, result, lines):
            save_figure(figure, self.out / stem)
        return lines


def execute(arguments: Sequence[str]) -> None:
    """Checks, loads, trains what is missing, writes; nothing is written before all checks."""
    start = time.perf_counter()
    given = build_parser().parse_args(arguments)
    names = [name for name in RESULTS if name in given.results or ALL in given.results]
    for name in given.results:
        if name not in (*RESULTS, ALL):
            raise UserError(f"{name} is unknown; choose from {', '.join([*RESULTS, ALL])}")
    if given.large and not given.short:
        raise UserError("--large goes with --short; without it every row has five class orders")
    selection = Selection.of(given.only)
    options = RunOptions(choose_device(given.device))
    out = given.out or Path("results") / ("reproduction-short" if given.short else "reproduction")
    for place, path in (("--out", out), ("--runs", given.runs)):
        check_folder(path, place)
    root = given.data_root or default_root()
    folder = given.features_folder or root / "features"
    features = {b.name: str(folder / b.features) for b in experiments.BENCHMARKS if b.features}
    results = {name: RESULTS[name].rows(given.short, features) for name in names}
    if given.large:
        results = {name: experiments.over_all_orders(rows) for name, rows in results.items()}
    command = command_line("ssd.reproduce", arguments)
    with in_words(WORDS):
        rows = [row for group in results.values() for row in group]
        data, absent = load_benchmarks(rows, root, features)
        campaign = Campaign(data, absent, given.runs, options)
        with folder_lock(given.runs), folder_lock(out):
            reproduction = Reproduction(
                results, selection, campaign, out, given.short, command, start
            )
            for reason in dict.fromkeys(reproduction.refused.values()):
                note(f"left out, {reason}")
            for hint in reproduction.hints():
                note(hint)
            if "table2" in names and not experiments.PEERS:
                note("table2 has no peers yet")
            run_all(reproduction)


def run_all(reproduction: Reproduction) -> None:
    """Trains and writes result by result: the first tables are there before the last runs.

    Raises:
        Interrupted: Ctrl-C was hit; the tables show what exists.
    """
    console = Console(soft_wrap=True, markup=False, highlight=False)
    waiting = reproduction.missing()
    jobs = [job for group in waiting.values() for job in group]
    display = CampaignDisplay(console, {job: reproduction.campaign.work(job) for job in jobs})
    how = f"{reproduction.out} shows what exists; go on with: {reproduction.command}"
    with resumable(how):
        try:
            for name, group in waiting.items():
                reproduction.train(display, group)
                result, lines = RESULTS[name], reproduction.write(name)
                if warning := doubts(lines):
                    note(f"{name} shows {warning}")
                console.print(rich_table(f"{name}: {result.title}", result, lines))
                for claim in verdicts(lines) if result.claims else ():
                    console.print(claim)
        except (Interrupted, KeyboardInterrupt):
            for name in waiting:
                reproduction.write(name)
            reproduction.record.save(reproduction.trained)
            raise
    reproduction.record.save(reproduction.trained, finished=True)
    console.print(f"{len(jobs)} runs trained  -> {reproduction.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake of the user's (one line on stderr), 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: execute(given), "--out or --runs")


if __name__ == "__main__":
    sys.exit(main())
