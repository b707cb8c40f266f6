"""Data sets in their layouts, what is said about damaged ones, and augmentation."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_opt import data, datasets
from model_opt.datasets import DataError, open_dataset
from tests.samples import learnable, write_cifar


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def test_cifar10(cifar: Path) -> None:
    with pytest.raises(DataError, match="32x32"):
        open_dataset(cifar, size=64)
    source = open_dataset(cifar)
    train, validation = source.load_train()
    assert (source.name, len(train), len(validation), len(source.load_test())) == ("cifar10", 45_000, 5_000, 10_000)
    assert train.shape == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    raw = np.fromfile(cifar / "cifar-10-batches-bin" / "data_batch_1.bin", np.uint8)
    assert int(train.labels[0]) == raw[0]
    assert train.images[0, 0, 0, :5].tolist() == raw[1:6].tolist()


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, records in (("train", 50_000), ("test", 10_000)):
        raw = rng.integers(0, 256, (records, 3074), dtype=np.uint8)
        raw[:, 0] %= 20
        raw[:, 1] %= 100
        raw.tofile(folder / f"{name}.bin")
    source = open_dataset(tmp_path)
    train, validation = source.load_train()
    assert (source.name, len(source.classes), len(train), len(validation)) == ("cifar100", 100, 45_000, 5_000)
    assert int(source.load_test().labels[0]) == raw[0, 1]
    assert train.mean != datasets.Cifar(tmp_path, "cifar10").mean
    (folder / "fine_label_names.txt").write_text("only\ntwo\n")
    with pytest.raises(DataError, match="2 names, expected 100"):
        open_dataset(tmp_path)


def test_missing_and_damaged_cifar(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing; pass --data .*--download"):
        open_dataset(tmp_path / "none").load_train()
    target = tmp_path / "cifar-10-batches-bin"
    target.mkdir()
    whole = (cifar / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    for content, reason in ((whole[:-1], "damaged"), (b"\x0b" + whole[1:], "label 11, above 9")):
        (target / "test_batch.bin").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_dataset(tmp_path).load_test()
    (tmp_path / "cifar-100-binary").mkdir()
    with pytest.raises(DataError, match="say which with --dataset"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="unknown data set"):
        open_dataset(tmp_path, "mnist")


def save_image(path: Path, colour: int, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 10, 20)).save(path)


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    ids = ["n01", "n02"]
    for k, name in enumerate(ids):
        for i in range(20):
            save_image(root / "train" / name / "images" / f"{name}_{i}.JPEG", 100 * k + i, (64, 64))
    for i in range(4):
        save_image(root / "val" / "images" / f"val_{i}.JPEG", i, (64, 64))
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tbullfrog\n")
    (root / "val" / "val_annotations.txt").write_text("".join(f"val_{i}.JPEG\t{ids[i % 2]}\t0\t0\t1\t1\n" for i in range(4)))
    source = open_dataset(tmp_path)
    train, validation = source.load_train()
    assert source.classes == ("goldfish", "bullfrog")
    assert (len(train), len(validation), train.shape) == (36, 4, (3, 64, 64))
    assert sorted(source.load_test().labels.tolist()) == [0, 0, 1, 1]
    assert all((int(image[0, 0, 0]) < 60) == (label == 0) for image, label in zip(train.images, train.labels))
    for file in (root / "train" / "n02" / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="class 'n02' has no images in the train split"):
        source.load_train()


def folders(root: Path, splits: tuple[str, ...] = ("train", "test"), size: tuple[int, int] = (16, 16)) -> Path:
    for split in splits:
        for k, name in enumerate(("cat", "dog")):
            for i in range(10):
                save_image(root / split / name / f"{i}.png", 100 * k + i, size)
    return root


def test_class_folders(tmp_path: Path) -> None:
    source = open_dataset(folders(tmp_path))
    train, validation = source.load_train()
    assert (source.name, source.classes, len(train), len(validation)) == ("folder", ("cat", "dog"), 18, 2)
    assert abs(float(train.normalised().mean())) < 1e-2
    assert len(source.load_test()) == 20
    folders(tmp_path, ("val",))
    assert [len(s) for s in open_dataset(tmp_path).load_train()] == [20, 20]
    assert open_dataset(tmp_path, size=8).load_test().shape == (3, 8, 8)


def test_image_files_are_what_a_client_would_send(tmp_path: Path) -> None:
    """The same decoding: transparency over black, the same resizing; and statistics of the training images before any are loaded."""
    from protocol.images import load_image

    source = open_dataset(folders(tmp_path))
    assert source.mean == source.load_train()[0].mean != (0.5, 0.5, 0.5)
    assert source.load_test().std == source.std == source.load_train()[1].std
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 4), dtype=np.uint8)
    for path in (tmp_path / "train").rglob("*.png"):
        Image.fromarray(pixels).save(path)
    train, _ = open_dataset(tmp_path, size=16).load_train()
    sent, notes = load_image(path, (3, 16, 16))
    assert "transparency" in notes and torch.equal(train.images[0], sent)
    whole = path.read_bytes()
    end = whole.index(b"IDAT") + 2000
    path.write_bytes(whole[:end] + b"\0" * 40)
    with pytest.raises(DataError, match="no readable image; remove or replace it"):
        open_dataset(tmp_path).load_train()


def test_the_first_images_are_of_all_classes(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for k in range(5):
            for i in range(12):
                save_image(tmp_path / split / f"class{k}" / f"{i}.png", 20 * k + i)
    source = open_dataset(tmp_path)
    train, validation = source.load_train()
    for split in (train, validation, source.load_test()):
        assert set(split[:20].labels.tolist()) == set(range(5))
        assert all(int(image[0, 0, 0]) // 20 == label for image, label in zip(split.images, split.labels))
    assert torch.equal(train.images, open_dataset(tmp_path).load_train()[0].images)


def test_images_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    source = open_dataset(folders(tmp_path))
    monkeypatch.setattr(datasets.np, "empty", exhausted)
    with pytest.raises(DataError, match=r"18 images of 16x16 do not fit into memory"):
        source.load_train()


def test_mistakes_in_class_folders(tmp_path: Path) -> None:
    save_image(folders(tmp_path) / "train" / "dog" / "x.png", 3, (20, 16))
    with pytest.raises(DataError, match=r"several sizes: .*\.png is (16x16, .*x\.png is 20x16|20x16, .*9\.png is 16x16); pass"):
        open_dataset(tmp_path).load_train()
    (tmp_path / "train" / "dog" / "x.png").write_text("no image")
    with pytest.raises(DataError, match="no readable image"):
        open_dataset(tmp_path).load_train()
    (tmp_path / "train" / "dog" / "x.png").unlink()
    save_image(tmp_path / "test" / "emu" / "0.png", 3)
    with pytest.raises(DataError, match="has the class 'emu', which train/ lacks"):
        open_dataset(tmp_path).load_test()
    for file in (tmp_path / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="class 'dog' has no images in the test split"):
        open_dataset(tmp_path).load_test()
    lonely = tmp_path / "lonely"
    save_image(lonely / "train" / "cat" / "0.png", 1)
    with pytest.raises(DataError, match="holds no data set"):
        open_dataset(lonely)
    save_image(lonely / "train" / "dog" / "0.png", 1)
    with pytest.raises(DataError, match="single training image"):
        open_dataset(lonely).load_train()


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake.tar.gz"
    fake.write_bytes(b"not the data set")
    md5 = datasets.ARCHIVES["cifar10"][1]
    monkeypatch.setitem(datasets.ARCHIVES, "cifar10", (fake.as_uri(), md5))
    with pytest.raises(DataError, match="checksum"):
        datasets.download(tmp_path / "out", "cifar10", lambda *_: None)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setitem(datasets.ARCHIVES, "cifar10", ((tmp_path / "nothing").as_uri(), md5))
    with pytest.raises(DataError, match="cannot download"):
        datasets.download(tmp_path / "out", "cifar10", lambda *_: None)
    write_cifar(tmp_path / "source", records=1)
    with tarfile.open(fake, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    import hashlib

    monkeypatch.setitem(datasets.ARCHIVES, "cifar10", (fake.as_uri(), hashlib.md5(fake.read_bytes()).hexdigest()))
    seen: list[int] = []
    datasets.download(tmp_path / "out", "cifar10", lambda done, _: seen.append(done))
    assert seen == [fake.stat().st_size]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["cifar-10-batches-bin"]
    with pytest.raises(DataError, match="cannot be downloaded"):
        datasets.download(tmp_path, "folder", lambda *_: None)


def test_augmentation_moves_flips_and_cuts() -> None:
    image = torch.arange(3 * 32 * 32).float().view(1, 3, 32, 32) + 1
    out = data.augment(image.repeat(64, 1, 1, 1), torch.Generator().manual_seed(0))
    assert out.shape == (64, 3, 32, 32)
    assert len({tuple(row.tolist()) for row in out[:, 0, 0]}) > 20
    holes = (out == 0).all(1).flatten(1).sum(1)
    assert int(holes.min()) >= 16
    assert int(holes.max()) == 64
    again = data.augment(image.repeat(64, 1, 1, 1), torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_noise_is_of_another_strength_for_each_image_and_known_in_grey_levels() -> None:
    split = replace(learnable(512), std=(0.25, 0.5, 0.2))

    def epoch(noise: float) -> torch.Tensor:
        return next(data.batches(split, 512, torch.Generator().manual_seed(1), shift=0.0, cutout=0.0, noise=noise))[0]

    # the same order, and no choice at random before the noise: flips agree
    grey = (epoch(8.0) - epoch(0.0)) * torch.tensor(split.std).view(1, 3, 1, 1) * 255
    of_images, of_channels = grey.std((1, 2, 3)), grey.std((0, 2, 3))
    assert of_images.max() < 8.5 and of_images.max() > 7
    assert of_images.min() < 1
    assert torch.allclose(of_channels, torch.full((3,), 8 / 3**0.5), rtol=0.05)  # of a uniform fraction of 8
    assert torch.equal(epoch(8.0), epoch(8.0))
    image = torch.ones(4, 3, 32, 32)
    holes = data.augment(image, torch.Generator().manual_seed(0), noise=(0.1, 0.1, 0.1))
    assert int((holes == 0).all(1).flatten(1).sum(1).min()) >= 16  # a hole is empty


def test_processes_share_the_batches() -> None:
    split = learnable(64)

    def epoch(share: slice) -> list[torch.Tensor]:
        return [x for x, _ in data.batches(split, 16, torch.Generator().manual_seed(3), share)]

    whole, even, odd = epoch(slice(None)), epoch(slice(0, None, 2)), epoch(slice(1, None, 2))
    assert len(whole) == 4
    for x, a, b in zip(whole, even, odd):
        assert torch.equal(x[::2], a)
        assert torch.equal(x[1::2], b)


def test_large_images_go_through_a_network_in_small_batches() -> None:
    def batch(side: int) -> int:
        return data.Split(torch.zeros(20, 3, side, side, dtype=torch.uint8), torch.zeros(20), (0.5,) * 3, (0.25,) * 3).inference_batch(500)

    assert [batch(side) for side in (32, 64, 128, 512)] == [500, 125, 31, 16]
