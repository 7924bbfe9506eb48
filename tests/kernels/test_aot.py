"""Every launch compiles for its GPU, fits it, and runs out of no registers."""

from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec

import aot
import gpus
import launches
import pytest
from aot import Resources, Row
from launches import BF16, FP32, Call
from rich.console import Console

from ssd_kernels import _dispatch, _tuning

pytestmark = [
    pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(
        _dispatch.interpreted(), reason="Triton's interpreter replaces the compiler in this process"
    ),
]
# Triton 3.2 keeps what it specialises in another form; knobs came after it.
readable = pytest.mark.skipif(
    _dispatch.TRITON and find_spec("triton.knobs") is None, reason="Triton is older than 3.4"
)
KERNELS = sorted(launches.kernels())
FAMILIES = list(gpus.GPUS)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        Console(width=aot.WIDTH).print("", aot.table(rows))


def compiled(family: str, kernel: str, report: list[Row]) -> list[str]:
    """Compiles what is chosen of a kernel; says what is wrong with it."""
    rows = [
        Row(family, launch, aot.compile_launch(launch, family))
        for launch in aot.chosen(family)
        if launch.name == kernel
    ]
    report += rows
    residents = aot.kept()
    return [text for row in rows for text in aot.complaints(row, residents)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launch_fits(kernel: str, report: list[Row]) -> None:
    assert compiled(aot.FULL, kernel, report) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != aot.FULL])
@pytest.mark.parametrize("kernel", KERNELS)
def test_first_launch_fits_elsewhere(family: str, kernel: str, report: list[Row]) -> None:
    assert compiled(family, kernel, report) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_and_tuning_row_is_launched(family: str) -> None:
    recorded = launches.grid(family)
    assert {launch.name for launch in recorded.launches} == set(KERNELS)
    rows = {
        (op, number) for op in _tuning.TABLE for number, _ in enumerate(_tuning.rows(op, family))
    }
    assert recorded.rows == rows


@readable
def test_every_flag_is_launched_on_and_off() -> None:
    seen: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for launch in launches.grid(aot.FULL).launches:
        for name, value in launch.constants().items():
            if isinstance(value, bool):
                seen[launch.name, name].add(value)
    assert len(seen) > len(KERNELS)
    assert {flag for flag, values in seen.items() if len(values) == 1} == set()


@readable
def test_launches_are_specialised_as_their_arguments_are() -> None:
    given = {"B": 128, "R": 10000, "k": 10, "C": 64}
    calls = [
        Call("sparse_linear", FP32, given),
        Call("sparse_linear", FP32, given | {"aligned": False}),
        Call("sparse_linear", FP32, given | {"B": 256}),
        Call("sparse_linear", FP32, given | {"C": 1}),
    ]
    whole, sliced, single = launches.record("sm90", calls).launches
    assert {"weight", "weight_stride", "outputs"} <= whole.aligned()
    assert "weight" not in sliced.aligned()
    assert "weight_stride" not in sliced.aligned()
    assert single.constants()["outputs"] == 1
    assert "outputs" not in whole.constants()


@readable
def test_a_launch_takes_the_rows_of_its_family() -> None:
    call = Call("linear_topk", BF16, {"B": 1024, "d": 256, "R": 10000, "k": 10})
    blocks = {
        family: launches.record(family, [call]).launches[0].constants()["BK"]
        for family in ("sm80", "sm90")
    }
    assert blocks == {"sm80": 32, "sm90": 64}


@pytest.mark.parametrize(
    ("family", "warps", "registers", "shared", "expected"),
    [
        ("sm90", 8, 128, 0, 2),
        ("sm90", 8, 131, 0, 1),
        ("sm90", 4, 32, 0, 16),
        ("sm90", 1, 32, 0, 32),
        ("sm90", 4, 32, 100 * 1024, 2),
        ("sm80", 4, 32, 100 * 1024, 1),
        ("sm120", 4, 32, 0, 12),
        ("sm120", 1, 32, 0, 24),
        ("gfx942", 4, 32, 0, None),
    ],
)
def test_resident_programs(
    family: str, warps: int, registers: int, shared: int, expected: int | None
) -> None:
    assert gpus.resident(family, warps, registers, shared) == expected


@pytest.mark.parametrize(
    ("resources", "word"),
    [
        (Resources(200, 0, 8, 8), "spills"),
        (Resources(64, 0, 16, 8), "spills"),
        (Resources(64, 2**18, 0, 8), "shared memory"),
        (Resources(64, 0, 0, 7), "not 8"),
    ],
)
def test_complaints(resources: Resources, word: str) -> None:
    launch = launches.grid("sm90").launches[0]
    residents = {("sm90", launch.name, launch.call, str(launch.warps)): 8}
    (text,) = aot.complaints(Row("sm90", launch, resources), residents)
    assert word in text
    fits = Row("sm90", launch, Resources(64, 0, 8, 8))
    assert aot.complaints(fits, residents) == []
    (text,) = aot.complaints(fits, {})
    assert "--write" in text


def test_the_kept_table_is_read() -> None:
    residents = aot.kept()
    if residents is None:
        pytest.skip("no table is kept for this version of Triton; aot.py --all --write makes it")
    recorded = launches.grid("sm90").launches
    expected = {("sm90", one.name, one.call, str(one.warps)) for one in recorded}
    assert {key for key in residents if key[0] == "sm90"} == expected
    assert all(1 <= resident <= 32 for resident in residents.values())
