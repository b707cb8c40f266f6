"""Where a network's ReLUs remain: counts per layer, and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no window system is needed
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from model_opt.activation import IDENTITY, LINEAR, RELU, SQUARE
from model_opt.published import PUBLISHED

KINDS = {"relu": RELU, "square": SQUARE, "linear": LINEAR, "identity": IDENTITY}
COLOURS = {"relu": "#d1495b", "square": "#2e86ab", "linear": "#8fb996", "identity": "#d9d9d9"}
_STRONG_AND_LIGHT = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
METHOD_COLOURS = _STRONG_AND_LIGHT[::2] + _STRONG_AND_LIGHT[1::2]


@dataclass(frozen=True)
class LayerCount:
    """What the pixels of one activation layer do."""

    name: str
    shape: tuple[int, ...]
    counts: dict[str, int]


def count_layers(masks: dict[str, Tensor]) -> list[LayerCount]:
    """Counts of each layer, from its mask of shape (C, H, W) or (F,)."""
    return [LayerCount(name, tuple(mask.shape), {kind: int((mask == value).sum()) for kind, value in KINDS.items()})
            for name, mask in masks.items()]


def draw_masks(masks: dict[str, Tensor], title: str, path: Path) -> None:
    """Bars of what each layer's pixels do, and below the share of channels that keep a ReLU at each place of the image."""
    layers = count_layers(masks)
    spatial = {name: mask for name, mask in masks.items() if mask.dim() == 3}
    columns = 6
    rows = -(-len(spatial) // columns)
    figure = plt.figure(figsize=(11, 3.2 + 1.9 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.2, 1.9 * max(rows, 1)])  # type: ignore[misc]
    axes = top.subplots(1, 2)
    places = np.arange(len(layers))
    shares = {kind: np.array([100 * layer.counts[kind] / sum(layer.counts.values()) for layer in layers]) for kind in KINDS}
    base = np.zeros(len(layers))
    for kind, share in shares.items():
        axes[0].bar(places, share, bottom=base, color=COLOURS[kind], label=kind, width=0.85)
        base += share
    axes[0].set(ylabel="pixels, %", title="what each layer's pixels do", ylim=(0, 100))
    axes[0].legend(loc="lower left", fontsize=8, ncols=4)
    axes[1].bar(places, [layer.counts["relu"] for layer in layers], color=COLOURS["relu"], width=0.85)
    axes[1].set(ylabel="ReLUs", title="ReLUs that remain")
    for axis in axes:
        axis.set_xticks(places, [layer.name.replace("blocks.", "") for layer in layers], rotation=70, fontsize=7)
    top.suptitle(title, fontsize=11)
    if spatial:
        grid = np.atleast_1d(bottom.subplots(rows, columns)).ravel()
        for axis in grid:
            axis.axis("off")
        for axis, (name, mask) in zip(grid, spatial.items()):
            heat = (mask == RELU).float().mean(0).cpu().numpy()
            axis.imshow(heat, cmap="magma", vmin=0, vmax=max(float(heat.max()), 1e-9), interpolation="nearest")
            size = "x".join(map(str, mask.shape))
            axis.set_title(f"{name.replace('blocks.', '')}\n{size}, max {heat.max():.0%}", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_pareto(rows: Sequence[dict[str, Any]], path: Path, title: str, published: str) -> None:
    """Accuracy against ReLUs on a log scale, a line for each series, that is a method with its settings.

    The scale is linear near 0 if there are networks without ReLUs.
    published: data set whose points in the literature, on its test images, are added, hollow; "" for none.
    """
    figure, axis = plt.subplots(figsize=(11, 5), layout="constrained")
    measure = "test_accuracy" if all(row.get("test_accuracy") is not None for row in rows) else "validation_accuracy"
    series = [row.get("series", row["label"]) for row in rows]
    for colour, name in zip(METHOD_COLOURS * 3, sorted(set(series))):
        points = sorted((row["relus"], 100 * row[measure]) for row, own in zip(rows, series) if own == name)
        axis.plot(*zip(*points), "o-", color=colour, label=name)
    marks = PUBLISHED.get(published, [])
    for method, marker in zip(dict.fromkeys(r.method for r in marks), "s^Dvp"):
        points = [(r.relus, r.accuracy) for r in marks if r.method == method]
        kind = next(r.replacement for r in marks if r.method == method)
        axis.plot(*zip(*points), marker, color="grey", mfc="none", ms=6, label=f"published, test: {method} ({kind})")
    axis.set_xscale("log")
    if any(row["relus"] == 0 for row in rows):
        least = 10 ** math.floor(math.log10(min((row["relus"] for row in rows if row["relus"]), default=1000)))
        axis.set_xscale("symlog", linthresh=least)
        axis.set_xlim(left=-least / 4)
    axis.set(xlabel="ReLUs per image", ylabel=f"{measure.replace('_', ' ')}, %", title=title)
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the points, however many series there are
    figure.savefig(path, dpi=130)
    plt.close(figure)
