"""Preprocessing of the two parties: from correlated randomness to single-use material (protocol sections 3 to 6).

The client runs the graph on its own shares, which depend on nothing that the online phase reveals, and sends the
server e for each activation and its re-maskings. Traffic: client to server only, one message per activation layer
(e at the active pixels, M at the identity pixels) and per re-masking.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from protocol import ring
from protocol.channel import Receiver, Sender
from protocol.crypten_adapter import build_graph, register_cryptensor
from protocol.material import (
    ClientActivation,
    ClientContents,
    ClientCorrelations,
    ServerActivation,
    ServerContents,
    ServerCorrelations,
)
from protocol.model import ActivationLayer, FixedPoint
from protocol.plan import ActivationStep, LinearStep, Plan, RemaskStep, public_constants
from protocol.tensor import Constant, RingTensor, Weight
from protocol.timeline import TimedReceiver, TimedSender, Timeline


class _ClientPass:
    """State of the client's preprocessing pass."""

    def __init__(self, plan: Plan, source: ClientCorrelations, to_server: Sender, timeline: Timeline) -> None:
        self.plan, self.source, self.to_server, self.timeline = plan, source, TimedSender(to_server, timeline), timeline
        self.activations: list[ClientActivation] = []

    @property
    def fixed_point(self) -> FixedPoint:
        return self.plan.model.fixed_point


def gather(dense: Tensor, pixels: Tensor, everything: bool) -> Tensor:
    """(batch, *layer) to (batch, chosen pixels); a view where all are chosen."""
    flat = dense.flatten(1)
    return flat if everything else flat.index_select(1, pixels)


@register_cryptensor("relucent_client")
class ClientTensor(RingTensor):
    """The client's share of a value, known to it before the online phase."""

    session: _ClientPass

    def _add_constant(self, constant: Constant) -> RingTensor:
        return self

    def _truncate(self, bits: int) -> Tensor:
        return ring.truncate_local(self.data, bits, ring.Party.CLIENT)

    def _private_map(self, weight: Weight, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.session.timeline.lap("elementwise")
        share = weight.map(self.data, apply)  # Delta * r
        self.session.timeline.lap("linear")
        share += self.session.source.linear(tuple(share.shape))
        return share

    def _remask(self) -> RingTensor:
        mask = self.session.source.fresh_mask(tuple(self.data.shape))
        self.session.to_server.send(ring.to_bytes(self.data - mask))
        fresh = self._with(mask)
        fresh.dealt = True
        return fresh

    def _activate(self, layer: ActivationLayer, shift: Tensor | None, constant: Tensor | None) -> RingTensor:
        step = ActivationStep(tuple(self.data.shape), layer)
        source, batch = self.session.source, step.batch
        share = self._rescaled(shift)
        z = gather(share.data, layer.active, layer.all_active)
        e = torch.empty_like(z)
        twice, base = z << 1, torch.zeros_like(z)
        if step.squares:
            squares = source.squares(step)
            put(e, layer.square_in_active, layer.all_square, -squares.mask.view(batch, -1))
            put(base, layer.square_in_active, layer.all_square, 2 * squares.product.view(batch, -1))
            base.addcmul_(z, z)
        relu = source.relus(step) if step.relus else None
        if relu is not None:
            put(e, layer.relu_in_active, False, relu.mask.view(batch, -1))
        e += z
        mask = source.fresh_mask(step.shape)
        if layer.all_active:
            passed, next_mask = z[:, :0], mask.flatten(1)
        else:
            passed = gather(share.data, layer.identity, False) - gather(mask, layer.identity, False)
            next_mask = gather(mask, layer.active, False)
        self.session.to_server.send(ring.to_bytes(e), ring.to_bytes(passed))
        self.session.timeline.close(layer.name)
        self.session.activations.append(ClientActivation(step, twice, base, relu, next_mask))
        return type(self)(self.session, mask, share.scale, True)


def put(dense: Tensor, index: Tensor, everything: bool, values: Tensor) -> None:
    """dense[:, index] = values, in place."""
    if everything:
        dense.copy_(values)
    else:
        dense.index_copy_(1, index, values)


@torch.no_grad()
def preprocess_client(plan: Plan, delta: dict[str, Tensor], source: ClientCorrelations, to_server: Sender,
                      timeline: Timeline | None = None) -> ClientContents:
    """The client's preprocessing of one inference.

    Args:
        delta: W - B of every private weight, by parameter name, int64. timeline: the one that `source` laps too.
    """
    state = _ClientPass(plan, source, to_server, timeline or Timeline())
    parameters: dict[str, Weight | Constant] = dict(public_constants(plan.model))
    parameters |= {name: Weight(value) for name, value in delta.items()}
    mask = source.fresh_mask(plan.input_shape)
    out = build_graph(plan.model, parameters)(ClientTensor(state, mask, state.fixed_point.activation_bits, True))
    state.timeline.lap("elementwise")
    state.timeline.close("output")
    return ClientContents(mask, tuple(state.activations), out.data)


@torch.no_grad()
def preprocess_server(plan: Plan, source: ServerCorrelations, from_client: Receiver, timeline: Timeline | None = None) -> ServerContents:
    """The server's preprocessing of one inference. timeline: the one that `source` laps too."""
    laps = timeline or Timeline()
    from_client = TimedReceiver(from_client, laps)
    linear, remask, activations = [], [], []
    for step in plan.steps:
        if isinstance(step, LinearStep):
            linear.append(source.linear(step.shape))
        elif isinstance(step, RemaskStep):
            data = from_client.receive(ring.ELEMENT_BYTES * torch.Size(step.shape).numel())
            remask.append(ring.from_bytes(data, step.shape))
        else:
            activations.append(_server_activation(step, source, from_client))
            laps.lap("elementwise")
            laps.close(step.layer.name)
    laps.close("output")
    return ServerContents(tuple(linear), tuple(remask), tuple(activations))


def _server_activation(step: ActivationStep, source: ServerCorrelations, from_client: Receiver) -> ServerActivation:
    layer, batch = step.layer, step.batch
    squares = source.squares(step) if step.squares else None
    relu = source.relus(step) if step.relus else None
    message = ring.from_bytes(from_client.receive(ring.ELEMENT_BYTES * (step.active + step.identities)),
                              (step.active + step.identities,))
    e = message[: step.active].view(batch, -1)
    passed = message[step.active :].view(batch, -1).clone()  # a view would keep all of e alive
    opening, cross = torch.empty_like(e), torch.zeros_like(e)
    if squares is not None:
        alpha = squares.mask.view(batch, -1)
        product = torch.addcmul(squares.product.view(batch, -1), alpha, gather(e, layer.square_in_active, layer.all_square))
        put(opening, layer.square_in_active, layer.all_square, alpha)
        put(cross, layer.square_in_active, layer.all_square, product << 1)
    if relu is not None:
        put(opening, layer.relu_in_active, False, -(relu.mask.view(batch, -1) + gather(e, layer.relu_in_active, False)))
    return ServerActivation(step, opening, cross, relu, passed)
