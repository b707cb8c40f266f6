"""The parties of a peer as processes on loopback, and the bytes they exchange as the kernel counts them. Linux only."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, cast

BYTES_RECEIVED, BYTES_SENT, TCP_INFO_SIZE = 128, 200, 208
"""Offsets of tcpi_bytes_received and tcpi_bytes_sent in Linux's struct tcp_info, and how much of it holds both."""


class PartyError(Exception):
    """A party failed or vanished."""


def run_parties(party: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """Run `party(rank, *arguments)` in `count` new processes at once and return their results by rank.

    `party` is a function of a module, arguments and results are picklable; its standard output goes to standard error. The first
    failure ends all of them. Raises PartyError.
    """
    context = get_context("spawn")
    processes, waiting, results = [], dict[Any, int](), dict[int, Any]()
    try:
        for rank in range(count):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(writer, party, rank, arguments), daemon=True)
            process.start()
            processes.append(process)
            writer.close()
            waiting[reader] = rank
        while waiting:
            for ready in wait(list(waiting)):
                rank = waiting.pop(ready)
                try:
                    results[rank], failure = cast(Connection, ready).recv()
                except EOFError:
                    failure = "the process ended without a result"
                if failure:
                    raise PartyError(f"party {rank}: {failure}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(count)]


def _report(writer: Connection, party: Callable[..., Any], rank: int, arguments: tuple[Any, ...]) -> None:
    os.dup2(2, 1)
    try:
        writer.send((party(rank, *arguments), ""))
    except Exception as error:
        writer.send((None, f"{type(error).__name__}: {error}"))
        raise


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def tcp_bytes() -> tuple[int, int]:
    """Bytes (sent, received) so far over the TCP connections that this process has open: payload with the engine's own framing,
    without TCP and IP headers. Take differences: a connection that closes takes its counts away."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
                    received += struct.unpack_from("Q", info, BYTES_RECEIVED)[0]
                    sent += struct.unpack_from("Q", info, BYTES_SENT)[0]
        except (OSError, struct.error):
            continue  # closed meanwhile
    return sent, received
