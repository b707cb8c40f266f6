"""The inference service: one model, many clients, no state shared between sessions but the stock."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol import ring
from protocol.channel import Duplex
from protocol.dealing import DealtToServer, weight_masks
from protocol.errors import ModelMismatch, PeerError, ProtocolViolation
from protocol.inference import make_delta
from protocol.material import Material
from protocol.model import Model
from protocol.online import online_server
from protocol.plan import Plan, make_plan
from protocol.preprocessing import preprocess_server
from protocol.prg import Seed
from protocol.simulation import server_parameters
from protocol.transport import abort, next_kind, next_message, run_session, time_limit, translate, when_over
from protocol.wire import (
    FRAME_BYTES,
    ID_BYTES,
    PROTOCOL_VERSION,
    SECRET_BYTES,
    ChunkReceiver,
    ChunkSender,
    check_bytes,
    check_version,
    to_chunks,
)
from server.stock import Stock

log = logging.getLogger("relucent.server")
REGISTER_S = 30.0


@dataclass(frozen=True, repr=False)
class _Registered:
    """One registration with the dealer and the Delta that belongs to it."""

    secret: bytes
    registration_id: bytes
    delta: bytes
    delta_id: bytes


class DealerLink:
    """The server's connection to the dealer."""

    def __init__(self, channel: grpc.Channel, model: Model, timeout_s: float) -> None:
        self._stub = rpc.DealingStub(channel)
        self._model, self._timeout_s = model, timeout_s

    def register(self, timeout_s: float) -> _Registered:
        """Register the model and compute Delta. Raises PeerError and its kin."""
        secret = secrets.token_bytes(SECRET_BYTES)
        public = self._model.public.to_bytes()

        def messages() -> Iterator[pb.RegisterUp]:
            yield pb.RegisterUp(open=pb.RegisterOpen(protocol_version=PROTOCOL_VERSION, model_id=self._model.public.model_id,
                                                     registration_secret=secret, public_bytes=len(public)))
            for chunk in to_chunks(0, (public,)):
                yield pb.RegisterUp(chunk=chunk)

        try:
            reply = self._stub.Register(messages(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            raise translate(error, "the dealer") from None
        seed = Seed(check_bytes(reply.weight_mask_seed, SECRET_BYTES, "the weight mask seed"))
        masks = weight_masks(self._model.public, seed)
        delta = b"".join(bytes(ring.to_bytes(part)) for part in make_delta(self._model, masks).values())
        return _Registered(secret, hashlib.sha256(secret).digest(), delta, hashlib.sha256(delta).digest())

    def fetch(self, registered: _Registered, plan: Plan, material_id: bytes, client_id: bytes,
              context: grpc.ServicerContext) -> tuple[Seed, ChunkReceiver]:
        """Ask for the server's part of one material; the request ends with the client's call `context`."""
        request = pb.MaterialRequest(
            protocol_version=PROTOCOL_VERSION, model_id=plan.model.model_id, registration_id=registered.registration_id,
            material_id=material_id, client_id=client_id, batch=plan.batch, registration_secret=registered.secret)
        messages = self._stub.FetchMaterial(request, timeout=self._timeout_s)
        when_over(context, messages.cancel)
        seed = Seed(check_bytes(next_message(messages, "the dealer").seed, SECRET_BYTES, "the seed"))
        return seed, ChunkReceiver(lambda: next_message(messages, "the dealer").chunk)


class InferenceService(rpc.InferenceServicer):  # type: ignore[misc]
    """Servicer of the Inference service for one model.

    Args:
        stock_bytes: memory for prepared material. lifetime_s: of prepared material. timeout_s: of one call.
    """

    def __init__(self, model: Model, dealer: grpc.Channel, *, max_batch: int = 32, stock_bytes: int = 4 << 30,
                 lifetime_s: float = 3600.0, timeout_s: float = 600.0) -> None:
        self._model, self._max_batch, self._timeout_s = model, max_batch, timeout_s
        self._public_bytes = model.public.to_bytes()
        self._parameters = server_parameters(model)
        self._plans: dict[int, Plan] = {1: make_plan(model.public, 1)}
        self._stock = Stock(stock_bytes, lifetime_s)
        self._link = DealerLink(dealer, model, timeout_s)
        self._registration_lock = threading.Lock()
        self._registered: _Registered | None = None

    def register(self, timeout_s: float) -> None:
        """Register with the dealer, waiting for it up to `timeout_s`."""
        with self._registration_lock:
            self._registered = self._link.register(timeout_s)
        log.info("registered with the dealer")

    def _current(self) -> _Registered:
        registered = self._registered
        if registered is None:
            raise PeerError("the server has not reached its dealer yet")
        return registered

    def _reregister(self, stale: _Registered) -> None:
        with self._registration_lock:
            if self._registered is stale:
                self._registered = self._link.register(REGISTER_S)
                log.warning("the dealer had forgotten the model; registered again")

    def _check_model(self, version: int, model_id: str) -> None:
        check_version(version)
        if model_id != self._model.public.model_id:
            raise ModelMismatch("this server holds another model", "ask the server for its model again")

    def _plan(self, batch: int) -> Plan:
        if not 1 <= batch <= self._max_batch:
            raise ProtocolViolation(f"the batch must lie in 1..{self._max_batch}, got {batch}")
        if batch not in self._plans:
            self._plans[batch] = make_plan(self._model.public, batch)
        return self._plans[batch]

    # --- public information ---------------------------------------------------------------------------------------

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Offer:
        try:
            check_version(request.protocol_version)
            current = self._current()
            return pb.Offer(
                protocol_version=PROTOCOL_VERSION, model_id=self._model.public.model_id, registration_id=current.registration_id,
                delta_id=current.delta_id, delta_bytes=len(current.delta), public_bytes=len(self._public_bytes),
                max_batch=self._max_batch)
        except BaseException as error:
            abort(context, error)

    def FetchPublic(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        yield from self._fetch(request, context, lambda: self._public_bytes)

    def FetchDelta(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        def delta() -> bytes:
            current = self._current()
            if not hmac.compare_digest(request.delta_id, current.delta_id):
                raise ModelMismatch("this Delta is outdated", "ask the server for its model again")
            return current.delta

        yield from self._fetch(request, context, delta)

    def _fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext, get: Callable[[], bytes]) -> Iterator[pb.Chunk]:
        try:
            self._check_model(request.protocol_version, request.model_id)
            data = get()
        except BaseException as error:
            abort(context, error)
        with time_limit(context, self._timeout_s):
            yield from to_chunks(0, (data,))

    # --- preprocessing ----------------------------------------------------------------------------------------------

    def Preprocess(self, request_iterator: Iterator[pb.PreprocessUp], context: grpc.ServicerContext) -> Iterator[pb.PreprocessDown]:
        def work(transmit: Callable[[Any], None]) -> None:
            opening = next_kind(request_iterator, "open")
            self._check_model(opening.protocol_version, opening.model_id)
            client_id = check_bytes(opening.client_id, SECRET_BYTES, "the client id")
            plan, current = self._plan(opening.batch), self._current()
            if not hmac.compare_digest(opening.delta_id, current.delta_id):
                raise ModelMismatch("the client's Delta is outdated", "fetch Delta again")
            material_id = self._stock.reserve(plan, client_id)
            try:
                transmit(pb.PreprocessDown(material_id=material_id))
                try:
                    seed, source = self._link.fetch(current, plan, material_id, client_id, context)
                except ModelMismatch:
                    self._reregister(current)
                    raise
                from_client = ChunkReceiver(lambda: next_kind(request_iterator, "chunk"))
                contents = preprocess_server(plan, DealtToServer(plan, seed, source), from_client)
                self._stock.store(Material(material_id, plan, contents))
                transmit(pb.PreprocessDown(ready=pb.Ready(dealer_bytes=source.bytes + SECRET_BYTES + FRAME_BYTES)))
            except BaseException:
                self._stock.release(material_id)
                raise

        yield from run_session(work, context, self._timeout_s)

    def Discard(self, request: pb.DiscardRequest, context: grpc.ServicerContext) -> pb.Empty:
        for material_id, secret in zip(request.material_ids, request.client_secrets):
            self._stock.discard(material_id, secret)
        return pb.Empty()

    # --- online -------------------------------------------------------------------------------------------------------

    def Infer(self, request_iterator: Iterator[pb.InferUp], context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        def work(transmit: Callable[[Any], None]) -> None:
            opening = next_kind(request_iterator, "open")
            self._check_model(opening.protocol_version, opening.model_id)
            check_bytes(opening.material_id, ID_BYTES, "the material id")
            # from here on the material is spent, whatever happens
            material = self._stock.take(opening.material_id, opening.client_secret, opening.model_id)
            channel = Duplex(ChunkSender(transmit), ChunkReceiver(lambda: next_kind(request_iterator, "chunk")))
            online_server(material, self._parameters, channel)

        yield from run_session(work, context, self._timeout_s)
