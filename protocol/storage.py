"""Prepared material as bytes in plan order, for `protocol.sealed` to keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from protocol import dcf, ring
from protocol.channel import Buffer
from protocol.errors import MaterialError
from protocol.material import ClientActivation, ClientContents, ReluShare, ServerActivation, ServerContents
from protocol.plan import ActivationStep, LinearStep, Plan


def _relu_parts(relu: ReluShare | None) -> Iterator[Buffer]:
    if relu is not None:
        for tensor in (relu.mask, relu.sign, relu.masked_sign):
            yield ring.to_bytes(tensor)
        for keys in relu.keys:
            yield from keys.parts()
            yield bytes(-keys.nbytes % ring.ELEMENT_BYTES)  # what follows stays aligned


def server_parts(contents: ServerContents) -> Iterator[Buffer]:
    """The server's half as bytes, in the order of `read_server`."""
    for tensor in (*contents.linear, *contents.remask):
        yield ring.to_bytes(tensor)
    for half in contents.activations:
        for tensor in (half.opening, half.cross, half.passed):
            yield ring.to_bytes(tensor)
        yield from _relu_parts(half.relu)


def client_parts(contents: ClientContents) -> Iterator[Buffer]:
    """The client's half as bytes, in the order of `read_client`."""
    yield ring.to_bytes(contents.input_mask)
    yield ring.to_bytes(contents.logits)
    for half in contents.activations:
        for tensor in (half.twice, half.base, half.next_mask):
            yield ring.to_bytes(tensor)
        yield from _relu_parts(half.relu)


class _Reader:
    """Takes consecutive pieces of a buffer as tensors that share its memory."""

    def __init__(self, data: bytearray, plan: Plan, party: int) -> None:
        self._view, self._position = memoryview(data), 0
        self._bits, self._party = plan.comparison_bits, party

    def take(self, count: int) -> memoryview:
        piece = self._view[self._position : self._position + count]
        if len(piece) != count:
            raise MaterialError("stored material is shorter than its plan")
        self._position += count
        return piece

    def tensor(self, *shape: int) -> Tensor:
        return ring.from_bytes(self.take(ring.ELEMENT_BYTES * torch.Size(shape).numel()), shape)

    def relu(self, step: ActivationStep) -> ReluShare | None:
        if not step.relus:
            return None
        mask, sign, masked_sign = (self.tensor(step.relus) for _ in range(3))
        keys = []
        for count in step.blocks():
            size = dcf.key_bytes(count, self._bits)
            keys.append(dcf.from_bytes(self.take(size), self._party, count, self._bits))
            self.take(-size % ring.ELEMENT_BYTES)
        return ReluShare(mask, tuple(keys), sign, masked_sign)

    def end(self) -> None:
        if self._position != len(self._view):
            raise MaterialError("stored material is longer than its plan")


def read_server(plan: Plan, data: bytearray) -> ServerContents:
    """Inverse of `server_parts`. Raises MaterialError if the length does not fit the plan."""
    reader = _Reader(data, plan, 0)
    linear = tuple(reader.tensor(*s.shape) for s in plan.steps if isinstance(s, LinearStep))
    remask = tuple(reader.tensor(*s.shape) for s in plan.steps if not isinstance(s, (LinearStep, ActivationStep)))
    halves = []
    for step in plan.activations:
        rows = step.batch
        opening, cross = (reader.tensor(rows, step.active // rows) for _ in range(2))
        passed = reader.tensor(rows, step.identities // rows)
        halves.append(ServerActivation(step, opening, cross, reader.relu(step), passed))
    reader.end()
    return ServerContents(linear, remask, tuple(halves))


def read_client(plan: Plan, data: bytearray) -> ClientContents:
    """Inverse of `client_parts`. Raises MaterialError if the length does not fit the plan."""
    reader = _Reader(data, plan, 1)
    input_mask, logits = reader.tensor(*plan.input_shape), reader.tensor(*plan.output_shape)
    halves = []
    for step in plan.activations:
        twice, base, next_mask = (reader.tensor(step.batch, step.active // step.batch) for _ in range(3))
        halves.append(ClientActivation(step, twice, base, reader.relu(step), next_mask))
    reader.end()
    return ClientContents(input_mask, tuple(halves), logits)
