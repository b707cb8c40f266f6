"""Hostile input of every kind: no crash, no hang, no unbounded answer, no traceback to the peer; and the service goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import Client, list_models
from protocol import relucent_pb2 as pb
from protocol.errors import PeerError, RelucentError
from protocol.model import Model
from tests import fuzzing
from tests.conftest import serving
from tests.fuzzing import CORPUS, METHODS, TARGETS
from tests.services import PIXELS, Services, agrees, start

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(max_examples=300, deadline=None)


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    """What fuzzing has found worth keeping, again."""
    files = [*(CORPUS / target).iterdir()]
    assert files
    for file in files:
        TARGETS[target](file.read_bytes())


@pytest.mark.parametrize("target", ["public_model", "model_file", "timeline", "chunks"])
@MANY
@given(data=st.data())
def test_parsers(target: str, data: st.DataObject) -> None:
    """Corpus files with a few bytes changed, cut out or put in."""
    raw = bytearray(data.draw(st.sampled_from([f.read_bytes() for f in sorted((CORPUS / target).iterdir())])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    TARGETS[target](bytes(raw))


# --- messages ---------------------------------------------------------------------------------------------------------

EDGES = {"uint32": [0, 1, 2, 2**31, 2**32 - 1], "uint64": [0, 1, 2**32, 2**63, 2**64 - 1], "bool": [False, True],
         "double": [0.0, -1.0, 1e308, float("inf"), float("nan")]}


def values(field: Any, known: dict[str, list[Any]]) -> st.SearchStrategy[Any]:
    """Values of a field: what a session would use, edges, and anything."""
    kinds = {field.TYPE_UINT32: "uint32", field.TYPE_UINT64: "uint64", field.TYPE_BOOL: "bool", field.TYPE_DOUBLE: "double"}
    if field.type == field.TYPE_MESSAGE:
        found = messages(field.message_type, known)
    elif field.type == field.TYPE_STRING:
        found = st.text(max_size=80)
    elif field.type == field.TYPE_BYTES:
        found = st.binary(max_size=64) | st.builds(bytes, st.sampled_from([16, 32, 1536, 70_000]))
    else:
        found = st.sampled_from(EDGES[kinds[field.type]])
    if field.name in known:
        found = st.sampled_from(known[field.name]) | found
    return st.lists(found, max_size=3) if field.is_repeated else found


def messages(descriptor: Any, known: dict[str, list[Any]]) -> st.SearchStrategy[Any]:
    """Messages of a type."""
    kind = getattr(pb, descriptor.name)
    optional = {field.name: values(field, known) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=optional).map(lambda fields: kind(**fields))


@pytest.fixture(scope="module")
def party() -> Iterator[fuzzing.Party]:
    one = fuzzing.Party(fuzzing.small_model())
    yield one
    one.stop()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@FEW
@given(data=st.data())
def test_any_messages_to_any_method(method: Any, data: st.DataObject, party: fuzzing.Party) -> None:
    """A promised status or an answer. Fields are drawn from what a real session uses too, so that calls get beyond the first check."""
    hosted = party.catalogue.models()[0]
    published = hosted.published()
    known: dict[str, list[Any]] = {
        "protocol_version": [1], "model_id": [hosted.model_id], "delta_id": [published.delta_id], "mask_id": [published.mask_id],
        "registration_id": [hosted.registration_id], "batch": [1], "client_id": [bytes(32)], "material_id": [bytes(16)], "offset": [0, 1]}
    drawn = data.draw(st.lists(messages(method.input_type, known), min_size=1, max_size=3))
    replies = party.call(method, drawn)
    assert sum(reply.ByteSize() for reply in replies) < 4 << 20
    assert party.stock.bytes_used() == 0  # nothing stays reserved


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@FEW
@given(junk=st.lists(st.binary(max_size=200), max_size=3))
def test_any_bytes_on_the_wire(method: Any, junk: list[bytes], running: Services) -> None:
    """Over a real connection, below protobuf."""
    address = running.server_address if method.containing_service.name == "Inference" else running.dealer_address
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}")
        with suppress(grpc.RpcError):
            for reply in call(iter(junk), timeout=5):
                assert len(reply) < 2 << 20
            return
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(junk), timeout=5))
        assert "Traceback" not in (caught.value.details() or "")
        assert "site-packages" not in (caught.value.details() or "")


# --- a peer in the middle of a session --------------------------------------------------------------------------------


class MessageRelay(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Passes calls on to `target`, and changes messages: `change(method, upward, message)` returns those to pass instead."""

    def __init__(self, target: str, change: Callable[[str, bool, bytes], list[bytes]]) -> None:
        self._channel, self.change = grpc.insecure_channel(target), change

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]

        def handle(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            upward = (changed for message in requests for changed in self.change(name, True, message))
            call = self._channel.stream_stream(details.method)(upward, timeout=10)
            context.add_callback(call.cancel)
            try:
                context.send_initial_metadata(call.initial_metadata())
                for reply in call:
                    yield from self.change(name, False, reply)
                context.set_trailing_metadata(call.trailing_metadata())
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata())  # type: ignore[attr-defined]
                context.abort(error.code(), error.details())  # type: ignore[attr-defined]

        return grpc.stream_stream_rpc_method_handler(handle)


@pytest.fixture(scope="module")
def running(mixed_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with serving(tmp_path_factory.mktemp("running")) as serve:
        yield serve(mixed_model, timeout_s=8, idle_s=3)


MUTATIONS: dict[str, Callable[[bytes], list[bytes]]] = {
    "lost": lambda _: [], "twice": lambda m: [m, m], "empty": lambda _: [b""], "half": lambda m: [m[: len(m) // 2]],
    "longer": lambda m: [m + m], "junk": lambda m: [b"\xff" * 20], "huge number": lambda m: [b"\x08\xff\xff\xff\xff\x0f" + m[2:]],
    "large": lambda m: [m + b"\x1a\x80\x80\x40" + bytes(1 << 20)]}


@pytest.mark.parametrize("peer", ["server", "dealer"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_message_changed_in_the_middle(peer: str, data: st.DataObject, running: Services) -> None:
    """Whatever happens to one message of a client's life, up or down: a named error on the client's side or an answer, in time."""
    which, upward, name = data.draw(st.integers(0, 40)), data.draw(st.booleans()), data.draw(st.sampled_from(sorted(MUTATIONS)))
    seen, lock = [0], threading.Lock()

    def change(_method: str, up: bool, message: bytes) -> list[bytes]:
        with lock:
            seen[0] += up == upward
            hit = up == upward and seen[0] == which + 1
        return MUTATIONS[name](message) if hit else [message]

    target = running.server_address if peer == "server" else running.dealer_address
    relay = MessageRelay(target, change)
    server, address = start(lambda s: s.add_generic_rpc_handlers((relay,)))
    addresses = (address, running.dealer_address) if peer == "server" else (running.server_address, address)
    try:
        with suppress(RelucentError), Client(*addresses, insecure=True, cache=running.cache, timeout_s=8) as client:
            client.predict(PIXELS[:1])
    finally:
        server.stop(0)
    with running.client() as client:
        agrees(client, running.catalogue.models()[0]._model)


def test_an_answer_that_never_comes_is_missed(running: Services) -> None:
    """A call may end well without its one answer; gRPC returns None then."""
    relay = MessageRelay(running.server_address, lambda _method, up, message: [message] if up else [])
    server, address = start(lambda s: s.add_generic_rpc_handlers((relay,)))
    try:
        with pytest.raises(PeerError, match="ended the call early"):
            list_models(address, insecure=True)
        with pytest.raises(PeerError, match="ended the call early"):
            Client(address, running.dealer_address, insecure=True, cache=running.cache, timeout_s=8)
    finally:
        server.stop(0)


def test_seeds() -> None:
    """The corpus holds a good call of every method, so that changed ones get deep."""
    kinds = {fuzzing.unpack_call(f.read_bytes())[0].name for f in (CORPUS / "service").iterdir()}
    assert kinds == {method.name for method in METHODS}
