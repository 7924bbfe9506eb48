"""Every kernel under the checker of kernels, and the checker itself: faults that it must find."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from ssd_kernels import _dispatch, _encoder, _segments, _tuning
from ssd_kernels._triton import jit, tl

if not _dispatch.TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.kernels.cases import Check, Draw, Op, gradients
from tests.kernels.checker import Fault, Launch, Site, checking
from tests.kernels.ops import OPS, cases, modules

# "triton" is in the name of every test here, for tests/test_interpreter.py picks them by it.
pytestmark = pytest.mark.skipif(
    not _dispatch.interpreted(), reason="the checker needs TRITON_INTERPRET=1"
)
SEED = 7
MEMORY_OPS = ("load", "store", "debug_barrier")


class Function(NamedTuple):
    """A @jit function of the package and where its source is."""

    jitted: Any
    tree: ast.FunctionDef  # its line 1 is the line of "def"
    first: int  # the line of "def" in the file

    @property
    def name(self) -> str:
        return self.tree.name

    @property
    def file(self) -> str:
        return inspect.getsourcefile(self.jitted.fn) or ""


LINEAR_INHIBIT = importlib.import_module("ssd_kernels.linear_inhibit")  # not the function
CASES = cases("checked")
TILES = {name: {"default": rows} for op in OPS.values() for name, rows in op.tiles.items()}


def limits(case: str) -> list[tuple[Any, str, Any]]:
    """Few rows at a time for some, few groups to select from for others; slots that are sorted."""
    if "networks" in case or case.endswith("gaba"):
        return [(LINEAR_INHIBIT, "slab_rows", lambda *_: 4), (_encoder, "WORKSPACE", 1)]
    if "ties" in case:
        return [(_encoder, "MAX_GROUPS", 3)]
    return [(_segments, "MAX_RANKED", 0)] if "sorted" in case else []


def run_case(case: str) -> None:
    """With tiles so short that the smallest shapes have several, and a short last one."""
    op, check = CASES[case]
    torch.manual_seed(0)
    with ExitStack() as stack:
        for limit in limits(case):
            stack.enter_context(mock.patch.object(*limit))
        stack.enter_context(mock.patch.object(_tuning, "TABLE", TILES))
        stack.enter_context(mock.patch.dict("os.environ", SSD_KERNELS_IMPL="triton"))
        if callable(check):
            check()
        else:
            compare(op, check)


def compare(op: Op, check: Check) -> None:
    found = []
    for impl in (check.impl, "reference"):
        torch.manual_seed(0)
        wide = impl == "reference" and check.tolerance > 0
        draw = Draw(dtype=check.dtype, wide=wide, whole=not check.tolerance)
        results = op.prepare(draw, check.given)(impl)
        found.append([*results, *gradients(results, draw.leaves)])
    bounds: dict[str, Any] = {"rtol": check.tolerance, "atol": check.tolerance / 10}
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(
            got, expected, **bounds, equal_nan=True, check_dtype=not check.tolerance
        )


@cache
def functions() -> list[Function]:
    """Every @jit function that the packages define."""
    found = []
    for module in modules():
        for value in vars(module).values():
            plain = getattr(value, "fn", None)
            if inspect.isfunction(plain) and plain.__module__ == module.__name__:
                lines, start = inspect.getsourcelines(plain)
                skipped = next(n for n, line in enumerate(lines) if line.startswith("def "))
                tree = ast.parse("".join(lines[skipped:])).body[0]
                assert isinstance(tree, ast.FunctionDef)
                found.append(Function(value, tree, start + skipped))
    return found


def memory_calls(function: Function) -> list[ast.Call]:
    """tl.load, tl.store, tl.atomic_.. and tl.debug_barrier, in order."""
    return [
        node
        for node in ast.walk(function.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "tl"
        and (node.func.attr in MEMORY_OPS or node.func.attr.startswith("atomic_"))
    ]


def reached(function: Function, node: ast.expr, sites: set[Site]) -> bool:
    """Whether the node was run."""
    end = node.end_lineno or node.lineno
    lines = range(function.first + node.lineno - 1, function.first + end)
    return any(site.file == function.file and site.line in lines for site in sites)


@cache
def launches(case: str) -> list[Launch]:
    with checking(SEED) as done:
        run_case(case)
    return done


@cache
def sites(case: str) -> set[Site]:
    return set().union(*(launch.sites for launch in launches(case)))


@cache
def cost(case: str) -> int:
    return sum(launch.ops.total() for launch in launches(case))


@pytest.mark.parametrize("case", CASES)
def test_triton_ops_are_clean(case: str) -> None:
    launches(case)


@cache
def all_launches() -> list[Launch]:
    return [launch for case in CASES for launch in launches(case)]


def kernels() -> set[str]:
    """What the package launches, name[grid](..), and what is called a kernel."""
    jitted = {f.name for f in functions()}
    launched = {
        node.func.value.id
        for module in modules()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    return {name for name in jitted if name in launched or name.endswith("_kernel")}


def test_triton_kernels_were_all_launched() -> None:
    assert kernels()
    assert {launch.kernel for launch in all_launches()} == kernels()


def test_triton_switches_were_all_on_and_off() -> None:
    """Every tl.constexpr that is a bool, of every kernel."""
    seen: dict[tuple[str, str], set[bool]] = {}
    for launch in all_launches():
        for name, value in launch.constants.items():
            if isinstance(value, bool):
                seen.setdefault((launch.kernel, name), set()).add(value)
    assert seen
    assert not {switch: values for switch, values in seen.items() if len(values) < 2}


def test_triton_memory_ops_were_all_run() -> None:
    ran = set().union(*(launch.sites for launch in all_launches()))
    calls = [(f, call) for f in functions() for call in memory_calls(f)]
    assert calls
    missed = [
        f"{f.name}:{f.first + call.lineno - 1} {ast.unparse(call)}"
        for f, call in calls
        if not reached(f, call, ran)
    ]
    assert not missed


# The checker itself: shipped kernels with a fault put in.


@contextmanager
def changed(function: Function, node: ast.expr, text: str) -> Iterator[None]:
    """The function with other text, on one line, in the place of a node."""
    rewriter = function.jitted.rewriter
    prepare = rewriter._prepare_source

    def edited(lines: list[str]) -> str:
        rows = prepare(lines).split("\n")
        assert node.lineno == node.end_lineno
        row = rows[node.lineno - 1].encode()
        end = node.end_col_offset
        rows[node.lineno - 1] = (row[: node.col_offset] + text.encode() + row[end:]).decode()
        return "\n".join(rows)

    with mock.patch.object(rewriter, "_prepare_source", edited):
        other = rewriter.rewrite_ast()
    with mock.patch.dict(type(function.jitted).rewritten_fn, {function.jitted.fn: other}):
        yield


def found(
    function: Function, node: ast.expr, text: str, calls: list[ast.Call]
) -> AssertionError | None:
    """The first fault or wrong result of the cases that run one of these memory ops."""
    for case in sorted(CASES, key=cost):
        if any(reached(function, call, sites(case)) for call in calls):
            with changed(function, node, text), checking(SEED):
                try:
                    run_case(case)
                except AssertionError as fault:
                    return fault
    return None


def barriers() -> list[Any]:
    return [
        pytest.param(f, call, id=f"{f.name}-{call.lineno}")
        for f in functions()
        for call in memory_calls(f)
        if ast.unparse(call) == "tl.debug_barrier()"
    ]


@pytest.mark.parametrize(("function", "barrier"), barriers())
def test_triton_barrier_taken_out_is_found(function: Function, barrier: ast.Call) -> None:
    fault = found(function, barrier, "None", [barrier])
    assert fault is not None
    assert "without a barrier" in str(fault)


# Without the bound these touch a place of the program's own, or a row whose factor is 0 or that is
# not kept.
HARMLESS = (
    "tl.load(weight + neuron[:, None] * weight_stride",
    "tl.load(units + sample",
    "tl.load(norms + sample",
    "tl.store(buffer + rank, packed, mask=rank < best)",
)


def bounds() -> list[Any]:
    """Every a < b in the mask of memory ops, or in a name that their masks are made of."""
    params = []
    for f in functions():
        users: dict[ast.expr, list[ast.Call]] = {}
        for call in memory_calls(f):
            if not ast.unparse(call).startswith(HARMLESS):
                for node in mask_parts(f, call):
                    users.setdefault(node, []).append(call)
        params += [
            pytest.param(f, node, calls, id=f"{f.name}-{node.lineno}-{ast.unparse(node)}")
            for node, calls in users.items()
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt)
        ]
    return params


def mask_parts(function: Function, call: ast.Call) -> list[ast.expr]:
    masks = [word.value for word in call.keywords if word.arg == "mask"]
    nodes = [node for mask in masks for node in ast.walk(mask) if isinstance(node, ast.expr)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assigned = [node for node in ast.walk(function.tree) if isinstance(node, ast.Assign)]
    return nodes + [a.value for a in assigned if ast.unparse(a.targets[0]) in names]


@pytest.mark.parametrize(("function", "bound", "calls"), bounds())
def test_triton_mask_off_by_one_is_found(
    function: Function, bound: ast.Compare, calls: list[ast.Call]
) -> None:
    left, right = ast.unparse(bound.left), ast.unparse(bound.comparators[0])
    assert found(function, bound, f"({left} <= {right})", calls) is not None


# The checker itself: kernels made for one fault each.


@jit
def _move_kernel(source, out, reads, writes, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    value = tl.load(source + lane, mask=lane < reads, other=0)
    tl.store(out + lane, value, mask=lane < writes)


@jit
def _write_read_kernel(data, out, STEP: tl.constexpr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(data + lane, lane)
    total = tl.sum(lane, axis=0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + lane, total + tl.load(data + (lane + STEP) % SIZE))


@jit
def _read_write_kernel(data, STEP: tl.constexpr, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    value = tl.load(data + (lane + STEP) % SIZE)
    if BARRIER:
        tl.debug_barrier()
    tl.store(data + lane, value)


@jit
def _write_twice_kernel(data, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(data + lane, lane)
    if BARRIER:
        tl.debug_barrier()
    tl.store(data + lane, lane + 1)


@jit
def _scatter_kernel(data, places, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(data + tl.load(places + lane), lane)


@jit
def _stamp_kernel(data, places, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(data + tl.load(places + lane), 7)


@jit
def _share_kernel(data, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(data + tl.program_id(0) * STRIDE + lane, tl.program_id(0) * SIZE + lane)


@jit
def _neighbour_kernel(data, out, STEP: tl.constexpr):
    program = tl.program_id(0)
    tl.store(data + program, 1)
    tl.debug_barrier()
    tl.store(out + program, tl.load(data + (program + STEP) % tl.num_programs(0)))


@jit
def _add_kernel(total, out, PLAIN: tl.constexpr, CAS: tl.constexpr):
    if CAS:
        tl.atomic_cas(total, 0, 1)
    else:
        tl.atomic_add(total, 1, sem="relaxed")
    if PLAIN:
        tl.store(out + tl.program_id(0), tl.load(total))


@jit
def _bytes_kernel(octets, words, BARRIER: tl.constexpr):
    tl.store(octets + 5, 1)
    if BARRIER:
        tl.debug_barrier()
    tl.store(words, tl.load(words + 1))


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def move(source: torch.Tensor, reads: int, writes: int) -> None:
    _move_kernel[(1,)](source, numbers(5), reads, writes, SIZE=8)


def write_read(step: int, barrier: bool) -> None:
    _write_read_kernel[(1,)](numbers(8), numbers(8), STEP=step, BARRIER=barrier, SIZE=8)


def read_write(step: int, barrier: bool) -> None:
    _read_write_kernel[(1,)](numbers(8), STEP=step, BARRIER=barrier, SIZE=8)


def write_twice(barrier: bool) -> None:
    _write_twice_kernel[(1,)](numbers(8), BARRIER=barrier, SIZE=8)


def scatter(*places: int) -> None:
    _scatter_kernel[(1,)](numbers(4), torch.tensor(places), SIZE=4)


def stamp() -> None:
    """Two lanes of two programs write one value to one address."""
    _stamp_kernel[(2,)](numbers(4), torch.tensor([3, 1, 3, 0]), SIZE=4)


def share(stride: int) -> None:
    _share_kernel[(2,)](numbers(16), STRIDE=stride, SIZE=8)


def neighbour(step: int) -> None:
    _neighbour_kernel[(3,)](numbers(3), numbers(3), STEP=step)


def add(plain: bool = False, cas: bool = False) -> None:
    _add_kernel[(3,)](numbers(1), numbers(3), PLAIN=plain, CAS=cas)


def octets(barrier: bool) -> None:
    data = numbers(2)
    _bytes_kernel[(1,)](data.view(torch.uint8), data, BARRIER=barrier)


def stray() -> None:
    """Reads one tensor of the launch through the pointer of another."""
    pool = numbers(16)
    _move_kernel[(1,)](pool[:4], pool[8:13], 5, 5, SIZE=8)


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "read outside": (lambda: move(numbers(5), 6, 5), r"load of source\[5\].*outside"),
    "read between rows": (lambda: move(torch.zeros(5, 2)[:, 0], 2, 2), r"source\[1\].*outside"),
    "read of a neighbour": (stray, r"load of source\[4\].*outside"),
    "write outside": (lambda: move(numbers(8), 8, 6), r"store of out\[5\].*outside"),
    "unwritten": (lambda: move(torch.empty(5), 5, 5), "load of source.*nothing wrote"),
    "write, write": (lambda: write_twice(False), "follows a write"),
    "write, write of one op": (lambda: scatter(0, 1, 2, 0), "two lanes at once"),
    "write, read": (lambda: write_read(1, False), "load of data.*follows a write"),
    "write, read of a lane": (lambda: write_read(0, False), "load of data.*follows a write"),
    "read, write": (lambda: read_write(1, False), "store of data.*follows a read"),
    "write, read in bytes": (lambda: octets(False), r"load of words\[1\].*follows a write"),
    "programs that write": (lambda: share(0), "meets a write of another program"),
    "programs that read and write": (lambda: neighbour(1), "meets a (read|write) of another"),
    "plain read of an atomic's": (lambda: add(plain=True), "meets a"),
    "plain read of a cas'": (lambda: add(plain=True, cas=True), "meets a"),
    "torch": (lambda: torch.empty(3).sum(), "sum reads memory that nothing wrote"),
    "torch in place": (lambda: torch.empty(3).add_(1), "add_ reads memory that nothing wrote"),
}
CLEAN: dict[str, Callable[[], Any]] = {
    "read and write": lambda: move(numbers(5), 5, 5),
    "filled": lambda: move(torch.empty(5).fill_(1), 5, 5),
    "product into fresh memory": lambda: move(
        torch.mm(torch.ones(5, 1), torch.ones(1, 1), out=torch.empty(5, 1)), 5, 5
    ),
    "write, write": lambda: write_twice(True),
    "write, write of one op": lambda: scatter(3, 1, 2, 0),
    "write, read": lambda: write_read(1, True),
    "read, write": lambda: read_write(1, True),
    "read, write of a lane": lambda: read_write(0, False),
    "write, read in bytes": lambda: octets(True),
    "programs that write": lambda: share(8),
    "writes of one value": stamp,
    "programs that read and write": lambda: neighbour(0),
    "atomics": add,
    "cas": lambda: add(cas=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_triton_fault_is_found(fault: str) -> None:
    run, message = FAULTS[fault]
    with pytest.raises(Fault, match=message), checking(SEED):
        run()


def test_triton_fault_names_place_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Fault) as caught, checking(SEED):
        write_read(1, False)
    line = inspect.getsourcelines(_write_read_kernel.fn)[1]
    source = inspect.getsource(_write_read_kernel.fn).split("\n")
    places = [line + n for n, text in enumerate(source) if "tl.store" in text]
    assert f"checking(seed={SEED})" in capsys.readouterr().err
    assert str(caught.value) == (
        f"test_checker.py:{places[1]}: load of data[1] by lane 0 follows a write of this program "
        f"without a barrier, last touched at test_checker.py:{places[0]} "
        f"(_write_read_kernel, program (0, 0, 0), seed {SEED})"
    )


@pytest.mark.parametrize("name", CLEAN)
def test_triton_clean_kernel_passes(name: str) -> None:
    with checking(SEED) as done:
        CLEAN[name]()
    assert len(done) == 1


def test_triton_log() -> None:
    with checking(SEED) as done:
        move(numbers(5), 3, 2)
        write_twice(True)
    first, second = done
    assert (first.kernel, first.constants) == ("_move_kernel", {"SIZE": 8})
    assert first.ops == {"load": 1, "store": 1}
    assert first.lanes == {"load": 3, "store": 2}
    assert second.ops == {"store": 2, "barrier": 1}
    assert len(second.sites) == 3


def test_triton_programs_run_in_a_random_order() -> None:
    orders = []
    for seed in (1, 1, 2):
        with checking(seed) as done:
            _add_kernel[(3, 4)](numbers(1), numbers(3), PLAIN=False, CAS=False)
        orders.append(done[0].order)
    places = [(x, y, 0) for x in range(3) for y in range(4)]
    assert sorted(orders[0]) == places
    assert orders[0] != places
    assert orders[0] == orders[1] != orders[2]


def test_triton_fresh_memory_holds_no_number() -> None:
    with checking(SEED):
        fresh = [
            torch.empty(3),
            torch.empty_like(torch.ones(3)),
            torch.ones(2).new_empty(3),
            torch.empty_strided((3,), (2,)),
        ]
        whole = torch.empty(3, dtype=torch.int64)
    assert all(tensor.isnan().all() for tensor in fresh)
    assert (whole > 2**60).all()


def test_triton_written_parts_are_told_from_the_rest() -> None:
    with checking(SEED):
        data = torch.empty(4, 3)
        data[1:3] = 1
        assert data[1:3].sum() == 6
        with pytest.raises(Fault, match="nothing wrote"):
            data[1:].sum()
        out = torch.empty(5, dtype=torch.int32)
        _move_kernel[(1,)](numbers(5), out, 5, 3, SIZE=8)
        assert out[:3].tolist() == [0, 1, 2]
        with pytest.raises(Fault, match="nothing wrote"):
            out.clone()


def test_triton_compiled_kernels_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), checking(SEED):
        pass


def test_triton_runs_as_ever_afterwards() -> None:
    with pytest.raises(Fault), checking(SEED):
        write_read(1, False)
    write_read(1, False)
    torch.empty(3).add_(1)
