"""The inference service: several models, many clients, no state shared between sessions but the stock."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol.dealing import DealtToServer
from protocol.errors import AccessDenied, ModelMismatch, PeerError, ProtocolViolation, ResourceLimit
from protocol.online import online_server
from protocol.plan import Plan
from protocol.preprocessing import preprocess_server
from protocol.timeline import Timeline
from protocol.tls import ANYBODY, Identity
from protocol.transport import (
    ACCEPTED_KEY,
    OPENING_S,
    TIMELINE_KEY,
    Session,
    answering,
    bearer_token,
    certified,
    is_plaintext,
    next_kind,
    pack_timeline,
    run_session,
    time_limit,
)
from protocol.wire import (
    FRAME_BYTES,
    ID_BYTES,
    MAX_DISCARDS,
    PROTOCOL_VERSION,
    SECRET_BYTES,
    ChunkReceiver,
    ChunkSender,
    check_bytes,
    check_version,
    to_chunks,
)
from server.catalogue import Catalogue, HostedModel, Published
from server.metrics import Metrics
from server.pacing import Paced
from server.sessions import Sessions
from server.state import State
from server.stock import Stock

log = logging.getLogger("relucent.server")
Reply = TypeVar("Reply")
@dataclass(frozen=True)
class Limits:
    """What one call may ask for. Times in seconds: of a whole call, and between two messages.

    timelines: whether a client is told, if it asks, how long the server took for what.
    """

    max_batch: int = 32
    timeout_s: float = 600.0
    idle_s: float = 60.0
    timelines: bool = False


class Access:
    """Who a caller is. plaintext: whether calls without TLS are let in, as anybody."""

    def __init__(self, state: State, plaintext: bool) -> None:
        self._state, self._plaintext = state, plaintext

    def identify(self, context: grpc.ServicerContext) -> Identity:
        """The caller, by certificate or API token. Raises AccessDenied."""
        if is_plaintext(context):
            if not self._plaintext:
                raise AccessDenied("plaintext calls are refused", "use TLS")
            return ANYBODY
        identity = certified(context)
        if identity is not None and identity.role == "client":
            return self._state.check_not_denied(identity)
        token = bearer_token(context)
        if token is None:
            raise AccessDenied("neither an API token nor a client certificate", "pass one of them")
        return self._state.identify(token)


class InferenceService(rpc.InferenceServicer):  # type: ignore[misc]
    """Servicer of the Inference service."""

    def __init__(self, catalogue: Catalogue, stock: Stock, access: Access, sessions: Sessions, metrics: Metrics,
                 limits: Limits = Limits(), downloads: Sessions | None = None) -> None:  # Limits is frozen
        self._downloads = downloads or sessions
        self._catalogue, self._stock, self._access, self._sessions = catalogue, stock, access, sessions
        self._metrics, self._limits = metrics, limits

    def _plan(self, hosted: HostedModel, batch: int) -> Plan:
        if not 1 <= batch <= self._limits.max_batch:
            raise ProtocolViolation(f"the batch must lie in 1..{self._limits.max_batch}, got {batch}")
        return hosted.plan(batch)

    # --- public information ---------------------------------------------------------------------------------------

    def _answer(self, what: str, context: grpc.ServicerContext, version: int, make: Callable[[], Reply]) -> Reply:
        with answering(what, context), self._metrics.failures():
            self._access.identify(context)
            check_version(version)
            return make()

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ModelList:
        def make() -> pb.ModelList:
            return pb.ModelList(models=[
                pb.ModelEntry(name=m.public.name, model_id=m.model_id, relus=m.public.relus, classes=len(m.public.classes),
                              input_shape=m.public.input_shape) for m in self._catalogue.models()])

        return self._answer("list", context, request.protocol_version, make)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Offer:
        def make() -> pb.Offer:
            hosted = self._catalogue.named(request.name)
            published = hosted.published()
            return pb.Offer(protocol_version=PROTOCOL_VERSION, model_id=hosted.model_id, registration_id=hosted.registration_id,
                            delta_id=published.delta_id, mask_id=published.mask_id, delta_bytes=len(published.delta),
                            public_bytes=len(hosted.public_bytes),
                            max_batch=self._limits.max_batch, name=hosted.public.name)

        return self._answer("describe", context, request.protocol_version, make)

    def FetchPublic(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        yield from self._fetch(request, context, lambda hosted: hosted.public_bytes)

    def FetchDelta(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        def delta(hosted: HostedModel) -> bytes:
            published = hosted.published()
            if not hmac.compare_digest(request.delta_id, published.delta_id):
                raise ModelMismatch("this Delta is outdated", "ask the server for its model again")
            return published.delta

        yield from self._fetch(request, context, delta)

    def _fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext, get: Callable[[HostedModel], bytes]) -> Iterator[pb.Chunk]:
        with answering("download", context), self._metrics.failures():
            identity = self._access.identify(context)
            check_version(request.protocol_version)
            with self._downloads.slot(identity.uri), time_limit(context, self._limits.timeout_s, self._limits.idle_s) as touch:
                data = get(self._catalogue.identified(request.model_id))
                if request.offset > len(data):
                    raise ProtocolViolation("the offset lies behind the end of the data")
                for chunk in to_chunks(0, (memoryview(data)[request.offset :],)):
                    touch()
                    self._metrics.bytes.labels("out").inc(chunk.ByteSize() + FRAME_BYTES)
                    yield chunk

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _session(self, phase: str, requests: Iterator[Any], context: grpc.ServicerContext,
                 work: Callable[[Identity, Session], None]) -> Iterator[Any]:
        """One streaming call: identified, timed, counted; its error becomes its status. `work` queues once it has read what is wanted."""

        def run(session: Session) -> None:
            with self._metrics.phase(phase):
                work(self._access.identify(context), session)
            log.info("%s done", phase)

        idle_s = self._limits.idle_s
        yield from run_session(phase, run, requests, context, self._limits.timeout_s, idle_s, min(OPENING_S, idle_s))

    def Preprocess(self, request_iterator: Iterator[pb.PreprocessUp], context: grpc.ServicerContext) -> Iterator[pb.PreprocessDown]:
        def work(identity: Identity, session: Session) -> None:
            opening = next_kind(session.incoming, "open")
            check_version(opening.protocol_version)
            hosted = self._catalogue.identified(opening.model_id)
            check_bytes(opening.client_id, SECRET_BYTES, "the client id")
            plan, published = self._plan(hosted, opening.batch), hosted.published()
            if not hmac.compare_digest(opening.delta_id, published.delta_id):
                raise ModelMismatch("the client's Delta is outdated", "fetch Delta again")
            with self._sessions.slot(identity.uri):
                prepare(identity, session, hosted, plan, published, opening)

        def prepare(identity: Identity, session: Session, hosted: HostedModel, plan: Plan, published: Published,
                    opening: pb.PreprocessOpen) -> None:
            client_id, timed = opening.client_id, self._limits.timelines and opening.timeline
            timeline = Timeline(time.perf_counter if timed else None)
            material_id = self._stock.reserve(plan, client_id, identity.uri)
            try:
                session.send(pb.PreprocessDown(material_id=material_id))
                try:
                    seed, source = hosted.fetch(plan, material_id, client_id, published.mask_id, context, session.touch)
                except ModelMismatch:
                    hosted.register_again(published.delta_id)
                    raise
                from_client = ChunkReceiver(lambda: next_kind(session.incoming, "chunk"))
                timeline.lap("setup")
                contents = preprocess_server(plan, DealtToServer(plan, seed, source, timeline), from_client, timeline)
                self._stock.store(material_id, plan, contents)
                timeline.lap("store")
                timeline.close("ready")
                if timed:
                    context.set_trailing_metadata(((TIMELINE_KEY, pack_timeline(timeline)),))
                self._metrics.bytes.labels("in").inc(from_client.bytes + source.bytes)
                self._metrics.bytes.labels("out").inc(ID_BYTES + 2 * FRAME_BYTES)
                session.send(pb.PreprocessDown(ready=pb.Ready(
                    dealer_bytes=source.bytes + SECRET_BYTES + FRAME_BYTES, lifetime_s=self._stock.lifetime_s, holder=self._stock.holder)))
            except BaseException:
                self._stock.release(material_id)
                raise

        yield from self._session("preprocessing", request_iterator, context, work)

    def Discard(self, request: pb.DiscardRequest, context: grpc.ServicerContext) -> pb.Empty:
        def make() -> pb.Empty:
            if len(request.material_ids) > MAX_DISCARDS:
                raise ResourceLimit(f"at most {MAX_DISCARDS} materials are discarded at once")
            for material_id, secret in zip(request.material_ids, request.client_secrets):
                self._stock.discard(material_id, secret)
            return pb.Empty()

        return self._answer("discard", context, PROTOCOL_VERSION, make)

    def Infer(self, request_iterator: Iterator[pb.InferUp], context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        def work(identity: Identity, session: Session) -> None:
            opening = next_kind(session.incoming, "open")
            check_version(opening.protocol_version)
            check_bytes(opening.material_id, ID_BYTES, "the material id")
            hosted = self._catalogue.identified(opening.model_id)
            with self._sessions.slot(identity.uri):
                infer(session, hosted, opening)

        def infer(session: Session, hosted: HostedModel, opening: pb.InferOpen) -> None:
            started = time.perf_counter()
            # from here on the material is spent, whatever happens
            material = self._stock.take(opening.material_id, opening.client_secret, opening.model_id, hosted.plan)
            try:
                context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
            except grpc.RpcError:  # the call was cancelled while it waited for its turn
                raise PeerError("the caller went away") from None
            channel = Paced(ChunkSender(session.send), ChunkReceiver(lambda: next_kind(session.incoming, "chunk")))
            timed = self._limits.timelines and opening.timeline
            timeline = Timeline(time.perf_counter if timed else None, started)
            timeline.lap("setup")
            online_server(material, hosted.graph, channel, timeline)
            if timed:
                context.set_trailing_metadata(((TIMELINE_KEY, pack_timeline(timeline)),))
            self._metrics.images.inc(material.plan.batch)
            self._metrics.bytes.labels("in").inc(channel.incoming.bytes)
            self._metrics.bytes.labels("out").inc(channel.outgoing.bytes)

        yield from self._session("online", request_iterator, context, work)
