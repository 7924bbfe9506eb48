"""Arguments that several ops refuse, and what they say; BATCH samples of small layers."""

from __future__ import annotations

import torch

from tests.kernels.cases import Arguments, Bad

BATCH, SLOTS, NEURONS, INPUTS, OUTPUTS = 4, 2, 9, 5, 3


def layer() -> Arguments:
    return {
        "x": torch.randn(BATCH, INPUTS),
        "weight": torch.randn(NEURONS, INPUTS),
        "k": SLOTS,
        "bias": torch.randn(NEURONS),
        "counts": torch.zeros(NEURONS, dtype=torch.int64),
    }


def active_layer() -> Arguments:
    layer = {"x": torch.rand(BATCH, INPUTS), "weight": torch.rand(NEURONS, INPUTS), "k": SLOTS}
    return layer | {"gaba": 1 - torch.rand(NEURONS)}


def code() -> Arguments:
    return {"values": torch.rand(BATCH, SLOTS), "indices": torch.randint(NEURONS, (BATCH, SLOTS))}


META = torch.device("meta")
SETTINGS: list[Bad] = [
    ({"k": 0}, ValueError, r"k=0 must lie in 1\.\.9"),
    ({"k": 10}, ValueError, r"k=10 must lie in 1\.\.9"),
    ({"k": True}, TypeError, "k=True must be an integer"),
    ({"k": 2.0}, TypeError, r"k=2\.0 must be an integer"),
    ({"k": torch.tensor(2)}, TypeError, "must be an integer"),
    ({"k": "2"}, TypeError, "k='2' must be an integer"),
]
NETWORKS: list[Bad] = [
    ({"networks": 0}, ValueError, "networks=0 must divide the 4 rows of x"),
    ({"networks": -1}, ValueError, "networks=-1 must divide the 4 rows of x"),
    ({"networks": 3}, ValueError, "networks=3 must divide the 4 rows of x"),
    ({"networks": 2}, ValueError, "networks=2 must divide the 9 rows of weight"),
]
LAYER: list[Bad] = [
    *SETTINGS,
    ({"networks": True}, TypeError, "networks=True must be an integer"),
    ({"networks": 1.0}, TypeError, r"networks=1\.0 must be an integer"),
    ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
    ({"weight": torch.ones(9, 5).half()}, TypeError, "weight has dtype torch.float16"),
    ({"bias": torch.ones(9).double()}, TypeError, "bias has dtype torch.float64"),
    ({"weight": torch.ones(9, 5, device=META)}, ValueError, "weight is on meta"),
    ({"weight": torch.ones(9)}, ValueError, r"weight has shape \[9\], expected \[R, d\]"),
    ({"x": torch.ones(4, 6)}, ValueError, r"x has shape \[4, 6\]"),
    ({"x": torch.ones(())}, ValueError, r"x has shape \[\]"),
    ({"bias": torch.ones(8)}, ValueError, r"bias has shape \[8\], expected \[9\]"),
    ({"inhibition": "divide"}, ValueError, "inhibition='divide'"),
    ({"counts": torch.zeros(9)}, TypeError, "counts has dtype torch.float32"),
    ({"counts": torch.zeros(8).long()}, ValueError, r"counts has shape \[8\]"),
    ({"counts": torch.zeros(9, device=META).long()}, ValueError, "counts is on meta"),
    *NETWORKS,
    ({"networks": 3, "x": torch.ones(3, 5), "k": 4}, ValueError, r"k=4 must lie in 1\.\.3"),
]
GABA: list[Bad] = [
    ({"gaba": torch.ones(8)}, ValueError, r"gaba has shape \[8\], expected \[9\]"),
    ({"gaba": torch.ones(9).long()}, TypeError, "gaba has dtype torch.int64"),
    ({"gaba": torch.ones(9, device=META)}, ValueError, "gaba is on meta"),
]
ACTIVE: list[Bad] = [
    *SETTINGS,
    *GABA,
    ({"counts": torch.zeros(9)}, TypeError, "counts has dtype torch.float32"),
    ({"x": torch.ones(2, 4, 5)}, ValueError, r"x has shape \[2, 4, 5\], expected \[B, d\]"),
    *NETWORKS,
    ({"inhibition": "none"}, ValueError, "inhibition='none'"),
]
GRADED: list[Bad] = [
    *ACTIVE,
    ({"gaba": torch.zeros(9)}, ValueError, r"gaba runs from 0 to 0, expected in \(0, 1\]"),
    ({"gaba": torch.full((9,), 1.5)}, ValueError, "gaba runs from 1.5 to 1.5"),
    ({"gaba": torch.full((9,), torch.nan)}, ValueError, "gaba runs from nan to nan"),
]
INDICES: list[Bad] = [
    (
        {"indices": torch.full((4, 2), bad)},
        ValueError,
        rf"indices run from {bad} to {bad}, .*0\.\.8",
    )
    for bad in (-1, 9, 2**40, -(2**63))
]
CODE: list[Bad] = [
    ({"indices": torch.zeros(4, 2).int()}, TypeError, "indices have dtype torch.int32"),
    ({"indices": torch.zeros(4, 3).long()}, ValueError, r"indices \[4, 3\]"),
    ({"indices": torch.zeros(4, 2, device=META).long()}, ValueError, "indices is on meta"),
    *INDICES,
]
