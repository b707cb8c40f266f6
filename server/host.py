"""Running processes: building the services from their settings, health, metrics, signals, worker processes."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from protocol import relucent_pb2 as pb
from protocol import relucent_pb2_grpc as rpc
from protocol.errors import InputError, PeerError, RelucentError
from protocol.model import Model
from protocol.sealed import load_key
from protocol.tls import seconds_left
from protocol.transport import OPENING_S, OPTIONS, PromptCallers, Security, connect, listen, time_limit
from server.catalogue import Catalogue, load_models
from server.config import DealerSettings, ServerSettings, Settings
from server.dealer import DealerService
from server.metrics import Metrics
from server.service import Access, InferenceService, Limits
from server.sessions import Sessions
from server.state import open_state
from server.stock import Stock

log = logging.getLogger("relucent")
CALL_THREADS = 512
"""Calls at once at one address, waiting ones included; the limits of `Sessions` are below it."""
CONNECTION_CALLS = 64
CONNECTION_S, CONNECTION_GRACE_S = 3600, 900
"""A connection is renewed after the first, and with it TLS' look at certificates; its calls get the second to finish."""
DOWNLOADS = (64, 16, 128, 64)
"""Downloads at once, of one client, that wait, of one client."""
REGISTER_S = 30.0
SWEEP_S = 60.0
RESTART_S = 1.0


class Health(health.HealthServicer):  # type: ignore[misc]
    """Without Watch, by which anybody could hold calls for ever; who asks for it falls back on Check, or takes us for healthy."""

    def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, send_response_callback: Any = None) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")


class Reflection(reflection.ReflectionServicer):  # type: ignore[misc]
    """gRPC's own; its calls, which know no caller, end soon."""

    def ServerReflectionInfo(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Answers about the schema, for `OPENING_S` seconds."""
        with time_limit(context, OPENING_S):
            yield from super().ServerReflectionInfo(request_iterator, context)


class Running:
    """A service with health, metrics, reflection if wanted, and a drain on SIGTERM.

    Every address has a gRPC server of its own, so that callers of one cannot take the threads of another's.

    Args:
        service: full name. add: adds it to a gRPC server.
    """

    def __init__(self, settings: Settings, service: str, add: Callable[[grpc.Server], None], share_port: bool = False) -> None:
        self._settings, self._service, self._add = settings, service, add
        changes = {"grpc.so_reuseport": int(share_port), "grpc.max_concurrent_streams": CONNECTION_CALLS,
                   "grpc.max_connection_age_ms": CONNECTION_S * 1000, "grpc.max_connection_age_grace_ms": CONNECTION_GRACE_S * 1000}
        self._options = [*(dict(OPTIONS) | changes).items()]
        self._health = Health()
        self._servers: list[grpc.Server] = []
        self._stop, self._reload = threading.Event(), threading.Event()

    def listen(self, address: str, security: Security, verify_peers: bool = False) -> str:
        """Add an address; returns it with its port."""
        server = grpc.server(ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="call"), options=self._options,
                             maximum_concurrent_rpcs=CALL_THREADS, interceptors=(PromptCallers(OPENING_S),))
        self._add(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            names = (self._service, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(names), server)
        self._servers.append(server)
        return listen(server, address, security, verify_peers)

    def serve_metrics(self, metrics: Metrics) -> None:
        """Serve the metrics at the address of the settings, if there is one."""
        if self._settings.metrics is None:
            return
        certificate = self._settings.certificate
        if certificate is not None:
            metrics.watch("relucent_certificate_seconds", "Until this party's certificate expires", lambda: seconds_left(certificate))
        host, _, port = self._settings.metrics.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"{self._settings.metrics!r} is no address for metrics", "write HOST:PORT, such as 127.0.0.1:9464")
        try:
            bound = metrics.serve(host, int(port))[0].server_port
        except OSError as error:
            raise PeerError(f"cannot serve metrics on {self._settings.metrics}: {error.strerror}", "is the port in use?") from error
        log.info("metrics on http://%s:%d/metrics", host, bound)

    def run(self, ready: str, reload: Callable[[], None] | None = None, every_minute: Callable[[], None] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then drain: no new calls, `grace_s` for those that run. Prints `ready` when it serves.

        SIGHUP calls `reload`.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, lambda *_: self._reload.set())
        for server in self._servers:
            server.start()
        for name in ("", self._service):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._settings.insecure:
            print("warning: plaintext transport; use it on trusted networks only", file=sys.stderr)
        print(ready, flush=True)
        swept = time.monotonic()
        while not self._stop.wait(0.5):
            if self._reload.is_set():
                self._reload.clear()
                if reload is not None:
                    _survive("reloading models", reload)
            if every_minute is not None and time.monotonic() - swept > SWEEP_S:
                swept = time.monotonic()
                _survive("tidying up", every_minute)
        print("stopping", flush=True)
        self._health.enter_graceful_shutdown()
        for stopped in [server.stop(self._settings.grace_s) for server in self._servers]:
            stopped.wait()


def _survive(what: str, work: Callable[[], None]) -> None:
    """Run `work`; whatever goes wrong is logged, and the service goes on."""
    try:
        work()
    except RelucentError as error:
        log.error("%s failed: %s", what, error)
    except Exception:
        log.exception("%s failed", what)


def run_server(settings: ServerSettings, models: list[Model], share_port: bool = False) -> None:
    """One server process, until it is told to stop. Raises RelucentError's kin if it cannot start."""
    state = open_state(settings)
    catalogue = Catalogue(connect(settings.dealer, settings.security), state, settings.timeout_s)
    catalogue.replace(models, REGISTER_S)
    stock = Stock(state, folder=settings.state / "stock" if settings.state is not None else None, limit_bytes=settings.stock_mb << 20,
                  client_bytes=settings.client_stock_mb << 20, memory_bytes=settings.memory_mb << 20, lifetime_s=settings.lifetime_s)
    sessions = Sessions(settings.sessions, settings.client_sessions, settings.waiting, settings.client_waiting, settings.wait_s,
                        settings.client_rate)
    metrics = Metrics("server")
    metrics.watch("relucent_server_stock_bytes", "Prepared material, in preparation too, of all on this database", stock.bytes_used)
    metrics.watch("relucent_server_sessions_waiting", "Sessions that wait for their turn", lambda: sessions.counts()[1])
    limits = Limits(settings.max_batch, settings.timeout_s, settings.idle_s, settings.timelines)
    downloads = Sessions(*DOWNLOADS, settings.wait_s)
    service = InferenceService(catalogue, stock, Access(state, settings.insecure), sessions, metrics, limits, downloads)
    running = Running(settings, pb.DESCRIPTOR.services_by_name["Inference"].full_name,
                      lambda server: rpc.add_InferenceServicer_to_server(service, server), share_port)
    address = running.listen(settings.listen, settings.security)
    if settings.listen_certified is not None:
        certified = Security(settings.client_ca, settings.certificate, settings.key)
        address += " and " + running.listen(settings.listen_certified, certified, verify_peers=True)
    running.serve_metrics(metrics)

    def reload() -> None:
        catalogue.replace(load_models(settings.models), REGISTER_S)  # all or nothing
        log.info("models reloaded: %s", ", ".join(h.public.name for h in catalogue.models()))

    names = ", ".join(f"{h.public.name} ({h.model_id[:12]})" for h in catalogue.models())
    try:
        running.run(f"serving {names} on {address}", reload, stock.tidy)
    finally:
        state.close()


def run_dealer(settings: DealerSettings) -> None:
    """The dealer process, until it is told to stop."""
    master = load_key(settings.master_key) if settings.master_key is not None else None
    metrics = Metrics("dealer")
    service = DealerService(settings.deals, settings.registrations, master, settings.insecure, metrics, timelines=settings.timelines)
    running = Running(settings, pb.DESCRIPTOR.services_by_name["Dealing"].full_name,
                      lambda server: rpc.add_DealingServicer_to_server(service, server))
    address = running.listen(settings.listen, settings.security)
    if settings.listen_servers is not None and not settings.insecure:
        address += " and " + running.listen(settings.listen_servers, settings.security, verify_peers=True)
    running.serve_metrics(metrics)
    running.run(f"dealing on {address}")


# --- several processes on one port ------------------------------------------------------------------------------------


class Workers:
    """Processes that share a port: the kernel gives each connection to one of them. One that dies is started again.

    Args:
        command: starts one worker, given its number.
    """

    def __init__(self, count: int, command: Callable[[int], list[str]]) -> None:
        self._command = command
        self._processes: list[subprocess.Popen[bytes]] = []
        self._count = count
        self._stop = threading.Event()

    def run(self, ready: str, grace_s: float) -> None:
        """Start all, pass signals on, and return when all have stopped. Raises PeerError if the first start fails."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        signal.signal(signal.SIGHUP, lambda *_: self._send(signal.SIGHUP))
        try:
            for i in range(self._count):
                self._processes.append(self._start(i))
            for process in self._processes:
                assert process.stdout is not None
                if not process.stdout.readline().startswith(b"serving"):
                    raise PeerError("a worker process did not start", "its message is above")
            print(ready, flush=True)
            while not self._stop.wait(RESTART_S):
                for i, process in enumerate(self._processes):
                    if process.poll() is not None:
                        self._start_again(i, process.returncode)
            print("stopping", flush=True)
        finally:
            self._finish(grace_s)

    def _start_again(self, number: int, code: int) -> None:
        log.error("worker %d ended with code %d; starting it again", number, code)
        try:
            self._processes[number] = self._start(number)
        except OSError as error:  # no memory, no disk: the others go on, and soon it is tried again
            log.error("worker %d does not start: %s", number, error.strerror)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which it inherits, until it serves
        try:
            return subprocess.Popen(self._command(number), stdout=subprocess.PIPE)
        finally:
            signal.signal(signal.SIGHUP, handler)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _finish(self, grace_s: float) -> None:
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + grace_s + 10
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def reserved_port(address: str) -> Any:
    """Hold a port that several processes will listen on, so that nobody else takes it; yields the address with its number."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"{address!r} is no address to listen on", "write HOST:PORT, such as 127.0.0.1:7001")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            held.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise PeerError(f"cannot listen on {address}: {error.strerror}", "is the port in use by another program?") from error
        yield f"{host}:{held.getsockname()[1]}"


def metrics_of_worker(address: str | None, number: int) -> str | None:
    """Each worker has its own metrics port, counting up from the first."""
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}" if port.isdigit() and int(port) else address


def run_workers(settings: ServerSettings, command: Callable[[dict[str, Any]], list[str]]) -> None:
    """Several server processes on the ports of `settings`. command: starts one process with these settings changed."""
    with contextlib.ExitStack() as ports:
        addresses: dict[str, str] = {"listen": ports.enter_context(reserved_port(settings.listen))}
        if settings.listen_certified is not None:
            addresses["listen_certified"] = ports.enter_context(reserved_port(settings.listen_certified))

        def start(number: int) -> list[str]:
            return command({**addresses, "metrics": metrics_of_worker(settings.metrics, number)})

        workers = Workers(settings.processes, start)
        names = ", ".join(str(Path(m).name) for m in settings.models)
        workers.run(f"serving {names} in {settings.processes} processes on {' and '.join(addresses.values())}", settings.grace_s)
