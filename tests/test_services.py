"""Dealer, server and client over real sockets: results, single use, faults, hostile input."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import re
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from client import Client
from protocol import errors
from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol.errors import (
    InputError,
    MaterialError,
    ModelMismatch,
    PeerError,
    ProtocolViolation,
    RelucentError,
    ResourceLimit,
    StorageError,
    VersionMismatch,
)
from protocol.model import Model
from protocol.timeline import KINDS, PREPROCESSING_KINDS
from protocol.transport import STATUS, answering, connect, translate
from protocol.wire import FRAME_BYTES, to_chunks
from server import dealer as dealing_service
from server.catalogue import HostedModel
from server.dealer import DealerService, _Meeting
from server.state import State
from tests.services import PIXELS, PLAINTEXT, Serve, Services, agrees, infer_messages, preprocess_open, start, steal, wait_for


def test_predictions_batches_and_costs(serve: Serve, mixed_model: Model) -> None:
    services = serve(mixed_model, max_batch=3)
    with services.client() as client:
        agrees(client, mixed_model, PIXELS)  # four images, at most three in a batch
        agrees(client, mixed_model, PIXELS[:1])
        assert client.last_online is not None
        plan = client._offer.plan(1)
        assert client.last_online.rounds == plan.rounds
        payload_up, payload_down = plan.online_bytes_up, plan.online_bytes_down
        assert payload_up < client.last_online.bytes_up < payload_up + 20 * plan.rounds
        assert payload_down < client.last_online.bytes_down < payload_down + 20 * plan.rounds
        result = client.predict(PIXELS[:1])[0]
        assert result.label == mixed_model.public.classes[result.index]
        with pytest.raises(InputError, match=r"1\.\.3"):
            client.preprocess(1, batch=4)


@pytest.mark.parametrize("batch", [1, 9])
def test_all_parties_tell_where_the_time_goes(batch: int, serve: Serve, mixed_model: Model) -> None:
    """Both phases, layer by layer in order; a party's parts sum to no more than the phase took, the client's to all of it."""
    with serve(mixed_model, timelines=True).client(timeline=True) as client:
        client.preprocess(1, batch)
        client.predict(PIXELS[:1].expand(batch, -1, -1, -1))
        phases = (("ready", client.last_preprocessing, PREPROCESSING_KINDS, 3), ("input", client.last_online, KINDS, 2))
        layers = [step.layer.name for step in client._offer.plan(1).activations]
    for extra, cost, kinds, parties in phases:
        assert cost is not None
        told = [cost.timeline, cost.server_timeline, cost.dealer_timeline]
        assert [bool(timeline) for timeline in told] == [True, True, parties == 3]
        for timeline in told[:parties]:
            names = [layer["layer"] for layer in timeline]
            assert [name for name in names if name != extra] == [*layers, "output"]
            assert {kind for layer in timeline for kind in layer} <= {"layer", *kinds}
            assert 0 < _spent(timeline) <= 1e3 * cost.seconds * cost.streams + 1
    assert client.last_preprocessing is not None and client.last_preprocessing.streams == (1 if batch == 1 else 2)
    assert _spent(client.last_preprocessing.timeline) > 0.9e3 * client.last_preprocessing.seconds


def _spent(timeline: tuple[dict[str, Any], ...]) -> float:
    """Milliseconds."""
    return float(sum(ms for layer in timeline for kind, ms in layer.items() if kind != "layer"))


def test_who_has_all_may_hang_up_and_who_has_not_ends_the_dealing() -> None:
    def meeting() -> _Meeting:
        one = _Meeting(bytes(32), 1, bytes(32))
        one.both.set()
        one.begun = True
        one.put("client", "chunk")
        return one

    done = meeting()
    done.left("server")  # between its last chunk and the end
    done.finish()
    assert [done.take("client"), done.take("client"), done.take("server")] == ["chunk", None, None]
    broken = meeting()
    broken.left("server")
    with pytest.raises(PeerError, match="a party left"):
        broken.put("client", "more")
    assert broken.take("client") == "chunk"
    for party in ("client", "server"):
        with pytest.raises(PeerError, match="the other party left"):
            broken.take(party)
    for waiting_for_a_slot in (False, True):
        early = _Meeting(bytes(32), 1, bytes(32))
        if waiting_for_a_slot:
            early.both.set()
        early.left("client")
        assert early.both.is_set()
        with pytest.raises(PeerError):
            early.take("server")


def test_a_party_that_reads_nothing_ends_the_dealing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing_service, "STALL_S", 0.3)
    for end in (lambda m: m.put("client", "more"), lambda m: m.finish()):
        full = _Meeting(bytes(32), 1, bytes(32))
        while not full.queues["client"].full():
            full.put("client", "chunk")
        with contextlib.suppress(PeerError):
            end(full)
        assert full.dead.is_set()


def test_a_party_that_reads_crumbs_ends_the_dealing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patience is for all of a dealing, and grows with the bytes that it takes."""
    monkeypatch.setattr(dealing_service, "STALL_S", 0.5)

    def dealt(size: int, pause_s: float) -> int:
        """How many of 40 messages a party is dealt that takes one every `pause_s`."""
        slow, message = _Meeting(bytes(32), 1, bytes(32)), pb.MaterialDown(chunk=pb.Chunk(data=bytes(size)))

        def read() -> None:
            while not slow.dead.wait(pause_s):
                slow.take("client")

        threading.Thread(target=read, daemon=True).start()
        for sent in range(40):
            try:
                slow.put("client", message)
            except PeerError:
                return sent
        slow.dead.set()
        return 40

    assert dealt(10, 0.1) < 30
    assert dealt(20_000, 0.1) == 40  # at 200 kB a second


def test_nobody_tells_where_the_time_goes_unless_allowed_and_asked(serve: Serve, mixed_model: Model) -> None:
    for allowed, asked in ((False, True), (True, False)):
        with serve(mixed_model, timelines=allowed).client(timeline=asked) as client:
            client.predict(PIXELS[:1])
            for cost in (client.last_preprocessing, client.last_online):
                assert cost is not None and not cost.server_timeline and not cost.dealer_timeline and bool(cost.timeline) is asked


@pytest.mark.parametrize(("streams", "count", "parts"), [(2, 9, [5, 4]), (3, 8, [3, 3, 2]), (2, 7, [7]), (1, 9, [9]), (10, 8, [1] * 8)])
def test_large_batches_run_in_streams(streams: int, count: int, parts: list[int], serve: Serve, mixed_model: Model) -> None:
    services = serve(mixed_model)
    pixels = PIXELS.repeat(3, 1, 1, 1)[:count]
    with services.client(streams=streams) as client:
        assert client._parts(count) == parts
        client.preprocess(1, count)
        assert (client.prepared(count), client._stock.count(parts[0])) == (1, parts.count(parts[0]))
        agrees(client, mixed_model, pixels)
        assert client.prepared(count) == 0
        assert client.last_online is not None
        whole = client._offer.plan(count)
        assert (client.last_online.streams, client.last_online.rounds) == (len(parts), whole.rounds)
        assert whole.online_bytes_up < client.last_online.bytes_up < whole.online_bytes_up + 40 * len(parts) * whole.rounds
        agrees(client, mixed_model, pixels)  # preprocesses first
        services.dealer_server.stop(0).wait()
        with pytest.raises(PeerError):
            client.predict(pixels)
    wait_for(lambda: not services.stock.bytes_used())


def test_implausible_results_are_marked(serve: Serve, mixed_model: Model) -> None:
    assert mixed_model.public.largest_logit is not None
    strict = Model(replace(mixed_model.public, largest_logit=1e-6), mixed_model.private)
    for model, plausible in ((mixed_model, True), (strict, False)):
        with serve(model).client() as client:
            assert [p.plausible for p in client.predict(PIXELS[:2])] == [plausible] * 2


def test_preprocessing_ahead(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    done: list[int] = []
    with services.client() as client:
        client.preprocess(3, progress=done.append)
        assert (client.prepared(), done, services.materials()) == (3, [1, 2, 3], 3)
        for left in (2, 1, 0):
            agrees(client, relu_model, PIXELS[:1])
            assert client.prepared() == left
        client.preprocess(2)
    assert services.materials() == 0  # close discards


def test_concurrent_clients_do_not_disturb_each_other(serve: Serve, mixed_model: Model) -> None:
    services = serve(mixed_model)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with services.client() as client:
                for _ in range(3):
                    agrees(client, mixed_model, PIXELS[index : index + 1])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_delta_is_cached_and_a_damaged_copy_replaced(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        agrees(client, relu_model, PIXELS[:1])
    (file,) = services.cache.iterdir()
    before = file.stat().st_mtime_ns
    with services.client():
        assert file.stat().st_mtime_ns == before
    file.write_bytes(bytes(len(file.read_bytes())))
    with services.client() as client:
        agrees(client, relu_model, PIXELS[:1])
    (file,) = services.cache.iterdir()
    assert any(file.read_bytes())


def test_cache_that_cannot_be_written(serve: Serve, relu_model: Model, tmp_path: Path) -> None:
    services = serve(relu_model)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="cannot store Delta") as caught:
        Client(services.server_address, services.dealer_address, insecure=True, cache=blocked)
    assert caught.value.hint


def test_full_disk(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import client.delta_cache as module

    services = serve(relu_model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        services.client()
    assert list(services.cache.iterdir()) == []  # nothing half-written stays


# --- single use ------------------------------------------------------------------------------------------------------


def test_used_material_is_refused(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        material_id, secret = steal(client)
        agrees(client, relu_model, PIXELS[:1])
        with pytest.raises(MaterialError, match="used"):
            infer_messages(client, material_id, secret)


def test_material_is_spent_by_an_aborted_online_phase(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        material_id, secret = steal(client)
        (chunk,) = to_chunks(0, (bytes(8 * 192),))
        with pytest.raises(PeerError):  # the stream ends after the first message
            infer_messages(client, material_id, secret, chunk)
        with pytest.raises(MaterialError, match="used"):
            infer_messages(client, material_id, secret, chunk)
        agrees(client, relu_model, PIXELS[:1])  # the client finds it refused, and prepares anew
        assert client.prepared() == 0


def test_material_of_another_client_is_refused_and_stays_good(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        material_id, _ = steal(client)
        with pytest.raises(MaterialError, match="unknown"):
            infer_messages(client, material_id, bytes(32))
        services.stock.discard(material_id, bytes(32))
        agrees(client, relu_model, PIXELS[:1])


def test_expired_material(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model, lifetime_s=0.5)
    with services.client() as client:
        client.preprocess(1)
        material_id, secret = steal(client)
        time.sleep(0.6)
        with pytest.raises(MaterialError, match=r"expired|used"):
            infer_messages(client, material_id, secret)
        assert client.prepared() == 0
        services.stock.lifetime_s = 60
        agrees(client, relu_model, PIXELS[:1])


def test_stock_limit(serve: Serve, relu_model: Model) -> None:
    from protocol.plan import make_plan

    size = make_plan(relu_model.public, 1).server_material_bytes
    services = serve(relu_model, stock_bytes=int(2.5 * size))
    with services.client() as client:
        client.preprocess(2)
        with pytest.raises(ResourceLimit, match="no room") as caught:
            client.preprocess(1)
        assert caught.value.hint == "use up or discard material, or try again later"
        agrees(client, relu_model, PIXELS[:1])
        client.preprocess(1)


def test_refused_material_is_destroyed_on_both_sides(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model, wait_s=0.3)
    with services.client() as client:
        client.preprocess(1)
        services.sessions._slots = 0
        with pytest.raises(ResourceLimit):
            client.predict(PIXELS[:1])
        wait_for(lambda: not services.materials())
        assert client.prepared() == 0


def test_failed_sessions_leave_nothing_in_memory(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spent half of a client that breaks off is freed at once, not when the collector of cycles comes round."""
    import gc
    import weakref

    import server.service as module

    held: list[weakref.ref[Any]] = []
    original = module.online_server

    def watched(material: Any, *rest: Any) -> None:
        held.append(weakref.ref(material._contents))
        original(material, *rest)

    monkeypatch.setattr(module, "online_server", watched)
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(PeerError):
                infer_messages(client, *steal(client), *to_chunks(0, (bytes(8 * 192),)))
            wait_for(lambda: held[0]() is None)
        finally:
            gc.enable()


class Gone(Exception):
    """A client that ends."""


@pytest.mark.parametrize("phase", ["preprocessing", "online"])
def test_a_client_that_leaves_between_any_two_messages(phase: str, serve: Serve, mixed_model: Model,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays reserved, running or met, what was accepted is spent, and the service goes on."""
    import client.api as module

    services, sent = serve(mixed_model), 0

    class Leaving(module.RequestQueue):  # type: ignore[type-arg]
        def put(self, message: Any) -> None:
            nonlocal sent
            if sent == number:
                wait_for(lambda: services.materials() == (phase == "preprocessing"))  # the server has got what came before
                raise Gone
            sent += 1
            super().put(message)

    with services.client() as client:
        monkeypatch.setattr(client, "_discard", lambda _: None)  # nobody tells the server
        for number in range(1, 100):  # noqa: B007  # `Leaving` looks at it
            if phase == "online":
                client.preprocess(1)
                material_id, secret = steal(client)
            with monkeypatch.context() as patch:
                patch.setattr(module, "RequestQueue", Leaving)
                sent = 0
                try:
                    client.predict(PIXELS[:1]) if phase == "online" else client.preprocess(1)
                    break
                except Gone:
                    pass
            wait_for(lambda: services.sessions.counts() == (0, 0) and not services.dealer._meetings and not services.materials())
            assert not services.stock._memory and not services.stock._keys
            if phase == "online":
                with pytest.raises(MaterialError, match="used"):
                    infer_messages(client, material_id, secret)
        assert number > len(client._offer.plan(1).activations)
        agrees(client, mixed_model)


# --- hostile or broken messages ---------------------------------------------------------------------------------------

INPUT = 8 * 192
DEVIATIONS: dict[str, list[pb.Chunk]] = {
    "too long": [pb.Chunk(data=bytes(INPUT + 8), last=True)],
    "too short": [pb.Chunk(data=bytes(INPUT - 8), last=True)],
    "out of order": [pb.Chunk(sequence=1, data=bytes(INPUT), last=True)],
    "repeated": [pb.Chunk(data=bytes(INPUT), last=True)] * 2,
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_deviating_messages_end_the_session_only(name: str, serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(2)
        material_id, secret = steal(client)
        with pytest.raises(ProtocolViolation):
            infer_messages(client, material_id, secret, *DEVIATIONS[name])
        agrees(client, relu_model, PIXELS[:1])
        assert client.prepared() == 0  # the spent one was refused, the other served


def test_wrong_phase_model_and_version(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        material_id, secret = steal(client)
        with pytest.raises(VersionMismatch, match="version 9"):
            infer_messages(client, material_id, secret, protocol_version=9)
        with pytest.raises(ModelMismatch):
            infer_messages(client, material_id, secret, model_id="0" * 64)
        with pytest.raises(ProtocolViolation, match="material id"):
            infer_messages(client, b"short", secret)
        with pytest.raises(grpc.RpcError) as caught:
            list(client._server.Infer(iter([pb.InferUp(chunk=pb.Chunk(data=b"x"))]), timeout=10))
        assert isinstance(translate(caught.value, "the server"), ProtocolViolation)
        agrees(client, relu_model, PIXELS[:1])


@pytest.mark.parametrize(("change", "kind"), [
    ({"protocol_version": 2}, VersionMismatch), ({"model_id": "x"}, ModelMismatch), ({"delta_id": bytes(32)}, ModelMismatch),
    ({"batch": 0}, ProtocolViolation), ({"batch": 10**6}, ProtocolViolation), ({"client_id": b""}, ProtocolViolation)])
def test_preprocessing_with_wrong_terms(change: dict[str, Any], kind: type[RelucentError], serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        with pytest.raises(grpc.RpcError) as caught:
            list(client._server.Preprocess(iter([preprocess_open(client, **change)]), timeout=10))
        assert type(translate(caught.value, "the server")) is kind
        assert services.materials() == 0


def test_client_gone_during_preprocessing_frees_the_reservation(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        call = client._server.Preprocess(iter([preprocess_open(client)]), timeout=10)
        assert len(next(call).material_id) == 16
        assert services.materials() == 1
        call.cancel()
        wait_for(lambda: not services.materials(), 45)


def test_what_sends_a_registration_does_not_own_the_model(relu_model: Model) -> None:
    # gRPC's thread that sends may end with the program: tensors that it frees then would abort the process
    sent: list[Iterator[Any]] = []

    def refuse(messages: Iterator[Any], **_: Any) -> None:
        sent.append(messages)
        raise PeerError("refused")

    hosted = HostedModel(relu_model, connect("127.0.0.1:1", PLAINTEXT), State("sqlite://", bytes(32)), 10)
    hosted._stub = SimpleNamespace(Register=refuse)
    with pytest.raises(PeerError, match="refused"):
        hosted.register(1)
    alive = weakref.ref(hosted)
    del hosted
    gc.collect()
    assert alive() is None
    assert next(sent[0]).open.model_id == relu_model.public.model_id


def another_registration(services: Services, model: Model) -> HostedModel:
    """The same model, registered by somebody with another secret."""
    hosted = HostedModel(model, connect(services.dealer_address, PLAINTEXT), State("sqlite://", bytes(32)), 10)
    hosted.register(10)
    return hosted


def test_dealer_gives_each_party_its_own_part_only(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    registered = services.catalogue.models()[0]
    dealer = rpc.DealingStub(connect(services.dealer_address, PLAINTEXT))
    secret = secrets.token_bytes(32)
    base: dict[str, Any] = {"protocol_version": 1, "model_id": relu_model.public.model_id, "batch": 1,
                            "registration_id": registered.registration_id, "material_id": bytes(16),
                            "client_id": hashlib.sha256(secret).digest(), "mask_id": registered.published().mask_id}
    bad: list[tuple[dict[str, Any], type[RelucentError]]] = [
        ({"registration_secret": bytes(32)}, MaterialError),  # a client that plays the server
        ({"client_secret": bytes(32)}, MaterialError),  # another client
        ({}, ProtocolViolation),
        ({"client_secret": secret, "model_id": "0" * 64}, ModelMismatch),
        ({"client_secret": secret, "registration_id": bytes(32)}, ModelMismatch),
        ({"client_secret": secret, "batch": 0}, ProtocolViolation),
        ({"client_secret": secret, "protocol_version": 7}, VersionMismatch)]
    for change, kind in bad:
        with pytest.raises(grpc.RpcError) as caught:
            list(dealer.FetchMaterial(pb.MaterialRequest(**(base | change)), timeout=10))
        assert type(translate(caught.value, "the dealer")) is kind


def test_material_is_bound_to_one_registration(serve: Serve, relu_model: Model) -> None:
    """A client cannot have the server's material dealt under masks of its own registration."""
    services = serve(relu_model)
    honest, other = services.catalogue.models()[0], another_registration(services, relu_model)
    dealer = rpc.DealingStub(connect(services.dealer_address, PLAINTEXT))
    secret = secrets.token_bytes(32)
    base: dict[str, Any] = {"protocol_version": 1, "model_id": relu_model.public.model_id, "batch": 1, "material_id": bytes(16),
                            "client_id": hashlib.sha256(secret).digest()}
    first = dealer.FetchMaterial(pb.MaterialRequest(
        **base, registration_id=honest.registration_id, registration_secret=honest._secret, mask_id=honest.published().mask_id), timeout=10)
    time.sleep(0.3)
    with pytest.raises(grpc.RpcError) as caught:
        list(dealer.FetchMaterial(pb.MaterialRequest(
            **base, registration_id=other.registration_id, client_secret=secret, mask_id=other.published().mask_id), timeout=10))
    assert isinstance(translate(caught.value, "the dealer"), MaterialError)
    first.cancel()


def test_parties_that_leave_do_not_fill_the_dealer(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    registered = services.catalogue.models()[0]
    dealer = rpc.DealingStub(connect(services.dealer_address, PLAINTEXT))
    for index in range(20):
        call = dealer.FetchMaterial(pb.MaterialRequest(
            protocol_version=1, model_id=relu_model.public.model_id, batch=1, material_id=index.to_bytes(16, "big"),
            client_id=hashlib.sha256(bytes(32)).digest(), registration_id=registered.registration_id,
            client_secret=bytes(32), mask_id=registered.published().mask_id), timeout=10)
        wait_for(lambda: bool(services.dealer._meetings))
        call.cancel()
        wait_for(lambda: not services.dealer._meetings)
        assert not any(thread.name == "deal" for thread in threading.enumerate())


def test_a_dealing_whose_parties_leave_while_it_waits_for_its_slot_ends(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    registered = services.catalogue.models()[0]
    dealer, slots = rpc.DealingStub(connect(services.dealer_address, PLAINTEXT)), services.dealer._slots
    terms: dict[str, Any] = {
        "protocol_version": 1, "model_id": relu_model.public.model_id, "batch": 1, "material_id": bytes(16),
        "client_id": hashlib.sha256(bytes(32)).digest(), "registration_id": registered.registration_id,
        "mask_id": registered.published().mask_id}

    def waiting() -> int:
        return sum(thread.name == "deal" for thread in threading.enumerate())

    with contextlib.ExitStack() as held:
        while slots.acquire(blocking=False):
            held.callback(slots.release)
        calls = [dealer.FetchMaterial(pb.MaterialRequest(**terms, **proof), timeout=20)
                 for proof in ({"client_secret": bytes(32)}, {"registration_secret": registered._secret})]
        wait_for(lambda: waiting() == 1)
        for call in calls:
            call.cancel()
        wait_for(lambda: waiting() == 0 and not services.dealer._meetings, 5)


def test_whoever_leaves_while_waiting_for_a_turn_is_no_failure_inside(serve: Serve, relu_model: Model,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    services = serve(relu_model, slots=1, wait_s=20.0)
    with services.client() as client:
        client.preprocess(1)
        material_id, secret = steal(client)
        with services.sessions.slot("somebody"):
            terms = pb.InferOpen(protocol_version=1, model_id=client.model.model_id, material_id=material_id, client_secret=secret)
            call = client._server.Infer(iter([pb.InferUp(open=terms)]), timeout=20)
            wait_for(lambda: services.sessions.counts()[1] == 1)
            call.cancel()
            time.sleep(0.3)
        wait_for(lambda: "the caller went away" in caplog.text)
    assert "failed inside" not in caplog.text and not services.materials()


def test_masks_and_delta_always_belong_together(serve: Serve, mixed_model: Model, tmp_path: Path) -> None:
    """Two servers share a registration; the dealer comes back with other masks and one server registers again. The other's
    clients must not be dealt material that does not fit its Delta: they get the right answer."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    first, second = serve(mixed_model, url=url), serve(mixed_model, url=url)
    second.catalogue._dealer = first.catalogue._dealer
    for hosted in second.catalogue.models():
        hosted._stub = first.catalogue.models()[0]._stub
        hosted.register(10)
    second.dealer_address = first.dealer_address
    with first.client() as one, second.client() as two:
        agrees(one, mixed_model)
        agrees(two, mixed_model)
        first.dealer_server.stop(0).wait()
        fresh = DealerService(plaintext=True)
        first.dealer_server, _ = start(lambda s: rpc.add_DealingServicer_to_server(fresh, s), first.dealer_address)
        agrees(one, mixed_model)  # the first server registers again
        agrees(two, mixed_model)
        with first.client() as late:
            agrees(late, mixed_model)


def test_clients_that_wait_alone_make_room(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the dealer for material that no server asks for keeps nobody else out."""
    import server.dealer as module

    monkeypatch.setattr(module, "MAX_WAITING", 4)
    services = serve(relu_model)
    with services.client() as client:
        calls = []
        for i in range(10):
            secret = i.to_bytes(32)
            calls.append(client._dealer.FetchMaterial(pb.MaterialRequest(
                protocol_version=1, model_id=client.model.model_id, registration_id=client._offer.registration_id,
                material_id=i.to_bytes(16), client_id=hashlib.sha256(secret).digest(), client_secret=secret, batch=1,
                mask_id=client._offer.mask_id), timeout=20))
        wait_for(lambda: sum(c.done() for c in calls) >= 6)
        agrees(client, relu_model)
        for call in calls:
            call.cancel()


def test_registering_a_model_again_reveals_nothing_of_its_masks(serve: Serve, relu_model: Model) -> None:
    """Whoever registers the same public model under another secret gets other masks B, useless against Delta."""
    services = serve(relu_model)
    first, second = services.catalogue.models()[0], another_registration(services, relu_model)
    assert first.registration_id != second.registration_id
    assert first.published().delta_id != second.published().delta_id
    again = HostedModel(relu_model, connect(services.dealer_address, PLAINTEXT), services.state, 10)
    again.register(10)
    assert again.published() == first.published()  # the same server after a restart


@pytest.mark.parametrize("data", [b"", b"junk" * 10])
def test_dealer_refuses_junk_models(data: bytes, serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    dealer = rpc.DealingStub(connect(services.dealer_address, PLAINTEXT))
    opening = pb.RegisterUp(open=pb.RegisterOpen(protocol_version=1, model_id="0" * 64, registration_secret=bytes(32),
                                                 public_bytes=len(data)))
    with pytest.raises(grpc.RpcError) as caught:
        dealer.Register(iter([opening, *(pb.RegisterUp(chunk=c) for c in to_chunks(0, (data,)))]), timeout=10)
    assert isinstance(translate(caught.value, "the dealer"), InputError)


# --- peers that go away -----------------------------------------------------------------------------------------------


def test_restarted_dealer_is_registered_with_again(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        agrees(client, relu_model, PIXELS[:1])
        services.dealer_server.stop(0).wait()
        fresh = DealerService(plaintext=True)
        services.dealer_server, _ = start(lambda s: rpc.add_DealingServicer_to_server(fresh, s), services.dealer_address)
        agrees(client, relu_model, PIXELS[:1])


def test_dealer_down(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        services.dealer_server.stop(0).wait()
        agrees(client, relu_model, PIXELS[:1])  # prepared material needs no dealer
        with pytest.raises(PeerError):
            client.preprocess(1)


def test_server_down(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)
        services.inference_server.stop(0).wait()
        with pytest.raises(PeerError, match="unreachable or went away"):
            client.predict(PIXELS[:1])
        assert client.prepared() == 0
    with pytest.raises(PeerError):
        services.client(timeout_s=5)


def test_wrong_service_behind_the_address(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model)
    with pytest.raises(VersionMismatch, match="no Relucent service"):
        Client(services.dealer_address, services.dealer_address, insecure=True, cache=services.cache)


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:99999", "host:x"])
def test_addresses(address: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        connect(address, PLAINTEXT)


class Failing(rpc.InferenceServicer):  # type: ignore[misc]
    """A server whose every description fails with `error`."""

    error: RelucentError

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Offer:
        with answering("describe", context):
            raise self.error


def test_every_error_has_a_status_and_comes_back(tmp_path: Path) -> None:
    kinds = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, RelucentError)} - {RelucentError}
    assert kinds == set(STATUS)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)
    failing = Failing()
    server, address = start(lambda s: rpc.add_InferenceServicer_to_server(failing, s))
    for kind in kinds:
        failing.error = kind("the reason", "try\n\x1b[31mthis \u2026 " + "x" * 1000)
        with pytest.raises(kind, match=r"\(request [0-9a-f]{12}\)$") as caught:
            Client(address, address, insecure=True, cache=tmp_path)
        assert type(caught.value) is kind
        if kind is StorageError:  # its text names files of that machine
            assert "the reason" not in str(caught.value)
            continue
        assert "the reason" in str(caught.value)
        assert caught.value.hint.startswith("try [31mthis ? xxx")
        assert len(caught.value.hint) == 500
    server.stop(0)


def test_failures_are_logged_under_the_id_that_the_caller_sees(serve: Serve, relu_model: Model) -> None:
    """Of unary calls and sessions, at server and dealer, with the phase; a call that is cut off has an id in the log, too."""
    from server.logs import TextFormatter

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    lines: list[str] = []
    handler = Lines()
    handler.setFormatter(TextFormatter())
    logging.getLogger("relucent").addHandler(handler)
    services = serve(relu_model, idle_s=0.5)
    try:
        with services.client() as client:
            request = pb.MaterialRequest(protocol_version=1, model_id=client.model.model_id, material_id=bytes(16), client_id=bytes(32),
                                         batch=1, registration_id=client._offer.registration_id, client_secret=b"secret")
            wrong = pb.FetchRequest(protocol_version=1, model_id="x")
            calls = {"describe": lambda: client._server.Describe(pb.DescribeRequest(protocol_version=1, name="x"), timeout=5),
                     "download": lambda: list(client._server.FetchDelta(wrong, timeout=5)),
                     "online": lambda: list(client._server.Infer(iter([pb.InferUp()]), timeout=5)),
                     "material": lambda: list(client._dealer.FetchMaterial(request, timeout=5))}
            for what, call in calls.items():
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                error = translate(caught.value, "the peer")
                text, _, request_id = str(error).removeprefix("the peer: ").rstrip(")").partition(" (request ")
                assert any(line.endswith(f"{what} failed: {type(error).__name__}: {text} request={request_id}") for line in lines), lines
            hold = threading.Event()
            with pytest.raises(grpc.RpcError):
                list(client._server.Preprocess(iter(hold.wait, True), timeout=20))
            hold.set()
            assert any(re.search(r"a call is cancelled: .* request=[0-9a-f]{12}$", line) for line in lines)
    finally:
        logging.getLogger("relucent").removeHandler(handler)


def test_what_the_server_cuts_the_client_answers_piece_by_piece(serve: Serve, mixed_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from protocol.plan import make_plan

    monkeypatch.setattr("server.pacing.FIRST_PIECE_BYTES", 64)
    monkeypatch.setattr("server.pacing.PIECES", 1 << 20)
    with serve(mixed_model).client() as client:
        agrees(client, mixed_model)
        plan, cost = make_plan(mixed_model.public, 1), client.last_online
    assert cost is not None
    pieces = 8 * plan.activations[0].active // 64
    assert pieces > 4 * plan.rounds
    assert cost.bytes_up - plan.online_bytes_up > FRAME_BYTES * pieces
    assert cost.bytes_down - plan.online_bytes_down > FRAME_BYTES * pieces


def test_framing_is_below_one_percent_for_large_layers() -> None:
    chunks = list(to_chunks(300, (bytes(512 * 1024),)))
    total = sum(c.ByteSize() + FRAME_BYTES for c in chunks)
    assert total < 512 * 1024 * 1.001


def test_internal_failure_shows_no_detail(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.service as module

    services = serve(relu_model)
    with services.client() as client:
        client.preprocess(1)

        def broken(*_: object) -> None:
            raise ValueError("secret 12345")

        monkeypatch.setattr(module, "online_server", broken)
        with pytest.raises(PeerError) as caught:
            client.predict(PIXELS[:1])
        assert "12345" not in str(caught.value)
