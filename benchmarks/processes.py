"""The real processes of a measurement: dealer and server on loopback, and their memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from protocol.errors import PeerError

START_S = 120.0


@dataclass(frozen=True)
class Roles:
    """Addresses and process ids of a running dealer and server; with TLS the authority's file and one API token per client."""

    server: str
    dealer: str
    server_pid: int
    dealer_pid: int
    ca: Path | None = None
    tokens: tuple[str, ...] = ()


def peak_rss_mb(pid: int) -> float:
    """Largest resident memory so far of a process, and of its children, summed, MB. Linux only; 0 elsewhere."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return round(_peak_rss_mb(pid) + sum(_peak_rss_mb(int(child)) for child in children), 1)
    except OSError:
        return _peak_rss_mb(pid)


def _peak_rss_mb(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1000, 1)
    except OSError:
        pass
    return 0.0


def role_command(role: str, *arguments: str) -> list[str]:
    """How to run a program of this installation with this interpreter."""
    app = {"server": "server.cli import server_app as app", "dealer": "server.cli import dealer_app as app"}[role]
    return [sys.executable, "-c", f"from {app}; app()", *arguments]


def _run(role: str, *arguments: str) -> str:
    """What a command of a program prints. Raises PeerError if it fails."""
    done = subprocess.run(role_command(role, *arguments), capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"relucent-{role} {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _start(role: str, arguments: list[str], log: Path, running: list[subprocess.Popen[str]]) -> tuple[subprocess.Popen[str], str]:
    with log.open("w") as errors:
        process = subprocess.Popen(role_command(role, *arguments), stdout=subprocess.PIPE, stderr=errors, text=True)
    running.append(process)
    assert process.stdout is not None
    timer = threading.Timer(START_S, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    if " on " not in line:
        reason = log.read_text().strip().splitlines()
        raise PeerError(f"the {role} did not start: {reason[-1] if reason else 'no message'}")
    return process, line.rsplit(" on ", 1)[1].strip()


@contextmanager
def serving_tls(model: Path, clients: int, *options: str) -> Iterator[Roles]:
    """As `serving`, as an operator would run it: TLS on every link, tokens for so many clients, state on disk."""
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as name, _stopping(running):
        folder = Path(name)
        tls = {}
        for role in ("dealer", "server"):
            _run(role, "init", name, "--host", "127.0.0.1")
            tls[role] = ["--certificate", f"{name}/{role}.pem", "--key", f"{name}/{role}-key.pem", "--ca", f"{name}/ca.pem",
                         "--grace-s", "1", "--listen", "127.0.0.1:0"]
        dealer, addresses = _start("dealer", ["serve", *tls["dealer"], "--listen-servers", "127.0.0.1:0"], folder / "dealer.log", running)
        for_clients, _, for_servers = addresses.split()
        server, address = _start("server", ["serve", str(model), *tls["server"], "--dealer", for_servers, "--state", str(folder / "state"),
                                            *options], folder / "server.log", running)
        tokens = _run("server", "token", "create", *(f"client{i}" for i in range(clients)), "--state", f"{name}/state").split()
        yield Roles(address, for_clients, server.pid, dealer.pid, folder / "ca.pem", tuple(tokens))


@contextmanager
def _stopping(running: list[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def serving(model: Path, *options: str, host: str = "127.0.0.1") -> Iterator[Roles]:
    """A dealer and a server for `model` on free ports of an address of this machine, stopped at the end."""
    running: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder, _stopping(running):
        base = ["serve", "--insecure", "--listen", f"{host}:0", "--grace-s", "1", "--timelines"]
        dealer, dealer_address = _start("dealer", base, Path(folder) / "dealer.log", running)
        arguments = [*base[:1], str(model), *base[1:], "--dealer", dealer_address, *options]
        server, server_address = _start("server", arguments, Path(folder) / "server.log", running)
        yield Roles(server_address, dealer_address, server.pid, dealer.pid)


def commit() -> str:
    """The checked-out commit, with a plus if files other than results have changed; empty outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, object]:
    """Versions, machine, commit and date, to store with every figure; call it first, so that the load is not the measurement's own."""
    names = ("torch", "crypten", "numpy", "grpcio", "protobuf", "cryptography")
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {"versions": {"python": platform.python_version(), "relucent": version("relucent")} | {n: version(n) for n in names},
            "cpu": f"{cpu}, {os.cpu_count()} cores", "load_average": [round(v, 2) for v in os.getloadavg()],
            "commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
