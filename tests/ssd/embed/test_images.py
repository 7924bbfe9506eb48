"""Data sets as images."""

from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from ssd.embed.images import (
    PRETRAIN,
    SHAPES,
    Images,
    load_folder,
    pixels,
    refuse_channels,
    refuse_same,
)
from ssd.errors import UserError


def test_pixels_are_exact() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, -1)
    assert torch.equal(pixels(levels.float() / 255, (1, 16, 16)).view(1, -1), levels)


def test_what_to_pretrain_on_is_another_set_of_the_same_shape() -> None:
    assert PRETRAIN.keys() == SHAPES.keys()
    for name, other in PRETRAIN.items():
        assert SHAPES[name] == SHAPES[other]
        refuse_same(name, other, "--pretrain")
        refuse_channels(name, SHAPES[other][0], "--pretrain")


@pytest.mark.parametrize("pair", [("mnist", "mnist-5k"), ("mnist-5k", "mnist"), ("mnist", "mnist")])
def test_a_set_that_shares_its_images_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="use fashion-mnist"):
        refuse_same(*pair, "--pretrain")
    refuse_same(pair[0], "folder pictures", "--weights")


def test_checksum_sees_images_and_labels() -> None:
    images, labels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])
    checksums = {
        Images("a", x, y, True).crc32
        for x in (images, images + 1)
        for y in (labels, labels.flip(0))
    }
    assert len(checksums) == 4


def test_folder(tmp_path: Path) -> None:
    """Classes in the order of their names; images scaled, grey ones made coloured."""
    exact = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    for place, image in (
        ("cat/1.png", exact),
        ("cat/2.png", torch.full((3, 64, 48), 7, dtype=torch.uint8)),
        ("ant/1.png", torch.full((1, 32, 32), 9, dtype=torch.uint8)),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        to_pil_image(image).save(tmp_path / place)
    steps: list[tuple[int, int]] = []
    images = load_folder(tmp_path, lambda text, done, total: steps.append((done, total)))
    assert images.labels.tolist() == [0, 1, 1]
    assert torch.equal(images.pixels[1], exact)
    assert (images.pixels[2] == 7).all()
    assert (images.pixels[0] == 9).all()
    assert steps == [(3, 3)]


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="--pretrain-folder") as caught:
        load_folder(tmp_path, lambda *arguments: None)
    assert "\n" not in str(caught.value)
