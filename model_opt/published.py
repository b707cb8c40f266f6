"""Published results, for reference marks in plots and tables: test accuracy in percent at a number of ReLUs, by data set.

From papers' abstracts, authors' code and later papers' tables, of ResNet-18 or of networks that they do not name (AutoReP's, SNL's). They
report the best epoch on the test set; ours is the last epoch, chosen on validation images. "replacement" is what a removed ReLU becomes:
identities are free in private inference, a degree-2 polynomial costs one square, so rows of different kinds are not alike.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One published point."""

    method: str
    replacement: str
    relus: int
    accuracy: float


def _points(method: str, replacement: str, text: str) -> list[Result]:
    pairs = [pair.split() for pair in text.split(",")]
    return [Result(method, replacement, round(float(k) * 1000), float(a)) for k, a in pairs]


PUBLISHED = {
    "cifar10": [
        *_points("AutoReP", "degree 2", "12.9 94.31"),
        *_points("SNL", "identity", "12.9 88.23, 25 90.88, 49.4 92.27, 99.9 93.50, 150 94.26, 300 95.06"),
        *_points("DeepReDuce", "identity", "36 88.5, 70 90.0, 114 92.7, 221.5 94.07"),
        *_points("SENet", "identity", "82 93.05, 150 94.91"),
        *_points("ReLUPruner", "identity", "6 87.82, 12.9 90.12, 50 94.02, 150 95.07"),
    ],
    "cifar100": [
        *_points("AutoReP", "degree 2", "12.9 74.92"),
        *_points("SNL", "identity", "12.9 66.53, 25 70.05, 49.4 73.75, 99.9 75.94, 150 77.35"),
        *_points("DeepReDuce", "identity", "12.3 64.97, 28.7 68.68, 49.2 69.50, 57.34 72.68, 114 74.72, 197 75.51, 229.38 76.22"),
        *_points("SENet", "identity", "24.6 70.59, 49.6 75.28"),
    ],
    "tiny-imagenet": [
        *_points("AutoReP", "degree 2", "55 63.69"),
        *_points("SNL", "identity", "60 54.24, 100 58.94, 200 63.39, 300 64.04"),
        *_points("DeepReDuce", "identity", "28.67 47.55, 57.35 53.75, 114.69 56.18, 230 59.18, 400 61.65, 917 64.66"),
        *_points("SENet", "identity", "142 58.9, 298 64.96"),
    ],
}
"""arXiv 2308.10134, 2202.02340, 2103.01396, 2301.09254, and ReLUPruner (AAAI 2026). SENet's 93.6 at 49.1K on CIFAR-10, more than it has
at 82K, is left out as a likely slip."""
