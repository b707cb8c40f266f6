"""A dealer and a server with certificates, as processes of their own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from client import Client
from protocol.sealed import load_key
from server.state import State


@dataclass
class Site:
    """A dealer and a server with certificates, as processes; stopped after the test."""

    folder: Path
    model: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def start(self, app: str, *arguments: object) -> tuple[subprocess.Popen[str], str]:
        """Start a program; its process and what it printed when it was ready."""
        command = [sys.executable, "-c", f"from server.cli import {app}_app as app; app()", "serve", *map(str, arguments), "--grace-s", "3"]
        errors = (self.folder / f"{app}{len(self.processes)}.log").open("w")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " on " in line, Path(errors.name).read_text()
        return process, line.strip()

    def dealer(self, *more: object, listen: str = "127.0.0.1:0", listen_servers: str = "127.0.0.1:0") -> subprocess.Popen[str]:
        tls = ["--certificate", self.folder / "dealer.pem", "--key", self.folder / "dealer-key.pem", "--ca", self.ca]
        process, line = self.start("dealer", *tls, "--listen", listen, "--listen-servers", listen_servers, *more)
        _, _, self.addresses["dealer"], _, self.addresses["servers"] = line.split()
        return process

    def server(self, *more: object, listen: str = "127.0.0.1:0") -> subprocess.Popen[str]:
        tls = ["--certificate", self.folder / "server.pem", "--key", self.folder / "server-key.pem", "--ca", self.ca,
               "--listen-certified", "127.0.0.1:0", "--client-ca", self.ca]
        process, line = self.start("server", self.model, *tls, "--dealer", self.addresses["servers"], "--state", self.folder / "state",
                                   "--listen", listen, *more)
        self.addresses["server"], _, self.addresses["certified"] = line.split(" on ")[1].split()
        return process

    def token(self, name: str = "alice", days: float | None = None) -> str:
        return self.state().create_token(name, days)

    def state(self) -> State:
        """The server's own database, as the token commands open it."""
        folder = self.folder / "state"
        return State(f"sqlite:///{folder / 'state.db'}", load_key(folder / "master.key"))

    def client(self, **identity: object) -> Client:
        return Client(self.addresses["server"], self.addresses["dealer"], ca=self.ca, cache=self.folder / "cache",  # type: ignore[arg-type]
                      timeout_s=30, **identity)

    def logs(self) -> str:
        """What all programs have logged."""
        return "".join(p.read_text() for p in self.folder.glob("*.log"))
