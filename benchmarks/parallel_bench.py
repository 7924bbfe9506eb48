"""Times a training step of a Top-K autoencoder on 1, 2 and 4 processes of one CPU thread (gloo).

python benchmarks/parallel_bench.py          # about two minutes
python benchmarks/parallel_bench.py --quick  # small: does everything run
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import bench
from benchmarks.timing import Quantiles, quantiles
from ssd.cli import exit_status
from ssd_kernels.parallel import ShardedTopKSAE
from ssd_kernels.sae import TopKSAE

WORLDS = (1, 2, 4)
SPLITS = ("neurons", "samples")
SHAPE = {"B": 1024, "d": 256, "R": 32768, "k": 32}
QUICK = {"B": 16, "d": 8, "R": 64, "k": 4}
STEPS, FIRST = 20, 3  # the first ones are not counted
MB = 1e6


def resident() -> float:
    """MB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / MB


def counted(collective: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    """The collective, which also notes the bytes that this process receives as a result."""

    def call(result: Tensor | list[Tensor], *given: Any, **settings: Any) -> Any:
        parts = result if isinstance(result, list) else [result]
        sent[-1] += sum(part.nbytes for part in parts)
        return collective(result, *given, **settings)

    return call


def train(
    rank: int, world: int, split: str, shape: dict[str, int], steps: int, folder: Path
) -> None:
    """One process; rank 0 saves milliseconds, CPU time, bytes of each step and its growth in MB."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    number = nn.Parameter(torch.zeros(1))
    torch.optim.Adam([number]).step()  # the first optimizer loads modules of torch
    before = resident()
    kind = ShardedTopKSAE if split == "neurons" else TopKSAE
    sae = model = kind(shape["d"], shape["R"], shape["k"], auxk=0)
    if split == "samples":
        model = DistributedDataParallel(sae, broadcast_buffers=False)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    times: list[float] = []
    work: list[float] = []
    sent: list[int] = []
    dist.all_reduce, dist.all_gather = (
        counted(c, sent) for c in (dist.all_reduce, dist.all_gather)
    )
    for _ in range(steps):
        x = torch.randn(shape["B"], shape["d"])
        own = x if split == "neurons" else x[rank::world]
        dist.barrier()
        sent.append(0)
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        model(own).fvu.backward()
        optimizer.step()
        work.append(1e3 * (time.process_time() - used))
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
        torch.save((times, work, sent, peak - before), folder / "measured")
    dist.destroy_process_group()


def main() -> None:
    options = bench.parser(__doc__, "small").parse_args()
    shape, steps = (QUICK, FIRST + 2) if options.quick else (SHAPE, FIRST + STEPS)
    torch.set_num_threads(1)
    runs = [(split, world) for split in SPLITS for world in WORLDS]
    with bench.running("parallel_bench", options) as run:
        for split, world in track(runs, "training"):
            with tempfile.TemporaryDirectory() as folder:
                given = world, split, shape, steps, Path(folder)
                torch.multiprocessing.spawn(train, given, nprocs=world)
                times, work, sent, growth = torch.load(Path(folder) / "measured")
            case = "TopKSAE", f"{split} split", "step", "float32", shape | {"processes": world}
            found = quantiles(times[FIRST:])
            run.write(case, "time", found, "ms")
            rate = Quantiles(*(1e3 * shape["B"] / ms for ms in reversed(found)))
            run.write(case, "throughput", rate, "samples/s")
            run.write(case, "CPU time", quantiles(work[FIRST:]), "ms a process")
            run.write(case, "memory", Quantiles(*[growth] * 3), "MB a process")
            line = f"{split} split over {world}: {found.p50:.1f} ms, {growth:.0f} MB a process"
            if split == "neurons":  # DistributedDataParallel sends its gradients by itself
                run.write(case, "exchanged", quantiles([b / MB for b in sent[FIRST:]]), "MB")
                line += f", results of collectives {sent[-1] / MB:.2f} MB"
            run.console.print(line)


if __name__ == "__main__":
    sys.exit(exit_status(main))
