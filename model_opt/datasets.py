"""Data sets in their official layouts: CIFAR-10, CIFAR-100, Tiny-ImageNet, and any folder of class folders.

- CIFAR-10: `cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin`, records of one label byte and 3,072 pixel bytes
  (red, green, blue planes of 32x32). CIFAR-100: `cifar-100-binary/{train,test}.bin`, a coarse and a fine label byte before
  the pixels. https://www.cs.toronto.edu/~kriz/cifar.html
- Tiny-ImageNet: `tiny-imagenet-200/`, 200 classes of 64x64 JPEGs. http://cs231n.stanford.edu/tiny-imagenet-200.zip
- Class folders: `train/CLASS/*` and `test/CLASS/*` (or `val/`), with an optional `val/` beside `test/`; all images of one size.

The validation images are a fixed part of the training images (CIFAR: the last 5,000; else the last tenth of each
class), unless class folders bring their own. The official validation images of Tiny-ImageNet are the test set here, as in
the literature: its own test set has no labels.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import urllib.request
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_opt.data import Split
from protocol.errors import InputError
from protocol.images import decode

CIFAR_VALIDATION = 5_000
CIFAR_PIXELS = 3 * 32 * 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
OR_FETCH = ", or have `relucent-opt train --download` fetch it"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class DataError(Exception):
    """The data set is missing, incomplete or damaged. The message says what to do."""


class Dataset(ABC):
    """One data set on disk.

    name: as in `DATASETS`. classes: names in order of label. mean, std: per channel over the training images, pixel / 255.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def load_train(self) -> tuple[Split, Split]:
        """Training and validation images. Raises DataError."""

    @abstractmethod
    def load_test(self) -> Split:
        """Test images. Raises DataError."""

    def _split(self, images: Tensor, labels: Tensor) -> Split:
        return Split(images, labels, self.mean, self.std)


class Cifar(Dataset):
    """CIFAR-10 or CIFAR-100, official binary version."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self._root = name, root
        if name == "cifar10":
            self._folder, self._train, self._test = "cifar-10-batches-bin", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
            self.mean, self.std, self.classes = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), CIFAR10_CLASSES
        else:
            self._folder, self._train, self._test = "cifar-100-binary", ("train",), "test"
            self.mean, self.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
            names = root / self._folder / "fine_label_names.txt"
            self.classes = tuple(names.read_text().split()) if names.is_file() else tuple(str(i) for i in range(100))
            if len(self.classes) != 100:
                raise DataError(f"{names} has {len(self.classes)} names, expected 100; it is damaged")

    def _read(self, name: str, records: int) -> tuple[Tensor, Tensor]:
        path = self._root / self._folder / f"{name}.bin"
        if not path.is_file():
            raise DataError(f"{path} is missing; pass --data with the folder that holds {self._folder}/{OR_FETCH}")
        raw = np.fromfile(path, dtype=np.uint8)
        size = CIFAR_PIXELS + (1 if self.name == "cifar10" else 2)
        if raw.size != records * size:
            raise DataError(f"{path} has {raw.size:,} bytes, expected {records * size:,}; it is damaged")
        labels = raw.reshape(-1, size)[:, -CIFAR_PIXELS - 1].astype(np.int64)
        if labels.max() >= len(self.classes):
            raise DataError(f"{path} holds the label {labels.max()}, above {len(self.classes) - 1}; it is not {self.name}")
        pixels = raw.reshape(-1, size)[:, -CIFAR_PIXELS:].reshape(-1, 3, 32, 32)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(labels)

    def load_train(self) -> tuple[Split, Split]:
        parts = [self._read(name, 50_000 // len(self._train)) for name in self._train]
        whole = self._split(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
        return whole[:-CIFAR_VALIDATION], whole[-CIFAR_VALIDATION:]

    def load_test(self) -> Split:
        return self._split(*self._read(self._test, 10_000))


def _decode(paths: Sequence[Path], size: int) -> Tensor:
    """RGB pixels of image files as uint8 (N, 3, H, W), as a client would send them; resized to size x size unless that is 0."""

    def read(path: Path) -> np.ndarray:
        try:
            return decode(path, size=(size, size) if size else None)[0]
        except InputError as error:
            raise DataError(f"{error.args[0]}; remove or replace it") from error

    first = read(paths[0])
    _, height, width = first.shape
    try:
        out = np.empty((len(paths), *first.shape), np.uint8)
    except MemoryError as error:
        raise DataError(f"{len(paths):,} images of {width}x{height} do not fit into memory; pass a smaller --image-size") from error

    def fill(index: int) -> None:
        pixels = read(paths[index])
        if pixels.shape != first.shape:
            raise DataError(f"images of several sizes: {paths[0]} is {width}x{height}, {paths[index]} is "
                            f"{pixels.shape[2]}x{pixels.shape[1]}; pass --image-size to resize them all")
        out[index] = pixels

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(paths)), chunksize=64):
            pass
    return torch.from_numpy(out)


class ImageFiles(Dataset):
    """Data sets of one image file per example; a subclass lists the files of a split by class."""

    def __init__(self, size: int) -> None:
        self._size = size

    @abstractmethod
    def _files(self, split: str) -> list[list[Path]]:
        """Files of each class in order, for "train", "validation" or "test". Raises DataError."""

    def _load(self, groups: list[list[Path]]) -> Split:
        """The images of all classes in a fixed random order."""
        examples = self._examples(groups)
        return self._split(_decode([path for path, _ in examples], self._size), torch.tensor([label for _, label in examples]))

    def _examples(self, groups: list[list[Path]]) -> list[tuple[Path, int]]:
        """Files and labels in that order."""
        examples = [(path, label) for label, group in enumerate(groups) for path in group]
        return [examples[i] for i in torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()]

    def load_train(self) -> tuple[Split, Split]:
        return self._load(self._files("train")), self._load(self._files("validation"))

    def load_test(self) -> Split:
        return self._load(self._files("test"))


def _tenth(groups: list[list[Path]], validation: bool) -> list[list[Path]]:
    """The last tenth of each class, or what is left without it."""
    if min(map(len, groups)) < 2:
        raise DataError("a class has a single training image; at least two are needed, one of them for validation")
    cuts = [len(group) - max(len(group) // 10, 1) for group in groups]
    return [group[cut:] if validation else group[:cut] for group, cut in zip(groups, cuts)]


class TinyImageNet(ImageFiles):
    """Tiny-ImageNet-200."""

    name = "tiny-imagenet"
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

    def __init__(self, root: Path, size: int) -> None:
        super().__init__(size)
        self._root = root / "tiny-imagenet-200"
        listing = self._root / "wnids.txt"
        if not listing.is_file():
            raise DataError(f"{listing} is missing; pass --data with the folder that holds tiny-imagenet-200/{OR_FETCH}")
        self._ids = sorted(listing.read_text().split())
        words = self._root / "words.txt"
        names = dict(line.split("\t", 1) for line in words.read_text().splitlines() if "\t" in line) if words.is_file() else {}
        self.classes = tuple(names.get(i, i).split(",")[0] for i in self._ids)

    def _files(self, split: str) -> list[list[Path]]:
        if split == "test":
            notes = self._root / "val" / "val_annotations.txt"
            if not notes.is_file():
                raise DataError(f"{notes} is missing; unpack tiny-imagenet-200.zip again")
            rows = [line.split("\t")[:2] for line in notes.read_text().splitlines()]
            groups = [sorted(notes.parent / "images" / file for file, label in rows if label == i) for i in self._ids]
        else:
            groups = [sorted((self._root / "train" / i / "images").glob("*.JPEG")) for i in self._ids]
        _complete(groups, self._ids, split)
        return groups if split == "test" else _tenth(groups, split == "validation")


def _complete(groups: list[list[Path]], names: Sequence[str], split: str) -> None:
    for group, name in zip(groups, names):
        if not group:
            raise DataError(f"class {name!r} has no images in the {split} split; add some, or remove the class everywhere")


class ClassFolders(ImageFiles):
    """Any folder of class folders."""

    name = "folder"

    def __init__(self, root: Path, size: int) -> None:
        super().__init__(size)
        self._root = root
        train = root / "train"
        self.classes = tuple(sorted(p.name for p in train.iterdir() if p.is_dir())) if train.is_dir() else ()
        if len(self.classes) < 2:
            raise DataError(f"{root} holds no data set: neither cifar-10-batches-bin/, cifar-100-binary/ or tiny-imagenet-200/ nor "
                            f"train/ with two or more class folders; pass --data with the right folder{OR_FETCH}")

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels over a thousand training images, or all if they are fewer."""
        examples = self._examples(self._files("train"))
        pixels = _decode([path for path, _ in examples[:: -(-len(examples) // 1000)]], self._size).float() / 255
        return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))

    @cached_property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(round(float(v), 4) for v in self._statistics[0])

    @cached_property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(round(max(float(v), 0.01), 4) for v in self._statistics[1])

    def _folder(self, split: str) -> str:
        """Folder of a split; "" if the validation images are part of train/."""
        own_validation = (self._root / "test").is_dir() and (self._root / "val").is_dir()
        if split == "test":
            return "test" if (self._root / "test").is_dir() else "val"
        return ("val" if own_validation else "") if split == "validation" else "train"

    def _files(self, split: str) -> list[list[Path]]:
        folder = self._root / (self._folder(split) or "train")
        if not folder.is_dir():
            raise DataError(f"{folder} is missing; {split} images are expected there, one folder per class")
        groups = [sorted(p for p in (folder / c).glob("*") if p.suffix.lower() in SUFFIXES) for c in self.classes]
        _complete(groups, self.classes, folder.name)
        extra = {p.name for p in folder.iterdir() if p.is_dir()} - set(self.classes)
        if extra:
            raise DataError(f"{folder} has the class {min(extra)!r}, which train/ lacks")
        shared = not self._folder("validation")
        return groups if split == "test" or not shared else _tenth(groups, split == "validation")

    def load_train(self) -> tuple[Split, Split]:
        train, validation = super().load_train()
        if train.shape != validation.shape:
            raise DataError(f"training images are {train.shape[2]}x{train.shape[1]}, validation images {validation.shape[2]}x"
                            f"{validation.shape[1]}; pass --image-size to resize them all")
        return train, validation


DATASETS = ("cifar10", "cifar100", "tiny-imagenet", "folder")
_MARKS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary", "tiny-imagenet": "tiny-imagenet-200", "folder": "train"}
ARCHIVES = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    "tiny-imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
}
"""Address and MD5 as published by the authors."""


def open_dataset(root: Path, name: str = "auto", size: int = 0) -> Dataset:
    """The data set below `root`; "auto" takes the only one that is there. size: side to resize image files to, 0 for their own.

    Raises DataError.
    """
    root = Path(root)
    if name == "auto":
        present = [n for n in DATASETS if (root / _MARKS[n]).is_dir()]
        if len(present) > 1:
            raise DataError(f"{root} holds {' and '.join(present)}; say which with --dataset")
        name = present[0] if present else "folder" if root.is_dir() and any(root.iterdir()) else "cifar10"
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if name.startswith("cifar"):
        if size:
            raise DataError(f"the images of {name} are 32x32 and cannot be resized; leave out --image-size")
        return Cifar(root, name)
    return TinyImageNet(root, size) if name == "tiny-imagenet" else ClassFolders(root, size)


def download(root: Path, name: str, progress: Callable[[int, int], None]) -> None:
    """Fetch, verify and unpack a data set below `root` unless it is there. `progress(done_bytes, total_bytes)`.

    Raises DataError.
    """
    if name not in ARCHIVES:
        raise DataError(f"{name!r} cannot be downloaded; say which with --dataset: {', '.join(ARCHIVES)}")
    url, expected = ARCHIVES[name]
    if (root / _MARKS[name]).is_dir():
        return
    root.mkdir(parents=True, exist_ok=True)
    archive = root / (url.rsplit("/", 1)[1] + ".part")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, archive.open("wb") as out:  # noqa: S310  # one of ARCHIVES
            total = int(response.headers.get("Content-Length", 0))
            done = 0
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
                done += len(chunk)
                progress(done, total)
        if digest.hexdigest() != expected:
            raise DataError(f"the download from {url} has the wrong checksum; try again")
        with tempfile.TemporaryDirectory(dir=root) as unpacked:  # renamed when whole
            if url.endswith(".zip"):
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(unpacked)  # noqa: S202  # zipfile keeps members below the folder
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(unpacked, filter="data")
            os.replace(Path(unpacked) / _MARKS[name], root / _MARKS[name])
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"cannot download {name} from {url}: {error}; pass --data with a local copy") from error
    finally:
        archive.unlink(missing_ok=True)
