"""The models that a server offers, each registered with the dealer; replaced as a whole when the operator asks."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol import ring
from protocol.dealing import weight_masks
from protocol.errors import AccessDenied, InputError, ModelMismatch, PeerError, ProtocolViolation
from protocol.inference import make_delta
from protocol.model import Model, load
from protocol.plan import Plan, make_plan
from protocol.prg import Seed
from protocol.simulation import server_graph
from protocol.transport import ask, next_message, when_over
from protocol.wire import PROTOCOL_VERSION, SECRET_BYTES, ChunkReceiver, check_bytes, to_chunks
from server.state import State

log = logging.getLogger("relucent.server")
REGISTER_S = 30.0


@dataclass(frozen=True, repr=False)
class Published:
    """Delta as bytes, its SHA-256, and the id of the masks that it was made with."""

    delta: bytes
    delta_id: bytes
    mask_id: bytes


class HostedModel:
    """One model: its parameters, plans, and its registration with the dealer.

    The registration secret comes from the database, so that Delta stays the same over restarts and in all processes.

    Args:
        dealer: channel to the dealer. timeout_s: of a request for material.
    """

    def __init__(self, model: Model, dealer: grpc.Channel, state: State, timeout_s: float) -> None:
        self.public, self._model = model.public, model
        self.public_bytes = model.public.to_bytes()
        self.graph = server_graph(model)
        self._plans = {1: make_plan(model.public, 1)}
        self._stub, self._timeout_s = rpc.DealingStub(dealer), timeout_s
        self._secret = state.registration_secret(self.model_id)
        self.registration_id = hashlib.sha256(self._secret).digest()
        self._published: Published | None = None
        self._lock = threading.Lock()

    @property
    def model_id(self) -> str:
        return self.public.model_id

    def plan(self, batch: int) -> Plan:
        """The plan for a batch size, made once."""
        if batch not in self._plans:
            self._plans[batch] = make_plan(self.public, batch)
        return self._plans[batch]

    def published(self) -> Published:
        """What clients get. Raises PeerError before the dealer has been reached."""
        if self._published is None:
            raise PeerError("the server has not reached its dealer yet")
        return self._published

    def register(self, timeout_s: float) -> None:
        """Register with the dealer, waiting for it up to `timeout_s`, and compute Delta. Raises PeerError and its kin."""

        # a list, for gRPC's thread that sends it may outlive this call and the program: it must not own the model
        messages = [pb.RegisterUp(open=pb.RegisterOpen(protocol_version=PROTOCOL_VERSION, model_id=self.model_id,
                                                       registration_secret=self._secret, public_bytes=len(self.public_bytes))),
                    *to_chunks(0, (self.public_bytes,), carrier=pb.RegisterUp)]
        with self._lock:
            reply = ask(self._stub.Register, iter(messages), "the dealer", timeout_s, wait_for_ready=True)
            seed = Seed(check_bytes(reply.weight_mask_seed, SECRET_BYTES, "the weight mask seed"))
            masks = weight_masks(self.public, seed)
            data = b"".join(bytes(ring.to_bytes(part)) for part in make_delta(self._model, masks).values())
            self._published = Published(data, hashlib.sha256(data).digest(), seed.public_id())
        log.info("registered %s with the dealer", self.model_id[:12])

    def register_again(self, stale: bytes) -> None:
        """Register anew unless that has happened since Delta had the id `stale`."""
        if self._published is None or self._published.delta_id == stale:
            self.register(REGISTER_S)

    def fetch(self, plan: Plan, material_id: bytes, client_id: bytes, mask_id: bytes, context: grpc.ServicerContext,
              touch: Callable[[], None]) -> tuple[Seed, ChunkReceiver]:
        """Ask for the server's part of one material; the request ends with the client's call `context`, `touch` is called as it comes."""
        request = pb.MaterialRequest(
            protocol_version=PROTOCOL_VERSION, model_id=self.model_id, registration_id=self.registration_id,
            material_id=material_id, client_id=client_id, batch=plan.batch, registration_secret=self._secret, mask_id=mask_id)
        messages = self._stub.FetchMaterial(request, timeout=self._timeout_s)
        when_over(context, messages.cancel)

        def following() -> pb.MaterialDown:
            try:
                message: pb.MaterialDown = next_message(messages, "the dealer")
            except AccessDenied as error:  # of this server, not of its client
                raise PeerError(f"the dealer refuses this server: {error}") from None
            touch()
            return message

        seed = Seed(check_bytes(following().seed, SECRET_BYTES, "the seed"))
        return seed, ChunkReceiver(lambda: following().chunk)


def load_models(paths: list[Path]) -> list[Model]:
    """The models of files and of the *.safetensors files of folders, in order, each file once. Raises InputError, ModelFileError."""
    found = [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    files = {file.resolve(): file for file in found}.values()
    if not files:
        raise InputError("no model to serve", "name compiled model files, or a folder that holds some")
    models = [load(file) for file in files]
    names = [model.public.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are named {name!r}", "compile one of them with another --name")
    return models


class Catalogue:
    """The models by name; the first is the default. `replace` swaps the whole set, sessions that run keep theirs."""

    def __init__(self, dealer: grpc.Channel, state: State, timeout_s: float) -> None:
        self._dealer, self._state, self._timeout_s = dealer, state, timeout_s
        self._hosted: dict[str, HostedModel] = {}
        self._by_id: dict[str, HostedModel] = {}

    def replace(self, models: list[Model], register_s: float) -> None:
        """Offer these models from now on; unchanged ones keep their registration. All or nothing: raises before any change."""
        hosted = {}
        for model in models:
            known = self._by_id.get(model.public.model_id)
            if known is None:
                known = HostedModel(model, self._dealer, self._state, self._timeout_s)
                known.register(register_s)
            hosted[model.public.name] = known
        self._hosted, self._by_id = hosted, {h.model_id: h for h in hosted.values()}

    def models(self) -> list[HostedModel]:
        return list(self._hosted.values())

    def named(self, name: str) -> HostedModel:
        """The model of a name, the default for "". Raises ModelMismatch."""
        hosted = self._hosted
        if not name:
            if not hosted:
                raise PeerError("the server has no model yet")
            return next(iter(hosted.values()))
        if name not in hosted:
            raise ModelMismatch("this server holds no model of that name", "list its models")
        return hosted[name]

    def identified(self, model_id: str) -> HostedModel:
        """The model of an id. Raises ModelMismatch."""
        if len(model_id) > 64:
            raise ProtocolViolation("a model id has 64 characters")
        hosted = self._by_id.get(model_id)
        if hosted is None:
            raise ModelMismatch("this server holds another model", "ask the server for its model again")
        return hosted
