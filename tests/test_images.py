"""Images from files: what is converted, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protocol.errors import InputError
from protocol.images import load_image

SHAPE = (3, 32, 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def write(folder: Path, pixels: np.ndarray, name: str = "x.png") -> Path:
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_an_image_of_the_right_form_is_unchanged(tmp_path: Path) -> None:
    tensor, note = load_image(write(tmp_path, PIXELS), SHAPE)
    assert note == ""
    assert np.array_equal(tensor.numpy(), PIXELS.transpose(2, 0, 1))


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    tensor, note = load_image(write(tmp_path, np.repeat(np.repeat(PIXELS, 2, 0), 3, 1)), SHAPE)
    assert tuple(tensor.shape) == SHAPE
    assert note == "resized from 96x64 to 32x32"


def test_grey_and_alpha(tmp_path: Path) -> None:
    tensor, note = load_image(write(tmp_path, PIXELS[..., 0]), SHAPE)
    assert note == "converted from L to RGB"
    assert (tensor[0] == tensor[2]).all()
    alpha = np.dstack([PIXELS, np.full((32, 32), 255, np.uint8)])
    alpha[:16, :, 3] = 0
    tensor, note = load_image(write(tmp_path, alpha), SHAPE)
    assert note == "transparency laid over black"
    assert (tensor[:, :16] == 0).all()
    assert np.array_equal(tensor[:, 16:].numpy(), PIXELS.transpose(2, 0, 1)[:, 16:])


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path, PIXELS).read_bytes()
    for name, content in {"text": b"hello", "empty": b"", "truncated": good[: len(good) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="no readable image"):
            load_image(tmp_path / name, SHAPE)
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / "nothing", SHAPE)
    with pytest.raises(InputError, match="no readable image"):
        load_image(tmp_path, SHAPE)
    with pytest.raises(InputError, match="are no images"):
        load_image(write(tmp_path, PIXELS), (7,))
