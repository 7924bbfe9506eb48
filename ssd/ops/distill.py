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

HIDDEN_LOSSES = ("kl", "mse")
MAX_COLUMNS = 4096  # a program holds a row; the torch path serves longer ones
MAX_LOOPED = 256  # on a CPU vectorised operators are as fast for longer rows
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


class Objective(NamedTuple):
    """The arguments of `distill` other than the student's outputs, described there."""

    labels: Tensor  # [B]
    target_logits: Tensor | None  # [B, C]
    target_hidden: Tensor | None  # [B, n]
    alpha: float | Tensor = 1.0
    lam: float | Tensor = 0.0
    temperature: float | Tensor = 1.0
    kl: str = "reverse"
    columns: Tensor | None = None  # [B, C]
    weight: Tensor | None = None  # [B]
    hidden_loss: str = "kl"
    hidden_weight: float | Tensor = 1.0

    @property
    def settings(self) -> tuple[float | Tensor, ...]:
        return self.alpha, self.lam, self.temperature, self.hidden_weight

    def looped(self, classes: int, units: int, *students: Tensor | None) -> bool:
        """Whether numba's loops are fastest: short float32 rows, settings that are numbers."""
        width = max(classes, units) if self.hidden_loss == "kl" else classes
        tensors = (*students, self.target_logits, self.target_hidden, self.weight)
        floats = all(t is None or t.dtype == torch.float32 for t in tensors)
        single = not any(isinstance(setting, Tensor) for setting in self.settings)
        return floats and single and width <= MAX_LOOPED

    def for_loops(self) -> tuple[tuple[Any, ...], tuple[float | bool, ...]]:
        """Targets and settings as ssd.ops._loops takes them."""
        from ssd.ops._loops import array

        rows = len(self.labels)
        # Without target_logits a hidden term counts for nothing.
        hidden = None if self.target_logits is None else self.target_hidden
        weight = self.weight
        if weight is None:
            weight = torch.ones(rows, dtype=torch.float32, device="cpu")
        arrays = (
            array(self.labels, rows),
            array(self.target_logits, rows),
            array(self.columns, rows, torch.bool),
            array(hidden, rows),
            array(weight, rows),
        )
        numbers = (float(setting) for setting in self.settings)
        return arrays, (*numbers, self.kl == "forward", self.hidden_loss == "mse")

    def for_launch(self) -> tuple[Any, ...]:
        """As the launchers take it: settings as numbers, or as [B] each if one is a tensor."""
        numbers = [1.0 if isinstance(s, Tensor) else float(s) for s in self.settings]
        rows, device = len(self.labels), self.labels.device
        tensors: list[Tensor] = []
        if any(isinstance(setting, Tensor) for setting in self.settings):
            tensors = [
                setting.to(torch.float32).expand(rows).contiguous()
                if isinstance(setting, Tensor)
                else torch.full((rows,), number, dtype=torch.float32, device=device)
                for setting, number in zip(self.settings, numbers, strict=True)
            ]
        weight = None if self.weight is None else self.weight.to(torch.float32)
        targets = self.labels, self.target_logits, self.target_hidden
        return *targets, numbers, tensors, self.kl, self.hidden_loss, self.columns, weight


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
    hidden_loss: str = "kl",
    hidden_weight: float | Tensor = 1.0,
    impl: str | None = None,
) -> DistillOutput:
    """alpha CE + (1 - alpha) [(1 - lam) D(logits) + lam hidden_weight H(hidden)] for each sample.

    D = T^2 KL between the softmaxes of student / T and teacher / T. H is D or, for "mse", the sum
    of (student - teacher)^2. Without target_logits the loss is the cross entropy alone, whatever
    alpha is; without hidden the last term is left out.

    Args:
        logits: [B, C] floating.
        labels: [B] int64 in 0..C-1.
        target_logits: [B, C], the teacher's.
        hidden: [B, n]; goes with target_hidden.
        target_hidden: [B, n], the teacher's.
        alpha: a number, or one for each sample [B], like the next two.
        lam: lambda.
        temperature: T > 0.
        kl: "reverse" is KL(student || teacher), "forward" KL(teacher || student).
        columns: [B, C] bool, the logits that D compares, at least one a sample; None: all.
        weight: [B] floating, multiplies each sample's gradients, not its loss.
        hidden_loss: "kl" or "mse".
        hidden_weight: a number, or one for each sample [B].
        impl: "triton", "numba", "torch" or "reference"; by default the fastest for the device.

    Returns:
        The loss of each sample and its gradients, without autograd.

    Raises:
        TypeError, ValueError: a dtype, shape, device or option that does not fit, before any work.
    """
    objective = Objective(
        labels,
        target_logits,
        target_hidden,
        alpha,
        lam,
        temperature,
        kl,
        columns,
        weight,
        hidden_loss,
        hidden_weight,
    )
    _check(logits, hidden, objective)
    widths = logits.shape[1], 1 if hidden is None else hidden.shape[1]
    served = min(len(logits), *widths) > 0 and max(widths) <= MAX_COLUMNS
    looped = objective.looped(*widths, logits, hidden)
    serve = _dispatch.choose("distill", impl, logits, "torch", served, looped)
    with torch.no_grad():
        return serve(logits, hidden, objective)


def _check(logits: Tensor, hidden: Tensor | None, objective: Objective) -> None:
    op, given = "distill", objective
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits have shape {list(logits.shape)}, expected [B, C]")
    if (hidden is None) != (given.target_hidden is None):
        raise ValueError(f"{op}: hidden and target_hidden must be given together")
    rows, shape = len(logits), tuple(logits.shape)
    if hidden is not None and (hidden.dim() != 2 or len(hidden) != rows):
        raise ValueError(f"{op}: hidden has shape {list(hidden.shape)}, expected [{rows}, n]")
    taught = {"target_logits": given.target_logits, "target_hidden": given.target_hidden}
    _checks.floating(op, logits=logits, hidden=hidden, **taught)
    for name, tensor, expected in (
        ("labels", given.labels, (rows,)),
        ("target_logits", given.target_logits, shape),
        ("columns", given.columns, shape),
        ("target_hidden", given.target_hidden, () if hidden is None else tuple(hidden.shape)),
        ("weight", given.weight, (rows,)),
    ):
        _checks.shape(op, name, tensor, expected)
        if tensor is not None:
            _checks.same_device(op, "logits", logits, name, tensor)
    for name in ("alpha", "lam", "temperature", "hidden_weight"):
        setting = getattr(given, name)
        if not isinstance(setting, Tensor):
            _checks.number(op, name, setting, positive=name == "temperature")
            continue
        if setting.dim():
            _checks.shape(op, name, setting, (rows,))
        _checks.same_device(op, "logits", logits, name, setting)
    if given.labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels have dtype {given.labels.dtype}; use torch.int64")
    if given.columns is not None and given.columns.dtype != torch.bool:
        raise TypeError(f"{op}: columns has dtype {given.columns.dtype}; use torch.bool")
    for name, known in (("kl", ("reverse", "forward")), ("hidden_loss", HIDDEN_LOSSES)):
        value = getattr(given, name)
        if value not in known:
            raise ValueError(f"{op}: {name}={value!r} is not one of {', '.join(known)}")
    _checks.in_range(op, "labels", given.labels, logits.shape[1])


def _reference(logits: Tensor, hidden: Tensor | None, objective: Objective) -> DistillOutput:
    options = objective._asdict()
    weight = options.pop("weight")
    leaves = [t.detach().requires_grad_() for t in (logits, hidden) if t is not None]
    with torch.enable_grad():
        student = leaves[1] if hidden is not None else None
        loss = reference.distill(leaves[0], hidden=student, **options)
        gradients = torch.autograd.grad(
            loss.sum() if weight is None else loss @ weight.to(loss.dtype),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
    return DistillOutput(loss.detach(), gradients[0], None if hidden is None else gradients[1])


def _torch(logits: Tensor, hidden: Tensor | None, objective: Objective) -> DistillOutput:
    dtype, wide = logits.dtype, accumulation_dtype(logits.dtype)  # T^2 magnifies rounding
    student, teacher, z, target_z = (
        None if t is None else t.to(wide)
        for t in (logits, objective.target_logits, hidden, objective.target_hidden)
    )
    assert student is not None
    log_p = F.log_softmax(student, dim=-1)
    label = objective.labels.unsqueeze(1)
    loss = log_p.gather(1, label)
    gradient = log_p.exp_().scatter_add_(1, label, torch.full_like(loss, -1.0))
    slopes = None if z is None else torch.zeros_like(z)
    if teacher is None:
        loss = -loss
    else:
        alpha, lam, scale, factor = (_column(setting) for setting in objective.settings)
        share = (1 - alpha) * (1 - lam)
        term, slope = _divergence(student, teacher, scale, objective.kl, objective.columns)
        loss = _plus(loss * -alpha, term, share * scale)
        gradient = _plus(gradient * alpha, slope, share)
        if z is not None and target_z is not None:
            share = (1 - alpha) * lam * factor
            if objective.hidden_loss == "mse":
                slope = z - target_z
                term, slope, scale = slope.square().sum(-1, keepdim=True), slope.mul_(2), 1.0
            else:
                term, slope = _divergence(z, target_z, scale, objective.kl, None)
            loss = _plus(loss, term, share * scale)
            slopes = slope * share
    if objective.weight is not None:
        factor = objective.weight.to(wide).unsqueeze(1)
        gradient, slopes = gradient * factor, None if slopes is None else slopes * factor
    loss, gradient = loss.squeeze(1).to(dtype), gradient.to(dtype).contiguous()
    return DistillOutput(loss, gradient, None if slopes is None else slopes.to(dtype).contiguous())


def _column(value: float | Tensor) -> float | Tensor:
    return value.unsqueeze(1) if isinstance(value, Tensor) and value.dim() else value


def _plus(total: Tensor, term: Tensor, weight: float | Tensor) -> Tensor:
    """total + weight * term, in one call."""
    if isinstance(weight, Tensor):
        return torch.addcmul(total, term, weight)
    return torch.add(total, term, alpha=weight)


def _divergence(
    student: Tensor, teacher: Tensor, scale: float | Tensor, kl: str, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """T KL of each row [B, 1], and the gradient of T^2 KL with respect to the student's row."""
    w, terms, log_v = reference.divergence_terms(student, teacher, scale, kl, columns)
    loss = terms.sum(-1, keepdim=True)
    if kl == "forward":
        return loss, (log_v.exp_() - w) * scale
    return loss, torch.addcmul(terms, w, loss, value=-1)


def _numba(logits: Tensor, hidden: Tensor | None, objective: Objective) -> DistillOutput:
    from ssd.ops import _loops

    rows = len(logits)
    loss, grad_logits = logits.new_empty(rows), torch.empty_like(logits)
    slopes = logits.new_zeros(rows, 0 if hidden is None else hidden.shape[1])
    students = _loops.array(logits, rows), _loops.array(hidden, rows)
    outputs = loss.numpy(), grad_logits.numpy(), slopes.numpy()
    _loops.distill(*students, *objective.for_loops(), outputs)
    return DistillOutput(loss, grad_logits, None if hidden is None else slopes)


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
def settings_of(row, alpha, lam, temperature, hidden_weight, EACH: tl.constexpr):
    """A row's alpha, shares of the logits' and hidden terms, T; tensors [B] if EACH."""
    if EACH:
        a, share, t = tl.load(alpha + row), tl.load(lam + row), tl.load(temperature + row)
        return a, (1 - a) * (1 - share), (1 - a) * share * tl.load(hidden_weight + row), t
    else:
        return alpha, (1 - alpha) * (1 - lam), (1 - alpha) * lam * hidden_weight, temperature


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
    share,
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
        total = alpha * total + share * term
        gradient = alpha * gradient + share * slope
    return total, gradient


@jit
def hidden_term(z, target_hidden, at, inside, share, t, FORWARD: tl.constexpr, MSE: tl.constexpr):
    """The hidden term of a row's loss, and the gradient."""
    teacher = tl.load(target_hidden + at, mask=inside, other=0.0).to(tl.float32)
    if MSE:
        difference = tl.where(inside, z - teacher, 0.0)
        return share * tl.sum(difference * difference, axis=0), 2 * share * difference
    else:
        term, slope = _row_divergence(z, teacher, inside, t, FORWARD)
        return share * term, share * slope


@jit
def _distill_kernel(
    logits,  # [B, C]
    labels,  # [B]
    target_logits,  # [B, C]
    hidden,  # [B, n]
    target_hidden,  # [B, n]
    columns,  # [B, C] bool
    alpha,  # [B] fp32 if EACH, else a number; so are the next three
    lam,
    temperature,
    hidden_weight,
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
    MSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a, of_logits, of_hidden, t = settings_of(row, alpha, lam, temperature, hidden_weight, EACH)
    scale = 1.0
    if WEIGHT:
        scale = tl.load(weight + row)
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    at = row * C + column
    student = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    label = tl.load(labels + row)
    total, gradient = logits_loss(
        student,
        label,
        target_logits,
        columns,
        at,
        column,
        inside,
        a,
        of_logits,
        t,
        TEACHER,
        COLUMNS,
        FORWARD,
    )
    if HIDDEN:
        unit = tl.arange(0, BLOCK_N)
        real = unit < N
        here = row * N + unit
        slope = tl.zeros([BLOCK_N], tl.float32)
        if TEACHER:
            z = tl.load(hidden + here, mask=real, other=0.0).to(tl.float32)
            term, slope = hidden_term(z, target_hidden, here, real, of_hidden, t, FORWARD, MSE)
            total += term
        tl.store(grad_hidden + here, scale * slope, mask=real)
    tl.store(loss + row, total)
    tl.store(grad_logits + at, scale * gradient, mask=inside)


def _triton(logits: Tensor, hidden: Tensor | None, objective: Objective) -> DistillOutput:
    loss, grad_logits, grad_hidden = _launch(logits, hidden, *objective.for_launch())
    return DistillOutput(loss, grad_logits, None if hidden is None else grad_hidden)


def _like(logits: Tensor, hidden: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    slopes = logits.new_empty(0 if hidden is None else hidden.shape)
    return logits.new_empty(len(logits)), logits.new_empty(logits.shape), slopes


@_op.operator("ssd::distill", _like)
def _launch(
    logits: Tensor,
    hidden: Tensor | None,
    labels: Tensor,
    target_logits: Tensor | None,
    target_hidden: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    kl: str,
    hidden_loss: str,
    columns: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_logits, grad_hidden = _like(logits, hidden)
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
            MSE=hidden_loss == "mse",
            BLOCK_C=power(classes),
            BLOCK_N=power(units),
            **chosen,
        )
    return loss, grad_logits, grad_hidden


def power(size: int) -> int:
    """Lanes of a program that holds `size` columns: a power of two."""
    return max(16, 1 << (size - 1).bit_length())


_dispatch.register("distill", reference=_reference, torch=_torch, numba=_numba, triton=_triton)
