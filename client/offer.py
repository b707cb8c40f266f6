"""What a server offers: the public model, Delta, and the ids that preprocessing is bound to; fetched, verified, cached."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from client.delta_cache import DeltaCache
from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol import ring
from protocol.errors import InputError, PeerError, ProtocolViolation
from protocol.model import MAX_PUBLIC_BYTES, PublicModel
from protocol.plan import Plan, make_plan, weight_shapes
from protocol.transport import ask, next_message
from protocol.wire import PROTOCOL_VERSION, SECRET_BYTES, ChunkReceiver, check_bytes, check_version

DESCRIBE_S = 20.0
FETCH_TRIES, FETCH_PAUSE_S = 5, 0.2


@dataclass(frozen=True, repr=False)
class Offer:
    """One model under one registration.

    delta: W - B of every private weight, by parameter name, int64. delta_id: its SHA-256. mask_id: names B.
    registration_id: the server's at the dealer. max_batch: images that the server takes at once.
    """

    model: PublicModel
    delta: dict[str, Tensor]
    delta_id: bytes
    mask_id: bytes
    registration_id: bytes
    max_batch: int
    _plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def label(self) -> bytes:
        """What material is prepared for: it serves no other model and no other registration."""
        return bytes.fromhex(self.model.model_id) + self.registration_id + self.delta_id

    def plan(self, batch: int) -> Plan:
        """The plan for a batch size, made once. Raises InputError if the server does not take that many."""
        if not 1 <= batch <= self.max_batch:
            raise InputError(f"the batch must lie in 1..{self.max_batch}, got {batch}")
        return self._plans.get(batch) or self._plans.setdefault(batch, make_plan(self.model, batch))


def fetch_offer(server: rpc.InferenceStub, name: str, cache: DeltaCache, timeout_s: float) -> Offer:
    """What the server offers under a name. Raises RelucentError's kin."""
    opening = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION, name=name)
    told: pb.Offer = ask(server.Describe, opening, "the server", min(DESCRIBE_S, timeout_s))
    check_version(told.protocol_version)
    if told.public_bytes > MAX_PUBLIC_BYTES:
        raise ProtocolViolation("the server announces a public model that is too large")
    request = pb.FetchRequest(protocol_version=PROTOCOL_VERSION, model_id=told.model_id, delta_id=told.delta_id)
    model = PublicModel.from_bytes(_fetch(server.FetchPublic, request, told.public_bytes, timeout_s))
    if model.model_id != told.model_id:
        raise ProtocolViolation("the server's public model does not have the announced id")
    shapes = weight_shapes(model)
    if told.delta_bytes != sum(ring.ELEMENT_BYTES * torch.Size(s).numel() for s in shapes.values()):
        raise ProtocolViolation("the server announces a Delta that does not fit its model")
    delta_id, mask_id, registration_id = (check_bytes(value, SECRET_BYTES, what) for value, what in (
        (told.delta_id, "the Delta id"), (told.mask_id, "the mask id"), (told.registration_id, "the registration id")))

    def fetch_delta() -> bytes:
        data = _fetch(server.FetchDelta, request, told.delta_bytes, timeout_s)
        if hashlib.sha256(data).digest() != delta_id:
            raise ProtocolViolation("Delta does not have the announced checksum")
        return data

    data = memoryview(cache.get(told.model_id, delta_id, told.delta_bytes, fetch_delta))
    delta, position = {}, 0
    for weight, shape in shapes.items():
        size = ring.ELEMENT_BYTES * torch.Size(shape).numel()
        delta[weight] = ring.outputs_last(ring.from_bytes(data[position : position + size], shape))
        position += size
    offer = Offer(model, delta, delta_id, mask_id, registration_id, int(told.max_batch))
    offer.plan(1)  # a model that cannot be run is refused here
    return offer


def _fetch(call: Callable[..., Iterator[pb.Chunk]], request: pb.FetchRequest, length: int, timeout_s: float) -> bytes:
    """A download; goes on where it broke off, up to FETCH_TRIES times and within `timeout_s` altogether."""
    data, deadline = bytearray(), time.monotonic() + timeout_s
    for attempt in range(FETCH_TRIES):
        rest = pb.FetchRequest(protocol_version=request.protocol_version, model_id=request.model_id, delta_id=request.delta_id,
                               offset=len(data))
        chunks = call(rest, timeout=deadline - time.monotonic())
        receiver = ChunkReceiver(lambda: next_message(chunks, "the server"))  # noqa: B023  # used before the next turn
        try:
            receiver.receive_into(data, length)
            return bytes(data)
        except PeerError:
            pause = FETCH_PAUSE_S * 2**attempt
            if attempt + 1 == FETCH_TRIES or time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")
