"""Cross entropy and the two distillation terms with their gradients, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.ops import reference
from ssd_kernels import _checks, _dispatch, _op, _tuning
from ssd_kernels._triton import jit, tl
from ssd_kernels.reference import accumulation_dtype

# One program holds a sample's row; beyond so many columns the torch path serves.
MAX_COLUMNS = 4096
MAX_LOOPED = 256  # on a CPU vectorised operators serve longer rows as fast
_tuning.TABLE["distill"] = {
    "default": (
        ({"columns": 32}, {"num_warps": 1}),
        ({"columns": 256}, {"num_warps": 2}),
        ({}, {"num_warps": 8}),
    ),
}


class DistillOutput(NamedTuple):
    """What `distill` returns; gradients are those of loss[b] with respect to row b."""

    loss: Tensor  # [B]
    grad_logits: Tensor  # [B, C]
    grad_hidden: Tensor | None  # [B, n]


def distill(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None = None,
    hidden: Tensor | None = None,
    target_hidden: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    lam: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    kl: str = "reverse",
    columns: Tensor | None = None,
    weight: Tensor | None = None,
    impl: str | None = None,
) -> DistillOutput:
    """alpha CE + (1 - alpha) [(1 - lam) D(logits) + lam D(hidden)] for each sample.

    D = T^2 KL between the softmaxes of student / T and teacher / T. Without target_logits the loss
    is the cross entropy alone, whatever alpha is; without hidden the last term is left out.

    Args:
        logits, target_logits: [B, C] floating. labels: [B] int64 in 0..C-1.
        hidden, target_hidden: [B, n].
        alpha, lam, temperature: numbers, or one for each sample [B]; temperature > 0.
        kl: "reverse" is KL(student || teacher), "forward" KL(teacher || student).
        columns: [B, C] bool, the logits that D compares; None: all. At least one a sample.
        weight: [B] floating, multiplies each sample's gradients, not its loss.
        impl: "triton", "numba", "torch" or "reference"; by default the fastest for the device.

    Returns:
        The loss of each sample and its gradients, without autograd.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit, before any work.
    """
    _check(logits, labels, target_logits, hidden, target_hidden, kl, columns)
    for name, value in (("alpha", alpha), ("lam", lam), ("temperature", temperature)):
        _check_setting(name, value, logits)
    if weight is not None:
        _checks.shape("distill", "weight", weight, (len(logits),))
        _checks.same_device("distill", "logits", logits, "weight", weight)
    widths = [t.shape[1] for t in (logits, hidden) if t is not None]
    served = min(len(logits), *widths) > 0 and max(widths) <= MAX_COLUMNS
    given = logits, target_logits, hidden, target_hidden, weight
    looped = loops_serve(max(widths), given, (alpha, lam, temperature))
    serve = _dispatch.choose("distill", impl, logits, "torch", served, looped)
    with torch.no_grad():
        return serve(
            logits,
            labels,
            target_logits,
            hidden,
            target_hidden,
            alpha=alpha,
            lam=lam,
            temperature=temperature,
            kl=kl,
            columns=columns,
            weight=weight,
        )


def _reference(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    weight: Tensor | None = None,
    **options: object,
) -> DistillOutput:
    leaves = [t.detach().requires_grad_() for t in (logits, hidden) if t is not None]
    with torch.enable_grad():
        student = leaves[1] if hidden is not None else None
        loss = reference.distill(
            leaves[0], labels, target_logits, student, target_hidden, **options  # type: ignore[arg-type]
        )  # fmt: skip
        gradients = torch.autograd.grad(
            loss.sum() if weight is None else loss @ weight.to(loss.dtype),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
    return DistillOutput(loss.detach(), gradients[0], None if hidden is None else gradients[1])


def _torch(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    weight: Tensor | None = None,
    **options: Any,
) -> DistillOutput:
    dtype, wide = logits.dtype, accumulation_dtype(logits.dtype)  # T^2 magnifies rounding
    taught = (None if t is None else t.to(wide) for t in (target_logits, hidden, target_hidden))
    loss, *gradients = _in_wide(logits.to(wide), labels, *taught, **options)
    if weight is not None:
        scale = weight.to(wide).unsqueeze(1)
        gradients = [None if g is None else g * scale for g in gradients]
    return DistillOutput(
        loss.to(dtype),
        *(None if g is None else g.to(dtype).contiguous() for g in gradients),  # type: ignore[arg-type]
    )


def loops_serve(
    width: int, tensors: Sequence[Tensor | None], settings: Sequence[float | Tensor]
) -> bool:
    """Whether numba's loops are the fastest: for short rows of float32 and numbers for all."""
    floats = all(t is None or t.dtype == torch.float32 for t in tensors)
    return floats and width <= MAX_LOOPED and not any(isinstance(s, Tensor) for s in settings)


def array(tensor: Tensor | None, rows: int, dtype: torch.dtype = torch.float32) -> Any:
    """What a loop reads of a tensor; [B, 0] of none."""
    if tensor is None:
        return torch.empty(rows, 0, dtype=dtype, device="cpu").numpy()
    return tensor.detach().contiguous().numpy()


def _numba(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    *,
    alpha: float,
    lam: float,
    temperature: float,
    kl: str,
    columns: Tensor | None,
    weight: Tensor | None,
) -> DistillOutput:
    from ssd.ops import _loops

    rows = len(logits)
    loss, grad_logits = logits.new_empty(rows), torch.empty_like(logits)
    slopes = logits.new_zeros(rows, 0 if hidden is None else hidden.shape[1])
    # Without target_logits a hidden term counts for nothing.
    taught = target_hidden if target_logits is not None else None
    _loops.distill(
        array(logits, rows),
        array(labels, rows),
        array(target_logits, rows),
        array(columns, rows, torch.bool),
        array(hidden, rows),
        array(taught, rows),
        float(alpha),
        float(lam),
        float(temperature),
        kl == "forward",
        array(logits.new_ones(rows) if weight is None else weight, rows),
        loss.numpy(),
        grad_logits.numpy(),
        slopes.numpy(),
    )
    return DistillOutput(loss, grad_logits, None if hidden is None else slopes)


def _in_wide(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    *,
    alpha: float | Tensor,
    lam: float | Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None,
) -> DistillOutput:
    log_p = F.log_softmax(logits, dim=-1)
    target = labels.unsqueeze(1)
    loss = log_p.gather(1, target)
    gradient = log_p.exp_().scatter_add_(1, target, torch.full_like(loss, -1.0))
    if target_logits is None:
        slopes = None if hidden is None else torch.zeros_like(hidden)
        return DistillOutput(-loss.squeeze(1), gradient, slopes)
    a, share, scale = (_column(value) for value in (alpha, lam, temperature))
    logits_share, hidden_share = (1 - a) * (1 - share), (1 - a) * share
    term, slopes = _divergence(logits, target_logits, scale, kl, columns)
    loss = _plus(loss * -a, term, logits_share * scale)
    gradient = _plus(gradient * a, slopes, logits_share)
    hidden_gradient = None
    if hidden is not None and target_hidden is not None:
        term, slopes = _divergence(hidden, target_hidden, scale, kl, None)
        loss = _plus(loss, term, hidden_share * scale)
        hidden_gradient = slopes * hidden_share
    return DistillOutput(loss.squeeze(1), gradient, hidden_gradient)


def _column(value: float | Tensor) -> float | Tensor:
    return value.unsqueeze(1) if isinstance(value, Tensor) and value.dim() else value


def _plus(total: Tensor, term: Tensor, weight: float | Tensor) -> Tensor:
    """total + weight * term, in one call."""
    if isinstance(weight, Tensor):
        return torch.addcmul(total, term, weight)
    return torch.add(total, term, alpha=weight)


def _divergence(
    student: Tensor,
    teacher: Tensor,
    scale: float | Tensor,
    kl: str,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """T KL of each row [B, 1], and the gradient of T^2 KL with respect to the student's row."""
    w, terms, log_v = reference.divergence_terms(student, teacher, scale, kl, columns)
    loss = terms.sum(-1, keepdim=True)
    if kl == "forward":
        return loss, (log_v.exp_() - w) * scale
    return loss, torch.addcmul(terms, w, loss, value=-1)


@jit
def _log_softmax(row, counts):
    row = tl.where(counts, row, float("-inf"))
    shifted = row - tl.max(row, axis=0)
    return shifted - tl.log(tl.sum(tl.exp(shifted), axis=0))


@jit
def _row_divergence(student, teacher, counts, t, FORWARD: tl.constexpr):
    """T^2 KL of a row and its gradient; 0 where a column does not count."""
    p = _log_softmax(student / t, counts)
    q = _log_softmax(teacher / t, counts)
    p_exp = tl.where(counts, tl.exp(p), 0.0)
    q_exp = tl.where(counts, tl.exp(q), 0.0)
    # 0 (log 0 - log 0) and 0 log 0 are 0.
    if FORWARD:
        ratio = tl.where(q_exp != 0, p - q, 0.0)
        loss = -tl.sum(q_exp * ratio, axis=0)
        gradient = t * (p_exp - q_exp)
    else:
        ratio = tl.where(p_exp != 0, p - q, 0.0)
        loss = tl.sum(p_exp * ratio, axis=0)
        gradient = t * p_exp * (ratio - loss)
    return t * t * loss, gradient


@jit
def settings_of(row, alpha, lam, temperature, EACH: tl.constexpr):
    """A row's entries of tensors [B] if EACH, else the numbers that serve all rows."""
    if EACH:
        return tl.load(alpha + row), tl.load(lam + row), tl.load(temperature + row)
    else:
        return alpha, lam, temperature


@jit
def logits_loss(
    student,
    label,
    target_logits,
    columns,
    at,
    column,
    inside,
    alpha,
    lam,
    t,
    TEACHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """The loss of a row of logits but for its hidden term, and the gradient."""
    log_p = _log_softmax(student, inside)
    chosen = column == label
    total = -tl.sum(tl.where(chosen, log_p, 0.0), axis=0)
    gradient = tl.exp(log_p) - tl.where(chosen, 1.0, 0.0)
    if TEACHER:
        counts = inside
        if COLUMNS:
            counts = tl.load(columns + at, mask=inside, other=0) != 0
        teacher = tl.load(target_logits + at, mask=inside, other=0.0).to(tl.float32)
        term, slope = _row_divergence(student, teacher, counts, t, FORWARD)
        total = alpha * total + (1 - alpha) * (1 - lam) * term
        gradient = alpha * gradient + (1 - alpha) * (1 - lam) * slope
    return total, gradient


@jit
def hidden_loss(z, target_hidden, at, inside, alpha, lam, t, FORWARD: tl.constexpr):
    """The hidden term of a row's loss, and the gradient."""
    teacher = tl.load(target_hidden + at, mask=inside, other=0.0).to(tl.float32)
    term, slope = _row_divergence(z, teacher, inside, t, FORWARD)
    return (1 - alpha) * lam * term, (1 - alpha) * lam * slope


@jit
def _distill_kernel(
    logits,  # [B, C]
    labels,  # [B]
    target_logits,  # [B, C]
    hidden,  # [B, n]
    target_hidden,  # [B, n]
    columns,  # [B, C] bool
    alpha,  # [B] fp32 if EACH, else a number; so are the next two
    lam,
    temperature,
    weight,  # [B] fp32
    loss,  # [B]
    grad_logits,  # [B, C]
    grad_hidden,  # [B, n]
    C: tl.constexpr,
    N: tl.constexpr,
    EACH: tl.constexpr,
    WEIGHT: tl.constexpr,
    TEACHER: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a, share, t = settings_of(row, alpha, lam, temperature, EACH)
    scale = 1.0
    if WEIGHT:
        scale = tl.load(weight + row)
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    at = row * C + column
    student = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels + row)
    total, gradient = logits_loss(
        student, label, target_logits, columns, at, column, inside, a, share, t,
        TEACHER, COLUMNS, FORWARD,
    )  # fmt: skip
    if HIDDEN:
        unit = tl.arange(0, BLOCK_N)
        real = unit < N
        here = row * N + unit
        slope = tl.zeros([BLOCK_N], tl.float32)
        if TEACHER:
            z = tl.load(hidden + here, mask=real, other=0.0).to(tl.float32)
            term, slope = hidden_loss(z, target_hidden, here, real, a, share, t, FORWARD)
            total += term
        tl.store(grad_hidden + here, scale * slope, mask=real)
    tl.store(loss + row, total)
    tl.store(grad_logits + at, scale * gradient, mask=inside)


def _triton(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    *,
    alpha: float | Tensor,
    lam: float | Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None,
    weight: Tensor | None,
) -> DistillOutput:
    numbers, tensors = settings(logits, alpha, lam, temperature)
    weight = None if weight is None else weight.to(torch.float32)
    loss, grad_logits, grad_hidden = _launch(
        logits, labels, target_logits, hidden, target_hidden, numbers, tensors, weight, kl, columns
    )
    return DistillOutput(loss, grad_logits, None if hidden is None else grad_hidden)


def settings(like: Tensor, *values: float | Tensor) -> tuple[list[float], list[Tensor]]:
    """What kernels take for settings: numbers or, if one of them is a tensor, tensors [B]."""
    numbers = [1.0 if isinstance(value, Tensor) else float(value) for value in values]
    if not any(isinstance(value, Tensor) for value in values):
        return numbers, []
    options: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
    return [], [
        value.to(torch.float32).expand(len(like)).contiguous()
        if isinstance(value, Tensor)
        else torch.full((len(like),), number, **options)
        for value, number in zip(values, numbers, strict=True)
    ]


def _like(
    logits: Tensor, labels: Tensor, target_logits: Tensor | None, hidden: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    slopes = logits.new_empty(0 if hidden is None else hidden.shape)
    return logits.new_empty(len(logits)), logits.new_empty(logits.shape), slopes


@_op.operator("ssd::distill", _like)
def _launch(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    weight: Tensor | None,
    kl: str,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """numbers or tensors: alpha, lam and temperature, as `settings` gives them."""
    loss, grad_logits, grad_hidden = _like(logits, labels, target_logits, hidden)
    classes, units = logits.shape[1], 1 if hidden is None else hidden.shape[1]
    optional = [
        logits if t is None else t.contiguous() for t in (target_logits, hidden, target_hidden)
    ]
    chosen = _tuning.config("distill", logits.device, columns=max(classes, units))
    with torch.cuda.device_of(logits):
        _distill_kernel[(len(logits),)](
            logits.contiguous(),
            labels.contiguous(),
            *optional,
            logits if columns is None else columns.contiguous().view(torch.uint8),
            *(tensors or numbers),
            loss if weight is None else weight.contiguous(),
            loss,
            grad_logits,
            grad_hidden,
            C=classes,
            N=units,
            EACH=len(tensors) > 0,
            WEIGHT=weight is not None,
            TEACHER=target_logits is not None,
            HIDDEN=hidden is not None,
            COLUMNS=columns is not None,
            FORWARD=kl == "forward",
            BLOCK_C=power(classes),
            BLOCK_N=power(units),
            **chosen,
        )
    return loss, grad_logits, grad_hidden


def power(size: int) -> int:
    """Lanes for so many columns."""
    return max(16, 1 << (size - 1).bit_length())


def _check(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    kl: str,
    columns: Tensor | None,
) -> None:
    op = "distill"
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits have shape {list(logits.shape)}, expected [B, C]")
    taught = {"target_logits": target_logits, "hidden": hidden, "target_hidden": target_hidden}
    _checks.floating(op, logits=logits, **taught)
    _checks.shape(op, "labels", labels, (len(logits),))
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels have dtype {labels.dtype}; use torch.int64")
    _checks.shape(op, "target_logits", target_logits, tuple(logits.shape))
    _checks.shape(op, "columns", columns, tuple(logits.shape))
    if columns is not None and columns.dtype != torch.bool:
        raise TypeError(f"{op}: columns has dtype {columns.dtype}; use torch.bool")
    if columns is not None:
        _checks.same_device(op, "logits", logits, "columns", columns)
    if (hidden is None) != (target_hidden is None):
        raise ValueError(f"{op}: hidden and target_hidden must be given together")
    if hidden is not None and (hidden.dim() != 2 or len(hidden) != len(logits)):
        raise ValueError(
            f"{op}: hidden has shape {list(hidden.shape)}, expected [{len(logits)}, n]"
        )
    if hidden is not None:
        _checks.shape(op, "target_hidden", target_hidden, tuple(hidden.shape))
    if kl not in ("reverse", "forward"):
        raise ValueError(f"{op}: kl={kl!r} is not one of reverse, forward")
    _checks.same_device(op, "logits", logits, "labels", labels)
    _checks.in_range(op, "labels", labels, logits.shape[1])


def _check_setting(name: str, value: float | Tensor, logits: Tensor) -> None:
    if not isinstance(value, Tensor):
        _checks.number("distill", name, value, positive=name == "temperature")
    else:
        if value.dim():
            _checks.shape("distill", name, value, (len(logits),))
        _checks.same_device("distill", "logits", logits, name, value)


_dispatch.register("distill", reference=_reference, torch=_torch, numba=_numba, triton=_triton)
