"""Draws calls of every op at random and compares each implementation with the truth.

    python tests/kernels/properties.py [--cases 10000] [--seed 0] [--only OP] [--impl NAME]
    python tests/kernels/properties.py --seed 0 --case 17

The seed and a case's number determine it; what is wrong is printed with the command that runs it
alone. Every implementation that this process has serves each case, on CPU and on CUDA: numba, where
it is installed, float32 on the CPU, for which it is the default. With TRITON_INTERPRET=1 the
kernels run in Triton's interpreter, on small cases of their own. A share of the cases has a wrong
argument, which must be refused by name with nothing changed. The exit status is 1 if a case is
wrong.

Left open by the contract, so that only shapes, dtypes, untouched inputs and repeats are judged:
- row_gradient, row_update, code_gram: infinities and NaN. The weight gradient of sparse_linear: an
  infinite upstream gradient, which a slot of value 0 may or may not multiply.
- distill with a teacher: infinite logits. Their divergence is inf - inf.
- gradients where an input is not finite or a score may not be. Infinite upstream gradients are
  judged.
- linear_code: the code of a sample that is wider; where the layer's output is not
  finite, only that the code is not either.
- the gate of linear_active where the layer is not a number.
- an index or label out of range on CUDA, where nothing may look.
Never drawn, since the contract excludes it: a sample that names an active neuron twice
(count_active, code_gram), gaba > 1, gaba <= 0 in linear_code.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

import torch
from torch import Tensor

from ssd_kernels import nn
from tests.kernels.ops import OPS
from tests.kernels.property_cases import Arguments, Case, Drawn, Outputs, off
from tests.kernels.property_draws import Draw, memory, twin
from tests.kernels.property_modules import KSparseMLP, SparseLinearModule, TopKLinear, TopKModule

DRAWN: list[Drawn] = [
    *(op.drawn for op in OPS.values() if op.drawn is not None),
    TopKModule(nn.TopK),
    TopKLinear(nn.TopKLinear),
    SparseLinearModule(nn.SparseLinear),
    KSparseMLP(nn.KSparseMLP),
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLAIN = ("reference", "torch")
KERNELS = {"cpu": "triton" if INTERPRETED else "numba", "cuda": "triton"}
INVALID = 0.12  # of all cases
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Way(NamedTuple):
    """Who serves a call."""

    impl: str
    device: str

    def __str__(self) -> str:
        return f"{self.impl} on {self.device}"


def ways(op: Drawn, impl: str | None) -> list[Way]:
    """Every way that this process can serve the op; `impl` names one, "plain" or "kernels"."""
    cuda = torch.cuda.is_available() and not INTERPRETED
    return [
        Way(name, device)
        for device in ["cpu", *["cuda"] * cuda]
        for name in op.implementations()
        if name in PLAIN or name == KERNELS[device]
        if impl in (None, name, "plain" if name in PLAIN else "kernels")
    ]


def op_of(number: int) -> Drawn:
    return DRAWN[number % len(DRAWN)]


def draw(seed: int, number: int) -> Case:
    """The case of this number, the same in every process."""
    op = op_of(number)
    d = Draw(seed, number, small=INTERPRETED)
    invalid = d.chance(INVALID)
    case = op.draw(d)
    faults = list(op.faults(case)) if invalid else []
    if faults:
        case.fault, changed = d.pick(faults)
        case.arguments |= changed
    return case


def run(number: int, seed: int, impl: str | None = None) -> list[str]:
    """What is wrong with the case of this number, a line each."""
    op, case = op_of(number), draw(seed, number)
    found = []
    for way in ways(op, impl):
        if case.fault and way.device == "cuda" and case.fault.startswith(("index", "label")):
            continue
        try:
            check = refused if case.fault else served
            found += [f"{way}: {problem}" for problem in check(op, case, way)]
        except Exception as error:
            found.append(f"{way}: {type(error).__name__}: {shortened(error)}")
    return found


def served(op: Drawn, case: Case, way: Way) -> Iterator[str]:
    """What is wrong with the way's service of a valid case."""
    after, outputs, gradients = serve(op, case, way)
    yield from touched(after, case)
    yield from repeated((after, outputs, gradients), serve(op, case, way))
    shapes = op.shapes(case) or {name: (out.shape, out.dtype) for name, out in outputs.items()}
    if outputs.keys() != shapes.keys():
        yield f"outputs {', '.join(outputs)}, expected {', '.join(shapes)}"
        return
    for name, (shape, dtype) in shapes.items():
        out = outputs[name]
        if (out.shape, out.dtype, out.device.type) != (shape, dtype, way.device):
            kind = f"{out.dtype} {list(out.shape)} on {out.device}"
            yield f"{name} is {kind}, expected {dtype} {list(shape)}"
            return
    got = {name: out.detach().cpu() for name, out in outputs.items()}
    if not case.open:
        yield from op.judge(case, got, mapped(after, lambda t: t.detach().cpu()))
        yield from graded(op, case, got, outputs, gradients)
    yield from written(outputs)


def serve(op: Drawn, case: Case, way: Way) -> tuple[Arguments, Outputs, Outputs]:
    """The arguments afterwards, the outputs and the gradients that were asked for."""
    arguments = placed(case.arguments, way.device)
    leaves = {name: arguments[name].detach().requires_grad_() for name in case.wants}
    with torch.set_grad_enabled(case.grad):
        outputs = op.call(arguments | leaves, way.impl)
    answered = [name for name in case.upstream if name in outputs and outputs[name].requires_grad]
    if not leaves or not answered:
        return arguments, outputs, {}
    gradients = torch.autograd.grad(
        [outputs[name] for name in answered],
        list(leaves.values()),
        [twin(case.upstream[name], way.device) for name in answered],
        allow_unused=True,
    )
    given = zip(leaves, gradients, strict=True)
    return arguments, outputs, {name: g for name, g in given if g is not None}


def touched(after: Arguments, case: Case) -> Iterator[str]:
    """Memory that has changed, in place where that is the op's work excepted."""
    before = tensors(case.arguments)
    for name, tensor in tensors(after).items():
        kept = tensor.detach()
        if name.partition("[")[0] in case.in_place and not case.fault:
            kept = twin(kept, "cpu").copy_(before[name])
        if not torch.equal(memory(kept).cpu(), memory(before[name])):
            yield f"{name} has been modified"


def repeated(
    first: tuple[Arguments, Outputs, Outputs], second: tuple[Arguments, Outputs, Outputs]
) -> Iterator[str]:
    """What the second call made of the same case, bit by bit."""
    for kind, one, other in zip(("", "", "gradient of "), first, second, strict=True):
        found, again = tensors(one), tensors(other)
        for name, tensor in found.items():
            a, b = (t.detach().view(BITS[t.element_size()]) for t in (tensor, again[name]))
            if not torch.equal(a, b):
                yield f"{kind}{name}: other bits the second time"


def graded(
    op: Drawn, case: Case, got: Outputs, outputs: Outputs, gradients: Outputs
) -> Iterator[str]:
    """What is wrong with the gradients."""
    learned = case.grad and bool(set(case.wants) - {"boost"})
    for name in case.upstream:
        # A threshold may depend on nothing, where k is all neurons.
        if outputs[name].requires_grad != learned and not (learned and name == "threshold"):
            yield f"{name}.requires_grad is {outputs[name].requires_grad}"
            return
    bounds = op.gradients(case, got) if case.wants and case.grad else {}
    for name in case.wants if bounds else ():
        gradient = gradients.get(name, torch.zeros_like(case[name])).cpu()
        if gradient.shape != case[name].shape or gradient.dtype != case[name].dtype:
            yield f"gradient of {name} is {gradient.dtype} {list(gradient.shape)}"
        else:
            yield from off(f"gradient of {name}", gradient, bounds[name])


def written(outputs: Outputs) -> Iterator[str]:
    """Outputs are ordinary tensors: a caller may write into them."""
    for name, out in outputs.items():
        try:
            out.zero_()
        except RuntimeError as error:
            yield f"{name} cannot be written into: {shortened(error)}"


def refused(op: Drawn, case: Case, way: Way) -> Iterator[str]:
    """What is wrong with how the way takes an argument that it must refuse."""
    arguments = placed(case.arguments, way.device)
    try:
        op.call(arguments, way.impl)
        yield f"{case.fault}: served"
    except (TypeError, ValueError) as error:
        if not str(error).startswith(tuple(f"{name}: " for name in (op.name, *op.prefixes))):
            yield f"{case.fault}: {type(error).__name__} without the op's name: {shortened(error)}"
    except Exception as error:
        yield f"{case.fault}: {type(error).__name__} in place of a ValueError: {shortened(error)}"
    yield from touched(arguments, case)


def mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with every tensor, also inside lists, changed."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return change(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


def placed(arguments: Arguments, device: str) -> Arguments:
    """A copy on the device, with the strides and the memory about each tensor."""
    return mapped(arguments, lambda t: t if t.is_meta else twin(t, device))


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    """By name; those of lists by name and number."""
    named = [
        (f"{name}[{number}]" if isinstance(value, list) else name, item)
        for name, value in arguments.items()
        for number, item in enumerate(value if isinstance(value, list) else [value])
    ]
    return {name: item for name, item in named if isinstance(item, Tensor) and not item.is_meta}


def shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def described(number: int, seed: int) -> str:
    """The call in a line, and how to run it alone."""
    case = draw(seed, number)

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(shown(item) for item in value)}]"
        if not isinstance(value, Tensor):
            return f"{value!r}"
        plain = value.is_contiguous() and not value.storage_offset()
        strides = "" if plain else f" strides {value.stride()} from {value.storage_offset()}"
        return f"{str(value.dtype)[6:]} {list(value.shape)}{strides}"

    given = ", ".join(f"{name}={shown(value)}" for name, value in case.arguments.items())
    asked = f"; gradients of {', '.join(case.wants)}" if case.wants and case.grad else ""
    fault = f"; must be refused: {case.fault}" if case.fault else ""
    prefix = "TRITON_INTERPRET=1 " if INTERPRETED else ""
    return (
        f"{op_of(number).name}, {case.draw.style}: {given}{asked}{fault}\n"
        f"  {prefix}python tests/kernels/properties.py --seed {seed} --case {number}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of all ops, or of --only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[op.name for op in DRAWN], metavar="OP")
    parser.add_argument("--impl", help='one by its name, or "plain" or "kernels"; default: all')
    parser.add_argument("--case", type=int, help="runs this case alone and prints its arguments")
    given = parser.parse_args(argv)
    if given.case is not None:
        case = draw(given.seed, given.case)
        for kind, found in (("", case.arguments), ("upstream gradient of ", case.upstream)):
            for name, tensor in tensors(found).items():
                print(f"{kind}{name}, strides {tensor.stride()}:\n{tensor}")
        numbers = [given.case]
    else:
        wanted = (n for n in itertools.count() if given.only in (None, op_of(n).name))
        numbers = list(itertools.islice(wanted, given.cases))
    total, wrong = Counter(op_of(n).name for n in numbers), Counter[str]()
    said = time.monotonic()
    for done, number in enumerate(numbers):
        problems = run(number, given.seed, given.impl)
        if problems:
            wrong[op_of(number).name] += 1
        if problems or given.case is not None:
            print(f"case {number}: {described(number, given.seed)}")
            print(*(f"  {problem}" for problem in problems), sep="\n", flush=True)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{done + 1} of {len(numbers)} cases, {wrong.total()} wrong", flush=True)
    for name, count in total.items():
        print(f"{name}: {count} cases, {wrong[name]} wrong")
    print(f"{len(numbers)} cases, {wrong.total()} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
