"""Fixed-point simulation: the graph on plain integers, rounding to nearest where the protocol truncates.

The reference for private results, and the source of the ranges that the compiler calibrates with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocol import ring
from protocol.crypten_adapter import build_graph, register_cryptensor
from protocol.model import ActivationLayer, FixedPoint, Model
from protocol.tensor import Constant, RingTensor, Weight


@dataclass
class Simulation:
    """State of one simulated pass, with the ranges it saw.

    truncated_magnitude: sum over all truncated elements of |y|, as reals of the ring, the largest over the images.
    largest_compared: largest |z| at a ReLU pixel, ring units at scale f_a.
    """

    fixed_point: FixedPoint
    truncated_magnitude: float = 0.0
    largest_compared: int = 0
    _magnitudes: list[Tensor] = field(default_factory=list)

    def record_truncation(self, y: Tensor) -> None:
        self._magnitudes.append(y.double().abs().flatten(1).sum(1))
        self.truncated_magnitude = float(torch.stack(self._magnitudes).sum(0).max())


@register_cryptensor("relucent_simulation")
class SimulationTensor(RingTensor):
    """Plain values; every tensor counts as dealt, since nothing is masked."""

    session: Simulation

    def _add_constant(self, constant: Constant) -> RingTensor:
        return self._with(self.data + constant.encoded("added", self.scale, lambda real: ring.encode(real, self.scale)))

    def _truncate(self, bits: int) -> Tensor:
        self.session.record_truncation(self.data)
        return ring.truncate_nearest(self.data, bits)

    def _private_map(self, weight: Weight, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return weight.map(self.data, apply)

    def _remask(self) -> RingTensor:
        fresh = self._with(self.data)
        fresh.dealt = True
        return fresh

    def _activate(self, layer: ActivationLayer, shift: Tensor | None, constant: Tensor | None) -> RingTensor:
        value = self._rescaled(shift)
        z = value.data.flatten(1)
        out = z.clone()
        if len(layer.square):
            y = z * z
            if layer.factor_of_active is not None:
                y[:, layer.active] *= layer.factor_of_active
            bits = self.fixed_point.activation_bits
            self.session.record_truncation(y[:, layer.square])
            y = ring.truncate_nearest(y, bits + layer.c2_shift)
            if constant is not None:
                y += constant.flatten()
            out[:, layer.square] = y[:, layer.square]
        if len(layer.relu):
            kept = z[:, layer.relu]
            self.session.largest_compared = max(self.session.largest_compared, int(kept.abs().max()))
            out[:, layer.relu] = kept.clamp_min(0)
        return type(self)(self.session, out.view(self.data.shape), value.scale, True)


def server_parameters(model: Model) -> dict[str, Weight | Constant]:
    """The model's own parameters: W as ring elements, constants as reals."""
    weights = {}
    for name, value in model.weights().items():
        step, digits = model.private.get(f"{name}_step"), None
        if step is not None and value.dim() == 4:
            digits = ring.digit_weight(model.private[name], step)
        weights[name] = Weight(value, ring.limb_weight(value) if digits is None else None, digits)
    return weights | {name: Constant(value) for name, value in model.constants().items()}


def server_graph(model: Model) -> Any:
    """The graph with the model's own parameters, for the server's online phase. Running it changes nothing in it."""
    return build_graph(model.public, server_parameters(model))


@torch.no_grad()
def simulate(model: Model, x_float: Tensor, session: Simulation | None = None) -> Tensor:
    """Fixed-point logits, float64 (batch, classes), for normalised images x (batch, *input_shape)."""
    session = session or Simulation(model.public.fixed_point)
    bits = session.fixed_point.activation_bits
    graph = server_graph(model)
    out = graph(SimulationTensor(session, ring.encode(x_float, bits), bits, True))
    return ring.decode(out.data, out.scale)
