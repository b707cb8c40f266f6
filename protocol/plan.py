"""The public plan of an inference: which correlated randomness and which messages, in order, with exact sizes.

Obtained by running the graph on shapes alone. Every party derives the same plan from the public model; lengths of
all messages are checked against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from protocol import dcf
from protocol.crypten_adapter import build_graph, register_cryptensor
from protocol.errors import ModelFileError
from protocol.model import PRIVATE_MAPS, ActivationLayer, FixedPoint, PublicModel
from protocol.ring import ELEMENT_BYTES
from protocol.tensor import Constant, RingTensor, Weight

MAX_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class LinearStep:
    """A private linear map; shape of its output, batch included."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class RemaskStep:
    """A re-masking in preprocessing, between two private maps without an activation."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ActivationStep:
    """An activation layer, one online round trip. Counts include the batch."""

    shape: tuple[int, ...]
    layer: ActivationLayer

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def active(self) -> int:
        return self.batch * len(self.layer.active)

    @property
    def squares(self) -> int:
        return self.batch * len(self.layer.square)

    @property
    def relus(self) -> int:
        return self.batch * len(self.layer.relu)

    @property
    def identities(self) -> int:
        return self.batch * len(self.layer.identity)

    def blocks(self) -> list[int]:
        """Sizes of the DCF key blocks."""
        full, rest = divmod(self.relus, dcf.BLOCK_KEYS)
        return [dcf.BLOCK_KEYS] * full + ([rest] if rest else [])


Step = LinearStep | RemaskStep | ActivationStep


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps of one inference on a batch, and what they cost."""

    model: PublicModel
    batch: int
    steps: tuple[Step, ...]
    output_shape: tuple[int, ...]
    output_scale: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.model.input_shape)

    @cached_property
    def activations(self) -> tuple[ActivationStep, ...]:
        return tuple(s for s in self.steps if isinstance(s, ActivationStep))

    @property
    def rounds(self) -> int:
        """Online rounds: one for each activation layer, and the logits."""
        return len(self.activations) + 1

    @property
    def comparison_bits(self) -> int:
        """Bits that a DCF compares, n - 1."""
        return self.model.fixed_point.comparison_bits - 1

    @property
    def online_bytes_up(self) -> int:
        """Payload client to server: the masked input and one element per active pixel."""
        return ELEMENT_BYTES * (_count(self.input_shape) + sum(s.active for s in self.activations))

    @property
    def online_bytes_down(self) -> int:
        """Payload server to client: one element per active pixel and the logits."""
        return ELEMENT_BYTES * (_count(self.output_shape) + sum(s.active for s in self.activations))

    @property
    def server_material_bytes(self) -> int:
        """About what a server holds for one inference."""
        total = 0
        for step in self.steps:
            if isinstance(step, ActivationStep):
                unpacked = 2 * self.comparison_bits * step.relus  # control bits in memory
                total += ELEMENT_BYTES * (2 * step.active + 3 * step.relus + step.identities) + self.key_bytes(step) + unpacked
            else:
                total += ELEMENT_BYTES * _count(step.shape)
        return total

    def key_bytes(self, step: ActivationStep) -> int:
        """One party's DCF keys of a step."""
        return sum(dcf.key_bytes(n, self.comparison_bits) for n in step.blocks())


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


class _Planner:
    def __init__(self, fixed_point: FixedPoint) -> None:
        self.fixed_point = fixed_point
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        if _count(step.shape) > MAX_ELEMENTS:
            raise ModelFileError("a layer of this model and batch is too large")
        self.steps.append(step)


@register_cryptensor("relucent_plan")
class PlanTensor(RingTensor):
    """Shapes and scales only."""

    session: _Planner

    def _add_constant(self, constant: Constant) -> RingTensor:
        return self

    def _truncate(self, bits: int) -> Tensor:
        return self.data

    def _private_map(self, weight: Weight, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        data = weight.map(self.data, apply)
        self.session.add(LinearStep(tuple(data.shape)))
        return data

    def _remask(self) -> RingTensor:
        self.session.add(RemaskStep(tuple(self.data.shape)))
        fresh = self._with(self.data)
        fresh.dealt = True
        return fresh

    def _activate(self, layer: ActivationLayer, shift: Tensor | None, constant: Tensor | None) -> RingTensor:
        if tuple(self.data.shape[1:]) != tuple(layer.mask.shape):
            raise ModelFileError(f"the mask of {layer.name!r} does not fit its layer")
        self.session.add(ActivationStep(tuple(self.data.shape), layer))
        value = self._rescaled(shift)
        return type(self)(self.session, value.data, value.scale, True)


def weight_shapes(model: PublicModel) -> dict[str, tuple[int, ...]]:
    """Shape of every private weight by parameter name, in graph order."""
    return {f"{n.name}.weight": tuple(n.attrs["shape"]) for n in model.nodes if n.op in PRIVATE_MAPS}


def public_constants(model: PublicModel) -> dict[str, Constant]:
    """Placeholders, in roles other than the server's, for constants that only the server adds."""
    constants = {f"{n.name}.bias": Constant(None) for n in model.nodes if n.op in PRIVATE_MAPS}
    for node in model.nodes:
        if node.op == "activation":
            constants |= {f"{node.name}.c1": Constant(None), f"{node.name}.c0": Constant(None)}
    return constants


@torch.no_grad()
def make_plan(model: PublicModel, batch: int) -> Plan:
    """The plan of an inference on `batch` images. Raises ModelFileError if the layers do not fit together."""
    planner = _Planner(model.fixed_point)
    parameters: dict[str, Weight | Constant] = dict(public_constants(model))
    for name, shape in weight_shapes(model).items():
        parameters[name] = Weight(torch.empty(shape, dtype=torch.int64, device="meta"))
    start = torch.empty((batch, *model.input_shape), dtype=torch.int64, device="meta")
    try:
        out = build_graph(model, parameters)(PlanTensor(planner, start, model.fixed_point.activation_bits, True))
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        raise ModelFileError(f"the layers of this model do not fit together: {type(error).__name__}") from error
    if out.data.dim() != 2 or (model.classes and out.data.shape[1] != len(model.classes)):
        raise ModelFileError("the model's output does not fit its class names")
    return Plan(model, batch, tuple(planner.steps), tuple(out.data.shape), out.scale)
