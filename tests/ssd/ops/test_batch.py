"""draw_batch and tally against a loop over learners and samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssd.ops.batch import Drawn, draw_batch, tally
from ssd.ops.reference import Stored, Tally, response_to_inhibition
from tests.kernels.conftest import triton_only

IMPLS = ["reference", "torch", triton_only("triton")]
LEARNERS, STORED, SIZE = 3, 11, 4
# A short last batch; an epoch that is over before; a learner that rests. And whole batches.
SAMPLES = ([11, 6, 0], [10, 9, 11], [8, 8, 8])


def stores(
    device: str,
    dtype: torch.dtype = torch.float32,
    features: int = 5,
    samples: list[int] = SAMPLES[0],
) -> dict[str, Any]:
    rows, classes = LEARNERS * STORED, 3
    order = torch.stack([torch.randperm(STORED) for _ in samples])
    # Room for whole batches; what stands there is no position.
    order = torch.cat([order, torch.full((LEARNERS, 1), 2**40)], dim=1)
    for own, count in zip(order, samples, strict=True):
        own[count:] = own[count:].clamp(max=STORED - 1)
    given = {
        "inputs": torch.randn(rows, features, dtype=dtype),
        "labels": torch.randint(1, classes, (rows,)),
        "order": order,
        "samples": torch.tensor(samples),
        "target_logits": torch.randn(rows, classes, dtype=dtype),
        "target_hidden": torch.randn(rows, 7, dtype=dtype),
        "counts": torch.randint(300, (LEARNERS * 13,)),
        "anneal_samples": torch.tensor([100, 7, 300]),
    }
    return {name: tensor.to(device) for name, tensor in given.items()}


def drawn(given: dict[str, Any], position: int, impl: str) -> Drawn:
    place = torch.tensor(position, device=given["order"].device)
    return draw_batch(Stored(**given, position=place, size=SIZE), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("features", [1, 300])
@pytest.mark.parametrize("samples", SAMPLES)
def test_a_batch(
    impl: str, dtype: torch.dtype, position: int, features: int, samples: list[int], device: str
) -> None:
    given = stores(device, dtype, features, samples)
    got = drawn(given, position, impl)
    weights = got.weight.view(LEARNERS, SIZE)
    pairs = [
        (given["inputs"], got.address),
        (given["labels"], got.labels),
        (given["target_logits"], got.target_logits),
        (given["target_hidden"], got.target_hidden),
    ]
    for learner, count in enumerate(samples):
        places = range(position * SIZE, min(position * SIZE + SIZE, count))
        assert weights[learner].tolist() == [
            float(torch.ones((), dtype=dtype) / max(len(places), 1)) if b < len(places) else 0.0
            for b in range(SIZE)
        ]
        for stored, taken in pairs:
            assert taken is not None
            own = taken.view(LEARNERS, SIZE, -1)[learner]
            for b, row in enumerate(own):
                expected = torch.zeros_like(row)
                if b < len(places):
                    number = given["order"][learner, places[b]]
                    expected = stored[learner * STORED + number].view(-1)
                assert torch.equal(row, expected)
    counts, anneal = given["counts"].view(LEARNERS, -1), given["anneal_samples"].unsqueeze(1)
    assert got.gaba is not None
    response = response_to_inhibition(counts, anneal, dtype)
    response[torch.tensor(samples) == 0] = 1  # nothing of a learner that rests is excited
    assert torch.equal(got.gaba, response.flatten())
    assert (response_to_inhibition(counts, anneal, dtype) < 0).any()
    assert {t.dtype for t in got if t is not None} == {dtype, torch.int64}


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gaba_of_many_neurons(impl: str, device: str) -> None:
    """Several programs; anneal_samples in floating point."""
    given = stores(device)
    given["counts"] = torch.randint(2**30, (LEARNERS * 1001,), device=device)
    given["anneal_samples"] = torch.tensor([1.0, 2.0**29, 77777.0], device=device)
    got = drawn(given, 0, impl)
    counts, anneal = given["counts"].view(LEARNERS, -1), given["anneal_samples"].unsqueeze(1)
    assert got.gaba is not None
    assert torch.equal(got.gaba, response_to_inhibition(counts, anneal, torch.float32).flatten())


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_given_is_drawn(impl: str, device: str) -> None:
    given = {name: stores(device)[name] for name in ("inputs", "labels", "order", "samples")}
    got = drawn(given, 1, impl)
    assert (got.target_logits, got.target_hidden, got.gaba) == (None, None, None)
    assert bool((got.address[:SIZE] != 0).all())


def step(device: str, classes: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    logits = torch.randn(LEARNERS * size, classes).round()  # many ties
    logits[torch.rand(logits.shape) < 0.1] = -0.0
    logits[torch.rand(logits.shape) < 0.1] = torch.nan
    logits[1] = -torch.inf
    logits[2] = torch.nan
    weight = torch.rand(LEARNERS * size)
    weight[torch.rand(len(weight)) < 0.3] = 0.0
    loss = torch.randn(len(weight))
    loss[weight == 0] = torch.nan
    labels = logits.argmax(1)
    wrong = torch.rand(len(labels)) < 0.3
    labels[wrong] = torch.randint(classes, (int(wrong.sum()),))
    given = loss.to(dtype), logits.to(dtype), labels, weight.to(dtype)
    return [t.to(device) for t in given]


def sums(device: str) -> dict[str, Tensor]:
    """Views into wider tensors, that hold something."""
    return {
        "loss_sum": torch.full((LEARNERS, 2), 0.5, dtype=torch.float64, device=device)[:, 1],
        "correct": torch.full((2 * LEARNERS,), 3, device=device)[::2],
        "seen": torch.full((LEARNERS, 3), 5, device=device)[:, 0],
        "position": torch.tensor(2**33, device=device),
        "overflow": torch.tensor([False, True, False, False, False, False], device=device)[::2],
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "size"), [(1, 1), (3, 7), (16, 200), (300, 40)])
def test_the_sums(impl: str, dtype: torch.dtype, classes: int, size: int, device: str) -> None:
    loss, logits, labels, weight = step(device, classes, max(size, 1), dtype)
    wider = torch.rand(len(loss), device=device) < 1 / size
    got = sums(device)
    tally(Tally(loss, logits, labels, weight, wider=wider, **got), impl=impl)
    names = ("loss_sum", "correct", "seen", "overflow")
    before = [sums(device)[name].tolist() for name in names]
    for learner, (total, correct, seen, overflow) in enumerate(zip(*before, strict=True)):
        for b in range(learner * size, (learner + 1) * size):
            if weight[b] > 0:
                total += loss[b].double().item()
                correct += int(logits[b].argmax() == labels[b])
                seen += 1
                overflow = overflow or bool(wider[b])
        torch.testing.assert_close(got["loss_sum"][learner].item(), total, rtol=1e-12, atol=1e-12)
        now = (got["correct"][learner], got["seen"][learner], got["overflow"][learner])
        assert tuple(t.item() for t in now) == (correct, seen, overflow)
    assert got["position"].item() == 2**33 + 1


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_may_be_wider(impl: str, device: str) -> None:
    given = step(device, 3, 5)
    got, expected = sums(device), sums(device)
    del got["overflow"]
    tally(Tally(*given, **got), impl=impl)
    wider = torch.zeros(len(given[0]), dtype=torch.bool, device=device)
    tally(Tally(*given, wider=wider, **expected), impl="reference")
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=0)
    assert expected["overflow"].tolist() == sums(device)["overflow"].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_are_bit_equal(impl: str, device: str) -> None:
    given = step(device, 10, 300)
    results = []
    for _ in range(20):
        results.append(sums(device))
        tally(Tally(*given, **results[-1] | {"overflow": None}), impl=impl)
    assert all(torch.equal(r["loss_sum"], results[0]["loss_sum"]) for r in results)
