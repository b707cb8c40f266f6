"""The partial activation: each pixel keeps its ReLU, or becomes a polynomial of degree 2, 1 or 0.

Source: AutoReP (Peng et al., ICCV 2023, arXiv 2308.10134) for the choice per pixel and the distribution-aware
fit. Here the quadratic coefficient is by default a public power of two per layer, so that a private square costs one
opening and no extra rounding; one trained coefficient per channel, as published, is the option.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from model_opt.data import Split
from model_opt.networks import activation_shapes, device_of

IDENTITY, SQUARE, RELU, LINEAR = 0, 1, 2, 3
"""What a pixel does; the values of `PartialActivation.mask`."""

RANGE_PENALTY = 1e-2
RANGE = 0.25
"""RANGE_PENALTY (the default) times half the squared excess of |z| over RANGE / c2, summed over square pixels, joins each image's loss.

Far beyond that range the quadratic term dominates, and successive layers amplify outliers until BatchNorm's running
statistics, and with them evaluation, are worthless: seen at a penalty of 1e-3 beyond 1/c2, gone with these values.
"""


def _gaussian(a: Tensor) -> tuple[Tensor, Tensor]:
    """Density and distribution function of the standard normal."""
    return torch.exp(-a * a / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + torch.erf(a / math.sqrt(2)))


def fit_relu(mean: Tensor, std: Tensor, c2: Tensor | float) -> tuple[Tensor, Tensor]:
    """Best c1, c0 of c2 z^2 + c1 z + c0 against ReLU(z) in mean square under z ~ N(mean, std^2), c2 given.

    Args and results have one entry per channel. At c2 = `best_c2` this is the unconstrained least-squares fit of degree 2, at
    c2 = 0 that of degree 1.
    """
    phi, cdf = _gaussian(mean / std)
    c1 = cdf - 2 * mean * c2
    c0 = std * phi + mean * cdf - c2 * (mean**2 + std**2) - c1 * mean
    return c1, c0


def best_c2(mean: Tensor, std: Tensor) -> Tensor:
    """Quadratic coefficient of the least-squares fit of ReLU under N(mean, std^2), per channel."""
    return _gaussian(mean / std)[0] / (2 * std)


def damped_fit(mean: Tensor, variance: Tensor, replacement: int) -> tuple[Tensor, Tensor, Tensor]:
    """c2, c1, c0 as AutoReP's released code computes them, for comparison.

    It takes v = max(variance, 0.5) for the deviation, then divides c0 by 5 and c2 by 10: nearer to the line z/2 than to the
    least-squares fit.
    """
    v = variance.clamp_min(0.5)
    a = mean / v
    phi, cdf = _gaussian(a)
    if replacement == LINEAR:
        return torch.zeros_like(a), cdf, v * phi / 5
    return phi / (2 * v) / 10, cdf - a * phi, v / 2 * phi * (1 + a * a) / 5


class _Partial(torch.autograd.Function):
    """y = ReLU(z) where the gate is 1, p(z) where it is 0, the mixture between; p(z) = (c2 z + c1) z + c0 pixel by pixel.

    `keep`, if given, is the gate of the forward pass, while `gate` only takes the gradient: a straight-through
    estimator. The gradient of a pixel's gate is the sum over the batch of dL/dy (ReLU(z) - p(z)).

    Works on (batch, H*W*C) views, which share memory with channels-last tensors; sums over the batch are products
    with a row of ones, ten times faster than reductions in bfloat16. c2, c1, c0 are such rows too.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, gate: Tensor | None, keep: Tensor | None, range_penalty: float, c2: Tensor, c1: Tensor,
                c0: Tensor) -> Tensor:
        flat = _flat(z)
        ctx.range_penalty = range_penalty
        rows = [c.to(z.dtype) for c in (c2, c1, c0)]
        ctx.save_for_backward(z, gate, keep, *rows)
        poly = torch.addcmul(rows[2], flat, torch.addcmul(rows[1], flat, rows[0]))
        if keep is not None:
            return _unflat(torch.where(keep, flat.clamp_min(0), poly), z)
        assert gate is not None
        return _unflat(torch.lerp(poly, flat.clamp_min(0), gate.to(z.dtype)), z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, gate, keep, c2, c1, c0 = ctx.saved_tensors
        flat, flat_grad = _flat(z), _flat(grad)
        ones = torch.ones(1, len(z), dtype=z.dtype, device=z.device)
        linear = torch.addcmul(c1, flat, c2)
        slope, step = torch.addcmul(linear, flat, c2), (flat > 0).to(z.dtype)
        slope = torch.where(keep, step, slope) if keep is not None else torch.lerp(slope, step, gate.to(z.dtype))
        grads: list[Tensor | None] = [None, None, None]
        if any(ctx.needs_input_grad[4:]):
            share = (~keep).float() if keep is not None else 1 - gate.float()
            weighted = [flat_grad * flat * flat, flat_grad * flat, flat_grad]
            for i in range(3):
                if ctx.needs_input_grad[4 + i]:
                    grads[i] = (ones @ weighted[i])[0].float() * share
        grad_z = flat_grad * slope
        if ctx.range_penalty and keep is not None:
            reach = torch.where(keep | (c2 == 0), math.inf, RANGE / c2.abs())
            grad_z.add_(flat - torch.minimum(torch.maximum(flat, -reach), reach), alpha=ctx.range_penalty / len(z))
        grad_gate = None
        if gate is not None and ctx.needs_input_grad[1]:
            gap = torch.addcmul(c0, flat, linear).neg_().add_(flat.clamp_min(0))
            grad_gate = (ones @ gap.mul_(flat_grad))[0].float()
        return _unflat(grad_z, z), grad_gate, None, None, *grads


def _flat(t: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H*W*C), a view if channels-last; (N, F) as it is."""
    return t.permute(0, 2, 3, 1).reshape(len(t), -1) if t.dim() == 4 else t


def _unflat(t: Tensor, like: Tensor) -> Tensor:
    if like.dim() != 4:
        return t
    n, c, h, w = like.shape
    return t.view(n, h, w, c).permute(0, 3, 1, 2)


class PartialActivation(nn.Module):
    """Mixed activation over (batch, C, H, W) or (batch, features) with one public choice per pixel.

    y = ReLU(z) where mask == RELU, c2 z^2 + c1 z + c0 where SQUARE, c1 z + c0 where LINEAR, z where IDENTITY.
    c1 and c0 are per channel (dimension 1); c2 is 2^-k with one integer k per layer, or per channel if
    `per_channel_c2` was called, times the constant `c2_scale`. Starts as all-ReLU.

    `replacement`: what a ReLU pixel would become, for the gradient of its gate.
    `gate`: what a reduction method puts in the mask's place while it trains: real, of the mask's shape, 1 for ReLU. With
    `soft_gate` the output is the mixture itself, else the mask decides and the gate only receives the gradient.
    `range_penalty`: see RANGE_PENALTY; 0 for none.

    Args:
        shape: shape of z without the batch.
    """

    mask: Tensor
    c2_shift: Tensor
    c2: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = (shape[0],) + (1,) * (len(shape) - 1)
        self.register_buffer("mask", torch.full(shape, RELU, dtype=torch.uint8))
        self.register_buffer("c2_shift", torch.tensor(2, dtype=torch.int64))
        self.register_parameter("c2", None)
        self.c1 = nn.Parameter(torch.full(self.channels, 0.5))
        self.c0 = nn.Parameter(torch.zeros(self.channels))
        self.replacement = SQUARE
        self.register_parameter("gate", None)
        self.soft_gate = False
        self.range_penalty = RANGE_PENALTY
        self.c2_scale = 1.0

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}, relus={self.count(RELU)}, squares={self.count(SQUARE)}"

    def count(self, kind: int) -> int:
        """Number of pixels that do `kind`, counted exactly from the mask."""
        return int((self.mask == kind).sum())

    def quadratic(self) -> Tensor:
        """The quadratic coefficient of each channel, of shape (C, 1, ...)."""
        return self.c2 * self.c2_scale if self.c2 is not None else torch.exp2(-self.c2_shift.float()).expand(self.channels)

    def per_channel_c2(self) -> None:
        """From now on c2 is trained, one per channel, starting from the layer's."""
        self.c2 = nn.Parameter(self.quadratic().clone())

    def fold_c2_scale(self) -> None:
        """The same function with `c2_scale` 1."""
        if self.c2 is not None:
            self.c2.data.mul_(self.c2_scale)
        self.c2_scale = 1.0

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor, damping: int = 2) -> None:
        """Set the coefficients by the closed forms from per-channel statistics of the pre-activation (shape (C,)).

        A replacement by SQUARE sets k (or c2 per channel), c1 and c0; by LINEAR c1 and c0; by IDENTITY nothing.
        damping is added to k: the unconstrained fit (0) overshoots on the heavy right tail behind a residual addition and
        a deep network of squares then diverges; 2 trains stably. c1 and c0 are the best ones for the damped c2.
        """
        if self.replacement == IDENTITY:
            return
        std = std.clamp_min(1e-3)
        c2 = torch.zeros_like(std)
        if self.replacement == SQUARE and self.c2 is not None:
            c2 = best_c2(mean, std) * 2.0**-damping
            self.c2.copy_(c2.view(self.channels))
        elif self.replacement == SQUARE:
            weight = std**2
            average = (best_c2(mean, std) * weight).sum() / weight.sum()
            self.c2_shift.fill_(int(torch.log2(1 / average).round().clamp(0, 12)) + damping)
            c2 = self.quadratic().flatten()
        c1, c0 = fit_relu(mean, std, c2)
        self.c1.copy_(c1.view(self.channels))
        self.c0.copy_(c0.view(self.channels))

    def freeze(self) -> None:
        """The coefficients keep their values."""
        for coefficient in (self.c2, self.c1, self.c0):
            if coefficient is not None:
                coefficient.requires_grad_(False)

    def _rows(self, mask: Tensor) -> list[Tensor]:
        """c2, c1, c0 of every pixel's polynomial as the flat rows of `_Partial`."""
        own = slice(len(mask))
        kind = torch.where(mask == RELU, self.replacement, mask)
        poly = (kind == SQUARE) | (kind == LINEAR)
        rows = (torch.where(kind == SQUARE, self.quadratic()[own], 0.0), torch.where(poly, self.c1[own], 1.0),
                torch.where(poly, self.c0[own], 0.0))
        return [_flat(row[None])[0] for row in rows]

    def forward(self, z: Tensor) -> Tensor:
        mask = self.mask[: z.shape[1]]  # a slimmable network may pass its first channels only
        gate = None if self.gate is None else _flat(self.gate[None, : z.shape[1]])[0]
        keep = None if self.soft_gate else _flat((mask == RELU)[None])[0]
        result: Tensor = _Partial.apply(z, gate, keep, self.range_penalty, *self._rows(mask))  # type: ignore[no-untyped-call]
        return result


def partial_activations(model: nn.Module) -> dict[str, PartialActivation]:
    """The partial activations of a network by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PartialActivation)}


def count_relus(model: nn.Module) -> int:
    """ReLUs per image that a network with partial activations still evaluates, counted from its masks."""
    return sum(layer.count(RELU) for layer in partial_activations(model).values())


RELU_CALLS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_")


class Tracer(fx.Tracer):
    """torch.fx's, to which a partial activation is one node; knows where it is, for error messages."""

    where = ""

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outer, self.where = self.where, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.where = outer
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PartialActivation) or super().is_leaf_module(m, module_qualified_name)


def separate_relus(model: nn.Module) -> nn.Module:
    """The same network, of the same weights, with an nn.ReLU for each place that applies one.

    Networks that call one nn.ReLU several times, or `relu` as a function, come back as a torch.fx.GraphModule; others, and those that
    cannot be traced, as they are.
    """
    try:
        graph = Tracer().trace(model)
    except Exception:  # whatever a user's forward raises; the compiler's own trace says where
        return model
    traced, seen, changed = fx.GraphModule(model, graph), set(), False
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(node.target), nn.ReLU) and node.target not in seen:
            seen.add(node.target)
        elif node.target in (seen if node.op == "call_module" else RELU_CALLS):
            name = node.name
            while hasattr(traced, name):
                name += "_"
            traced.add_module(name, nn.ReLU())
            node.op, node.target, node.args, node.kwargs = "call_module", name, (node.all_input_nodes[0],), {}
            changed = True
    if not changed:
        return model
    traced.recompile()
    return traced


def replace_relus(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Replace each nn.ReLU by an all-ReLU PartialActivation, in place and on the network's device; the function computed is unchanged.

    Args:
        input_shape: shape of one input without the batch, such as (3, 32, 32).
    """
    where = device_of(model)
    for name, shape in activation_shapes(model, input_shape, nn.ReLU).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PartialActivation(shape).to(where))
    return model


@torch.no_grad()
def fit_polynomials(model: nn.Module, sample: Split, *, damping: int = 2, released: bool = False) -> None:
    """Set the coefficients of every layer's replacement by the closed forms from its pre-activations on `sample`.

    damping: see `PartialActivation.fit`. released: use `damped_fit` as AutoReP's released code does; c2 must then be per channel.
    """
    layers = partial_activations(model)
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Any:
        def record(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
            z = args[0].float().transpose(0, 1).flatten(1)
            sums[name].append(torch.stack([z.mean(1), z.square().mean(1)]))

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    model.eval()
    where, batch = device_of(model), sample.inference_batch(250)
    try:
        for start in range(0, len(sample), batch):
            model(sample[start : start + batch].normalised().to(where))
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        mean, square = torch.stack(sums[name]).mean(0)
        variance = (square - mean**2).clamp_min(0)
        if released and layer.replacement != IDENTITY:
            for parameter, value in zip((layer.c2, layer.c1, layer.c0), damped_fit(mean, variance, layer.replacement)):
                if parameter is not None:
                    parameter.copy_(value.view(layer.channels))
        else:
            layer.fit(mean, variance.sqrt(), damping)
