"""The dealer's pass, and how the two parties read what it deals (protocol sections 3 to 5).

Traffic, one way, in plan order. Dealer to server: t_S of each private map; the server's DCF keys. Dealer to client: w_C of
each layer's squares; the client's DCF keys with its shares of mu and A mu. All that can be expanded from a party's own
seed is not sent: r, t_C, beta, a_C, r' come from the client's seed; alpha, w_S, a_S and the server's shares of mu
and A mu from the server's. The dealer sees the public graph and its own randomness, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from protocol import dcf, ring
from protocol.channel import Receiver, Sender
from protocol.crypten_adapter import build_graph, register_cryptensor
from protocol.dcf import DcfKeys
from protocol.material import ReluShare, SquareShare
from protocol.model import ActivationLayer, FixedPoint, PublicModel
from protocol.plan import ActivationStep, Plan, public_constants, weight_shapes
from protocol.prg import Seed
from protocol.tensor import Constant, RingTensor, Weight
from protocol.timeline import TimedReceiver, TimedSender, Timeline


def weight_masks(model: PublicModel, seed: Seed) -> dict[str, Tensor]:
    """The mask B of every private weight, expanded from the registration's seed (dealer and server)."""
    return {name: ring.outputs_last(seed.ring(f"weight/{name}", shape)) for name, shape in weight_shapes(model).items()}


class _Streams:
    """Labels of the pseudorandom streams: one counter for each kind, the same in every role."""

    def __init__(self, seed: Seed, timeline: Timeline) -> None:
        self._seed, self._timeline = seed, timeline
        self._counters: dict[str, int] = {}

    def ring(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        index = self._counters.get(kind, 0)
        self._counters[kind] = index + 1
        self._timeline.lap("elementwise")
        expanded = self._seed.ring(f"{kind}/{index}", shape)
        self._timeline.lap("randomness")
        return expanded


class _Dealing:
    """State of one dealing pass."""

    def __init__(self, plan: Plan, client_seed: Seed, server_seed: Seed, to_client: Sender, to_server: Sender, timeline: Timeline) -> None:
        self.plan, self.timeline = plan, timeline
        self.client, self.server = _Streams(client_seed, timeline), _Streams(server_seed, timeline)
        self.to_client, self.to_server = TimedSender(to_client, timeline), TimedSender(to_server, timeline)

    @property
    def fixed_point(self) -> FixedPoint:
        return self.plan.model.fixed_point


@register_cryptensor("relucent_dealer")
class DealerTensor(RingTensor):
    """What the dealer knows of the client's share: the mask r where it is dealt, only the shape elsewhere."""

    session: _Dealing

    def _add_constant(self, constant: Constant) -> RingTensor:
        return self

    def _truncate(self, bits: int) -> Tensor:
        return self.data if self.data.is_meta else ring.truncate_local(self.data, bits, ring.Party.CLIENT)

    def _private_map(self, weight: Weight, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.session.timeline.lap("elementwise")
        product = weight.map(self.data, apply)
        self.session.timeline.lap("linear")
        product -= self.session.client.ring("linear", tuple(product.shape))
        self.session.to_server.send(ring.to_bytes(product))
        return product.to("meta")

    def _remask(self) -> RingTensor:
        fresh = self._with(self.session.client.ring("mask", tuple(self.data.shape)))
        fresh.dealt = True
        return fresh

    def _activate(self, layer: ActivationLayer, shift: Tensor | None, constant: Tensor | None) -> RingTensor:
        step = ActivationStep(tuple(self.data.shape), layer)
        if step.squares:
            beta = self.session.client.ring("beta", (step.squares,))
            alpha = self.session.server.ring("alpha", (step.squares,))
            beta *= alpha
            beta -= self.session.server.ring("product", (step.squares,))
            self.session.to_client.send(ring.to_bytes(beta))
        if step.relus:
            self._deal_relus(step)
        mask = self.session.client.ring("mask", step.shape)
        self.session.timeline.close(layer.name)
        return type(self)(self.session, mask, self.fixed_point.activation_bits, True)

    def _deal_relus(self, step: ActivationStep) -> None:
        session, bits = self.session, self.session.plan.comparison_bits
        a = session.client.ring("relu", (step.relus,)) + session.server.ring("relu", (step.relus,))
        mu = (a >> bits) & 1
        sign = mu - session.server.ring("sign", (step.relus,))
        masked_sign = a * mu - session.server.ring("masked_sign", (step.relus,))
        session.to_client.send(ring.to_bytes(sign), ring.to_bytes(masked_sign))
        payload = torch.stack([2 * mu - 1, a * (2 * mu - 1)], 1).numpy().view(np.uint64)
        low = (a & ((1 << bits) - 1)).numpy().view(np.uint64)
        start = 0
        for count in step.blocks():
            part = slice(start, start + count)
            session.timeline.lap("elementwise")
            for_server, for_client = dcf.generate(low[part], payload[part], bits, dcf.fresh_randomness(count))
            session.timeline.lap("keys")
            session.to_server.send(*for_server.parts())
            session.to_client.send(*for_client.parts())
            start += count


@torch.no_grad()
def deal(plan: Plan, masks: dict[str, Tensor], client_seed: Seed, server_seed: Seed, to_client: Sender,
         to_server: Sender, timeline: Timeline | None = None) -> None:
    """Make the correlated randomness of one inference. Run by the dealer; one message per layer and party or more.

    Args:
        masks: `weight_masks` of the server's registration.
        client_seed, server_seed: fresh for this material; each goes to its party beforehand.
    """
    dealing = _Dealing(plan, client_seed, server_seed, to_client, to_server, timeline or Timeline())
    parameters: dict[str, Weight | Constant] = dict(public_constants(plan.model))
    parameters |= {name: Weight(mask) for name, mask in masks.items()}
    start = dealing.client.ring("mask", plan.input_shape)
    build_graph(plan.model, parameters)(DealerTensor(dealing, start, dealing.fixed_point.activation_bits, True))
    dealing.timeline.lap("elementwise")
    dealing.timeline.close("output")


def _receive_keys(plan: Plan, step: ActivationStep, party: int, source: Receiver) -> tuple[DcfKeys, ...]:
    bits = plan.comparison_bits
    return tuple(
        dcf.from_bytes(memoryview(source.receive(dcf.key_bytes(count, bits))), party, count, bits) for count in step.blocks()
    )


class DealtToClient:
    """`ClientCorrelations` from the client's seed and the dealer's messages."""

    def __init__(self, plan: Plan, seed: Seed, source: Receiver, timeline: Timeline | None = None) -> None:
        laps = timeline or Timeline()
        self._plan, self._streams, self._source = plan, _Streams(seed, laps), TimedReceiver(source, laps)

    def fresh_mask(self, shape: tuple[int, ...]) -> Tensor:
        return self._streams.ring("mask", shape)

    def linear(self, shape: tuple[int, ...]) -> Tensor:
        return self._streams.ring("linear", shape)

    def squares(self, step: ActivationStep) -> SquareShare:
        shape = (step.squares,)
        product = ring.from_bytes(self._source.receive(ring.ELEMENT_BYTES * step.squares), shape)
        return SquareShare(self._streams.ring("beta", shape), product)

    def relus(self, step: ActivationStep) -> ReluShare:
        signs = ring.from_bytes(self._source.receive(2 * ring.ELEMENT_BYTES * step.relus), (2, step.relus))
        keys = _receive_keys(self._plan, step, 1, self._source)
        return ReluShare(self._streams.ring("relu", (step.relus,)), keys, signs[0], signs[1])


class DealtToServer:
    """`ServerCorrelations` from the server's seed and the dealer's messages."""

    def __init__(self, plan: Plan, seed: Seed, source: Receiver, timeline: Timeline | None = None) -> None:
        laps = timeline or Timeline()
        self._plan, self._streams, self._source = plan, _Streams(seed, laps), TimedReceiver(source, laps)

    def linear(self, shape: tuple[int, ...]) -> Tensor:
        return ring.from_bytes(self._source.receive(ring.ELEMENT_BYTES * torch.Size(shape).numel()), shape)

    def squares(self, step: ActivationStep) -> SquareShare:
        shape = (step.squares,)
        return SquareShare(self._streams.ring("alpha", shape), self._streams.ring("product", shape))

    def relus(self, step: ActivationStep) -> ReluShare:
        shape = (step.relus,)
        keys = _receive_keys(self._plan, step, 0, self._source)
        a, sign, masked_sign = (self._streams.ring(kind, shape) for kind in ("relu", "sign", "masked_sign"))
        return ReluShare(a, keys, sign, masked_sign)
