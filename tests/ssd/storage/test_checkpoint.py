"""Checkpoints: what is saved comes back, damage is noticed, files change as a whole."""

import errno
import os
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import save_file

from ssd.errors import UserError
from ssd.storage.checkpoint import load_checkpoint, save_checkpoint
from ssd.storage.files import read_text, temporary, write_atomically

CPU = torch.device("cpu")
TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "counts": torch.tensor([2**40, -1]),
    "scalar": torch.tensor(0.1, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}
STATE = {"numbers": {"task": 3}, "seconds": 0.1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "c", TENSORS, STATE)
    return tmp_path / "c"


def test_round_trip(path: Path) -> None:
    tensors, state = load_checkpoint(path, CPU)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(path, CPU)


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        if position < header and damaged[position : position + 1].isspace():
            continue  # padding of the header
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(path, CPU)


def test_other_safetensors_file(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(path, CPU)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(
    monkeypatch: pytest.MonkeyPatch, path: Path, call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_leftover_of_a_kill_is_replaced(path: Path) -> None:
    temporary(path).write_bytes(b"half")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert not temporary(path).exists()


def test_content_written_to_the_stream(tmp_path: Path) -> None:
    def fail(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise ValueError("why")

    write_atomically(tmp_path / "f", lambda stream: stream.writelines([b"a", b"b"]))
    assert (tmp_path / "f").read_bytes() == b"ab"
    with pytest.raises(ValueError, match="why"):
        write_atomically(tmp_path / "f", fail)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"ab")]


def test_text_is_utf8_whatever_a_path_in_it_is(tmp_path: Path) -> None:
    """Names of files come as surrogates where the locale is not theirs."""
    path = tmp_path / "a.md"
    write_atomically(path, os.fsdecode("é".encode()) + "é" + "\udcc3\udca9" + "\udcff")
    assert read_text(path) == "ééé\\xff"


def test_text_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(path) == "a\nb\nc\n"
    for content in ("é".encode("latin-1"), "a".encode("utf-16"), "a".encode("utf-16-le")):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not UTF-8"):
            read_text(path)
