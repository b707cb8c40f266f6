"""The dealer service: registrations of models, and one dealing for each material once both parties have asked.

Security contract: each party gets its own part only. The server proves itself by the secret whose hash is the
registration id, the client by the secret whose hash the server named for this material. Every dealing uses fresh
randomness; nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol.dealing import deal, weight_masks
from protocol.errors import (
    AccessDenied,
    MaterialError,
    ModelMismatch,
    PeerError,
    PeerTimeout,
    ProtocolViolation,
    RelucentError,
    ResourceLimit,
)
from protocol.model import MAX_PUBLIC_BYTES, PublicModel
from protocol.plan import make_plan
from protocol.prg import Seed
from protocol.timeline import Timeline
from protocol.transport import (
    TIMELINE_KEY,
    Session,
    answering,
    certified,
    is_plaintext,
    next_kind,
    pack_timeline,
    run_session,
    time_limit,
    when_over,
)
from protocol.wire import ID_BYTES, SECRET_BYTES, ChunkReceiver, ChunkSender, check_bytes, check_version
from server.metrics import Metrics

log = logging.getLogger("relucent.dealer")
MEETING_S = 30.0
"""How long the first party waits for the second."""
DEAL_S = 600.0
STALL_S, SLOWEST = 30.0, 125_000
"""How long parties may leave their queues full, over all of a dealing, beyond the time that their bytes take at so many a second."""
REGISTER_S = 60.0
MAX_WAITING = 96
"""Parties of a kind that may wait for the other."""


@dataclass(frozen=True, repr=False)
class _Registration:
    """mask_id: names the masks. owners: names of the servers that registered, by their certificates; "" in plaintext."""

    model: PublicModel
    masks: dict[str, Any]
    mask_id: bytes
    owners: frozenset[str]


@dataclass
class _Meeting:
    """The two requests for one material, bound to registration, batch and client.

    `claimed` parties have come, `gone` ones have left; each gets chunks through its own bounded queue. `begun`: dealing has its slot;
    `dealt`: all is made.
    """

    registration_id: bytes
    batch: int
    client_id: bytes
    claimed: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    begun: bool = False
    dealt: bool = False
    patience_s: float = field(default_factory=lambda: STALL_S)
    both: threading.Event = field(default_factory=threading.Event)
    dead: threading.Event = field(default_factory=threading.Event)
    queues: dict[str, queue.Queue[Any]] = field(default_factory=lambda: {p: queue.Queue(maxsize=16) for p in ("client", "server")})

    def put(self, party: str, message: Any) -> None:
        """Queue a part of what is dealt. Raises PeerError if a party has left, or leaves its queue full."""
        if self.gone or not self._queued(party, message, lambda: bool(self.gone)):
            self.dead.set()
            raise PeerError("a party left or stalled while its material was dealt")

    def finish(self) -> None:
        """All is dealt. Whoever has all of it by now may have hung up without waiting to be told."""
        self.dealt = True
        for party in self.queues:
            if not self._queued(party, None, lambda: party in self.gone) and party not in self.gone:  # noqa: B023  # used at once
                self.dead.set()

    def _queued(self, party: str, message: Any, over: Callable[[], bool]) -> bool:
        while not (over() or self.dead.is_set()) and self.patience_s > 0:
            started = time.monotonic()
            try:
                self.queues[party].put(message, timeout=0.2)
                self.patience_s += len(message.chunk.data) / SLOWEST if isinstance(message, pb.MaterialDown) else 0
                return True
            except queue.Full:
                pass
            finally:
                self.patience_s -= time.monotonic() - started
        return False

    def left(self, party: str) -> None:
        """The party's call is over. Before dealing begins that ends the meeting; later it ends when more is dealt."""
        self.gone.add(party)
        if not self.begun:
            self.dead.set()
            self.both.set()

    def take(self, party: str) -> Any:
        """What comes next for a party, None after all. Raises PeerError."""
        while True:
            try:
                return self.queues[party].get(timeout=0.2)
            except queue.Empty:
                if self.dealt and party in self.gone:
                    return None
                if self.dead.is_set():
                    raise PeerError("the other party left, or dealing failed; the material is destroyed") from None


class DealerService(rpc.DealingServicer):  # type: ignore[misc]
    """Servicer of the Dealing service.

    A server shows its certificate; a client proves that it is the one that the server prepares this material with.

    Args:
        max_deals: dealings at once. max_registrations: models held. master: 32 bytes from which masks of weights are derived;
            None for fresh ones. plaintext: let calls without TLS in, whoever they come from. meeting_s: how long a party waits
            for the other. timelines: whether a client is told, if it asks, how long what took.
    """

    def __init__(self, max_deals: int = 4, max_registrations: int = 16, master: bytes | None = None, plaintext: bool = False,
                 metrics: Metrics | None = None, meeting_s: float = MEETING_S, timelines: bool = False) -> None:
        self._meeting_s, self._timelines = meeting_s, timelines
        self._master = master or secrets.token_bytes(32)
        self._plaintext, self._metrics = plaintext, metrics or Metrics("dealer")
        self._registrations: OrderedDict[bytes, _Registration] = OrderedDict()
        self._meetings: dict[bytes, _Meeting] = {}
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(max_deals)
        self._max_registrations = max_registrations

    # --- registration -----------------------------------------------------------------------------------------

    def Register(self, request_iterator: Iterator[pb.RegisterUp], context: grpc.ServicerContext) -> pb.Registration:
        with answering("registration", context), time_limit(context, REGISTER_S), self._metrics.phase("registration"):
            return self._register(request_iterator, self._server_name(context))

    def _server_name(self, context: grpc.ServicerContext) -> str:
        """Name of the server that calls, by its certificate. Raises AccessDenied for anybody else."""
        if is_plaintext(context):
            if not self._plaintext:
                raise AccessDenied("plaintext calls are refused", "use TLS")
            return ""
        identity = certified(context)
        if identity is None or identity.role != "server":
            raise AccessDenied("this is for servers, and this caller has no server's certificate",
                               "connect to the dealer's address for servers with the certificate that `relucent-server init` wrote")
        return identity.name

    def _register(self, messages: Iterator[pb.RegisterUp], owner: str) -> pb.Registration:
        opening = next_kind(messages, "open")
        check_version(opening.protocol_version)
        secret = check_bytes(opening.registration_secret, SECRET_BYTES, "the registration secret")
        if opening.public_bytes > MAX_PUBLIC_BYTES:
            raise ResourceLimit("the public part of the model is too large")
        receiver = ChunkReceiver(lambda: next_kind(messages, "chunk"))
        try:
            model = PublicModel.from_bytes(bytes(receiver.receive(opening.public_bytes)))
        finally:
            self._metrics.bytes.labels("in").inc(receiver.bytes)
        if model.model_id != opening.model_id:
            raise ModelMismatch("the public part does not have the announced model id")
        make_plan(model, 1)
        name = hashlib.sha256(secret).digest()
        seed = Seed(hmac.digest(self._master, b"weight-mask" + bytes.fromhex(model.model_id) + name, "sha256"))
        masks = weight_masks(model, seed)
        with self._lock:
            known = self._registrations.get(name)
            owners = known.owners if known is not None and known.model.model_id == model.model_id else frozenset()
            self._registrations[name] = _Registration(model, masks, seed.public_id(), owners | {owner})
            self._registrations.move_to_end(name)
            while len(self._registrations) > self._max_registrations:
                self._registrations.popitem(last=False)
        log.info("registered model %s", model.model_id[:12])
        return pb.Registration(weight_mask_seed=seed.reveal())

    # --- material -----------------------------------------------------------------------------------------------

    def FetchMaterial(self, request: pb.MaterialRequest, context: grpc.ServicerContext) -> Iterator[pb.MaterialDown]:
        party = "server" if request.WhichOneof("proof") == "registration_secret" else "client"  # as it says

        def work(session: Session) -> None:
            with self._metrics.phase(f"material for the {party}"):
                registration = self._authenticate(party, request, context)
                meeting = self._meet(party, request)
                when_over(context, lambda: meeting.left(party))
                hand_over(registration, meeting, session.send)

        def hand_over(registration: _Registration, meeting: _Meeting, transmit: Callable[[Any], None]) -> None:
            timed = self._timelines and request.timeline and party == "client"
            timeline = Timeline(time.perf_counter if timed else None)
            try:
                if not meeting.both.wait(self._meeting_s):
                    raise PeerTimeout("the other party did not ask for its part in time")
                if meeting.dead.is_set():
                    raise PeerError("the other party left, or dealing failed; the material is destroyed")
                if party == "client":  # one of the two handlers does the work
                    threading.Thread(target=copy_context().run, args=(self._deal, registration, meeting, timeline), daemon=True,
                                     name="deal").start()
                while (message := meeting.take(party)) is not None:
                    if isinstance(message, RelucentError):
                        raise message
                    transmit(message)
                if timed:
                    context.set_trailing_metadata(((TIMELINE_KEY, pack_timeline(timeline)),))
            except BaseException:
                if not meeting.dealt:
                    meeting.dead.set()
                raise
            finally:
                with self._lock:
                    if self._meetings.get(request.material_id) is meeting:
                        del self._meetings[request.material_id]

        yield from run_session("material", work, iter(()), context, DEAL_S)

    def _authenticate(self, party: str, request: pb.MaterialRequest, context: grpc.ServicerContext) -> _Registration:
        check_version(request.protocol_version)
        check_bytes(request.material_id, ID_BYTES, "the material id")
        check_bytes(request.client_id, SECRET_BYTES, "the client id")
        if not 1 <= request.batch <= 4096:
            raise ProtocolViolation("the batch is out of range")
        with self._lock:
            registration = self._registrations.get(request.registration_id)
            if registration is not None:
                self._registrations.move_to_end(request.registration_id)
        if registration is None or registration.model.model_id != request.model_id:
            raise ModelMismatch("this model is not registered with the dealer")
        if request.WhichOneof("proof") is None:
            raise ProtocolViolation("a request for material without a proof")
        proof, wanted = ((request.registration_secret, request.registration_id) if party == "server"
                         else (request.client_secret, request.client_id))
        if not hmac.compare_digest(hashlib.sha256(proof).digest(), wanted):
            raise MaterialError("the proof does not match; this part belongs to somebody else")
        if party == "server" and self._server_name(context) not in registration.owners:
            raise ModelMismatch("this server has not registered this model with the dealer")
        if not hmac.compare_digest(request.mask_id, registration.mask_id):
            raise ModelMismatch("the dealer holds other masks than Delta was made with")
        if party == "client" and is_plaintext(context) and not self._plaintext:
            raise AccessDenied("plaintext calls are refused", "use TLS")
        return registration

    def _meet(self, party: str, request: pb.MaterialRequest) -> _Meeting:
        with self._lock:
            meeting = self._meetings.get(request.material_id)
            if meeting is None:
                self._make_room(party)
                meeting = self._meetings[request.material_id] = _Meeting(
                    request.registration_id, request.batch, request.client_id)
            terms = (request.registration_id, request.batch, request.client_id)
            if party in meeting.claimed or (meeting.registration_id, meeting.batch, meeting.client_id) != terms:
                raise MaterialError("this material was already asked for, or with other terms")
            meeting.claimed.add(party)
            if len(meeting.claimed) == 2:
                meeting.both.set()
        return meeting

    def _make_room(self, party: str) -> None:
        """Before a party waits for the other: clients, who need no certificate, push out the longest waiting of their kind, not servers."""
        alone = {p: [(i, m) for i, m in self._meetings.items() if m.claimed == {p}] for p in ("client", "server")}
        if party == "server" and len(alone["server"]) >= MAX_WAITING:
            raise ResourceLimit("the dealer has too many requests waiting", "try again in a few seconds")
        if party == "client" and len(alone["client"]) >= MAX_WAITING:
            material_id, meeting = alone["client"][0]
            meeting.left("client")
            del self._meetings[material_id]

    def _deal(self, registration: _Registration, meeting: _Meeting, timeline: Timeline) -> None:
        try:
            deadline = time.monotonic() + MEETING_S
            while not self._slots.acquire(timeout=0.2):
                if meeting.dead.is_set():
                    return
                if time.monotonic() > deadline:
                    raise ResourceLimit("the dealer is busy")
            meeting.begun = True
            senders: dict[str, ChunkSender] = {}
            try:
                if meeting.gone:
                    raise PeerError("a party left before its material was dealt")
                plan = make_plan(registration.model, meeting.batch)
                seeds = {party: Seed.fresh() for party in ("client", "server")}
                for party in ("client", "server"):
                    meeting.put(party, pb.MaterialDown(seed=seeds[party].reveal()))
                    senders[party] = ChunkSender(partial(meeting.put, party), pb.MaterialDown)
                timeline.lap("setup")
                deal(plan, registration.masks, seeds["client"], seeds["server"], senders["client"], senders["server"], timeline)
                meeting.finish()
            finally:
                self._slots.release()
                self._metrics.bytes.labels("out").inc(sum(sender.bytes for sender in senders.values()))
        except PeerError:
            meeting.dead.set()
        except RelucentError as error:
            with contextlib.suppress(PeerError):
                for party in ("client", "server"):
                    meeting.put(party, error)
        except BaseException:
            meeting.dead.set()
            log.exception("dealing failed")
