"""Draws calls of every op at random and compares each implementation with the truth.

    python tests/kernels/properties.py [--cases 10000] [--seed 0] [--only OP] [--impl NAME]
    python tests/kernels/properties.py --seed 0 --case 17

The seed and a case's number determine it; what is wrong is printed with the command that runs it
alone. Every implementation that this process has serves each case, on CPU and on CUDA. With
TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on small cases of their own. A share of
the cases has a wrong argument, which must be refused by name with nothing changed. Exit status: 1
if a case is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

import torch
from torch import Tensor

from tests.kernels.property_draws import Draw, memory, twin
from tests.kernels.property_ops import OPS, Arguments, Case, Op, Outputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INVALID = 0.12  # of all cases


class Way:
    """Who serves: an implementation and a device."""

    def __init__(self, impl: str, device: str) -> None:
        self.impl, self.device = impl, device

    def __str__(self) -> str:
        return f"{self.impl} on {self.device}"


def ways(op: Op, impl: str | None) -> list[Way]:
    """Every way that this process can serve the op, or those of one implementation."""
    cuda = torch.cuda.is_available() and not INTERPRETED
    plain = ("reference", "torch")
    return [
        Way(name, device)
        for device in ("cpu", *(["cuda"] if cuda else []))
        for name in op.implementations()
        if name in plain or INTERPRETED or device == "cuda"
        if impl in (None, name) or (impl == "triton" and name not in plain)
    ]


def op_of(number: int) -> Op:
    return OPS[number % len(OPS)]


def draw(seed: int, number: int) -> Case:
    """The case of this number, the same in every process."""
    op = op_of(number)
    d = Draw(seed, number, small=INTERPRETED)
    invalid = d.chance(INVALID)
    case = op.draw(d)
    if invalid:
        case.fault, changed = d.pick(list(op.faults(case)))
        case.arguments |= changed
    return case


def mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with every tensor, also inside lists, changed."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(item) for item in value]
        return change(value) if isinstance(value, Tensor) else value

    return {name: one(value) for name, value in arguments.items()}


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    """By name; those of lists by name and number."""
    found = {}
    for name, value in arguments.items():
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            if isinstance(item, Tensor) and not item.is_meta:
                found[f"{name}[{number}]" if isinstance(value, list) else name] = item
    return found


def placed(arguments: Arguments, device: str) -> Arguments:
    """A copy on the device, with the strides and the memory about each tensor."""
    return mapped(arguments, lambda t: t if t.is_meta else twin(t, device))


def touched(arguments: Arguments, case: Case, original: Arguments) -> Iterator[str]:
    """Memory that has changed, in place where that is the op's work excepted."""
    before = tensors(original)
    for name, tensor in tensors(arguments).items():
        if name.partition("[")[0] in case.in_place and not case.fault:
            with torch.no_grad():
                tensor = twin(tensor.detach(), "cpu")
                tensor.copy_(before[name])
        if not torch.equal(memory(tensor.detach()).cpu(), memory(before[name])):
            yield f"{name} has been modified"


def serve(op: Op, case: Case, way: Way) -> tuple[Arguments, Outputs, dict[str, Tensor | None]]:
    """The arguments afterwards, the outputs and the gradients that were asked for."""
    arguments = placed(case.arguments, way.device)
    leaves = {name: arguments[name].detach().requires_grad_() for name in case.wants}
    with torch.set_grad_enabled(case.grad):
        outputs = op.call(arguments | leaves, way.impl)
    gradients: dict[str, Tensor | None] = {}
    answered = {name: g for name, g in case.upstream.items() if outputs[name].requires_grad}
    if leaves and answered:
        given = torch.autograd.grad(
            [outputs[name] for name in answered],
            list(leaves.values()),
            [twin(g, way.device) for g in answered.values()],
            allow_unused=True,
        )
        gradients = dict(zip(leaves, given, strict=True))
    return arguments, outputs, gradients


def served(op: Op, case: Case, way: Way) -> Iterator[str]:
    """What is wrong with the way's service of a valid case."""
    after, outputs, gradients = serve(op, case, way)
    yield from touched(after, case, case.arguments)
    again = serve(op, case, way)
    first = {**tensors(after), **outputs, **{f"gradient of {n}": g for n, g in gradients.items()}}
    second = {
        **tensors(again[0]),
        **again[1],
        **{f"gradient of {n}": g for n, g in again[2].items()},
    }
    for name, tensor in first.items():
        if tensor is not None and not identical(tensor, second[name]):
            yield f"{name}: other bits the second time"
    shapes = op.shapes(case)
    for name, (shape, dtype) in shapes.items():
        out = outputs.get(name)
        if out is None or (tuple(out.shape), out.dtype, out.device.type) != (
            shape,
            dtype,
            way.device,
        ):
            got = out if out is None else f"{out.dtype} {list(out.shape)} on {out.device}"
            yield f"{name} is {got}, expected {dtype} {list(shape)} on {way.device}"
            return
    if shapes and outputs.keys() != shapes.keys():
        yield f"outputs {', '.join(outputs)}, expected {', '.join(shapes)}"
        return
    got = {name: out.detach().cpu() for name, out in outputs.items()}
    if not case.open:
        yield from op.judge(case, got, mapped(after, lambda t: t.detach().cpu()))
        if case.wants:
            yield from graded(op, case, got, outputs, gradients)
    yield from written(outputs)


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (t.detach().view(bits[t.element_size()]) for t in (a, b))
    return torch.equal(a, b)


def graded(
    op: Op, case: Case, got: Outputs, outputs: Outputs, gradients: dict[str, Tensor | None]
) -> Iterator[str]:
    from tests.kernels.property_ops import off

    differentiable = set(case.wants) - {"boost"}
    for name in case.upstream:
        if outputs[name].requires_grad != (case.grad and bool(differentiable)) and (
            name in ("out", "values") or not case.grad
        ):
            yield f"{name}.requires_grad is {outputs[name].requires_grad}"
            return
    if not case.grad:
        return
    bounds = op.gradients(case, got)
    for name in case.wants:
        gradient = gradients.get(name)
        gradient = torch.zeros_like(case[name]) if gradient is None else gradient.cpu()
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
            yield f"{name} cannot be written into: {str(error)[:60]}"


def refused(op: Op, case: Case, way: Way) -> Iterator[str]:
    """What is wrong with how the way takes an argument that it must refuse."""
    arguments = placed(case.arguments, way.device)
    try:
        op.call(arguments, way.impl)
    except (TypeError, ValueError) as error:
        if not str(error).startswith(tuple(f"{name}: " for name in (op.name, *op.prefixes))):
            yield f"{case.fault}: {type(error).__name__} without the op's name: {str(error)[:80]!r}"
    except Exception as error:
        yield f"{case.fault}: {type(error).__name__}, no TypeError or ValueError: {str(error)[:80]!r}"
    else:
        yield f"{case.fault}: served"
    yield from touched(arguments, case, case.arguments)


def run(number: int, seed: int, impl: str | None = None) -> list[str]:
    """What is wrong with the case of this number, a line each."""
    op, case = op_of(number), draw(seed, number)
    found = []
    for way in ways(op, impl):
        if case.fault and way.device == "cuda" and case.fault.startswith(("index", "label")):
            continue  # would be looked for on the host, or end the process
        check = refused if case.fault else served
        try:
            found += [f"{way}: {problem}" for problem in check(op, case, way)]
        except Exception as error:
            found.append(f"{way}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return found


def described(case: Case, name: str) -> str:
    """The call in a line."""
    parts = []
    for argument, value in case.arguments.items():
        if isinstance(value, Tensor):
            layout = case.draw.layouts.get(id(value), "")
            layout = "" if layout == "contiguous" else f" {layout}"
            parts.append(f"{argument} {str(value.dtype)[6:]}{list(value.shape)}{layout}")
        elif isinstance(value, list):
            parts.append(
                f"{argument} [{', '.join(str(list(v.shape)) if isinstance(v, Tensor) else str(v) for v in value)}]"
            )
        else:
            parts.append(f"{argument}={value!r}")
    asked = f"; gradients of {', '.join(case.wants)}" if case.wants and case.grad else ""
    fault = f"; must be refused: {case.fault}" if case.fault else ""
    return f"{name}, {case.draw.style}: {', '.join(parts)}{asked}{fault}"


def report(number: int, seed: int, found: list[str], details: bool = False) -> None:
    case = draw(seed, number)
    print(f"case {number} of seed {seed}: {described(case, op_of(number).name)}")
    for problem in found:
        print(f"  {problem}")
    prefix = "TRITON_INTERPRET=1 " if INTERPRETED else ""
    if details:
        for name, tensor in tensors(case.arguments).items():
            print(f"{name}, strides {tensor.stride()}:\n{tensor}")
        for name, tensor in case.upstream.items():
            print(f"upstream gradient of {name}:\n{tensor}")
    else:
        print(f"  {prefix}python tests/kernels/properties.py --seed {seed} --case {number}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[op.name for op in OPS], metavar="OP")
    parser.add_argument("--impl", help='one implementation; "triton" stands for all kernels')
    parser.add_argument("--case", type=int, help="runs this case alone and prints its arguments")
    given = parser.parse_args()
    if given.case is not None:
        found = run(given.case, given.seed, given.impl)
        report(given.case, given.seed, found, details=True)
        print("wrong" if found else "right")
        return int(bool(found))
    numbers = [n for n in range(given.cases) if given.only in (None, op_of(n).name)]
    total, wrong = Counter(op_of(n).name for n in numbers), Counter[str]()
    said = time.monotonic()
    for done, number in enumerate(numbers):
        found = run(number, given.seed, given.impl)
        if found:
            wrong[op_of(number).name] += 1
            report(number, given.seed, found)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"{done + 1} of {len(numbers)} cases, {wrong.total()} wrong", flush=True)
    for name, cases in total.items():
        print(f"{name}: {cases} cases, {wrong[name]} wrong")
    print(f"{len(numbers)} cases, {wrong.total()} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
