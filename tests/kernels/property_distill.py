"""What is drawn and what is right for distill."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.property_bounds import Bounds, finite
from tests.kernels.property_cases import (
    Arguments,
    Case,
    Drawn,
    Outputs,
    Shapes,
    mislabelled,
    off,
    other,
)
from tests.kernels.property_draws import STYLES, Draw

DEFAULTS = {"alpha": 1.0, "lam": 0.0, "temperature": 1.0, "hidden_weight": 1.0}


class Distill(Drawn):
    def draw(self, d: Draw) -> Case:
        d.style = d.pick([*STYLES, "infinite"])
        case = Case(d, d.dtype())
        batch, classes = d.samples(), max(1, d.features())
        if d.chance(0.05):
            classes = d.upto(200, 300)
        case.give(logits=(batch, classes))
        case.add("labels", torch.from_numpy(d.rng.integers(0, classes, batch)))
        if d.chance(0.75):
            case.give(target_logits=(batch, classes))
            case.open = d.style == "infinite"
        if d.chance(0.5):
            units = d.features()
            case.give(hidden=(batch, units), target_hidden=(batch, units))
        ranges = {"alpha": (0, 1), "lam": (0, 1), "temperature": (0.5, 4), "hidden_weight": (0, 9)}
        for name, (low, high) in ranges.items():
            kind = d.pick(["number", "number", "each", "default" if name != "alpha" else "each"])
            if kind == "number":
                case.arguments[name] = round(float(d.rng.uniform(low, high)), 2)
            elif kind == "each":
                values = torch.from_numpy(d.rng.uniform(low, high, batch)).to(case.dtype)
                case.add(name, values)
        if d.chance(0.4):
            case.add("weight", torch.from_numpy(d.rng.uniform(0.1, 2, batch)).to(case.dtype))
        case.arguments["kl"] = d.pick(["reverse", "forward"])
        case.arguments["hidden_loss"] = d.pick(["kl", "mse"])
        if d.chance(0.4):
            columns = torch.from_numpy(d.rng.random((batch, classes)) < 0.5)
            columns[torch.arange(batch), torch.from_numpy(d.rng.integers(0, classes, batch))] = True
            case.add("columns", columns)
        return case

    def shapes(self, case: Case) -> Shapes:
        logits, hidden = case["logits"], case["hidden"]
        shapes: Shapes = {
            "loss": ((len(logits),), case.dtype),
            "grad_logits": (tuple(logits.shape), case.dtype),
        }
        if hidden is not None:
            shapes["grad_hidden"] = (tuple(hidden.shape), case.dtype)
        return shapes

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        logits, labels, dtype = case["logits"].double(), case["labels"], case.dtype
        unit = 2 * (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps)
        alpha, lam, temperature, factor = (
            torch.as_tensor(default if case[name] is None else case[name], dtype=torch.float64)
            .expand(len(logits))
            .unsqueeze(1)
            for name, default in DEFAULTS.items()
        )
        every = torch.ones_like(logits, dtype=torch.bool)
        log_p, error = log_softmax(logits, every, unit, dtype)
        p, target = log_p.exp(), F.one_hot(labels, logits.shape[1]).double()
        loss, slope = -log_p.gather(1, labels.unsqueeze(1)), p - target
        loss_error = error.gather(1, labels.unsqueeze(1))
        slope_error = miss(log_p, error) + unit * (p + target) + torch.finfo(dtype).tiny
        terms = []
        if case["target_logits"] is not None:
            loss, loss_error, slope, slope_error = (
                alpha * t for t in (loss, loss_error, slope, slope_error)
            )
            share = (1 - alpha) * (1 - lam)
            terms.append((share, "logits", "target_logits", case["columns"]))
            if case["hidden"] is not None:
                terms.append(((1 - alpha) * lam * factor, "hidden", "target_hidden", None))
        slopes = {"logits": slope}
        errors = {"logits": slope_error}
        if case["hidden"] is not None:
            slopes["hidden"] = errors["hidden"] = torch.zeros(
                case["hidden"].shape, dtype=torch.float64
            )
        for share, student, teacher, columns in terms:
            pair = case[student].double(), case[teacher].double()
            if student == "hidden" and case["hidden_loss"] == "mse":
                measured = squares(*pair, unit, dtype)
            else:
                measured = divergence(*pair, columns, temperature, case["kl"], unit, dtype)
            term, term_error, slope, slope_error = measured
            # A share rounds too, as 1 - alpha does, whatever is left of it.
            loss = loss + share * term
            size = unit * (4 + 4 * factor)
            loss_error = loss_error + share.abs() * term_error + size * term.abs()
            slopes[student] = slopes[student] + share * slope
            errors[student] = errors[student] + share.abs() * slope_error + size * slope.abs()
        bounds = Bounds.around(loss, loss_error + 2 * unit * loss.abs())
        yield from off("loss", got["loss"], bounds.reshape(len(logits)))
        weight = 1.0 if case["weight"] is None else case["weight"].double().unsqueeze(1)
        for name, gradient in slopes.items():
            slope = weight * gradient
            error = weight * (errors[name] + 2 * unit * gradient.abs())
            yield from off(f"grad_{name}", got[f"grad_{name}"], Bounds.around(slope, error))

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        logits, classes = case["logits"], case["logits"].shape[1]
        yield "logits int64", {"logits": logits.isnan().long()}
        yield "logits 1-d", {"logits": logits.new_ones(len(logits))}
        yield "labels int32", {"labels": case["labels"].int()}
        yield "labels longer", {"labels": F.pad(case["labels"], (0, 1))}
        yield "labels on meta", {"labels": case["labels"].to("meta")}
        yield "kl", {"kl": "sideways"}
        yield "hidden_loss", {"hidden_loss": "sideways"}
        yield from mislabelled(case, "labels", classes)
        yield "columns int64", {"columns": torch.ones(logits.shape, dtype=torch.int64)}
        yield "hidden alone", {"hidden": logits, "target_hidden": None}
        if case["target_logits"] is not None:
            target = case["target_logits"]
            yield "target_logits longer", {"target_logits": F.pad(target, (0, 1))}
            yield "target_logits of another dtype", {"target_logits": target.to(other(case.dtype))}
            yield "target_logits on meta", {"target_logits": target.to("meta")}
        if case["hidden"] is not None:
            hidden = case["hidden"]
            yield "hidden 1-d", {"hidden": hidden.new_ones(len(hidden))}
            yield "target_hidden longer", {"target_hidden": F.pad(hidden, (0, 1))}
            yield "target_hidden of another dtype", {"target_hidden": hidden.to(other(case.dtype))}


def miss(log_p: Tensor, error: Tensor) -> Tensor:
    """How far exp(log_p), at most 1, may be off where log_p is by `error`."""
    exact = log_p.exp()
    above, below = (log_p + error).clamp(max=0).exp(), (log_p - error).exp()
    return torch.maximum(above - exact, exact - below)


def log_softmax(
    rows: Tensor, counts: Tensor, unit: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Over the columns that count, and its error bound; elsewhere 0."""
    log_p = F.log_softmax(rows.masked_fill(~counts, -torch.inf), dim=1).masked_fill(~counts, 0.0)
    size = torch.where(counts, finite(rows), 0.0)
    largest = size.amax(1, keepdim=True) if rows.shape[1] else size.sum(1, keepdim=True)
    error = unit * (rows.shape[1] + 4 + 2 * largest + finite(log_p)) + torch.finfo(dtype).tiny
    return log_p, torch.where(largest > torch.finfo(dtype).max / 4, torch.inf, error)


def squares(
    student: Tensor, teacher: Tensor, unit: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As divergence, for the sum of squared differences."""
    difference = student - teacher
    error = unit * (student.abs() + teacher.abs()) + torch.finfo(dtype).tiny
    loss = difference.square().sum(1, keepdim=True)
    size = 2 * difference.abs() + error
    loss_error = (error * size).sum(1, keepdim=True) + (student.shape[1] + 4) * unit * loss
    over = (size.square().sum(1, keepdim=True)) > torch.finfo(dtype).max / 64
    return (
        loss,
        torch.where(over, torch.inf, loss_error),
        2 * difference,
        torch.where(over, torch.inf, 2 * error + 4 * unit * difference.abs()),
    )


def divergence(
    student: Tensor,
    teacher: Tensor,
    columns: Tensor | None,
    temperature: Tensor,
    kl: str,
    unit: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T^2 KL [B, 1] and its error bound; its gradient [B, n] and that one's."""
    counts = torch.ones_like(student, dtype=torch.bool) if columns is None else columns
    p, p_error = log_softmax(student / temperature, counts, unit, dtype)
    q, q_error = log_softmax(teacher / temperature, counts, unit, dtype)
    ratio, ratio_error = p - q, p_error + q_error + unit * (p - q).abs()
    p_exp, q_exp = (torch.where(counts, t.exp(), 0.0) for t in (p, q))
    p_miss = miss(p, p_error) + torch.finfo(dtype).tiny
    q_miss = miss(q, q_error) + torch.finfo(dtype).tiny
    mean, mean_miss, sign = (q_exp, q_miss, -1) if kl == "forward" else (p_exp, p_miss, 1)
    size = (mean * ratio.abs()).sum(1, keepdim=True)
    loss = sign * (mean * ratio).sum(1, keepdim=True)
    loss_error = (mean_miss * (ratio.abs() + ratio_error) + mean * ratio_error).sum(1, keepdim=True)
    loss_error = loss_error + (student.shape[1] + 4) * unit * size
    if kl == "forward":
        slope, slope_error = p_exp - q_exp, p_miss + q_miss + unit * (p_exp + q_exp)
    else:
        slope = p_exp * (ratio - loss)
        reach = ratio.abs() + loss.abs()
        slope_error = p_miss * (reach + ratio_error + loss_error)
        slope_error = slope_error + p_exp * (ratio_error + loss_error + 4 * unit * reach)
    slope_error = torch.where(counts, slope_error, 0.0)
    # Products and squares of T round and, of large ratios, overflow.
    largest = temperature**2 * (ratio.abs().amax(1, keepdim=True) if student.shape[1] else size)
    over = largest > torch.finfo(dtype).max / 4
    square = temperature**2
    loss_error = square * (loss_error + 4 * unit * loss.abs())
    slope_error = temperature * (slope_error + 4 * unit * slope.abs())
    return (
        square * loss,
        torch.where(over, torch.inf, loss_error),
        temperature * slope,
        torch.where(over, torch.inf, slope_error),
    )
