"""Cases of distill."""

from __future__ import annotations

import torch

from ssd.ops.distill import distill
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_distill import Distill


def call(
    draw: cases.Draw,
    teacher: bool = True,
    columns: bool = False,
    kl: str = "reverse",
    hidden_loss: str = "kl",
    each: bool = False,
) -> cases.Run:
    """columns: some are left out. each: settings, and a weight, of each sample."""
    logits, target = draw(draw.B, draw.C), draw(draw.B, draw.C)
    hidden = [draw(draw.B, draw.N).relu() for _ in range(2)] if draw.N else [None, None]
    given = logits, draw.labels(), target if teacher else None, *hidden
    options = draw.settings(each) | {"kl": kl, "hidden_loss": hidden_loss}
    options["columns"] = logits > -1 if columns else None
    return lambda impl: tuple(distill(*given, **options, impl=impl))


def good() -> cases.Arguments:
    logits = torch.randn(refused.BATCH, refused.OUTPUTS)
    hidden = torch.randn(refused.BATCH, refused.SLOTS)
    labels = torch.randint(refused.OUTPUTS, (refused.BATCH,))
    taught = {"target_logits": logits, "hidden": hidden, "target_hidden": hidden}
    return {"logits": logits, "labels": labels, "columns": logits > -9, "lam": 0.5} | taught


BAD: list[cases.Bad] = [
    ({"labels": torch.full((4,), -100)}, ValueError, r"labels run from -100 to -100, .*0\.\.2"),
    ({"labels": torch.full((4,), 3)}, ValueError, r"labels run from 3 to 3, expected 0\.\.2"),
    ({"labels": torch.zeros(4, device=refused.META).long()}, ValueError, "labels is on meta"),
    ({"labels": torch.zeros(4).int()}, TypeError, "labels have dtype torch.int32"),
    ({"target_hidden": torch.ones(4, 2).half()}, TypeError, "target_hidden has dtype"),
    (
        {"target_hidden": torch.ones(4, 2, device=refused.META)},
        ValueError,
        "target_hidden is on meta",
    ),
    ({"target_hidden": torch.ones(4, 1)}, ValueError, r"target_hidden has shape \[4, 1\]"),
    ({"target_logits": torch.ones(4, 1)}, ValueError, r"target_logits has shape \[4, 1\]"),
    ({"columns": torch.ones(4, 3, device=refused.META).bool()}, ValueError, "columns is on meta"),
    ({"weight": torch.ones(3)}, ValueError, r"weight has shape \[3\], expected \[4\]"),
    ({"weight": torch.ones(4, device=refused.META)}, ValueError, "weight is on meta"),
    ({"alpha": torch.ones(3)}, ValueError, r"alpha has shape \[3\], expected \[4\]"),
    ({"lam": torch.ones(4, 1)}, ValueError, r"lam has shape \[4, 1\], expected \[4\]"),
    ({"temperature": torch.ones(4, device=refused.META)}, ValueError, "temperature is on meta"),
    ({"hidden_weight": torch.ones(3)}, ValueError, r"hidden_weight has shape \[3\], expected"),
    ({"hidden_loss": "l1"}, ValueError, "hidden_loss='l1' is not one of kl, mse"),
    ({"temperature": 0.0}, ValueError, r"temperature=0\.0 must be finite and above 0"),
    ({"temperature": -1}, ValueError, "temperature=-1 must be finite and above 0"),
    ({"alpha": float("nan")}, ValueError, "alpha=nan must be finite and at least 0"),
    ({"alpha": True}, TypeError, "alpha=True must be a number"),
    ({"lam": "1"}, TypeError, "lam='1' must be a number"),
]


OP = cases.Op(
    distill,
    call,
    calls={
        "": {},
        "of each sample": {"columns": True, "kl": "forward", "each": True},
        "squares": {"hidden_loss": "mse"},
        "squares of each sample": {"hidden_loss": "mse", "each": True},
        "of labels": {"teacher": False, "N": 0},
    },
    good=good,
    bad=BAD,
    drawn=Distill(distill),
    compiled=[
        *cases.grid(FP32, B=128, C=10, teacher=False),
        *cases.grid(FP32, BF16, B=128, C=10),
        *cases.grid(FP32, B=128, C=10, n=10, each=True),
        *cases.grid(FP32, B=128, C=100, n=200, columns=True, kl="forward"),
        *cases.grid(FP32, BF16, B=128, C=4096, n=4096, columns=True),
        *cases.grid(FP32, B=128, C=10, n=10, hidden_loss="mse"),
        *cases.grid(FP32, B=128, C=100, n=4096, hidden_loss="mse", each=True),
    ],
    checked={
        "": cases.check(tolerance=1e-4, B=3, C=10, N=18, columns=True),
        "each": cases.check(tolerance=1e-4, B=3, C=10, N=18, each=True),
        "hidden alone": cases.check(tolerance=1e-4, B=3, C=3, N=18, teacher=False, each=True),
        "squares": cases.check(tolerance=1e-4, B=3, C=10, N=18, hidden_loss="mse", each=True),
        "forward": cases.check(tolerance=1e-4, B=3, C=18, N=0, kl="forward"),
        "labels": cases.check(tolerance=1e-4, B=3, C=3, N=0, teacher=False),
    },
    tiles={"distill": cases.tile(num_warps=1)},
    pins={
        "": cases.pin("_distill_kernel", 0, B=128, C=10, N=10),
        "each": cases.pin("_distill_kernel", 0, B=128, C=10, N=10, each=True),
        "labels": cases.pin("_distill_kernel", 0, B=128, C=10, N=10, teacher=False),
    },
)
