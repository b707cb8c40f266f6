"""Images from files: decoded, brought to RGB and to the model's size; the same for what a network learns from and for what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from protocol.errors import InputError

MAX_PIXELS = 64_000_000


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file; what goes wrong with it, while it is open too, becomes an InputError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path} is larger than {MAX_PIXELS // 10**6} megapixels", "make it smaller")
            yield image
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", "check the path") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no readable image", "use PNG, JPEG or another format that Pillow reads") from error


def check_image(path: Path) -> None:
    """Raise InputError unless the file exists and begins as an image; its pixels are not decoded."""
    with _opened(path):
        pass


def decode(path: Path, channels: int = 3, size: tuple[int, int] | None = None) -> tuple[np.ndarray, list[str]]:
    """One image as uint8 (C, H, W), and what was changed.

    Another size than `size` (H, W) is resized (bicubic, aspect ratio not kept); grey becomes RGB, or colours grey if `channels` is 1;
    alpha is laid over black. Raises InputError for a missing file or one that is no image.
    """
    notes = []
    with _opened(path) as image:
        image.load()
        if "A" in image.getbands() or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
            notes.append("transparency laid over black")
        mode = "RGB" if channels == 3 else "L"
        if image.mode != mode and not (notes and mode == "RGB"):
            notes.append(f"converted from {image.mode} to {mode}")
        converted = image.convert(mode)
    if size is not None and converted.size != size[::-1]:
        notes.append(f"resized from {converted.width}x{converted.height} to {size[1]}x{size[0]}")
        converted = converted.resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = np.array(converted, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), notes


def load_image(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """One image as uint8 of `shape` (C, H, W), and a note on what was changed, empty if nothing was. Raises InputError as `decode`."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(f"the model takes inputs of shape {shape}, which are no images", "use the Python API")
    planes, notes = decode(path, shape[0], shape[1:])
    return torch.from_numpy(np.ascontiguousarray(planes)), ", ".join(notes)
