"""The compiled network in plain PyTorch: what the compiler checks itself against, the floor of every comparison, the reference of
float accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.model import RELU, SQUARE, Model

Truncation = Callable[[Tensor], Tensor]


class Plaintext:
    """Runs a compiled model on real numbers with folded BatchNorm; `dtype` float32 for timing, float64 for analysis.

    The weights are those of the file, that is, rounded to f_w bits.
    """

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32) -> None:
        self._public = model.public
        self._tensors = {name: value.to(dtype) for name, value in model.floats().items()}
        self._layers = {}
        for node in model.public.nodes:
            if node.op == "activation":
                layer = model.public.activation(node.name)
                c2 = layer.c2_of_pixels(torch.arange(layer.mask.numel()))
                c2 = c2.to(dtype).view(layer.mask.shape) if isinstance(c2, Tensor) else c2
                relu, square = layer.mask == RELU, layer.mask == SQUARE
                kinds = (bool(relu.any()), bool(square.any()), bool((relu | square).all()))
                self._layers[node.name] = (relu, square, kinds, c2)

    def __call__(self, x: Tensor, truncated: Truncation = lambda t: t) -> Tensor:
        """Logits of normalised images. `truncated` is applied to every value that the protocol truncates."""
        values = {"input": x}
        for node in self._public.nodes:
            a, attrs = values[node.inputs[0]], node.attrs
            if node.op == "conv2d":
                value = F.conv2d(a, self._tensors[f"{node.name}.weight"], self._tensors[f"{node.name}.bias"],
                                 attrs["stride"], attrs["padding"], attrs["dilation"], attrs["groups"])
            elif node.op == "linear":
                value = F.linear(a, self._tensors[f"{node.name}.weight"], self._tensors[f"{node.name}.bias"])
            elif node.op == "scale":
                value = a * self._tensors[f"{node.name}.weight"] + self._tensors[f"{node.name}.bias"]
            elif node.op == "add":
                value = a + values[node.inputs[1]]
            elif node.op == "flatten":
                value = a.flatten(1)
            elif node.op == "avg_pool2d":
                value = F.avg_pool2d(a, attrs["kernel"], attrs["stride"], attrs["padding"])
            elif node.op == "max_pool2d":
                value = F.max_pool2d(a, attrs["kernel"], attrs["stride"], attrs["padding"])
            else:
                value = self._activation(node.name, truncated(a), truncated)
            values[node.name] = value
        return values[self._public.output]

    def _activation(self, name: str, z: Tensor, truncated: Truncation) -> Tensor:
        relu, square, (any_relu, any_square, all_active), c2 = self._layers[name]
        out = z
        if any_square:
            view = (-1,) + (1,) * (relu.dim() - 1)
            c1, c0 = (self._tensors[f"{name}.{k}"].view(view) for k in ("c1", "c0"))
            out = truncated(torch.addcmul(c0, z, c1 + c2 * z))
        if any_relu:
            kept = z.clamp_min(0)
            if not any_square and all_active:
                return kept
            out = torch.where(relu, kept, out)
        return out if all_active or not any_square else torch.where(relu | square, out, z)


def rounding_bound(model: Model, x: Tensor) -> float:
    """How far private and simulated fixed-point logits of one image may differ, except with probability 2^-40.

    Derivation: every truncation adds an error of at most one unit u = 2^-f_a. In the protocol it is unbiased within an
    interval of length u, in the simulation at most u/2 in magnitude. To first order logit j moves by
    sum_i g_ji e_i with g the gradient at the truncated values, computed here exactly in float64. Hoeffding's
    inequality bounds each of the two sums by u sqrt(ln(2/p) / 2) |g_j|; the simulation's errors are taken
    as independent, too. The bound is for the largest row, with twice the sum for the two runs.
    """
    network = Plaintext(model, torch.float64)
    noise: list[Tensor] = []

    def perturb(value: Tensor) -> Tensor:
        noise.append(torch.zeros_like(value, requires_grad=True))
        return value + noise[-1]

    logits = network(x.double()[:1], perturb)[0]
    unit = 2.0**-model.public.fixed_point.activation_bits
    worst = 0.0
    for logit in logits:
        gradients = torch.autograd.grad(logit, noise, retain_graph=True, allow_unused=True)
        worst = max(worst, sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
    failure = 2.0**-40 / len(logits)
    return 2 * unit * worst * float(torch.tensor(2 / failure).log().div(2).sqrt())
