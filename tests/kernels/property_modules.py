"""What is drawn and what is right for the modules of ssd_kernels.nn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import ssd_kernels as sk
from ssd_kernels import _dispatch
from tests.kernels.property_bounds import Bounds, finite, rounding
from tests.kernels.property_cases import (
    Arguments,
    Case,
    Drawn,
    Outputs,
    Shapes,
    codes,
    floats,
    ks,
    named,
    off,
    same,
)
from tests.kernels.property_codes import SparseLinear, decoded, slot_gradient, spread
from tests.kernels.property_draws import Draw
from tests.kernels.property_layers import LinearTopK, Scores, TopK, layer, layer_gradients, ranked


class Module(Drawn):
    """A module of ssd_kernels.nn; the environment chooses the implementation."""

    prefixes = ("topk", "linear_topk", "sparse_linear", "TopKLinear", "SparseLinear")

    def module(self, arguments: Arguments) -> torch.nn.Module:
        raise NotImplementedError

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(self, arguments: Arguments, *inputs: str) -> Any:
        module = self.module(arguments)
        parameters = {n: t for n, t in self.parameters(arguments).items() if t is not None}
        given = tuple(arguments[name] for name in inputs)
        return torch.func.functional_call(module, parameters, given)

    def call(self, arguments: Arguments, impl: str) -> Outputs:
        with mock.patch.dict(os.environ, {_dispatch.ENVIRONMENT: impl}):
            return self.outputs(arguments)

    def outputs(self, arguments: Arguments) -> Outputs:
        raise NotImplementedError


class TopKModule(Module, TopK):
    table = "topk"

    def draw(self, d: Draw) -> Case:
        case, _ = ranked(d)
        case.ask("scores")
        case.answer(out=tuple(case["scores"].shape))
        case.truth = self.expected(case)
        return case

    def outputs(self, arguments: Arguments) -> Outputs:
        return {"out": sk.nn.TopK(arguments["k"])(arguments["scores"])}

    def shapes(self, case: Case) -> Shapes:
        return {"out": (tuple(case["scores"].shape), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        dense = torch.zeros_like(case["scores"])
        values = case.truth.values.relu().to(case.dtype)
        yield from same("out", got["out"], dense.scatter(-1, case.truth.indices, values))

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        passes = torch.zeros(case["scores"].shape, dtype=torch.bool)
        passes = passes.scatter(-1, case.truth.indices, case.truth.values > 0)
        gradient = torch.where(passes, case.upstream["out"].double(), 0.0)
        return {"scores": Bounds.of(gradient, gradient)}

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ks(case["k"], case["scores"].shape[-1])
        yield "x int64", {"scores": case["scores"].isnan().long()}


class TopKLinear(Module, LinearTopK):
    table = "linear_topk"

    def draw(self, d: Draw) -> Case:
        case = layer(d, networks=False)
        case.arguments.pop("counts", None)
        case.arguments.pop("networks")
        case.in_place = ()
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        return self.finish(case)

    def module(self, arguments: Arguments) -> torch.nn.Module:
        weight = arguments["weight"]
        return sk.nn.TopKLinear(
            *reversed(weight.shape),
            arguments["k"],
            arguments.get("bias") is not None,
            arguments["inhibition"],
            weight.device,
            weight.dtype,
        )

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        return {"weight": arguments["weight"], "bias": arguments.get("bias")}

    def outputs(self, arguments: Arguments) -> Outputs:
        return named(self.forward(arguments, "x"))

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ks(case["k"], len(case["weight"]))
        yield from floats(case, "x")
        yield "x longer", {"x": F.pad(case["x"], (0, 1))}
        yield "inhibition", {"inhibition": "divide"}


class SparseLinearModule(Module, SparseLinear):
    table = "sparse_linear"

    def module(self, arguments: Arguments) -> torch.nn.Module:
        weight = arguments["weight"]
        return sk.nn.SparseLinear(
            *weight.shape, arguments.get("bias") is not None, weight.device, weight.dtype
        )

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        return {"weight": arguments["weight"], "bias": arguments.get("bias")}

    def outputs(self, arguments: Arguments) -> Outputs:
        return {"out": self.forward(arguments, "values", "indices")}

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from codes(case, len(case["weight"]))
        yield from floats(case, "values")


class KSparseMLP(Module, LinearTopK):
    table = "linear_topk"

    def draw(self, d: Draw) -> Case:
        case = layer(d, networks=False)
        for name in ("counts", "networks"):
            case.arguments.pop(name, None)
        case.in_place = ()
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        outputs = d.features()
        case.give(decoder=(len(case["weight"]), outputs))
        if case["bias"] is not None:
            case.give(decoder_bias=(outputs,))
        case.truth = truth = Scores(case)
        names = ("x", "weight", "bias", "decoder", "decoder_bias")
        case.ask(*names, doubt=truth.ranking.doubtful())
        case.answer(out=(*case["x"].shape[:-1], outputs))
        return case

    def module(self, arguments: Arguments) -> torch.nn.Module:
        weight, decoder = arguments["weight"], arguments["decoder"]
        return sk.nn.KSparseMLP(
            *reversed(weight.shape),
            decoder.shape[1],
            arguments["k"],
            arguments.get("bias") is not None,
            arguments["inhibition"],
            weight.device,
            weight.dtype,
        )

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        return {
            "encoder.weight": arguments["weight"],
            "encoder.bias": arguments.get("bias"),
            "decoder.weight": arguments["decoder"],
            "decoder.bias": arguments.get("decoder_bias"),
        }

    def outputs(self, arguments: Arguments) -> Outputs:
        """And the code, without gradient, which the truth of the output is taken from."""
        out = self.forward(arguments, "x")
        with torch.no_grad():
            encoder = TopKLinear(sk.nn.TopKLinear)
            return {"out": out, **encoder.outputs(arguments)}

    def shapes(self, case: Case) -> Shapes:
        shape = (*case["x"].shape[:-1], case["decoder"].shape[1])
        return {"out": (shape, case.dtype), **super().shapes(case)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        yield from super().judge(case, got, after)
        bounds = decoded(case, got["values"], got["indices"], case["decoder"], case["decoder_bias"])
        yield from off("out", got["out"], bounds)

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        rows, k = len(case.truth.first), case["k"]
        values, indices = (got[name].reshape(rows, k) for name in ("values", "indices"))
        gradient = case.upstream["out"].reshape(rows, case["decoder"].shape[1])
        own = slot_gradient(case, gradient, case["decoder"], indices)
        middle = (own.lower + own.upper) / 2
        # Each slot's gradient is rounded to the dtype.
        error = (own.upper - middle).abs() + 2 * torch.finfo(case.dtype).eps * middle.abs()
        error = torch.where(own.free, torch.inf, error + torch.finfo(case.dtype).tiny)
        active = values > 0
        zeros = torch.zeros(rows, case.truth.neurons, dtype=torch.float64)
        slope, doubt = (
            zeros.scatter(1, indices, torch.where(active, t, 0.0)) for t in (middle, error)
        )
        case.upstream_grain, grain = 0.0, case.upstream_grain  # what is rounded has none
        bounds = layer_gradients(case, slope, finite(slope) + finite(doubt), doubt, k)
        case.upstream_grain = grain
        bounds["decoder"] = spread(values, gradient, indices, case.truth.neurons, case.dtype, 0.0)
        if case["decoder_bias"] is not None:
            error = rounding(finite(gradient).sum(0), rows, case.dtype, case.upstream_grain)
            bounds["decoder_bias"] = Bounds.around(gradient.double().sum(0), error)
        return bounds

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ks(case["k"], len(case["weight"]))
        yield "x longer", {"x": F.pad(case["x"], (0, 1))}
        yield "x int64", {"x": case["x"].isnan().long()}
        yield "inhibition", {"inhibition": "divide"}
