"""What fuzzing throws at the parsers and services, as functions of bytes that raise on any behaviour that is not promised.

`tests/test_fuzz.py` runs them with hypothesis and replays `tests/corpus`; `tests/fuzz_guided.py` runs them guided by coverage.
"""

from __future__ import annotations

import atexit
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import grpc
import torch
from google.protobuf.message import DecodeError

from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol.errors import RelucentError
from protocol.model import Model, PublicModel, load
from protocol.plan import make_plan
from protocol.transport import STATUS, connect, unpack_timeline
from protocol.wire import ChunkReceiver
from server.catalogue import Catalogue
from server.dealer import DealerService
from server.metrics import Metrics
from server.service import Access, InferenceService, Limits
from server.sessions import Sessions
from server.state import State
from server.stock import Stock

CORPUS = Path(__file__).parent / "corpus"
PROMISED = {code.value[0] for code in STATUS.values()}
SERVICES = {"Inference": rpc.InferenceServicer, "Dealing": rpc.DealingServicer}
METHODS = [method for name in SERVICES for method in pb.DESCRIPTOR.services_by_name[name].methods]
"""Descriptors of every method of both services."""


def request_type(method: Any) -> Any:
    return getattr(pb, method.input_type.name)


class Aborted(Exception):
    """What a servicer's abort raises."""


class Caller(grpc.ServicerContext):  # type: ignore[misc]
    """The context of a call that comes from nowhere, over plaintext. `ended`: the status that it got."""

    def __init__(self) -> None:
        self.ended: tuple[Any, str] | None = None
        self.active = True
        self._callbacks: list[Callable[[], None]] = []

    def abort(self, code: Any, details: str) -> NoReturn:
        self.ended = code, details
        raise Aborted

    def cancel(self) -> None:
        self.over()

    def over(self) -> None:
        self.active = False
        for callback in self._callbacks:
            callback()
        self._callbacks.clear()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if self.active:
            self._callbacks.append(callback)
        return self.active

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return self.active

    def _nothing(self, *_: Any, **__: Any) -> Any:
        return None

    abort_with_status = code = details = set_code = set_details = set_trailing_metadata = send_initial_metadata = _nothing
    disable_next_message_compression = set_compression = trailing_metadata = peer = peer_identities = peer_identity_key = _nothing
    time_remaining = _nothing


class Party:
    """An inference service with its dealer, called without sockets but for the link between the two."""

    def __init__(self, model: Model) -> None:
        dealer = DealerService(plaintext=True, meeting_s=0.2)
        self._link = grpc.server(ThreadPoolExecutor(8))
        rpc.add_DealingServicer_to_server(dealer, self._link)
        port = self._link.add_insecure_port("127.0.0.1:0")
        self._link.start()
        from tests.services import PLAINTEXT

        state = State("sqlite://", bytes(32))
        self.catalogue = Catalogue(connect(f"127.0.0.1:{port}", PLAINTEXT), state, 5.0)
        self.catalogue.replace([model], 10)
        self.stock = Stock(state, limit_bytes=64 << 20)
        inference = InferenceService(self.catalogue, self.stock, Access(state, True), Sessions(4, 4, 8, 8, 1.0), Metrics("server"),
                                     Limits(timeout_s=2.0, idle_s=1.0))
        self.services = {"Inference": inference, "Dealing": dealer}

    def stop(self) -> None:
        self._link.stop(0)

    def call(self, method: Any, requests: list[Any]) -> list[Any]:
        """One call with these messages; its replies. Raises AssertionError for a status that is not promised."""
        caller, kind = Caller(), request_type(method)
        work = getattr(self.services[method.containing_service.name], method.name)
        try:
            if method.client_streaming:
                answer = work(iter(requests), caller)
            else:
                answer = work(requests[0] if requests else kind(), caller)
            replies = [answer] if not method.server_streaming else list(answer)
        except Aborted:
            assert caller.ended is not None
            code, details = caller.ended
            assert code.value[0] in PROMISED, (method.name, code)
            assert "failed inside" not in details, method.name
            assert "Traceback" not in details
            assert len(details) < 500
            replies = []
        finally:
            caller.over()
        return replies

    def real(self) -> dict[bytes, bytes]:
        """What stands for the ids of this party in the corpus, and what they are."""
        hosted = self.catalogue.models()[0]
        published = hosted.published()
        return {b"M" * 64: hosted.model_id.encode(), b"D" * 32: published.delta_id, b"K" * 32: published.mask_id,
                b"R" * 32: hosted.registration_id, b"S" * 32: hosted._secret}


def pack_call(index: int, messages: list[bytes]) -> bytes:
    """A call as the bytes that `service` takes: the method's index, then each message after its length."""
    return bytes([index]) + b"".join(len(m).to_bytes(2, "little") + m for m in messages)


def unpack_call(data: bytes) -> tuple[Any, list[bytes]]:
    """Inverse of `pack_call`, for any bytes."""
    method, rest, messages = METHODS[data[0] % len(METHODS) if data else 0], data[1:], []
    while len(rest) >= 2 and len(messages) < 64:
        length = int.from_bytes(rest[:2], "little")
        messages.append(rest[2 : 2 + length])
        rest = rest[2 + length :]
    return method, messages


@cache
def small_model() -> Model:
    """A model of every operation."""
    from tests.conftest import build_compiled, make_network

    torch.manual_seed(0)
    return build_compiled(make_network(True), torch.randn(4, 3, 8, 8))


@cache
def _party() -> Party:
    party = Party(small_model())
    atexit.register(party.stop)
    return party


# --- targets ----------------------------------------------------------------------------------------------------------


def service(data: bytes) -> None:
    """A call of any method of both services with any messages."""
    for placeholder, value in _party().real().items():
        data = data.replace(placeholder, value)
    method, messages = unpack_call(data)
    try:
        requests = [request_type(method).FromString(message) for message in messages]
    except DecodeError:  # gRPC itself refuses it
        return
    _party().call(method, requests)


def public_model(data: bytes) -> None:
    """The public part of a model, as it comes from a server, or to the dealer."""
    with suppress(RelucentError):
        make_plan(PublicModel.from_bytes(data), 1)


def model_file(data: bytes) -> None:
    """A model file from disk."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        with suppress(RelucentError):
            load(Path(file.name))


def timeline(data: bytes) -> None:
    """The metadata that a server may send with its last message."""
    with suppress(RelucentError):
        unpack_timeline(data)


def chunks(data: bytes) -> None:
    """A stream of chunks into a receiver that waits for a message as long as the first byte says."""
    length, rest = data[0] if data else 0, data[1:]

    def stream() -> Iterator[pb.Chunk]:
        left = rest
        while left:
            size = left[0] % 16
            yield pb.Chunk(sequence=left[0] >> 6, last=bool(left[0] & 32), data=left[1 : 1 + size])
            left = left[1 + size :]
        raise RelucentError("the end")

    source = stream()
    with suppress(RelucentError):
        assert len(ChunkReceiver(lambda: next(source)).receive(length)) == length


TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in (service, public_model, model_file, timeline, chunks)}


def _session(party: Party, pixels: torch.Tensor) -> dict[str, list[bytes]]:
    """The serialised requests of one client's session, by method."""
    from client import Client, list_models
    from tests.services import start

    requests: dict[str, list[bytes]] = {}

    class Recorder(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, proceed: Any, details: Any) -> Any:
            handler = proceed(details)
            name = details.method.rpartition("/")[2]
            read = handler.request_deserializer

            def keep(message: bytes) -> Any:
                requests.setdefault(name, []).append(message)
                return read(message)

            return handler._replace(request_deserializer=keep)

    def add(server: grpc.Server) -> None:
        for name in SERVICES:
            getattr(rpc, f"add_{name}Servicer_to_server")(party.services[name], server)

    server, address = start(add, interceptors=(Recorder(),))
    list_models(address, insecure=True)
    with Client(address, address, insecure=True, cache=Path(tempfile.mkdtemp())) as client:
        client.predict(pixels)
        client.preprocess(1)
    hosted = party.catalogue.models()[0]
    with grpc.insecure_channel(address) as channel:
        hosted._stub = rpc.DealingStub(channel)
        hosted.register(10)
    server.stop(0)
    return requests


def write_seeds() -> None:
    """Write one good input of every kind to the corpus: the calls of a real session, with placeholders for what changes."""
    from protocol.model import serialise
    from tests.services import PIXELS

    def write(target: str, name: str, data: bytes) -> None:
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        (CORPUS / target / name).write_bytes(data)

    party = _party()
    for name, messages in _session(party, PIXELS[:1]).items():
        index = [m.name for m in METHODS].index(name)
        data = pack_call(index, [m for m in messages if len(m) < 1 << 16])
        for placeholder, value in party.real().items():
            data = data.replace(value, placeholder)
        write("service", name, data)
    model = small_model()
    write("public_model", "good", model.public.to_bytes())
    write("model_file", "good", serialise(model))
    write("timeline", "good", zlib.compress(json.dumps([{"layer": "input", "wait": 1.5}]).encode()))
    write("chunks", "good", bytes([4, 2, 1, 2, 34, 3, 4]))


if __name__ == "__main__":
    write_seeds()
