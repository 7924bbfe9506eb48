"""A checker of kernels in Triton's interpreter: bounds, unwritten memory, races.

    with checking() as launches:
        topk(scores, 5, impl="triton")

raises Fault at the first access that breaks a rule, and lists every launch with what it did:

- An address lies in an element of the very tensor whose pointer it was made from.
- Nothing is read that was not written: neither by a kernel nor by a torch op. Fresh memory holds
  NaN, or large integers.
- Between two barriers no address is written twice by a program, read after it was written, or
  written after it was read; the lane that read may write in a later op. Lanes of two ops are the
  same if the shapes are equal and so are the positions. A reduction is no barrier.
- No program touches what another one of the launch writes. Atomics may meet atomics, nothing else.

Writes of the same value to one address may meet: whichever comes last, the outcome is the same.

Lanes that are masked off do nothing. Programs run one after another, in a random order.

What it cannot see: a barrier that only some threads reach; a lane that the compiler holds in
several threads, or in other threads for the load than for the store of one position; shared memory;
a kernel that waits for another program; what tolist, numpy, or the inside of an operator registered
with torch.library reads.

triton-viz 3.0, the one such tool on PyPI, checks bounds alone: it knows neither barriers nor lanes
nor what was written.

TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

Array = npt.NDArray[Any]

NOBODY, MANY = -1, -2
# An address holds the number of the tensor it was made from in its upper bits.
TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64(2**48 - 1)
# The torch ops that write every element of what they change.
OVERWRITING = ("fill_", "zero_", "copy_", "normal_", "uniform_", "random_")
FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
TRITON = str(Path(triton.__file__).parent) + os.sep


class Fault(AssertionError):
    """An access that breaks a rule."""


class Site(NamedTuple):
    """A line of a kernel."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


@dataclass
class Launch:
    """One launch and what it did."""

    kernel: str
    constants: dict[str, Any]  # the tl.constexpr arguments
    ops: Counter[str] = field(default_factory=Counter)  # loads, stores, atomics, barriers
    lanes: Counter[str] = field(default_factory=Counter)  # that were not masked off, by kind of op
    sites: set[Site] = field(default_factory=set)
    order: list[tuple[int, int, int]] = field(default_factory=list)  # of the programs


class Memory(TorchDispatchMode):
    """Which bytes of fresh tensors were ever written.

    A tensor that is not from torch.empty or the like counts as written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        # Held, so that no address is used twice.
        self._fresh: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def written(self, storage: torch.UntypedStorage) -> Array | None:
        """A flag for each byte, to be read and changed; None: all are written."""
        held = self._fresh.get(storage.data_ptr())
        return None if held is None else held[1].numpy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        overwritten = self._look(func, name, args, kwargs)
        result = func(*args, **kwargs)
        for flags in overwritten:
            flags.fill_(True)
        if name in FRESH and result.device.type == "cpu" and result.numel():
            self._poison(result)
        return result

    def _poison(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        flags = torch.zeros(storage.nbytes(), dtype=torch.bool)
        self._fresh[storage.data_ptr()] = (storage, flags)
        if tensor.dtype.is_floating_point:
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3)

    def _look(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
        """Fails if unwritten memory is read; the flags of what will be overwritten."""
        overwritten = []
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            alias = argument.alias_info
            writes = alias is not None and alias.is_write
            if name.startswith("new_") or name.endswith("_like") or name == "set_":
                continue
            if alias is not None and not writes:  # a view
                continue
            for flags in self._flags(given.get(argument.name)):
                if writes and (argument.kwarg_only or name in OVERWRITING):
                    overwritten.append(flags)
                elif not flags.all():
                    raise Fault(f"torch.{name} reads memory that nothing wrote ({argument.name})")
        return overwritten

    def _flags(self, value: Any) -> list[Tensor]:
        tensors = value if isinstance(value, (list, tuple)) else [value]
        found = []
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            held = self._fresh.get(tensor.untyped_storage().data_ptr())
            if held is not None:
                size = tensor.element_size()
                strides = (*(stride * size for stride in tensor.stride()), 1)
                shape, offset = (*tensor.shape, size), tensor.storage_offset() * size
                found.append(held[1].as_strided(shape, strides, offset))
        return found


class Shadow:
    """What the programs of a launch did to each unit of a storage; a unit is a few bytes."""

    def __init__(self, storage: torch.UntypedStorage, unit: int, written: Array | None) -> None:
        count = -(-storage.nbytes() // unit)
        self.unit = unit
        self.written = written
        self.writer = np.full(count, NOBODY)  # a program
        self.reader = np.full(count, NOBODY)  # a program, or MANY
        self.updated = np.zeros(count, dtype=bool)  # by an atomic
        self.write_segment = np.full(count, -1)
        self.read_segment = np.full(count, -1)
        self.read_lane = np.full(count, NOBODY)  # or MANY, in that segment
        self.last_site = np.full(count, -1)
        self.claim = np.zeros(count, dtype=np.int64)

    def bytes_of(self, at: Array) -> Array:
        return at[:, None] * self.unit + np.arange(self.unit)


class Argument:
    """A tensor handed to a launch."""

    def __init__(self, name: str, tensor: Tensor, shadow: Shadow) -> None:
        self.name = name
        self.shadow = shadow
        self.size = tensor.element_size()
        self.address = tensor.data_ptr()
        self.first_byte = tensor.storage_offset() * self.size
        steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        span = 1 + sum(steps) if tensor.numel() else 0
        starts = torch.zeros(max(1, span * self.size), dtype=torch.bool)
        if tensor.numel():
            strides = [stride * self.size for stride in tensor.stride()]
            starts.as_strided(tensor.shape, strides).fill_(True)
        self.starts = starts.numpy()  # whether an element begins at this byte

    def holds(self, offset: Array) -> Array:
        near = offset.clip(0, len(self.starts) - 1)
        return (near == offset) & self.starts[near]


class Access(NamedTuple):
    """The lanes of an op that touch one argument."""

    kind: str
    argument: Argument
    at: Array  # units of the storage
    lane: Array
    element: Array  # of the argument, for messages
    value: Array  # that a store writes
    held: Array  # what is there before


class Checker:
    """The state of a launch, and what takes the place of the interpreter's functions."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.launches: list[Launch] = []
        self.memory = Memory()
        self._random = np.random.default_rng(seed)
        self._arguments: list[Argument] = []
        self._waiting: list[int] = []
        self._shapes: dict[tuple[int, ...], int] = {}
        self._sites: list[Site] = []
        self._segment = self._program = 0
        self._fault: Fault | None = None

    def hooks(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        builder = interpreter.interpreter_builder
        yield interpreter.GridExecutor, "__call__", self._launch(interpreter.GridExecutor.__call__)
        yield interpreter, "_implicit_cvt", self._convert(interpreter._implicit_cvt)
        yield builder, "set_grid_idx", self._next_program(builder)
        yield builder, "create_barrier", self._barrier
        for name, kind, pointers, mask in (  # the two are places among the arguments
            ("create_masked_load", "load", 0, 1),
            ("create_masked_store", "store", 0, 2),
            ("create_atomic_rmw", "atomic", 1, 3),
            ("create_atomic_cas", "atomic", 0, None),
        ):
            original = getattr(builder, name)
            yield builder, name, self._memory_op(kind, pointers, mask, original)

    def _launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.memory.paused = True
            try:
                self._begin(executor, args, kwargs)
                return original(executor, *args, **kwargs)
            except Exception:
                if self._fault is not None:  # the interpreter wraps what a kernel raises
                    raise self._fault.with_traceback(None) from None
                raise
            finally:
                self.memory.paused = False

        return launch

    def _begin(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = {name: value for name, value in kwargs.items() if name in executor.arg_names}
        given = inspect.getcallargs(executor.fn, *args, **known)
        constants = {name: given.pop(name) for name in executor.constexprs}
        given = {name: _described(value) for name, value in given.items()}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        shadows = self._shadows(list(tensors.values()))
        self._arguments = [
            Argument(name, tensor, shadows[tensor.untyped_storage().data_ptr()])
            for name, tensor in tensors.items()
        ]
        self._waiting = list(range(len(self._arguments)))
        self._shapes, self._sites, self._fault = {}, [], None
        self.launches.append(Launch(executor.fn.__name__, constants))

    def _shadows(self, tensors: list[Tensor]) -> dict[int, Shadow]:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        units = dict.fromkeys(storages, 8)
        for tensor in tensors:
            address = tensor.untyped_storage().data_ptr()
            units[address] = min(units[address], tensor.element_size())
        return {
            address: Shadow(storage, units[address], self.memory.written(storage))
            for address, storage in storages.items()
        }

    def _convert(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def convert(arg: Any) -> Any:
            if _described(arg) is not arg:
                return original(arg)  # which converts the tensor in its turn
            if hasattr(arg, "data_ptr") or isinstance(arg, tuple):
                if not isinstance(arg, Tensor):
                    raise NotImplementedError(f"the checker does not follow a {type(arg)}")
                number = self._waiting.pop(0)
                assert self._arguments[number].address == arg.data_ptr()
                result = original(arg)
                result.handle.data = result.handle.data + (np.uint64(number) << TAG_SHIFT)
                return result
            return original(arg)

        return convert

    def _next_program(self, builder: Any) -> Callable[[int, int, int], None]:
        original = builder.set_grid_idx
        order: Iterator[int] = iter(())

        def next_program(x: int, y: int, z: int) -> None:
            nonlocal order
            if x == y == z == 0:
                order = iter(self._random.permutation(int(np.prod(builder.grid_dim))).tolist())
            self._program = next(order)
            self._segment += 1
            place = tuple(int(n) for n in np.unravel_index(self._program, builder.grid_dim))
            self.launches[-1].order.append(place)  # type: ignore[arg-type]
            original(*place)

        return next_program

    def _barrier(self) -> None:
        self._segment += 1
        launch = self.launches[-1]
        launch.ops["barrier"] += 1
        launch.sites.add(_site())

    def _memory_op(
        self, kind: str, pointers: int, mask: int | None, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        def operate(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            tagged = given[pointers]
            value = given[1].data if kind == "store" else np.zeros(())
            self._check(kind, tagged, np.True_ if mask is None else given[mask].data, value)
            given[pointers] = interpreter.TensorHandle(tagged.data & ADDRESS, tagged.dtype)
            return original(*given, **kwargs)

        return operate

    def _check(self, kind: str, pointers: Any, mask: Any, value: Array) -> None:
        launch, site = self.launches[-1], _site()
        launch.ops[kind] += 1
        launch.sites.add(site)
        self._sites.append(site)
        shape = pointers.data.shape
        live = np.flatnonzero(np.broadcast_to(mask, shape))
        launch.lanes[kind] += len(live)
        tagged = pointers.data.reshape(-1)[live]
        lane = live + (self._shapes.setdefault(shape, len(self._shapes)) << 32)
        value = np.broadcast_to(value, shape).reshape(-1)[live]
        numbers = tagged >> TAG_SHIFT
        for number in np.unique(numbers):
            own = numbers == number
            access = self._locate(kind, int(number), pointers, tagged[own], lane[own], value[own])
            {"load": self._load, "store": self._store, "atomic": self._atomic}[kind](access)
            access.argument.shadow.last_site[access.at] = len(self._sites) - 1

    def _locate(
        self, kind: str, number: int, pointers: Any, tagged: Array, lane: Array, value: Array
    ) -> Access:
        """The units that the lanes touch; fails outside of the tensor."""
        if number >= len(self._arguments):
            self._fail(f"{kind} at an address far outside every tensor")
        argument = self._arguments[number]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if size != argument.size:
            raise NotImplementedError(f"a pointer to {argument.name} was cast to another size")
        offset = (tagged & ADDRESS).astype(np.int64) - argument.address
        element = offset // size
        at = (offset + argument.first_byte) // argument.shadow.unit
        access = Access(kind, argument, at, lane, element, value, value)
        self._refuse(~argument.holds(offset), access, "lies outside of the tensor")
        if kind == "store":
            everywhere = np.ones(len(tagged), dtype=bool)
            access = access._replace(
                held=interpreter._interpreter.load(
                    tagged & ADDRESS, everywhere, np.zeros_like(value), value.dtype
                )
            )
        parts = size // argument.shadow.unit
        if parts == 1:
            return access
        at = (at[:, None] + np.arange(parts)).reshape(-1)
        return Access(kind, argument, at, *(field.repeat(parts) for field in access[3:]))

    def _load(self, access: Access) -> None:
        shadow, at, lane = access.argument.shadow, access.at, access.lane
        self._refuse(
            shadow.write_segment[at] == self._segment,
            access,
            "follows a write of this program without a barrier",
        )
        self._refuse_others(shadow.writer[at], access, "meets a write of another program")
        self._refuse(shadow.updated[at], access, "meets an atomic")
        self._refuse_unwritten(access)
        before = shadow.read_lane[at]
        alone = (shadow.read_segment[at] != self._segment) | (before == lane)
        now = np.where(alone, lane, MANY)
        shadow.read_lane[at] = now
        # Where several lanes of this op read, the last of them has left its number.
        shadow.read_lane[at[shadow.read_lane[at] != now]] = MANY
        shadow.read_segment[at] = self._segment
        reader = shadow.reader[at]
        own = (reader == NOBODY) | (reader == self._program)
        shadow.reader[at] = np.where(own, self._program, MANY)

    def _store(self, access: Access) -> None:
        shadow, at, lane = access.argument.shadow, access.at, access.lane
        shadow.claim[at] = np.arange(len(at))
        rival = access.value[shadow.claim[at]]
        self._refuse(_differ(rival, access.value), access, "is of two lanes at once")
        changes = _differ(access.held, access.value)
        self._refuse(
            changes & (shadow.write_segment[at] == self._segment),
            access,
            "follows a write of this program without a barrier",
        )
        self._refuse(
            (shadow.read_segment[at] == self._segment) & (shadow.read_lane[at] != lane),
            access,
            "follows a read of another lane without a barrier",
        )
        writer = np.where(changes, shadow.writer[at], NOBODY)
        self._refuse_others(writer, access, "meets a write of another program")
        self._refuse_others(shadow.reader[at], access, "meets a read of another program")
        self._refuse(shadow.updated[at], access, "meets an atomic")
        shadow.writer[at] = self._program
        shadow.write_segment[at] = self._segment
        if shadow.written is not None:
            shadow.written[shadow.bytes_of(at)] = True

    def _atomic(self, access: Access) -> None:
        shadow, at = access.argument.shadow, access.at
        self._refuse(shadow.writer[at] != NOBODY, access, "meets a plain write of the launch")
        self._refuse(shadow.reader[at] != NOBODY, access, "meets a plain read of the launch")
        self._refuse_unwritten(access)
        shadow.updated[at] = True

    def _refuse_others(self, program: Array, access: Access, why: str) -> None:
        self._refuse((program != NOBODY) & (program != self._program), access, why)

    def _refuse_unwritten(self, access: Access) -> None:
        shadow = access.argument.shadow
        if shadow.written is not None:
            written = shadow.written[shadow.bytes_of(access.at)].all(axis=1)
            self._refuse(~written, access, "reads memory that nothing wrote")

    def _refuse(self, bad: Any, access: Access, why: str) -> None:
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        shadow = access.argument.shadow
        before = ""
        if access.at[first] in range(len(shadow.last_site)):
            last = shadow.last_site[access.at[first]]
            before = f", last touched at {self._sites[last]}" if last >= 0 else ""
        lane = int(access.lane[first]) & (2**32 - 1)
        self._fail(
            f"{access.kind} of {access.argument.name}[{access.element[first]}] by lane {lane} "
            f"{why}{before}"
        )

    def _fail(self, what: str) -> None:
        launch = self.launches[-1]
        self._fault = Fault(
            f"{self._sites[-1]}: {what} ({launch.kernel}, program {launch.order[-1]}, "
            f"seed {self.seed})"
        )
        raise self._fault


def _differ(one: Array, other: Array) -> Array:
    """Bit for bit, so that NaN equals NaN."""
    bits = np.dtype(f"u{one.dtype.itemsize}")
    return np.ascontiguousarray(one).view(bits) != np.ascontiguousarray(other).view(bits)


def _described(arg: Any) -> Any:
    """The tensor of a descriptor; else the argument."""
    return arg.base if type(arg).__name__ == "TensorDescriptor" else arg


def _site() -> Site:
    """The line of the kernel that is being run."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith((TRITON, __file__)):
        frame = frame.f_back
    return Site(frame.f_code.co_filename, frame.f_lineno)


@contextmanager
def checking(seed: int | None = None) -> Iterator[list[Launch]]:
    """Checks what runs inside; yields the list of launches, which grows. Not to be nested."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the checker needs TRITON_INTERPRET=1, set before Triton is imported")
    if seed is None:
        seed = int(np.random.default_rng().integers(2**31))
    checker = Checker(seed)
    with ExitStack() as stack:
        for owner, name, hook in list(checker.hooks()):
            stack.enter_context(mock.patch.object(owner, name, hook))
        stack.enter_context(checker.memory)
        try:
            yield checker.launches
        except Exception:
            print(f"checking(seed={seed}) repeats the order of the programs", file=sys.stderr)
            raise
