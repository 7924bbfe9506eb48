"""Data sets: reading, refusing, falling back, splitting into tasks, ordering samples."""

import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from kill_resume import write_features
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from ssd.config import PRESETS, resolve
from ssd.data import (
    INCREMENT,
    MNIST_5K,
    SOURCES,
    Dataset,
    Source,
    _mix,
    _mix_tensor,
    _signed,
    class_order,
    default_root,
    hold_out,
    load,
    shuffled,
    split,
)
from ssd.errors import UserError


def small(classes: int = 6, per_class: int = 5) -> Dataset:
    y = torch.arange(classes).repeat(per_class)
    x = torch.rand(len(y), 3)
    return Dataset("small", x, y, x[: 2 * classes], y[: 2 * classes])


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, np.ndarray]:
    write_features(tmp_path / "f.npz", 40, 3)
    with np.load(tmp_path / "f.npz") as archive:
        return dict(archive)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        print("Downloading, trying mirrors")
        raise URLError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)


def test_npz_and_pt_hold_the_same(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    pairs = [(tensors[f"x_{part}"], tensors[f"y_{part}"]) for part in ("train", "test")]
    pairs[0][0].requires_grad_()
    torch.save(tuple(pairs), tmp_path / "f.pt")
    npz, pt = (load("features", tmp_path, tmp_path / f"f.{end}") for end in ("npz", "pt"))
    assert npz.checksum() == pt.checksum()
    assert npz.x_train.dtype == torch.float32
    assert npz.y_test.dtype == torch.int64
    np.testing.assert_array_equal(pt.x_train.numpy(), arrays["x_train"])
    assert npz.classes == 4


def test_checksum_sees_every_part() -> None:
    data = small()
    for name in ("x_train", "y_train", "x_test", "y_test"):
        changed = {n: getattr(data, n).clone() for n in ("x_train", "y_train", "x_test", "y_test")}
        changed[name][-1] += 1
        assert Dataset("small", **changed).checksum() != data.checksum()
    flat = Dataset("small", data.x_train.reshape(-1, 1), data.y_train, data.x_test, data.y_test)
    assert flat.checksum() != data.checksum()


def change(key: str, value: object):
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays[key] = np.asarray(value(arrays[key]) if callable(value) else value)

    return edit


def set_at(index: int, value: float):
    def edit(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32 if array.ndim == 2 else np.int64)
        array[index] = value
        return array

    return edit


BAD_ARRAYS = {
    "nan": (change("x_train", set_at(3, np.nan)), "1 rows of x_train hold NaN"),
    "infinity": (change("x_test", set_at(0, np.inf)), "x_test hold NaN or infinity"),
    "negative label": (change("y_train", set_at(0, -1)), "y_train holds the label -1"),
    "gap": (change("y_train", lambda y: np.where(y == 2, 1, y)), "has the label 2"),
    "huge label": (change("y_train", set_at(0, 10**12)), "has the label 4"),
    "test label out of range": (change("y_test", set_at(0, 9)), "label 9 is in only one"),
    "float labels": (change("y_train", lambda y: y.astype(np.float32)), "must be integers"),
    "labels of two dimensions": (change("y_train", lambda y: y[:, None]), "must be integers [N]"),
    "fewer labels": (change("y_train", lambda y: y[1:]), "with N = 39"),
    "no samples": (change("x_train", lambda x: x[:0]), "with N = 40"),
    "no columns": (change("x_train", lambda x: x[:, :0]), "d > 0"),
    "other columns": (change("x_test", lambda x: x[:, 1:]), "samples are [3] in x_train"),
    "samples of another shape": (
        change("x_test", lambda x: x.reshape(-1, 1, 3)),
        "[1, 3] in x_test",
    ),
    "complex": (change("x_train", lambda x: x.astype(complex)), "must be real"),
    "text": (change("x_train", lambda x: x.astype(str)), "cannot be read"),
    "scalar": (change("x_train", 1.0), "must be real numbers"),
    "missing": (lambda arrays: arrays.pop("y_test"), "lacks y_test"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], case: str) -> None:
    edit, message = BAD_ARRAYS[case]
    edit(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError) as caught:
        load("features", tmp_path, tmp_path / "bad.npz")
    assert message in str(caught.value)


NOT_DENSE = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")  # of prototypes
@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense(
    tmp_path: Path, arrays: dict[str, np.ndarray], kind: str, key: str
) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if tensors[key].dim() < (2 if kind in ("csr", "nested", "jagged") else 1):
        tensors[key] = tensors[key].unsqueeze(1)
    tensors[key] = NOT_DENSE[kind](tensors[key])
    x_train, y_train, x_test, y_test = tensors.values()
    torch.save(((x_train, y_train), (x_test, y_test)), tmp_path / "f.pt")
    with pytest.raises(UserError, match=r"^[^\n]*f\.pt[^\n]*$") as caught:
        load("features", tmp_path, tmp_path / "f.pt")
    assert kind == "jagged" or f"{key} must be a dense tensor" in str(caught.value)


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    trap, files = tmp_path / "executed", [tmp_path / "bad.npz", tmp_path / "bad.pt"]
    np.savez(files[0], **{**arrays, "x_train": np.array([Malicious(trap)], dtype=object)})
    torch.save(((Malicious(trap), torch.zeros(1)), (torch.zeros(1, 2), torch.zeros(1))), files[1])
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Malicious(trap)))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(trap)))
    for file in [*files, tmp_path / "plain.npz", tmp_path / "plain.pt"]:
        with pytest.raises(UserError):
            load("features", tmp_path, file)
        assert not trap.exists(), file
    with open(files[1].with_name("plain.pt"), "rb") as stream:
        pickle.load(stream)
    assert trap.exists()  # the trap works where pickles are executed


@pytest.mark.parametrize("end", [".npz", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_features(
    tmp_path: Path, arrays: dict[str, np.ndarray], end: str, share: float
) -> None:
    path = tmp_path / f"f{end}"
    if end == ".pt":
        torch.save([(torch.rand(9, 2), torch.arange(9))] * 2, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cannot be read|other than tensors"):
        load("features", tmp_path, path)


def test_pt_of_another_layout(tmp_path: Path) -> None:
    torch.save([torch.rand(9, 2)], tmp_path / "f.pt")
    with pytest.raises(UserError, match="must hold"):
        load("features", tmp_path, tmp_path / "f.pt")


def test_folder_of_the_sdmlp_repository(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    for part in ("train", "test"):
        pair = torch.tensor(arrays[f"x_{part}"]), torch.tensor(arrays[f"y_{part}"])
        torch.save(pair, tmp_path / f"all_data_{part}.pt")
    expected = load("features", tmp_path, tmp_path / "f.npz")
    assert load("features", tmp_path, tmp_path).checksum() == expected.checksum()
    torch.save([pair], tmp_path / "all_data_test.pt")
    with pytest.raises(UserError, match=r"all_data_test\.pt must hold \(x, y\)"):
        load("features", tmp_path, tmp_path)
    (tmp_path / "all_data_train.pt").unlink()
    with pytest.raises(UserError, match=r"is a folder without all_data_train\.pt$"):
        load("features", tmp_path, tmp_path)


def test_features_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load("features", tmp_path, tmp_path / "absent.npz")
    (tmp_path / "f.csv").touch()
    with pytest.raises(UserError, match=r"\.npz or \.pt"):
        load("features", tmp_path, tmp_path / "f.csv")
    with pytest.raises(UserError, match="go together"):
        load("features", tmp_path)
    with pytest.raises(UserError, match="go together"):
        load("mnist", tmp_path, tmp_path / "f.csv")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """A folder in the layout and the sizes of MNIST."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60000), ("t10k", 10000)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count) % 251
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return raw


def test_mnist_from_idx_files(idx: Path) -> None:
    data = load("mnist", idx.parents[1])
    assert data.name == "mnist"
    assert data.x_train.shape == (60000, 784)
    assert data.x_test.shape == (10000, 784)
    assert data.x_train[250, 0] == pytest.approx(250 / 255)
    assert data.y_train[:12].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("size", [0, 10, 1000])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_truncated_idx(idx: Path, file: str, size: int) -> None:
    os.truncate(idx / file, size)
    with pytest.raises(UserError, match="is damaged") as caught:
        load("mnist", idx.parents[1])
    assert "\n" not in str(caught.value)


def test_idx_of_another_size(idx: Path) -> None:
    write_idx(idx / "t10k-images-idx3-ubyte", np.zeros((100, 28, 28), dtype=np.uint8))
    with pytest.raises(UserError, match="is damaged"):
        load("mnist", idx.parents[1])
    write_idx(idx / "t10k-images-idx3-ubyte", np.zeros((10000, 28, 28), dtype=np.uint8))
    write_idx(idx / "t10k-labels-idx1-ubyte", np.full(10000, 200, dtype=np.uint8))
    with pytest.raises(UserError, match="only one of y_train and y_test"):
        load("mnist", idx.parents[1])


def real_mnist() -> Dataset:
    root = default_root()
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {root}; set SSD_DATA to test with it")
    return load("mnist", root, strict=True)


def test_real_mnist() -> None:
    data = real_mnist()
    counts = " ".join(map(str, data.y_train.bincount().tolist()))
    assert counts == "5923 6742 5958 6131 5842 5421 5918 6265 5851 5949"
    assert data.x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)


def test_bundled_subset_is_what_its_text_says() -> None:
    whole, part = real_mnist(), load("mnist-5k", Path("none"))
    chosen = torch.stack([(whole.y_train == digit).nonzero()[:500, 0] for digit in range(10)])
    for x, y, rows in (
        (part.x_train, part.y_train, chosen[:, :400].flatten()),
        (part.x_test, part.y_test, chosen[:, 400:].flatten()),
    ):
        assert torch.equal(x, whole.x_train[rows])
        assert torch.equal(y, whole.y_train[rows])


def test_bundled_subset_never_changes() -> None:
    """Results are known by this checksum of their data."""
    assert load("mnist-5k", Path("none")).checksum() == "65c84f22"


@pytest.mark.parametrize("content", ["missing", "truncated", "one bit", "text", "other arrays"])
def test_damaged_subset(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, whole = tmp_path / "mnist_5k.npz", MNIST_5K.read_bytes()
    middle = len(whole) // 2
    if content == "truncated":
        file.write_bytes(whole[:middle])
    elif content == "one bit":
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif content == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif content == "other arrays":
        np.savez(file, x=np.zeros((10, 784), dtype=np.uint8))
    monkeypatch.setattr("ssd.data.MNIST_5K", file)
    with pytest.raises(UserError, match=r"mnist_5k.npz is damaged .*; install ssd-kernels") as said:
        load("mnist-5k", tmp_path)
    assert "\n" not in str(said.value)


@pytest.mark.usefixtures("offline")
def test_subset_stands_in_for_mnist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notices: list[str] = []
    data = load("mnist", tmp_path, notice=notices.append)
    assert data.name == "mnist-5k"
    assert data.x_train.shape == (4000, 784)
    assert data.y_test.bincount().tolist() == [100] * 10
    assert 0 <= data.x_train.min() < data.x_train.max() <= 1
    assert len(notices) == 1
    assert "mnist-5k" in notices[0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_unavailable(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is neither in") as caught:
        load(name, tmp_path, strict=True)
    assert "\n" not in str(caught.value)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2's str, as CIFAR's files have them."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_str(self, text: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_str


def write_cifar(
    monkeypatch: pytest.MonkeyPatch, root: Path, name: str, content: object = None
) -> dict[str, np.ndarray]:
    """Six files of 20 images (CIFAR-10) or two of 200 (CIFAR-100), and their MD5 sums."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    classes = 10 if name == "cifar10" else 100
    key = "labels" if name == "cifar10" else "fine_labels"
    folder, generator = root / kind.base_folder, np.random.default_rng(0)
    folder.mkdir()
    pixels = {}
    for attribute in ("train_list", "test_list"):
        listed = []
        for file, _ in getattr(kind, attribute):
            pixels[file] = generator.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
            batch = {"data": pixels[file], key: [i % classes for i in range(2 * classes)]}
            with open(folder / file, "wb") as stream:
                Python2Pickler(stream, protocol=2).dump(content or batch)
            listed.append([file, calculate_md5(str(folder / file))])
        monkeypatch.setattr(kind, attribute, listed)
    return pixels


@pytest.mark.parametrize(
    ("name", "classes", "training"), [("cifar10", 10, 5), ("cifar100", 100, 1)]
)
def test_cifar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, classes: int, training: int
) -> None:
    pixels = list(write_cifar(monkeypatch, tmp_path, name).values())
    data = load(name, tmp_path)
    assert data.classes == classes
    assert data.x_train.shape == (2 * classes * training, 3072)
    np.testing.assert_array_equal((data.x_train * 255).round(), np.concatenate(pixels[:training]))
    np.testing.assert_array_equal((data.x_test * 255).round(), pixels[-1])


def test_cifar_with_a_wrong_md5(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_cifar(monkeypatch, tmp_path, "cifar100")
    with open(tmp_path / "cifar-100-python" / "train", "ab") as stream:
        stream.write(b".")
    with pytest.raises(UserError, match="wrong MD5"):
        load("cifar100", tmp_path)


def test_cifar_runs_no_pickled_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_cifar(monkeypatch, tmp_path, "cifar10", Malicious(tmp_path / "executed"))
    with pytest.raises(UserError, match="mkdir is not allowed"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_split_covers_everything_once() -> None:
    data = small()
    tasks = split(data, 3, [5, 0, 3, 1, 4, 2])
    assert [task.classes for task in tasks] == [(5, 0), (3, 1), (4, 2)]
    for task in tasks:
        assert set(task.y_train.tolist()) == set(task.y_test.tolist()) == set(task.classes)
    assert sum(len(task.y_train) for task in tasks) == len(data.y_train)
    assert sum(len(task.y_test) for task in tasks) == len(data.y_test)
    rows = torch.cat([task.x_train for task in tasks])
    assert torch.equal(rows.sort(0).values, data.x_train.sort(0).values)


@pytest.mark.parametrize("tasks", [0, -1, 4, 7])
def test_tasks_must_divide_the_classes(tasks: int) -> None:
    with pytest.raises(UserError, match="use one of 1, 2, 3, 6"):
        split(small(), tasks, list(range(6)))


def test_class_order() -> None:
    assert class_order(5, 0) == [0, 1, 2, 3, 4]
    orders = [class_order(10, seed) for seed in (1, 2, 3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert class_order(10, 2) == orders[1]


def test_hold_out_takes_the_last_of_each_class() -> None:
    data = small(classes=3, per_class=5)
    held = hold_out(data, 0.4)
    assert torch.equal(held.x_test, data.x_train[9:])
    assert torch.equal(held.x_train, data.x_train[:9])
    with pytest.raises(UserError, match="without training or validation data"):
        hold_out(data, 0.05)


@pytest.mark.parametrize(
    ("offset", "dtype", "told"),
    [
        (1e9, "f8", True),
        (10**9, "i8", True),
        (1e9, "f4", False),
        (1e3, "f8", False),
        (0, "f8", False),
        (32000, "i2", False),
    ],
)
def test_what_float32_cannot_tell_apart(
    tmp_path: Path, arrays: dict[str, np.ndarray], offset: float, dtype: str, told: bool
) -> None:
    for key in ("x_train", "x_test"):
        steps = np.arange(arrays[key].size).reshape(arrays[key].shape)  # up to 120
        arrays[key] = (steps + offset).astype(dtype)
    np.savez(tmp_path / "f.npz", **arrays)
    said: list[str] = []
    load("features", tmp_path, tmp_path / "f.npz", notice=said.append)
    assert any("3 of the 3 columns of x_train vary by less than" in line for line in said) == told


DTYPES = ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", "u1", "i1", ">i2", ">u2", "<u4", ">i8", "?"]


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_read_as_it_is(
    tmp_path: Path, arrays: dict[str, np.ndarray], dtype: str, order: str
) -> None:
    """Whatever its byte order, its width, and how its rows lie."""
    values = {key: np.round(array) % 2 for key, array in arrays.items()}
    label = ">i4" if "f" in dtype else dtype
    for name, x, y in (("f", dtype, label), ("plain", "<f4", "<i8")):
        written = {
            key: np.array(array, x if key[0] == "x" else y, order=order)
            for key, array in values.items()
        }
        np.savez(tmp_path / f"{name}.npz", **written)
    found, plain = (load("features", tmp_path, tmp_path / f"{n}.npz") for n in ("f", "plain"))
    assert found.checksum() == plain.checksum()
    assert set(found.x_train.flatten().tolist()) == {0.0, 1.0}
    assert found.x_train.dtype == torch.float32
    assert found.y_train.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["U3", "M8[s]", "O"])
def test_what_is_no_number_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], dtype: str
) -> None:
    arrays["x_train"] = np.zeros(arrays["x_train"].shape).astype(dtype)
    np.savez(tmp_path / "g.npz", **arrays)
    with pytest.raises(UserError, match=r"g\.npz"):
        load("features", tmp_path, tmp_path / "g.npz")


@pytest.mark.parametrize("part", ["y_train", "y_test"])
@pytest.mark.parametrize("label", [-1, 300])
def test_no_sample_is_left_out_of_a_split(part: str, label: int) -> None:
    data = small()
    y = getattr(data, part).clone()
    y[2] = label
    data = replace(data, **{part: y})
    with pytest.raises(UserError, match=f"{part} holds the label {label},"):
        split(data, 3, [5, 0, 3, 1, 4, 2])


def test_the_order_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, from its authors' reference code."""
    increment = 0x9E3779B97F4A7C15
    outputs = [_mix(i * increment) for i in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_every_part_of_the_key_matters_and_every_sample_comes_once() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]
    orders = [tuple(shuffled(50, *key).tolist()) for key in keys]
    assert len(set(orders)) == len(keys)
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert shuffled(50, 0, 1).tolist() == list(orders[1])


def test_orders_are_fair() -> None:
    """Where sample 0 comes: uniform over 8 places, chi-squared with 7 degrees of freedom."""
    places = torch.stack([shuffled(8, 5, key) for key in range(4000)]).eq(0).double().sum(0)
    statistic = ((places - 500) ** 2 / 500).sum()
    assert statistic < 24.3  # exceeded once in a thousand


def test_the_tensor_and_the_integer_arithmetic_agree() -> None:
    counters = [0, 1, 2, 12345, 2**40]
    ours = _mix_tensor(torch.tensor(counters) * _signed(INCREMENT))
    assert [v % 2**64 for v in ours.tolist()] == [_mix(c * INCREMENT) for c in counters]


def test_orders_of_none_and_of_one() -> None:
    assert shuffled(0, 1).tolist() == []
    assert shuffled(1, 1).tolist() == [0]


def test_a_data_set_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arrays of any kind become tensors; images become rows; mistakes are named."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((12, 1, 2, 3)), np.arange(12, dtype=np.int32) % 3
    read = lambda root: (images, labels, torch.tensor(images), labels)  # noqa: E731
    monkeypatch.setitem(SOURCES, "mine", Source(read, tasks=3))
    data = load("mine", tmp_path)
    assert (data.name, data.classes, data.x_train.shape) == ("mine", 3, (12, 6))
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    for name in PRESETS:
        config = resolve({"dataset": "mine", "preset": name})
        config.validate()
        assert config == replace(
            resolve({"dataset": "features", "preset": name}), dataset="mine", tasks=3
        )
    bad = lambda root: (images, labels[1:], images, labels)  # noqa: E731
    monkeypatch.setitem(SOURCES, "mine", Source(bad))
    with pytest.raises(UserError, match=r"^mine: x_train must be real numbers"):
        load("mine", tmp_path)
