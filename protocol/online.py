"""The online phase (protocol section 6): one round trip per activation layer.

Client to server: the masked input x - r_0, then M = y_C - r' per activation layer. Server to client: d per activation
layer, then its share of the logits. d is masked by alpha or A, M and the input by fresh masks, so that each party sees
uniform ring elements only; the logits are revealed to the client alone.

Each element of M depends on the same element of d alone, so the client answers d as it arrives, piece by piece: on a slow link both
directions are then busy at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol import dcf, kernels, ring
from protocol.channel import Channel
from protocol.crypten_adapter import register_cryptensor
from protocol.errors import InputError
from protocol.material import ClientActivation, ClientContents, Material, ReluShare, ServerContents
from protocol.model import ActivationLayer, FixedPoint
from protocol.plan import Plan
from protocol.preprocessing import gather, put
from protocol.ring import ELEMENT_BYTES, Party
from protocol.tensor import Constant, RingTensor, Weight
from protocol.timeline import Timeline

_NONE = np.empty(0, np.int64)


def _array(t: Tensor | None) -> NDArray[np.int64]:
    return _NONE if t is None else t.contiguous().numpy()


def _check_shapes(d: tuple[int, ...], *others: Tensor) -> None:
    """Compiled loops check no bounds."""
    if any(tuple(t.shape) != d or not t.is_contiguous() for t in others):
        raise ValueError("the material is for an activation of another shape")


def relu_share(d: NDArray[np.int64], relu: ReluShare, bits: int, party: Party) -> NDArray[np.int64]:
    """This party's share of ReLU(d - A), flat; protocol section 5.

    Args:
        d: opened z + A, flat. bits: what the DCF compares, n - 1.
    """
    opened, sign, masked_sign, mask = (a.view(np.uint64) for a in (d, _array(relu.sign), _array(relu.masked_sign), _array(relu.mask)))
    if not len(opened) == len(sign) == len(masked_sign) == len(mask) == sum(map(len, relu.keys)):  # compiled loops check no bounds
        raise ValueError("the material is for another number of ReLUs")
    out = np.empty(len(opened), np.uint64)
    start = 0
    for keys in relu.keys:
        part = slice(start, start + len(keys))
        kernels.finish_relu(opened[part], dcf.evaluate(keys, opened[part]), sign[part], masked_sign[part], mask[part], np.uint64(bits),
                            np.uint64(party is Party.SERVER), out[part])
        start += len(keys)
    return out.view(np.int64)


class _ServerPass:
    """State of the server's online pass."""

    def __init__(self, plan: Plan, contents: ServerContents, channel: Channel, timeline: Timeline) -> None:
        self.plan, self.channel, self.timeline = plan, channel, timeline
        self.linear, self.remask, self.activations = iter(contents.linear), iter(contents.remask), iter(contents.activations)

    @property
    def fixed_point(self) -> FixedPoint:
        return self.plan.model.fixed_point


@register_cryptensor("relucent_server")
class ServerTensor(RingTensor):
    """The server's share of a value during the online phase."""

    session: _ServerPass

    def _add_constant(self, constant: Constant) -> RingTensor:
        self.data += constant.encoded("added", self.scale, lambda real: ring.encode(real, self.scale))
        return self

    def _truncate(self, bits: int) -> Tensor:
        return ring.truncate_local(self.data, bits, Party.SERVER)

    def _private_map(self, weight: Weight, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self.session.timeline.lap("elementwise")
        share = weight.map(self.data, apply, next(self.session.linear))
        self.session.timeline.lap("linear")
        return share

    def _remask(self) -> RingTensor:
        fresh = self._with(self.data + next(self.session.remask))
        fresh.dealt = True
        return fresh

    def _activate(self, layer: ActivationLayer, shift: Tensor | None, constant: Tensor | None) -> RingTensor:
        scale = self.fixed_point.activation_bits
        if self.scale < scale:
            return self._rescaled(shift)._activate(layer, None, constant)
        session, half, bits = self.session, next(self.session.activations), self.scale - scale
        step, batch, y = half.step, half.step.batch, half.cross
        share, d = self.data.flatten(1), torch.empty((batch, step.active // batch), dtype=torch.int64)
        if tuple(self.data.shape) != step.shape:
            raise ValueError("the material is for an activation of another shape")
        _check_shapes(tuple(d.shape), half.opening, y)
        active = None if layer.all_active else layer.active
        kernels.open_share(_array(share), _array(shift).reshape(-1), bits, _array(active), half.opening.numpy(), d.numpy())
        session.timeline.lap("elementwise")
        session.channel.send(ring.to_bytes(d))
        session.timeline.lap("send")
        if step.squares:
            added = None if constant is None else gather(constant[None], layer.active, layer.all_active)[0]
            kernels.square_server(d.numpy(), half.opening.numpy(), _array(layer.factor_of_active), scale + layer.c2_shift, _array(added),
                                  y.numpy())
        session.timeline.lap("squares")
        if half.relu is not None:
            opened = gather(d, layer.relu_in_active, False).numpy()
            kept = relu_share(opened.reshape(-1), half.relu, session.plan.comparison_bits, Party.SERVER)
            put(y, layer.relu_in_active, False, torch.from_numpy(kept).view(batch, -1))
            session.timeline.lap("comparison")
        answer = ring.from_bytes(session.channel.receive(ELEMENT_BYTES * step.active), (batch, -1))
        session.timeline.lap("wait")
        session.timeline.close(layer.name)
        y += answer
        if layer.all_active:
            data = y
        else:
            data = torch.empty_like(share)
            data.index_copy_(1, layer.active, y)
            passed = ring.truncate_local(gather(share, layer.identity, False), bits, Party.SERVER)
            data.index_copy_(1, layer.identity, passed + half.passed)
        return type(self)(session, data.view(step.shape), scale, True)


@torch.no_grad()
def online_server(material: Material[ServerContents], graph: Any, channel: Channel, timeline: Timeline | None = None) -> None:
    """The server's online phase; uses the material up. `graph` is `simulation.server_graph`, one for all sessions."""
    contents, plan = material.take(), material.plan
    state = _ServerPass(plan, contents, channel, timeline or Timeline())
    count = torch.Size(plan.input_shape).numel()
    start = ring.from_bytes(channel.receive(ELEMENT_BYTES * count), plan.input_shape)
    state.timeline.lap("wait")
    state.timeline.close("input")
    out = graph(ServerTensor(state, start, state.fixed_point.activation_bits, True))
    state.timeline.lap("elementwise")
    channel.send(ring.to_bytes(out.data))
    state.timeline.lap("send")
    state.timeline.close("output")


def _arriving(channel: Channel, d: Tensor) -> Iterator[tuple[int, int]]:
    """Fills d, flat, with the next message; after every piece from where to where it has become whole. An empty d is one piece."""
    data, there, done = ring.to_bytes(d), 0, 0
    for piece in channel.pieces(len(data)):
        data[there : there + len(piece)] = piece
        there += len(piece)
        if there // ELEMENT_BYTES > done or not len(d):
            yield done, there // ELEMENT_BYTES
            done = there // ELEMENT_BYTES


def _chosen(columns: NDArray[np.int64], width: int, first: int, last: int) -> tuple[int, NDArray[np.int64]]:
    """Of rows of `width` elements, one after another: which of elements first to last - 1 lie in these columns, counted from
    `first`, and how many do before them. columns: sorted."""
    start, stop = (len(columns) * (end // width) + int(np.searchsorted(columns, end % width)) for end in (first, last))
    rows, which = np.divmod(np.arange(start, stop), len(columns))
    return start, columns[which] + (rows * width - first)


def _answer(half: ClientActivation, d: Tensor, first: int, plan: Plan, timeline: Timeline) -> Tensor:
    """A run of one layer's M, of all images flat, from the same run of d, whose first element is `first`."""
    layer, last = half.step.layer, first + len(d)
    twice, mask, y = (t.view(-1)[first:last] for t in (half.twice, half.next_mask, half.base))
    if half.step.squares:
        _check_shapes(tuple(d.shape), twice, mask, y)
        bits = plan.model.fixed_point.activation_bits + layer.c2_shift
        kernels.square_client(d.numpy(), twice.numpy(), _array(layer.factor_of_active), first, bits, mask.numpy(), y.numpy())
    timeline.lap("squares")
    if half.relu is not None:
        before, where = _chosen(layer.relu_in_active.numpy(), len(layer.active), first, last)
        if len(where):
            kept = relu_share(d.numpy()[where], half.relu.part(before, before + len(where)), plan.comparison_bits, Party.CLIENT)
            y.numpy()[where] = kept - mask.numpy()[where]
        timeline.lap("comparison")
    return y


@torch.no_grad()
def online_client(material: Material[ClientContents], x_ring: Tensor, channel: Channel, timeline: Timeline | None = None) -> Tensor:
    """The client's online phase; uses the material up. Returns the logits, ring elements at `plan.output_scale`.

    Args:
        x_ring: the images as fixed point with f_a fractional bits, `plan.input_shape`.
    """
    plan = material.plan
    if tuple(x_ring.shape) != plan.input_shape:  # broadcasting would put several images under one mask
        raise InputError(f"the input has shape {tuple(x_ring.shape)}, the material is for {plan.input_shape}")
    contents: ClientContents = material.take()
    laps = timeline or Timeline()
    masked = x_ring - contents.input_mask
    laps.lap("elementwise")
    channel.send(ring.to_bytes(masked))
    laps.lap("send")
    laps.close("input")
    for half in contents.activations:
        d = torch.empty(half.step.active, dtype=torch.int64)
        for first, last in _arriving(channel, d):
            laps.lap("wait")
            answer = ring.to_bytes(_answer(half, d[first:last], first, plan, laps))
            channel.send(answer, last=last == len(d))
            laps.lap("send")
        laps.close(half.step.layer.name)
    count = torch.Size(plan.output_shape).numel()
    share = ring.from_bytes(channel.receive(ELEMENT_BYTES * count), plan.output_shape)
    laps.lap("wait")
    laps.close("output")
    return share + contents.logits
