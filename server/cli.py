"""Command lines of the server and the dealer."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from protocol import relucent_pb2_grpc as rpc
from protocol.errors import InputError, PeerError
from protocol.model import load
from protocol.terminal import exit_on_error
from protocol.transport import OPTIONS, connect
from server.dealer import DealerService
from server.service import InferenceService

server_app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                         help="Serve a compiled model for private inference.")
dealer_app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                         help="Deal correlated randomness to a server and its clients.")

Listen = Annotated[str, typer.Option(help="HOST:PORT to listen on; port 0 picks a free one.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Accept plaintext transport; there is no other yet.")]
Grace = Annotated[float, typer.Option(help="Seconds that running calls get to finish on SIGTERM.", min=0)]


@server_app.callback()
@dealer_app.callback()
def _root() -> None:
    """Keeps `serve` a subcommand."""


def _start(add: Callable[[grpc.Server], Any], listen: str, insecure: bool, workers: int) -> tuple[grpc.Server, str]:
    if not insecure:
        raise InputError("this version has plaintext transport only", "pass --insecure to accept that, on trusted networks")
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"{listen!r} is no address to listen on", "write HOST:PORT, such as 127.0.0.1:7001")
    server = grpc.server(ThreadPoolExecutor(workers, thread_name_prefix="call"), options=OPTIONS, maximum_concurrent_rpcs=workers)
    add(server)
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise PeerError(f"cannot listen on {listen}", "is the port in use by another program?")
    server.start()
    return server, f"{host}:{bound}"


def _run_until_signal(server: grpc.Server, grace_s: float, ready: str) -> None:
    """Announce `ready` once signals are handled, and stop on the first."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    print(ready, flush=True)
    stop.wait()
    print("stopping", flush=True)
    server.stop(grace_s).wait()


def _log() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s %(message)s")


@server_app.command("serve")
@exit_on_error("relucent-server")
def serve_model(
    model: Annotated[Path, typer.Argument(help="Compiled model file.")],
    dealer: Annotated[str, typer.Option(help="HOST:PORT of the dealer.")],
    listen: Listen = "127.0.0.1:7001",
    insecure: Insecure = False,
    max_batch: Annotated[int, typer.Option(help="Largest batch of images.", min=1, max=256)] = 32,
    stock_mb: Annotated[int, typer.Option(help="Memory for prepared material, in MB.", min=1)] = 4096,
    lifetime_s: Annotated[float, typer.Option(help="Seconds that prepared material is kept.", min=1)] = 3600.0,
    sessions: Annotated[int, typer.Option(help="Calls served at once.", min=1)] = 64,
    grace_s: Grace = 10.0,
) -> None:
    """Serve MODEL until SIGTERM. Prints one line with the address once it is ready."""
    _log()
    loaded = load(model)
    channel = connect(dealer, insecure)
    service = InferenceService(loaded, channel, max_batch=max_batch, stock_bytes=stock_mb << 20, lifetime_s=lifetime_s)
    service.register(timeout_s=30.0)
    server, address = _start(lambda s: rpc.add_InferenceServicer_to_server(service, s), listen, insecure, sessions)
    if insecure:
        print("warning: plaintext transport; use it on trusted networks only", file=sys.stderr)
    _run_until_signal(server, grace_s, f"serving {loaded.public.name} ({loaded.public.model_id[:12]}) on {address}")


@dealer_app.command("serve")
@exit_on_error("relucent-dealer")
def serve_dealer(
    listen: Listen = "127.0.0.1:7002",
    insecure: Insecure = False,
    deals: Annotated[int, typer.Option(help="Dealings at once.", min=1)] = 4,
    grace_s: Grace = 10.0,
) -> None:
    """Deal until SIGTERM. Prints one line with the address once it is ready."""
    _log()
    service = DealerService(max_deals=deals)
    server, address = _start(lambda s: rpc.add_DealingServicer_to_server(service, s), listen, insecure, 128)
    _run_until_signal(server, grace_s, f"dealing on {address}")
