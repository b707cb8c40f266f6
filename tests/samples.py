"""Data that tests train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from model_opt.data import Split
from model_opt.datasets import CIFAR10_CLASSES
from model_opt.files import NetworkInfo

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def learnable(count: int) -> Split:
    """Images whose brightness tells the class."""
    labels = torch.arange(count) % 10
    noise = torch.randint(0, 10, (count, 3, 32, 32), generator=torch.Generator().manual_seed(count))
    return Split((labels.view(-1, 1, 1, 1) * 25 + noise).to(torch.uint8), labels, MEAN, STD)


def network_info(network: str = "resnet18", width: int = 4, **changes: object) -> NetworkInfo:
    """Of a CIFAR-10 network."""
    facts = {"classes": CIFAR10_CLASSES, "input_shape": (3, 32, 32), "mean": MEAN, "std": STD, "partial": False, "made_by": {}}
    return NetworkInfo(network, width, **(facts | changes))  # type: ignore[arg-type]


def write_cifar(root: Path, records: int = 10_000) -> Path:
    """A folder in CIFAR-10's official layout with random content."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        raw = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
        raw[:, 0] %= 10
        raw.tofile(folder / f"{name}.bin")
    return root
