"""CIFAR-10 in its official binary layout, and augmentation on whole batches.

Layout: `cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin`, 10,000 records of one label byte and 3,072 bytes
(red, green, blue planes of 32x32) each. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
RECORD_BYTES = 1 + 3 * 32 * 32
RECORDS_PER_FILE = 10_000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
VALIDATION_IMAGES = 5_000
CUTOUT = 8


class DataError(Exception):
    """The data set is missing, incomplete or damaged. The message says what to do."""


@dataclass(frozen=True)
class Split:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


def _read(path: Path) -> Split:
    if not path.is_file():
        raise DataError(
            f"{path} is missing; pass --data with the folder that holds {FOLDER}/, or --download to fetch CIFAR-10"
        )
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size != RECORDS_PER_FILE * RECORD_BYTES:
        raise DataError(f"{path} has {raw.size:,} bytes, expected {RECORDS_PER_FILE * RECORD_BYTES:,}; it is damaged")
    records = raw.reshape(-1, RECORD_BYTES)
    if records[:, 0].max() > 9:
        raise DataError(f"{path} holds a label above 9; it is not CIFAR-10")
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.from_numpy(records[:, 0].astype(np.int64)))


def load_train(root: Path) -> tuple[Split, Split]:
    """Training and validation split: the first 45,000 and the last 5,000 training images. Raises DataError."""
    parts = [_read(Path(root) / FOLDER / f"data_batch_{i}.bin") for i in range(1, 6)]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    cut = len(labels) - VALIDATION_IMAGES
    return Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])


def load_test(root: Path) -> Split:
    """The 10,000 test images. Raises DataError."""
    return _read(Path(root) / FOLDER / "test_batch.bin")


def download(root: Path, progress: Callable[[int, int], None]) -> None:
    """Fetch, verify and unpack CIFAR-10 below `root` unless it is there. `progress(done_bytes, total_bytes)`."""
    if (root / FOLDER / "test_batch.bin").is_file():
        return
    root.mkdir(parents=True, exist_ok=True)
    archive = root / "cifar-10-binary.tar.gz.part"
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(URL, timeout=30) as response, archive.open("wb") as out:
            total = int(response.headers.get("Content-Length", 0))
            done = 0
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                progress(done, total)
        if digest.hexdigest() != ARCHIVE_MD5:
            raise DataError(f"the download from {URL} has the wrong checksum; try again")
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    except OSError as error:
        raise DataError(f"cannot download CIFAR-10 from {URL}: {error}; pass --data with a local copy") from error
    finally:
        archive.unlink(missing_ok=True)


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) to float32 with per-channel mean 0 and deviation 1 over the training set."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip, crop after reflection padding by 4 pixels, and an 8x8 cutout to zero; an own choice for each image."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = (torch.randint(0, 9, (count, 1), generator=generator) for _ in range(2))
    flip = torch.randint(0, 2, (count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = torch.arange(width)
    columns = left + torch.where(flip == 1, width - 1 - columns, columns)
    index = torch.arange(count).view(-1, 1, 1)
    rows, columns, index = (t.to(images.device) for t in (rows[:, :, None], columns[:, None, :], index))
    cropped = padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2)
    centre = torch.randint(0, height, (2, count, 1), generator=generator)
    hidden = (torch.arange(height) - centre + CUTOUT // 2).clamp(-1, CUTOUT)  # (2, count, height): inside is 0..CUTOUT-1
    inside = (hidden >= 0) & (hidden < CUTOUT)
    hole = (inside[0][:, :, None] & inside[1][:, None, :]).to(images.device)
    return cropped.masked_fill(hole[:, None], 0.0)


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented, normalised batches; the incomplete last one is left out."""
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for start in range(0, len(split) - size + 1, size):
        chosen = order[start : start + size]
        yield augment(normalise(split.images[chosen]), generator), split.labels[chosen]
