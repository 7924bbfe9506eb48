"""Several processes against one that does the same alone, in fp64; every rank runs every check."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import record
from ssd_kernels import TopKOutput, count_active, linear_topk, sparse_linear
from ssd_kernels.nn import TopKLinear
from ssd_kernels.parallel import ShardedTopKSAE, reduce_activity, sharded_linear, sharded_topk
from ssd_kernels.sae import TopKSAE

ROOT = Path(__file__).parents[2]
WIDTH, WIDE = 6, {"dtype": torch.float64}
SPLIT = ("encoder.weight", "encoder.bias", "decoder.weight")  # over the processes


def mine(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of this process."""
    return tensor.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]


def same_code(got: TopKOutput, expected: TopKOutput) -> None:
    """Values to rounding; the same neurons, wherever one is active."""
    torch.testing.assert_close(got.values, expected.values, equal_nan=True)
    inactive = expected.values == 0
    assert torch.equal(got.values == 0, inactive)
    assert torch.equal(
        got.indices.masked_fill(inactive, 0), expected.indices.masked_fill(inactive, 0)
    )
    assert bool((got.indices.sort(-1).values.diff(dim=-1) > 0).all()), "distinct in a sample"


def same_everywhere(tensor: Tensor) -> None:
    """Bit for bit on all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    assert all(torch.equal(part, tensor) for part in parts)


def ops_agree() -> None:
    """k within a shard's neurons, beyond them and R; R that the processes divide and others."""
    batches = itertools.cycle([(7,), (2, 3), ()])
    for neurons, k, biased in itertools.product((40, 41, 43), (1, 5, 25, 40), (True, False)):
        batch = next(batches)
        x = torch.randn(*batch, WIDTH, **WIDE)
        weight, decoder = torch.randn(2, neurons, WIDTH, **WIDE)
        bias, shift = (torch.randn(neurons, **WIDE), torch.randn(WIDTH, **WIDE))
        whole = [x, weight, decoder, *((bias, shift) if biased else ())]
        split = [x, mine(weight), mine(decoder), *((mine(bias), shift) if biased else ())]
        whole, split = ([t.clone().requires_grad_() for t in given] for given in (whole, split))

        code = linear_topk(*whole[:2], k, *whole[3:4])
        output = sparse_linear(code.values, code.indices, whole[2], *whole[4:])
        found = sharded_topk(*split[:2], k, *split[3:4], neurons=neurons)
        sharded = sharded_linear(found.values, found.indices, split[2], *split[4:], neurons=neurons)
        same_code(found, code)
        torch.testing.assert_close(sharded, output)

        # The loss depends on the values directly too.
        for one, got in ((output, code), (sharded, found)):
            got.values.retain_grad()
            ((one - 1).square().mean() + got.values.pow(3).sum()).backward()
        active = code.values > 0
        torch.testing.assert_close(found.values.grad * active, code.values.grad * active)
        same_everywhere(found.values.grad)
        same_everywhere(split[0].grad)
        for number, (got, expected) in enumerate(zip(split, whole, strict=True)):
            gradient = mine(expected.grad) if number in (1, 2, 3) else expected.grad
            torch.testing.assert_close(got.grad, gradient)


def ties_go_to_the_lower_index() -> None:
    x = torch.randint(-1, 2, (200, 3)).double()
    weight = torch.randint(-1, 2, (37, 3)).double()
    for k in (1, 4, 30):
        code, found = linear_topk(x, weight, k), sharded_topk(x, mine(weight), k, neurons=37)
        assert torch.equal(found.values, code.values)
        same_code(found, code)


def nan_is_largest() -> None:
    x, weight = torch.randn(5, WIDTH, **WIDE), torch.randn(37, WIDTH, **WIDE)
    x[3] = torch.nan
    for row in (36, 20, 2):
        weight[row, 0] = torch.nan
        found = sharded_topk(x, mine(weight), 12, neurons=37)
        same_code(found, linear_topk(x, weight, 12))
        assert bool(found.values[:, 0].isnan().all())
    assert found.indices[0, :3].tolist() == [2, 20, 36]
    assert found.indices[3].tolist() == list(range(12))


def narrow_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(50, WIDTH, dtype=dtype), torch.randn(37, WIDTH, dtype=dtype)
        code, found = linear_topk(x, weight, 9), sharded_topk(x, mine(weight), 9, neurons=37)
        assert found.values.dtype == dtype
        torch.testing.assert_close(found.values, code.values)
        decoded = sharded_linear(found.values, found.indices, mine(weight), neurons=37)
        expected = sparse_linear(found.values, found.indices, weight)
        # Every process rounds its part, which may be larger than the sum.
        parts = sparse_linear(found.values, found.indices, weight.abs())
        slack = dist.get_world_size() * torch.finfo(dtype).eps * float(parts.max())
        torch.testing.assert_close(decoded, expected, rtol=0, atol=slack)


def a_batch_may_be_empty() -> None:
    weight = mine(torch.randn(37, WIDTH))
    found = sharded_topk(torch.randn(0, WIDTH), weight, 9, neurons=37)
    assert sharded_linear(*found[:2], weight, neurons=37).shape == (0, WIDTH)


def pair(neurons: int, k: int, **settings: object) -> tuple[TopKSAE, ShardedTopKSAE]:
    """An autoencoder of random weights, and the same split."""
    whole = TopKSAE(WIDTH, neurons, k, **WIDE, **settings)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    split = ShardedTopKSAE(WIDTH, neurons, k, **WIDE, **settings)
    load(split, whole)
    return whole, split


def load(split: ShardedTopKSAE, whole: TopKSAE) -> None:
    state = whole.state_dict()
    rows = slice(split.rows.start, split.rows.stop)
    split.load_state_dict({n: t[rows] if n in SPLIT else t for n, t in state.items()})


def same_parameters(
    split: nn.Module, whole: nn.Module, group: dist.ProcessGroup | None = None
) -> None:
    """And gradients."""
    theirs = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        for got, expected in ((parameter, theirs[name]), (parameter.grad, theirs[name].grad)):
            expected = mine(expected, group) if name in SPLIT else expected
            torch.testing.assert_close(got, expected)


def autoencoders_agree() -> None:
    """Training with AuxK, clipping and unit rows; dead neurons in no, in one and in all shards."""
    for dead in (range(0), range(8), range(0, 42, 5), range(42)):
        whole, split = pair(42, 5, dead_after=100, auxk=4)
        both = (whole, split)
        for sae in both:
            sae.samples += 90
            sae.last_active += 90
            sae.last_active[list(dead)] = 0
        with torch.no_grad():
            whole.encoder.bias[list(dead)] -= 50  # negative everywhere
        load(split, whole)
        optimizers = [torch.optim.Adam(sae.parameters(), lr=0.01) for sae in both]
        for step in range(3):
            whole.k = split.k = 12 - 3 * step
            x = torch.randn(20, WIDTH, **WIDE)
            inputs = [x.clone().requires_grad_() for _ in both]
            outs = [sae(given) for sae, given in zip(both, inputs, strict=True)]
            same_code(TopKOutput(*outs[1][1:3]), TopKOutput(*outs[0][1:3]))
            torch.testing.assert_close(
                (outs[1].output, outs[1].fvu, outs[1].auxk),
                (outs[0].output, outs[0].fvu, outs[0].auxk),
            )
            assert bool(outs[0].auxk > 0) == (len(dead) > 0)
            for buffer in ("samples", "counts", "last_active", "dead"):
                assert torch.equal(getattr(split, buffer), getattr(whole, buffer)), buffer
            for out, sae, optimizer in zip(outs, both, optimizers, strict=True):
                optimizer.zero_grad()
                (out.fvu + out.auxk / 32).backward()
                sae.project_gradient()
            torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
            norm = nn.utils.get_total_norm([p.grad for p in whole.parameters()])
            torch.testing.assert_close(split.gradient_norm(), norm)
            for sae in both:
                nn.utils.clip_grads_with_norm_(sae.parameters(), float(norm) / 2, norm)
            same_parameters(split, whole)
            for sae, optimizer in zip(both, optimizers, strict=True):
                optimizer.step()
                sae.normalize_decoder()
            same_parameters(split, whole)
        for tensor in (split.decoder.bias, split.counts, outs[1].output):
            same_everywhere(tensor)
        code = split.eval().encode(x)
        same_code(code, whole.eval().encode(x))
        torch.testing.assert_close(split.decode(*code[:2]), whole.decode(*code[:2]))


def a_shard_without_candidates_takes_part() -> None:
    """All dead neurons are those of the first process; the others still sum gradients with it."""
    whole, split = pair(42, 5, dead_after=100, auxk=40)
    for sae in (whole, split):
        sae.samples += 90
        sae.last_active += 90
        sae.last_active[:3] = 0
        with torch.no_grad():
            sae.encoder.bias[: 3 if sae is whole or dist.get_rank() == 0 else 0] -= 50
    x = torch.randn(20, WIDTH, **WIDE)
    outs = whole(x), split(x)
    assert outs[0].auxk > 0
    torch.testing.assert_close(outs[1].auxk, outs[0].auxk)
    for out in outs:
        (out.fvu + out.auxk).backward()
    same_parameters(split, whole)


def shards_begin_different() -> None:
    """Of processes that are seeded alike, which afterwards draw the same batches."""
    ShardedTopKSAE(WIDTH, 41, 3)  # of shards of unequal size
    same_everywhere(torch.rand(5))
    sae = ShardedTopKSAE(WIDTH, 40, 3)
    assert torch.equal(sae.encoder.weight, sae.decoder.weight)
    first = sae.encoder.weight[:1].detach().clone()
    parts = [torch.empty_like(first) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, first)
    assert len({tuple(part.flatten().tolist()) for part in parts}) == len(parts)
    sae.reset_parameters()
    assert not torch.equal(sae.encoder.weight[:1], first)
    same_everywhere(torch.rand(5))
    assert [len(sae.encoder.bias), len(sae.counts)] == [len(sae.rows), 40]


def mistakes_are_refused() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    x, weight = torch.randn(4, WIDTH), torch.randn(40, WIDTH)
    rows = 40 // world
    wrong = [
        (lambda: sharded_topk(x, weight, 3, neurons=40), rf"\[40, {WIDTH}\], expected \[{rows}, "),
        (lambda: sharded_topk(x, mine(weight), 41, neurons=40), "k=41 must lie in 1..40"),
        (lambda: sharded_topk(x, mine(weight), 3, neurons=1), f"{world} processes cannot share"),
        (lambda: sharded_topk(x.double(), mine(weight), 3, neurons=40), "float32 but x has"),
        (
            lambda: sharded_linear(x, x.long() + 40, mine(weight), neurons=40),
            r"sharded_linear: indices run from .* expected 0..39",
        ),
        (
            lambda: sharded_linear(x, x.long().abs(), weight, neurons=40),
            rf"on process {rank} of {world} for neurons=40",
        ),
        (lambda: ShardedTopKSAE(WIDTH, 1, 1), "ShardedTopKSAE: .* cannot share neurons=1"),
        (lambda: ShardedTopKSAE(WIDTH, 40, 41), "ShardedTopKSAE: k=41 must lie in 1..40"),
    ]
    for call, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def activity_of_all_samples() -> None:
    """DistributedDataParallel, half of the samples each, with a clock of samples and of steps."""
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = TopKSAE(WIDTH, 41, 3, auxk=0, **WIDE)
    ours = TopKSAE(WIDTH, 41, 3, auxk=0, **WIDE)
    ours.load_state_dict(whole.state_dict())
    layer = TopKLinear(WIDTH, 41, 3, **WIDE)
    counters, expected = torch.zeros(2, 2, 41, dtype=torch.int64)
    parallel = DistributedDataParallel(ours, broadcast_buffers=False)
    optimizers = [torch.optim.SGD(sae.parameters(), lr=0.1) for sae in (whole, ours)]
    for step in range(1, 5):
        x = torch.randn(8 * world, WIDTH, **WIDE)
        own = x[rank::world]
        for sae, given in ((whole, x), (parallel, own)):
            sae.zero_grad()
            (sae(given).output - given).square().mean().backward()
        same_parameters(ours, whole, group=dist.new_group([rank], use_local_synchronization=True))
        for optimizer in optimizers:
            optimizer.step()
        count_active(*layer(own)[:2], *counters, step)
        count_active(*layer(x)[:2], *expected, step)
        counts, last_active = reduce_activity(ours.counts, ours.last_active)  # at each step
        assert torch.equal(counts, whole.counts)
        assert torch.equal(world * last_active, whole.last_active)
    same_everywhere(counts)
    assert not torch.equal(ours.counts, counts)
    assert len(set(expected[1].tolist())) > 2
    assert torch.equal(torch.stack(reduce_activity(*counters)), expected)
    assert reduce_activity(counters[0])[1] is None


def fsdp_agrees() -> None:
    """fully_shard on an autoencoder: the ops see whole parameters."""
    world, rank = dist.get_world_size(), dist.get_rank()
    whole, ours = (TopKSAE(WIDTH, 41, 3, auxk=0, **WIDE) for _ in range(2))
    ours.load_state_dict(whole.state_dict())
    fully_shard(ours, mesh=init_device_mesh("cpu", (world,)))
    optimizers = [torch.optim.Adam(sae.parameters()) for sae in (whole, ours)]
    for _ in range(3):
        x = torch.randn(8 * world, WIDTH, **WIDE)
        losses = []
        for sae, given, optimizer in zip(
            (whole, ours), (x, x[rank::world]), optimizers, strict=True
        ):
            optimizer.zero_grad()
            losses.append((sae(given).output - given).square().mean())
            losses[-1].backward()
            sae.project_gradient()
            optimizer.step()
            sae.normalize_decoder()
        mean = losses[1].detach().clone() / world
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, losses[0].detach())
        for got, expected in zip(ours.parameters(), whole.parameters(), strict=True):
            assert isinstance(got, DTensor)
            torch.testing.assert_close(got.full_tensor(), expected.detach())
    assert torch.equal(reduce_activity(ours.counts)[0], whole.counts)


def neurons_and_samples_split() -> None:
    """A grid of 2 x 2 processes: each holds half of the neurons and sees half of the samples."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("samples", "neurons"))
    samples, neurons = (mesh[name].get_group() for name in ("samples", "neurons"))
    whole = TopKSAE(WIDTH, 41, 3, auxk=0, **WIDE)
    split = ShardedTopKSAE(WIDTH, 41, 3, auxk=0, group=neurons, **WIDE)
    load(split, whole)
    parallel = DistributedDataParallel(split, process_group=samples, broadcast_buffers=False)
    for _ in range(2):
        x = torch.randn(8, WIDTH, **WIDE)
        for sae, given in ((whole, x), (parallel, x[dist.get_rank(samples) :: 2])):
            sae.zero_grad()
            (sae(given).output - given).square().mean().backward()
        same_parameters(split, whole, neurons)
        norm = nn.utils.get_total_norm([p.grad for p in whole.parameters()])
        torch.testing.assert_close(split.gradient_norm(), norm)
    counts, _ = reduce_activity(split.counts, group=samples)
    assert torch.equal(counts, whole.counts)


CHECKS: dict[int, list[Callable[[], None]]] = {
    2: [activity_of_all_samples, fsdp_agrees],
    4: [neurons_and_samples_split],
}
ANY = [
    ops_agree,
    ties_go_to_the_lower_index,
    nan_is_largest,
    narrow_dtypes,
    a_batch_may_be_empty,
    autoencoders_agree,
    a_shard_without_candidates_takes_part,
    shards_begin_different,
    mistakes_are_refused,
]


def run(rank: int, world: int, meet: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=world)
    for check in ANY + CHECKS[world]:
        torch.manual_seed(0)  # so that all ranks draw the same
        check()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", CHECKS)
def test_processes_equal_one(world: int, tmp_path: Path) -> None:
    """The traceback names the check that failed."""
    torch.multiprocessing.spawn(run, (world, tmp_path / "meet"), nprocs=world)


def torchrun(file: Path, *options: str) -> str:
    """What two processes print."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, file, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("option", [[], pytest.param(["--neurons"], marks=pytest.mark.slow)])
def test_example(option: list[str]) -> None:
    said = torchrun(ROOT / "examples/ddp_sae.py", "--steps", "9", *option)
    first, last = (float(found) for found in re.findall(r"unexplained (\S+)", said))
    assert 0 < last < 0.9 * first
    assert "1.00 of the slots" in said


def test_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/parallel.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    script = tmp_path / "page.py"
    script.write_text("".join(blocks), encoding="utf-8")
    torchrun(script)


def test_the_page_shows_what_was_measured() -> None:
    shown = (ROOT / "docs/parallel.md").read_text(encoding="utf-8")
    rows = record.read(ROOT / "benchmarks/results/cpu/parallel_bench.csv")
    cases = {(row.mode, row.provider, row.shape["processes"]) for row in rows}
    assert len(cases) == 6
    for _, split, world in cases:
        cells = [split.removesuffix(" split"), str(world)]
        for metric in ("time", "throughput", "CPU time", "memory", "exchanged"):
            row = record.find(rows, split, metric, {"processes": world})
            digits = 2 if metric == "exchanged" else 0
            cells.append("" if row is None else f"{row.p50:,.{digits}f}")
        assert f"| {' | '.join(cells)} |".replace("  ", " ") in shown


def test_bytes_exchanged_are_those_of_the_formula() -> None:
    """s = 4 bytes; the shapes and the bytes are from the file of the benchmark."""
    rows = record.read(ROOT / "benchmarks/results/cpu/parallel_bench.csv")
    found = [row for row in rows if row.metric == "exchanged"]
    assert len(found) == 3
    for row in found:
        batch, width, k, world = (row.shape[name] for name in ("B", "d", "k", "processes"))
        size = 8 * batch * k * world + 2 * 4 * batch * width + 4 * batch * k
        assert row.p50 == pytest.approx(size / 1e6, rel=1e-5)
