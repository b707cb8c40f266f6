"""A relay between processes that makes loopback behave like a slower link, or a faulty one.

Each direction is a queue: bytes leave it at the link's rate, and arrive half a round trip later. The relay's own delay is measured first
and taken off. Checked by `tests/test_links.py`: round-trip time and throughput within 5% of the setting.
"""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from protocol.links import LINKS, Link

READ_BYTES = 1 << 16
"""Smaller pieces keep a gigabit link's two directions spinning for their moments at the same time."""
READ_S = 2e-3
MIN_READ_BYTES = 1 << 12
"""Slow links take pieces that leave in this time: what has arrived may be answered before the rest has left."""
SPIN_S = 150e-6
"""The last part of a wait is spun: sleeping is not that exact."""
MAX_QUEUED = 4096

Fault = Callable[[int, bytes], list[bytes] | None]
"""Given the bytes that a direction has carried before and the next piece: what to pass on, or None to cut the connection."""


def wait_until(moment: float) -> None:
    """Sleep until time.perf_counter() reaches `moment`, to some microseconds."""
    left = moment - time.perf_counter()
    if left > SPIN_S:
        time.sleep(left - SPIN_S)
    while time.perf_counter() < moment:
        pass


class _Direction:
    """One direction of the link, shared by all connections: when its next byte may leave."""

    def __init__(self, link: Link, own_delay_s: float) -> None:
        self._delay = max(link.rtt_s / 2 - own_delay_s, 0.0)
        self._rate = link.bits_per_s
        self.read_bytes = min(max(int(self._rate * READ_S / 8), MIN_READ_BYTES), READ_BYTES) if self._rate else READ_BYTES
        self._free = 0.0
        self._lock = threading.Lock()

    def arrival(self, count: int) -> float:
        """When `count` bytes that are sent now arrive."""
        with self._lock:
            start = max(time.perf_counter(), self._free)
            self._free = start + (8 * count / self._rate if self._rate else 0.0)
            return self._free + self._delay


@dataclass
class Relay:
    """Listens on `address` and passes everything to `target` ("host:port") and back.

    up_fault, down_fault: what goes wrong with bytes to the target, and from it.
    """

    target: str
    link: Link
    own_delay_s: float = 0.0
    up_fault: Fault | None = None
    down_fault: Fault | None = None
    address: str = ""
    _sockets: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Relay:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._up, self._down = (_Direction(self.link, self.own_delay_s) for _ in range(2))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """Break all connections."""
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self) -> None:
        host, _, port = self.target.rpartition(":")
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((host, int(port)), 10)
            except OSError:
                near.close()
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                one.settimeout(None)
            self._sockets += [near, far]
            for source, sink, direction, fault in ((near, far, self._up, self.up_fault), (far, near, self._down, self.down_fault)):
                pending: queue.Queue[tuple[float, bytes] | None] = queue.Queue(MAX_QUEUED)
                threading.Thread(target=_read, args=(source, pending, direction, fault), daemon=True).start()
                threading.Thread(target=_write, args=(sink, source, pending), daemon=True).start()


def _read(source: socket.socket, pending: queue.Queue[tuple[float, bytes] | None], direction: _Direction, fault: Fault | None) -> None:
    carried = 0
    try:
        while data := source.recv(direction.read_bytes):
            pieces = [data] if fault is None else fault(carried, data)
            carried += len(data)
            if pieces is None:
                break
            for piece in pieces:
                pending.put((direction.arrival(len(piece)), piece))
    except OSError:
        pass
    pending.put(None)


def _write(sink: socket.socket, source: socket.socket, pending: queue.Queue[tuple[float, bytes] | None]) -> None:
    with suppress(OSError):
        while (item := pending.get()) is not None:
            wait_until(item[0])
            sink.sendall(item[1])
    for one in (sink, source):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


# --- measuring --------------------------------------------------------------------------------------------------------


@contextmanager
def echo_server(host: str = "127.0.0.1") -> Iterator[str]:
    """A server that sends every byte back; yields its address."""

    def serve(one: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                one.sendall(data)

    def accept() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(one,), daemon=True).start()

    with socket.create_server((host, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"{host}:{listener.getsockname()[1]}"


def round_trips(address: str, count: int) -> list[float]:
    """Seconds of `count` round trips of one byte to an echo server."""
    host, _, port = address.rpartition(":")
    times = []
    with socket.create_connection((host, int(port)), 10) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            started = time.perf_counter()
            one.sendall(b"x")
            one.recv(1)
            times.append(time.perf_counter() - started)
    return times


def throughput(address: str, byte_count: int) -> float:
    """Bits per second of `byte_count` bytes sent to an echo server while they come back, once half of them are there: TCP starts slowly."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as one:
        half: list[tuple[float, int]] = []

        def receive() -> None:
            received = 0
            while received < byte_count and (data := one.recv(1 << 16)):
                received += len(data)
                if not half and 2 * received >= byte_count:
                    half.append((time.perf_counter(), received))

        reader = threading.Thread(target=receive)
        reader.start()
        one.sendall(bytes(byte_count))
        reader.join()
        return 8 * (byte_count - half[0][1]) / (time.perf_counter() - half[0][0])


@contextmanager
def relayed(target: str, link: Link) -> Iterator[str]:
    """A relay to `target` in a process of its own; yields the address to use instead."""
    command = [sys.executable, "-c", f"from benchmarks.relay import main; main({target!r}, {link.name!r})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            yield address
        finally:
            process.terminate()


def measure_capacity() -> None:
    """Print what a relay that neither delays nor paces carries on this machine, as JSON: bits per second."""
    with echo_server() as address, Relay(address, Link("none", 0.0, 0.0)) as relay:
        print(json.dumps({"bits_per_s": throughput(relay.address, 50_000_000)}))


def own_delay() -> float:
    """Seconds that a relay without delay adds to one direction, median of many."""
    with echo_server() as address:
        direct = sorted(round_trips(address, 300))[150]
        with Relay(address, Link("none", 0.0, 0.0)) as relay:
            return max(sorted(round_trips(relay.address, 300))[150] - direct, 0.0) / 2


def main(target: str, name: str) -> None:
    """Run a relay until the process is ended; prints its address."""
    sys.setswitchinterval(0.0005)
    with Relay(target, LINKS[name], own_delay()) as relay:
        print(relay.address, flush=True)
        sys.stdin.read()
