"""The partial activation: each pixel keeps its ReLU, squares, or passes through.

Source: AutoReP (Peng et al., ICCV 2023, arXiv 2308.10134) for the choice per pixel and the distribution-aware
fit. The quadratic coefficient is a public power of two per layer, so that a private square costs one opening
and no extra rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from model_opt.networks import activation_shapes

IDENTITY, SQUARE, RELU = 0, 1, 2
"""What a pixel does; the values of `PartialActivation.mask`."""

RANGE_PENALTY = 1e-2
RANGE = 0.25
"""RANGE_PENALTY times half the squared excess of |z| over RANGE 2^k, summed over square pixels, joins each image's loss.

Far beyond that range the quadratic term dominates, and successive layers amplify outliers until BatchNorm's running
statistics, and with them evaluation, are worthless: seen at a penalty of 1e-3 beyond 2^k, gone with these values.
"""


def fit_relu(mean: Tensor, std: Tensor, c2: Tensor | float) -> tuple[Tensor, Tensor]:
    """Best c1, c0 of c2 z^2 + c1 z + c0 against ReLU(z) in mean square under z ~ N(mean, std^2), c2 given.

    Args and results have one entry per channel. At c2 = phi(a)/(2 std), a = mean/std, this is the unconstrained
    least-squares fit.
    """
    a = mean / std
    phi = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    cdf = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    c1 = cdf - 2 * mean * c2
    c0 = std * phi + mean * cdf - c2 * (mean**2 + std**2) - c1 * mean
    return c1, c0


def best_c2(mean: Tensor, std: Tensor) -> Tensor:
    """Quadratic coefficient of the least-squares fit of ReLU under N(mean, std^2), per channel."""
    a = mean / std
    return torch.exp(-a * a / 2) / math.sqrt(2 * math.pi) / (2 * std)


class _Partial(torch.autograd.Function):
    """a = relu(z) where `keep`, else c2 z^2 + c1 z + c0; the indicator learns by a straight-through gradient.

    AutoReP passes d mask / d indicator := softplus(indicator), so the gradient of pixel k's indicator is
    softplus(w_k) * sum over the batch of dL/da_k (relu(z_k) - p(z_k)).

    Works on (batch, H*W*C) views, which share memory with channels-last tensors; sums over the batch are products
    with a row of ones, ten times faster than reductions in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, indicator: Tensor | None, keep: Tensor, c2: float, c1: Tensor, c0: Tensor) -> Tensor:
        flat = _flat(z)
        ctx.save_for_backward(z, indicator, keep, c1, c0)
        ctx.c2 = c2
        poly = torch.addcmul(_row(c0, z), flat, torch.add(_row(c1, z), flat, alpha=c2))
        return _unflat(torch.where(_flat(keep[None])[0], flat.clamp_min(0), poly), z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, indicator, keep, c1, c0 = ctx.saved_tensors
        channels = z.shape[1]
        flat, flat_grad, flat_keep = _flat(z), _flat(grad), _flat(keep[None])[0]
        ones = torch.ones(1, len(z), dtype=z.dtype, device=z.device)
        linear = torch.add(_row(c1, z), flat, alpha=ctx.c2)
        slope = torch.where(flat_keep, (flat > 0).to(z.dtype), torch.add(linear, flat, alpha=ctx.c2))
        squares = (~flat_keep).float()
        grad_c1 = ((ones @ (flat_grad * flat))[0].float() * squares).view(-1, channels).sum(0).view_as(c1)
        grad_c0 = ((ones @ flat_grad)[0].float() * squares).view(-1, channels).sum(0).view_as(c0)
        grad_z = flat_grad * slope
        if RANGE_PENALTY:
            excess = flat - flat.clamp(-RANGE / ctx.c2, RANGE / ctx.c2)
            grad_z.add_(excess.masked_fill_(flat_keep, 0), alpha=RANGE_PENALTY / len(z))
        grad_w = None
        if indicator is not None and ctx.needs_input_grad[1]:
            gap = torch.addcmul(_row(c0, z), flat, linear).neg_().add_(flat.clamp_min(0))
            score = (ones @ gap.mul_(flat_grad))[0].float()
            score = score.view(z.shape[2], z.shape[3], channels).permute(2, 0, 1)
            grad_w = torch.nn.functional.softplus(indicator) * score
        return _unflat(grad_z, z), grad_w, None, None, grad_c1, grad_c0


def _flat(t: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H*W*C); a view if channels-last."""
    return t.permute(0, 2, 3, 1).reshape(len(t), -1)


def _unflat(t: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return t.view(n, h, w, c).permute(0, 3, 1, 2)


def _row(per_channel: Tensor, z: Tensor) -> Tensor:
    """A per-channel coefficient repeated for every pixel of a flat row, (H*W*C,)."""
    return per_channel.to(z.dtype).flatten().repeat(z.shape[2] * z.shape[3])


class PartialActivation(nn.Module):
    """Mixed activation over (batch, C, H, W) or (batch, features) with one public choice per pixel.

    y = ReLU(z) where mask == RELU, 2^-k z^2 + c1 z + c0 where mask == SQUARE, z where mask == IDENTITY;
    c1 and c0 are per channel (dimension 1), k is one integer per layer. Starts as all-ReLU.

    Args:
        shape: shape of z without the batch.
    """

    mask: Tensor
    c2_shift: Tensor
    indicator: Tensor | None

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        channels = (shape[0],) + (1,) * (len(shape) - 1)
        self.register_buffer("mask", torch.full(shape, RELU, dtype=torch.uint8))
        self.register_buffer("c2_shift", torch.tensor(2, dtype=torch.int64))
        self.c1 = nn.Parameter(torch.full(channels, 0.5))
        self.c0 = nn.Parameter(torch.zeros(channels))
        self.indicator = None

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}, relus={self.count(RELU)}, squares={self.count(SQUARE)}"

    def count(self, kind: int) -> int:
        """Number of pixels that do `kind`, counted exactly from the mask."""
        return int((self.mask == kind).sum())

    @property
    def c2(self) -> float:
        """The public quadratic coefficient 2^-k."""
        return 2.0 ** -int(self.c2_shift)

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor, damping: int = 2) -> None:
        """Set k, c1, c0 by the closed forms from per-channel statistics of the pre-activation (shape (C,)).

        damping is added to k: the unconstrained fit (0) overshoots on the heavy right tail behind a residual addition and
        a deep network of squares then diverges; 2 trains stably. c1 and c0 are the best ones for the damped c2.
        """
        std = std.clamp_min(1e-3)
        weight = std**2
        c2 = (best_c2(mean, std) * weight).sum() / weight.sum()
        self.c2_shift.fill_(int(torch.log2(1 / c2).round().clamp(0, 12)) + damping)
        c1, c0 = fit_relu(mean, std, self.c2)
        self.c1.copy_(c1.view_as(self.c1))
        self.c0.copy_(c0.view_as(self.c0))

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() == 4 and not bool((self.mask == IDENTITY).any()):
            result: Tensor = _Partial.apply(  # type: ignore[no-untyped-call]
                z, self.indicator, self.mask == RELU, self.c2, self.c1, self.c0)
            return result
        poly = self.c2 * z * z + self.c1 * z + self.c0
        return torch.where(self.mask == RELU, z.clamp_min(0), torch.where(self.mask == SQUARE, poly, z))


def partial_activations(model: nn.Module) -> dict[str, PartialActivation]:
    """The partial activations of a network by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PartialActivation)}


def count_relus(model: nn.Module) -> int:
    """ReLUs per image that a network with partial activations still evaluates, counted from its masks."""
    return sum(layer.count(RELU) for layer in partial_activations(model).values())


def replace_relus(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Replace each nn.ReLU by an all-ReLU PartialActivation, in place; the function computed is unchanged.

    Args:
        input_shape: shape of one input without the batch, such as (3, 32, 32).
    """
    for name, shape in activation_shapes(model, input_shape, nn.ReLU).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PartialActivation(shape))
    return model
