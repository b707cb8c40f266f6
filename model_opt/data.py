"""Images in memory, and augmentation on whole batches. Where the images come from: `model_opt.datasets`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protocol.model import tensors_digest

SHIFT, CUTOUT = 0.125, 0.25
"""How far an image is shifted at most, and the side of the hole, as fractions of its side."""


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8, labels (N,) int64, and what normalises a channel, in units of pixel / 255."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice) -> Split:
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def sample(self, count: int) -> Split:
        """As many images, or all if they are fewer, in random order and the same ones each time: any batch of them stands for the whole."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].to(self.labels.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def joined(self, other: Split) -> Split:
        """These images and then those of `other`, normalised as these."""
        return replace(self, images=torch.cat([self.images, other.images]), labels=torch.cat([self.labels, other.labels]))

    def to(self, device: torch.device) -> Split:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def digest(self) -> str:
        """SHA-256 over images, labels and normalisation."""
        normalisation = torch.tensor([self.mean, self.std])
        return tensors_digest({"images": self.images.cpu(), "labels": self.labels.cpu(), "normalisation": normalisation}).hex()

    def labels_digest(self) -> str:
        """SHA-256 over the labels in their order, which tells what images these are however they are stored."""
        return tensors_digest({"labels": self.labels.cpu()}).hex()

    def normalised(self, chosen: slice | Tensor = slice(None)) -> Tensor:
        """The chosen images as float32 with per-channel mean 0 and deviation 1 over the training set."""
        return normalise(self.images[chosen], self.mean, self.std)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.images.shape[1:])

    def inference_batch(self, images: int) -> int:
        """How many images go through a network together without gradients: `images` of 32x32, or as many pixels, at least 16."""
        return max(images * 32 * 32 // math.prod(self.shape[1:]), 16)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, C, H, W) to float32, (pixel / 255 - mean) / std for each channel."""
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - torch.tensor(mean, device=images.device).view(1, -1, 1, 1) * 255) / scale


def augment(images: Tensor, generator: torch.Generator, shift: float = SHIFT, cutout: float = CUTOUT,
            noise: Sequence[float] = ()) -> Tensor:
    """Random flip, shift after reflection padding, white noise, and a square hole set to zero; an own choice for each image.

    shift: largest shift, cutout: side of the hole, both as fractions of the side; 0 for none. noise: largest standard deviation for
    each channel, in units of the images; an image has a uniform fraction of it.
    """
    count, _, height, width = images.shape
    margin, hole_side = round(height * shift), round(height * cutout)
    padded = torch.nn.functional.pad(images, (margin,) * 4, mode="reflect")
    top, left = (torch.randint(0, 2 * margin + 1, (count, 1), generator=generator) for _ in range(2))
    flip = torch.randint(0, 2, (count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = torch.arange(width)
    columns = left + torch.where(flip == 1, width - 1 - columns, columns)
    index = torch.arange(count).view(-1, 1, 1)
    rows, columns, index = (t.to(images.device) for t in (rows[:, :, None], columns[:, None, :], index))
    cropped = padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2)
    if any(noise):
        deviation = torch.rand(count, 1, 1, 1, generator=generator) * torch.tensor(noise).view(1, -1, 1, 1)
        cropped = cropped + (torch.randn(images.shape, generator=generator) * deviation).to(images.device)
    if not hole_side:
        return cropped
    inside = []
    for side in (height, width):
        distance = torch.arange(side) - torch.randint(0, side, (count, 1), generator=generator) + hole_side // 2
        inside.append((distance >= 0) & (distance < hole_side))
    hole = (inside[0][:, :, None] & inside[1][:, None, :]).to(images.device)
    return cropped.masked_fill(hole[:, None], 0.0)


def batches(split: Split, size: int, generator: torch.Generator, share: slice = slice(None), shift: float = SHIFT,
            cutout: float = CUTOUT, noise: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented, normalised batches; the incomplete last one is left out.

    share: the part of every batch that this process of several trains on; all draw the same random choices. noise: largest standard
    deviation, in grey levels of 255.
    """
    deviations = [noise / 255 / std for std in split.std]
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for start in range(0, len(split) - size + 1, size):
        chosen = order[start : start + size]
        yield augment(split.normalised(chosen), generator, shift, cutout, deviations)[share], split.labels[chosen][share]
