"""Prometheus metrics of server and dealer. Labels are few and bounded; no identity, no id, nothing secret."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import nan
from time import perf_counter
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from protocol.errors import AccessDenied, RelucentError, ResourceLimit
from protocol.transport import STATUS

log = logging.getLogger("relucent")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0)


PHASES = {"server": ("preprocessing", "online"), "dealer": ("registration", "material for the client", "material for the server")}
OUTCOMES = ("done", "refused", "failed")
REFUSALS = (ResourceLimit, AccessDenied)


class Metrics:
    """One process's figures. program: "server" or "dealer", the prefix of every name.

    Every series is there from the start, at 0: one that came with its first event would hide that event from `increase`.
    """

    def __init__(self, program: str) -> None:
        self.registry = CollectorRegistry()
        prefix = f"relucent_{program}"
        self.running = Gauge(f"{prefix}_sessions_running", "Sessions that run", registry=self.registry)
        self.phases = Histogram(f"{prefix}_phase_seconds", "Time of a phase, successful or not", ["phase"], buckets=SECONDS,
                                registry=self.registry)
        self.done = Counter(f"{prefix}_sessions", "Sessions that ended, by phase and outcome", ["phase", "outcome"], registry=self.registry)
        if program == "server":
            self.images = Counter(f"{prefix}_images", "Images classified", registry=self.registry)
        self.bytes = Counter(f"{prefix}_bytes", "Payload bytes, protobuf included", ["direction"], registry=self.registry)
        self.refusals = Counter(f"{prefix}_refusals", "Calls refused by policy", ["reason"], registry=self.registry)
        self.errors = Counter(f"{prefix}_errors", "Calls that failed, by kind of error", ["kind"], registry=self.registry)
        for phase in PHASES[program]:
            self.phases.labels(phase)
            for outcome in OUTCOMES:
                self.done.labels(phase, outcome)
        for direction in ("in", "out"):
            self.bytes.labels(direction)
        for kind in REFUSALS:
            self.refusals.labels(kind.__name__)
        for name in ("Internal", *(kind.__name__ for kind in STATUS if kind not in REFUSALS)):
            self.errors.labels(name)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is computed when it is read; NaN if that fails, so that the others can still be read."""

        def read() -> float:
            try:
                return value()
            except Exception as error:
                log.warning("%s cannot be read: %s", name, type(error).__name__)
                return nan

        Gauge(name, text, registry=self.registry).set_function(read)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Count a call that is refused, or fails."""
        try:
            yield
        except REFUSALS as error:
            self.refusals.labels(type(error).__name__).inc()
            raise
        except Exception as error:
            self.errors.labels(type(error).__name__ if isinstance(error, RelucentError) else "Internal").inc()
            raise

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count and time one session of a phase, by its outcome."""
        started = perf_counter()
        self.running.inc()
        outcome = "failed"
        try:
            with self.failures():
                yield
            outcome = "done"
        except REFUSALS:
            outcome = "refused"
            raise
        finally:
            self.running.dec()
            self.done.labels(name, outcome).inc()
            self.phases.labels(name).observe(perf_counter() - started)

    def serve(self, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
        """Serve /metrics over plain HTTP. Raises OSError if the port is taken."""
        return start_http_server(port, host, self.registry)
