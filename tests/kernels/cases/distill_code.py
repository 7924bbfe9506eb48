"""Cases of distill_code."""

from __future__ import annotations

from ssd.ops.distill_code import distill_code
from tests.kernels import cases
from tests.kernels.cases import FP32


def call(
    draw: cases.Draw,
    teacher: bool = True,
    columns: bool = False,
    kl: str = "reverse",
    hidden_loss: str = "kl",
    each: bool = False,
) -> cases.Run:
    """columns: some are left out. each: settings, and a weight, of each sample."""
    values, indices = draw.code()
    target = draw(draw.B, draw.C)
    given = values, indices, draw(draw.R, draw.C), draw.labels(), target if teacher else None
    options = draw.settings(each) | {"kl": kl, "hidden_loss": hidden_loss}
    options["columns"] = target > -1 if columns else None
    if draw.N:
        options["target_hidden"] = draw(draw.B, draw.N).relu()
        options["positions"] = draw.range(draw.R).clamp(max=draw.N)
    return lambda impl: tuple(distill_code(*given, **options, impl=impl))


OP = cases.Op(
    distill_code,
    call,
    calls={
        "": {},
        "of each sample": {"columns": True, "kl": "forward", "each": True},
        "squares": {"hidden_loss": "mse"},
        "squares of each sample": {"hidden_loss": "mse", "each": True},
        "of labels": {"teacher": False, "N": 0},
    },
    compiled=[
        *cases.grid(FP32, B=128, R=10000, K=10, C=10, teacher=False),
        *cases.grid(FP32, B=128, R=10000, K=10, C=10, n=10, each=True),
        *cases.grid(FP32, B=1280, R=100000, K=40, C=10, n=20, columns=True, each=True),
        *cases.grid(FP32, B=128, R=10000, K=40, C=10),
        *cases.grid(FP32, B=128, R=10000, K=300, C=100, n=200, kl="forward"),
        *cases.grid(FP32, B=128, R=10000, K=128, C=128, n=4096, each=True),
        *cases.grid(FP32, B=128, R=10000, K=300, C=4096, n=4096, columns=True),
        *cases.grid(FP32, B=128, R=1000, K=10, C=10, n=1000, hidden_loss="mse"),
        *cases.grid(FP32, B=1280, R=100000, K=40, C=10, n=20, hidden_loss="mse", each=True),
    ],
    checked={
        "": cases.check(tolerance=1e-4, B=3, R=20, K=5, C=10, N=6, each=True),
        "columns": cases.check(
            tolerance=1e-4, B=3, R=20, K=3, C=18, N=0, columns=True, kl="forward"
        ),
        "squares": cases.check(
            tolerance=1e-4, B=3, R=20, K=5, C=10, N=6, hidden_loss="mse", each=True
        ),
        "labels": cases.check(tolerance=1e-4, B=3, R=20, K=1, C=3, N=0, teacher=False),
        "one": cases.check(tolerance=1e-4, B=3, R=20, K=4, C=1, N=1),
    },
    tiles={"distill_code": cases.tile(TILE=32, num_warps=1)},
    pins={
        "": cases.pin("_distill_code_kernel", 0, **cases.SMALL, C=10, N=10),
        "each": cases.pin("_distill_code_kernel", 0, **cases.SMALL, C=10, N=10, each=True),
        "labels": cases.pin(
            "_distill_code_kernel", 0, **cases.SMALL, C=10, teacher=False, each=True
        ),
    },
)
