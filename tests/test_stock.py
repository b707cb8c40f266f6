"""The client's stock: prepared ahead, in memory or on disk, used once, refilled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import Client
from client.stock import DiskStock, MemoryStock, Prepared, Stock
from protocol.errors import InputError, MaterialError, PeerError, StorageError
from protocol.inference import preprocess
from protocol.model import Model
from protocol.plan import Plan, make_plan
from protocol.transport import Security
from server.stock import Stock as ServerStock
from tests.services import PIXELS, Serve, Services, agrees, start, wait_for
from tests.test_programs import image, program


def open_client(services: Services, folder: Path, **options: object) -> Client:
    return Client(services.server_address, services.dealer_address, insecure=True, cache=services.cache, timeout_s=30,
                  stock=str(folder / "stock"), stock_key=folder / "stock.key", **options)  # type: ignore[arg-type]


@pytest.fixture
def material(mixed_model: Model) -> Callable[[], Prepared]:
    """Makes material without a server."""

    def make(expires: float = 2e12) -> Prepared:
        client, _, _ = preprocess(mixed_model, 1)
        return Prepared(client, os.urandom(32), expires)

    return make


@pytest.fixture
def plan(mixed_model: Model) -> Plan:
    return make_plan(mixed_model.public, 1)


@pytest.fixture(params=["memory", "disk"])
def stock(request: pytest.FixtureRequest, tmp_path: Path) -> Stock:
    return MemoryStock() if request.param == "memory" else DiskStock(tmp_path / "stock", tmp_path / "key", b"here")


def test_in_and_out(stock: Stock, material: Callable[..., Prepared], plan: Plan) -> None:
    assert stock.take(plan) is None
    made = [material(), material(), material(expires=1.0)]
    known = {m.material.material_id: m.secret for m in made}
    for one in made:
        stock.add(one)
    assert (stock.count(1), stock.count(2)) == (2, 0)  # one has expired
    for left in (1, 0):
        taken = stock.take(plan)
        assert taken is not None
        assert known.pop(taken.material.material_id) == taken.secret
        assert stock.count(1) == left
    assert stock.take(plan) is None
    assert "secret" in repr(made[0])
    assert made[0].secret.hex() not in repr(made[0])


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_expires_goes(on_disk: bool, tmp_path: Path, material: Callable[..., Prepared], plan: Plan) -> None:
    """Of a client that stays up and keeps ahead, as the clock goes on."""
    now = [0.0]
    stock = DiskStock(tmp_path, tmp_path / "key", b"here", lambda: now[0]) if on_disk else MemoryStock(lambda: now[0])
    old: list[Prepared] = []
    for hour in range(3):
        now[0] = 3600.0 * hour
        assert stock.count(1) == 0
        for _ in range(2):
            old.append(material(expires=now[0] + 1800))
            stock.add(old[-1])
        held = len([*tmp_path.glob("*.material")]) if isinstance(stock, DiskStock) else sum(map(len, stock._ready.values()))
        assert held == stock.count(1) == 2
    if not on_disk:
        for gone in old[:4]:
            with pytest.raises(MaterialError):
                gone.material.take()
    assert stock.take(plan) is not None


def test_threads_never_share_material(stock: Stock, material: Callable[[], Prepared], plan: Plan) -> None:
    for _ in range(3):
        stock.add(material())
    taken: list[bytes] = []

    def take() -> None:
        while (one := stock.take(plan)) is not None:
            taken.append(one.material.material_id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 3


def test_what_lies_on_disk(tmp_path: Path, material: Callable[[], Prepared], plan: Plan) -> None:
    def opened(registration: bytes = b"here") -> DiskStock:
        return DiskStock(tmp_path / "stock", tmp_path / "key", registration)

    made = material()
    secret, mask = made.secret, made.material._contents.input_mask.numpy().tobytes()  # type: ignore[union-attr]
    opened().add(made)
    for path in (tmp_path / "stock").iterdir():
        assert path.stat().st_mode & 0o077 == 0
        assert secret not in path.read_bytes()
        assert mask[:64] not in path.read_bytes()
    assert opened(b"elsewhere").count(1) == 0
    (file,) = (tmp_path / "stock").glob("*.material")
    copy = file.read_bytes()
    taken = opened().take(plan)
    assert taken is not None
    assert taken.material.take().input_mask.numpy().tobytes() == mask
    assert not file.exists()
    file.write_bytes(copy)  # a file that comes back, from a backup say, is worthless: its key is gone
    assert opened().take(plan) is None
    assert not file.exists()
    # a damaged file is passed over
    for _ in range(2):
        opened().add(material())
    files = sorted((tmp_path / "stock").glob("*.material"))
    files[0].write_bytes(b"x" * 100)
    assert opened().take(plan) is not None
    assert opened().take(plan) is None
    # another key
    opened().add(material())
    (tmp_path / "key").unlink()
    with pytest.raises(StorageError, match="cannot be decrypted"):
        opened().take(plan)


def test_full_disk(tmp_path: Path, material: Callable[[], Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    import protocol.sealed as module

    stock = DiskStock(tmp_path / "stock", tmp_path / "key", b"here")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match="No space left"):
            stock.add(material())
        with pytest.raises(StorageError, match="No space left"):
            module.load_key(tmp_path / "other")
    assert stock.count(1) == 0
    assert not list((tmp_path / "stock").glob("*.material"))
    assert not (tmp_path / "other").exists()
    (tmp_path / "stock" / "stock.db").write_bytes(b"no database")
    with pytest.raises(StorageError, match="not a database"):
        stock.count(1)


TAKE = """
import sys, time, torch
from pathlib import Path
import client.stock as module
from protocol.model import load
from protocol.plan import make_plan
folder, moment = Path(sys.argv[1]), sys.argv[2]
def stop(*_):
    print("here", flush=True)
    time.sleep(60)
if moment == "before reading":
    module.read_sealed = stop
elif moment == "before removing":
    module.read_client = stop
stock = module.DiskStock(folder / "stock", folder / "key", b"here")
stock.take(make_plan(load(folder / "m.safetensors").public, 1))
stop()
"""


@pytest.mark.parametrize("moment", ["before reading", "before removing", "after"])
def test_killed_client_never_uses_material_again(moment: str, tmp_path: Path, mixed_model: Model, material: Callable[[], Prepared],
                                                 plan: Plan) -> None:
    from protocol.model import save

    save(mixed_model, tmp_path / "m.safetensors")
    DiskStock(tmp_path / "stock", tmp_path / "key", b"here").add(material())
    process = subprocess.Popen([sys.executable, "-c", TAKE, str(tmp_path), moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    again = DiskStock(tmp_path / "stock", tmp_path / "key", b"here")
    assert again.take(plan) is None
    assert not list((tmp_path / "stock").glob("*.material"))


# --- with a server ----------------------------------------------------------------------------------------------------


def test_stock_outlives_the_client(serve: Serve, mixed_model: Model, tmp_path: Path) -> None:
    services = serve(mixed_model)
    with open_client(services, tmp_path) as client:
        client.preprocess(2)
    assert services.materials() == 2
    services.dealer_server.stop(0).wait()  # from here on nothing can be prepared
    with open_client(services, tmp_path) as client:
        assert client.prepared() == 2
        for left in (1, 0):
            agrees(client, mixed_model)
            assert client.prepared() == left
    assert services.materials() == 0


def test_what_the_server_lost_is_replaced(serve: Serve, mixed_model: Model, tmp_path: Path) -> None:
    services = serve(mixed_model)
    with open_client(services, tmp_path) as client:
        client.preprocess(3)
        for material_id in list(services.stock._memory)[:2]:
            services.stock.release(material_id)
        agrees(client, mixed_model)
        assert client.prepared() == 0
        agrees(client, mixed_model)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_another_server_behind_the_address_costs_one_material(kind: str, serve: Serve, mixed_model: Model, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers with a database in common and a stock each: what the other holds is refused unspent, and kept for when it is back."""
    import client.api as module
    from client.api import rpc

    url = f"sqlite:///{tmp_path / 's.db'}"
    first, second = (serve(mixed_model, url=url, folder=tmp_path / name) for name in ("one", "two"))
    second.catalogue.models()[0]._stub = first.catalogue.models()[0]._stub
    second.catalogue.models()[0].register(10)
    assert first.stock.holder != second.stock.holder
    (tmp_path / "one.id").chmod(0o660)  # as an orchestrator does that gives a volume to a group
    assert ServerStock(first.state, folder=tmp_path / "one").holder == first.stock.holder

    def leads_to(services: Services) -> None:
        channel = module.connect(services.server_address, Security(insecure=True))
        client._channels.append(channel)
        client._server = rpc.InferenceStub(channel)

    with open_client(first, tmp_path) if kind == "disk" else first.client() as client:
        client.preprocess(3)
        leads_to(second)
        agrees(client, mixed_model)  # one of them is tried, then fresh material
        assert (client.prepared(), client._stock.count(1), second.materials()) == (0, 2, 2)
        agrees(client, mixed_model)  # none is tried any more
        client.preprocess(1)
        assert (client.prepared(), client._stock.count(1)) == (1, 3)
        agrees(client, mixed_model)
        assert (client.prepared(), client._stock.count(1)) == (0, 2)
        leads_to(first)
        monkeypatch.setattr(module, "AWAY_S", 0.0)  # some time later
        for left in (1, 0):
            agrees(client, mixed_model)
            assert client.prepared() == left


def test_a_stock_of_an_older_client_is_read(tmp_path: Path, material: Callable[[], Prepared], plan: Plan) -> None:
    import sqlite3

    DiskStock(tmp_path / "stock", tmp_path / "key", b"here").add(material())
    with sqlite3.connect(tmp_path / "stock" / "stock.db") as database:
        database.execute("ALTER TABLE prepared DROP COLUMN holder")
    assert DiskStock(tmp_path / "stock", tmp_path / "key", b"here").take(plan) is not None


def test_a_copied_stock_is_refused_before_anything_of_the_image_is_sent(serve: Serve, mixed_model: Model, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder restored from a backup holds masks that were used: the server must refuse them first."""
    import client.api as module

    services = serve(mixed_model)
    with open_client(services, tmp_path) as client:
        client.preprocess(1)
        shutil.copytree(tmp_path / "stock", tmp_path / "copy")
        agrees(client, mixed_model)
    shutil.rmtree(tmp_path / "stock")
    (tmp_path / "copy").rename(tmp_path / "stock")
    sent: list[list[str]] = []

    class Recording(module.RequestQueue):  # type: ignore[type-arg]
        def __init__(self) -> None:
            super().__init__()
            sent.append([])

        def put(self, message: Any) -> None:
            sent[-1].append(message.WhichOneof("kind"))
            super().put(message)

    monkeypatch.setattr(module, "RequestQueue", Recording)
    with open_client(services, tmp_path) as client:
        assert client.prepared() == 1
        agrees(client, mixed_model)
    assert sent[0] == ["open"]  # refused; then preprocessing and the online phase proper
    assert len(sent) == 3


def test_refilling_in_the_background(serve: Serve, mixed_model: Model, tmp_path: Path) -> None:
    services = serve(mixed_model)
    with services.client() as client:
        client.keep_ahead(2)
        with pytest.raises(InputError, match="already"):
            client.keep_ahead(2)
        for _ in range(3):
            wait_for(lambda: client.prepared() == 2)
            agrees(client, mixed_model)
        wait_for(lambda: client.prepared() == 2)
    assert services.materials() == 0


def test_refilling_comes_back_after_a_fault(serve: Serve, mixed_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import client.api as module
    from protocol import relucent_pb2_grpc as rpc
    from server.dealer import DealerService

    monkeypatch.setattr(module, "REFILL_PAUSES_S", (0.2, 1.0))
    services = serve(mixed_model)
    with services.client() as client:
        client.keep_ahead(1)
        wait_for(lambda: client.prepared() == 1)
        services.dealer_server.stop(0).wait()
        agrees(client, mixed_model)
        with pytest.raises(PeerError):
            client.predict(PIXELS[:1])
        services.dealer_server, _ = start(
            lambda s: rpc.add_DealingServicer_to_server(DealerService(plaintext=True), s), services.dealer_address)
        wait_for(lambda: client.prepared() == 1)
        agrees(client, mixed_model)


def test_what_is_ready_only_when_a_client_has_closed_is_given_back(serve: Serve, mixed_model: Model) -> None:
    services = serve(mixed_model)
    with services.client() as client:
        client.preprocess(1)
        prepared = client._prepare(1)
        client._stock.close()
        client._closed.set()
        client._put(prepared)
        assert services.materials() == 1  # the one of which the closed stock's list was made
        client._closed.clear()
        assert client.prepared() == 0


def test_closing_does_not_wait_for_a_hanging_peer(serve: Serve, mixed_model: Model) -> None:
    services = serve(mixed_model)
    client = services.client()
    hold = threading.Event()
    services.dealer._deal = lambda *_: hold.wait(20)  # type: ignore[method-assign]
    client.keep_ahead(1)
    time.sleep(0.5)
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 5
    hold.set()


def test_prepare_and_classify(serve: Serve, mixed_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    services = serve(mixed_model)
    to = ["--server", services.server_address, "--dealer", services.dealer_address, "--insecure", "--cache", services.cache]
    done = program("client", "prepare", *to, "--count", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 inferences of 1 image ready for tiny\n"
    services.dealer_server.stop(0).wait()
    done = program("client", "classify", image(tmp_path), *to, "--json")
    assert done.returncode == 0, done.stderr
    assert '"preprocessing_ms": 0.0' in done.stdout
    assert services.materials() == 1
    done = program("client", "prepare", *to, "--count", 1)
    assert done.stdout == "1 inferences of 1 image ready for tiny\n"
