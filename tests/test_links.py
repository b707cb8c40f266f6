"""The emulated links: round-trip time and throughput as set, and what faults on the way do to the parties."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import emulation
from benchmarks.emulation import netem_works
from benchmarks.relay import Fault, Relay, echo_server, round_trips
from client import Client
from protocol.errors import InputError, PeerError, RelucentError
from protocol.links import LINKS, Link
from protocol.model import Model
from tests.services import PIXELS, Serve, agrees, wait_for
from tests.site import Site


@pytest.mark.alone
@pytest.mark.parametrize("how", ["relay", "netem"])
@pytest.mark.parametrize("name", ["lan", "wan", "mobile"])
def test_links_are_as_set(name: str, how: str) -> None:
    """One good reading of some for each figure: a busy machine can make a link slower, not faster."""
    if how == "netem" and not netem_works():
        pytest.skip("this kernel has no netem, or this is not root")
    link, readings = LINKS[name], []
    for _ in range(10):
        readings.append(_in_a_process_of_its_own(f"from benchmarks.emulation import measure_link; measure_link({name!r}, {how!r})"))
        assert readings[-1]["emulation"] == how
        if (any(r["rtt_s"] == pytest.approx(link.rtt_s, rel=0.05) for r in readings)
                and any(r["bits_per_s"] == pytest.approx(link.bits_per_s, rel=0.05) for r in readings)):
            return
    capacity = _in_a_process_of_its_own("from benchmarks.relay import measure_capacity; measure_capacity()")["bits_per_s"]
    if capacity < 1.2 * link.bits_per_s:
        pytest.skip(f"this machine carries only {capacity / 1e6:.0f} Mbit/s through a relay that does not pace")
    pytest.fail(str(readings))


@pytest.mark.alone
@pytest.mark.parametrize("upward", [True, False])
def test_each_direction_of_the_relay_delays_and_paces(upward: bool) -> None:
    """Half of the round trip each way, and the whole rate; one good reading of some."""
    link, size, readings = LINKS["mobile"], 250_000, []

    def seconds(sender: socket.socket, receiver: socket.socket, count: int) -> float:
        started = time.perf_counter()
        sender.sendall(bytes(count))
        while count:
            count -= len(receiver.recv(1 << 16))
        return time.perf_counter() - started

    with socket.create_server(("127.0.0.1", 0)) as listening, Relay(f"127.0.0.1:{listening.getsockname()[1]}", link) as relay:
        host, _, port = relay.address.rpartition(":")
        near = socket.create_connection((host, int(port)), 10)
        far, _ = listening.accept()
        with near, far:
            for _ in range(10):
                ends = (near, far) if upward else (far, near)
                readings.append((seconds(*ends, 1), seconds(*ends, size)))
                if (any(one == pytest.approx(link.rtt_s / 2, rel=0.05) for one, _ in readings)
                        and any(all_ == pytest.approx(link.rtt_s / 2 + 8 * size / link.bits_per_s, rel=0.05) for _, all_ in readings)):
                    return
    pytest.fail(str(readings))


def _in_a_process_of_its_own(code: str) -> dict[str, Any]:
    """What `code` prints, away from this process's many threads."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(done.stdout))


def test_the_relay_serves_where_netem_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "netem_works", lambda: False)
    with emulation.emulated(LINKS["wan"]) as way, echo_server(way.host) as address, way.to(address) as through:
        assert (way.emulation, way.prefix) == ("relay", ()) and through != address
        assert min(round_trips(through, 2)) > 0.9 * LINKS["wan"].rtt_s
    with emulation.emulated(LINKS["loopback"]) as way, way.to("localhost:1") as through:
        assert (way.emulation, way.host, through) == ("", "127.0.0.1", "localhost:1")
    for how, message in (("netem", "netem cannot be used here"), ("tbf", "unknown emulation 'tbf'")):
        with pytest.raises(InputError, match=message), emulation.emulated(LINKS["wan"], how):
            pass


def test_a_link_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ip` and `tc` stand in here that note their calls; the second fails as where the kernel lacks the qdisc."""
    calls = tmp_path / "calls"
    for name, status in (("ip", 0), ("tc", 2)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $* >> {calls}\necho no such qdisc >&2\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(emulation, "netem_works", lambda: True)
    with pytest.raises(PeerError, match=r"`tc qdisc add .* netem delay 40000us rate 100000000bit .* failed: no such qdisc"), \
            emulation.emulated(LINKS["wan"]):
        pass
    said = calls.read_text().splitlines()
    assert said[0] == f"ip netns add relucent-{os.getpid()}"
    assert said[-2:] == [f"ip link delete rl{os.getpid()}a", f"ip netns delete relucent-{os.getpid()}"]


def test_time_on_a_link() -> None:
    assert LINKS["wan"].least(18, 10_000_000, 9_000_000) == pytest.approx(18 * 0.08 + 0.8)
    assert LINKS["wan"].seconds(18, 10_000_000, 9_000_000) == pytest.approx(18 * 0.083 + 0.8)
    assert LINKS["wan"].least(18, 10_000_000, 9_000_000, 2) == pytest.approx(18 * 0.08 + 0.4)  # one stream waits while the other sends
    assert LINKS["wan"].least(18, 10**8, 0, 2) == pytest.approx(0.08 + 8)
    assert LINKS["lan"].seconds(18, 10_000_000, 9_000_000) == pytest.approx(18 * 0.0005 + 19 * 0.008)
    assert LINKS["loopback"].seconds(18, 10**9, 10**9) == 0


# --- faults ----------------------------------------------------------------------------------------------------------


def after(count: int, fault: Callable[[bytes], list[bytes] | None]) -> Fault:
    """`fault` for the piece that crosses byte `count`, nothing before, and nothing after."""
    return lambda carried, data: fault(data) if carried <= count < carried + len(data) else [data]


def flip(data: bytes) -> list[bytes]:
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0x10
    return [bytes(changed)]


FAULTS: dict[str, Callable[[bytes], list[bytes] | None]] = {
    "cut": lambda _: None, "drop": lambda _: [], "truncate": lambda data: [data[: len(data) // 2]], "flip": flip,
    "repeat": lambda data: [data, data]}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("upward", [True, False])
def test_a_faulty_link_ends_in_time_and_the_service_goes_on(name: str, upward: bool, serve: Serve, mixed_model: Model) -> None:
    """Somewhere in the traffic something is cut, lost, changed or repeated: an error or an answer in time, and clean recovery.

    The transport is plaintext here: that bytes inside a share were changed or lost is then noticed by nobody, so the answer is checked
    only where the connection is cut. TLS notices every such change.
    """
    services = serve(mixed_model, timeout_s=6, idle_s=3)
    rng = random.Random(f"{name}{upward}")
    for _ in range(3):
        fault = after(rng.randrange(200, 60_000), FAULTS[name])
        with (Relay(services.server_address, Link("none", 0.0, 0.0), up_fault=fault if upward else None,
                   down_fault=None if upward else fault) as relay, contextlib.suppress(RelucentError),
              Client(relay.address, services.dealer_address, insecure=True, cache=services.cache, timeout_s=5) as client):
            if name == "cut":
                agrees(client, mixed_model)
            else:
                client.predict(PIXELS[:1])
    with services.client() as client:  # and the service goes on
        agrees(client, mixed_model)


def test_faults_between_server_and_dealer(site: Site, mixed_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a connection that lasts, at any byte, either way: clients get the right answer or a named error in time; then service again."""
    for name, value in (("TIMEOUT_S", "6"), ("IDLE_S", "3"), ("WAIT_S", "2")):
        monkeypatch.setenv(f"RELUCENT_SERVER_{name}", value)
    armed: list[tuple[int, bool, str]] = []  # bytes to let through, whether towards the dealer, and the fault

    def passes(upward: bool) -> Fault:
        def strike(_carried: int, data: bytes) -> list[bytes] | None:
            if not armed or armed[0][1] != upward:
                return [data]
            left, _, name = armed.pop()
            if left >= len(data):
                armed.append((left - len(data), upward, name))
                return [data]
            return FAULTS[name](data)

        return strike

    def answers(client: Client) -> bool:
        with contextlib.suppress(RelucentError):
            agrees(client, mixed_model)
            return True
        return False

    site.dealer()
    rng, outcomes = random.Random(5), []
    with Relay(site.addresses["servers"], Link("none", 0.0, 0.0), up_fault=passes(True), down_fault=passes(False)) as relay:
        site.addresses["servers"] = relay.address
        site.server()
        with Client(site.addresses["server"], site.addresses["dealer"], ca=site.ca, cache=site.folder / "cache", token=site.token(),
                    timeout_s=5) as client:
            for upward in (True, False):
                for name in FAULTS:
                    armed.append((rng.randrange(100 if upward else 20_000), upward, name))
                    started = time.monotonic()
                    outcomes.append(answers(client))
                    assert time.monotonic() - started < 20
                    assert not armed, "the fault was not reached"
                    wait_for(lambda: answers(client), 40)
    assert not all(outcomes), "no fault was felt"
    assert "Traceback" not in site.logs()


@pytest.mark.parametrize("peer", ["server", "dealer"])
def test_behind_tls_no_fault_gives_a_wrong_answer(peer: str, site: Site, mixed_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between client and server, or client and dealer: the right answer or a named error in time, every time."""
    for name, value in (("TIMEOUT_S", "8"), ("IDLE_S", "4"), ("WAIT_S", "2")):
        monkeypatch.setenv(f"RELUCENT_SERVER_{name}", value)
    site.dealer()
    site.server()
    token = site.token()
    with site.client(token=token) as client:
        agrees(client, mixed_model)
    rng = random.Random(peer)
    outcomes = []
    for name in [*FAULTS] * 3:
        fault, upward = after(rng.randrange(3000, 60_000), FAULTS[name]), peer == "server" and bool(rng.randrange(2))
        with Relay(site.addresses[peer], Link("none", 0.0, 0.0), up_fault=fault if upward else None,
                   down_fault=None if upward else fault) as relay:
            addresses = {**site.addresses, peer: relay.address}
            started = time.monotonic()
            try:
                with Client(addresses["server"], addresses["dealer"], ca=site.ca, cache=site.folder / "cache", token=token,
                            timeout_s=8) as client:
                    agrees(client, mixed_model)
                outcomes.append("right")
            except RelucentError as error:
                outcomes.append(type(error).__name__)
            assert time.monotonic() - started < 40
    assert set(outcomes) - {"right"}, "no fault was felt"
    with site.client(token=token) as client:  # and the service goes on
        agrees(client, mixed_model)
    assert "Traceback" not in site.logs()
