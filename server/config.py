"""Settings of server and dealer: one schema for TOML file, environment and flags, in rising order of precedence.

Environment variables are the names in capitals after RELUCENT_SERVER_ or RELUCENT_DEALER_.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from protocol.errors import InputError
from protocol.transport import Security

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Settings(BaseSettings):
    """What both programs have.

    certificate, key: this party's TLS files. ca: file of the authorities that certify its peers. insecure: plaintext links.
    metrics: HOST:PORT of the metrics' own HTTP server.
    reflection: answer anybody's questions about the services' schema (gRPC reflection). grace_s: what running calls get to finish on
    SIGTERM.
    """

    model_config = SettingsConfigDict(extra="forbid")

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    insecure: bool = False
    metrics: str | None = None
    reflection: bool = False
    log_json: bool = False
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    grace_s: float = Field(10.0, ge=0)

    @property
    def security(self) -> Security:
        return Security(self.ca, self.certificate, self.key, None, self.insecure)

    @model_validator(mode="after")
    def _transport(self) -> Settings:
        if not self.insecure and self.certificate is None:
            raise ValueError("no certificate: make one with `init` and give certificate and key, or insecure = true on trusted networks")
        if self.insecure and self.certificate is not None:
            raise ValueError("insecure contradicts a certificate; leave one of them out")
        return self


class DatabaseSettings(BaseSettings):
    """Where a server keeps what outlives it; all that the commands beside the server need of its settings.

    state: folder for tokens and prepared material; without one both live in memory. database: SQLAlchemy address in place of the
    SQLite file there. master_key: file; default master.key in the folder.
    """

    model_config = SettingsConfigDict(env_prefix="RELUCENT_SERVER_", extra="ignore")

    state: Path | None = None
    database: str | None = None
    master_key: Path | None = None

    @model_validator(mode="after")
    def _keyed(self) -> DatabaseSettings:
        if self.database is not None and self.master_key is None and self.state is None:
            raise ValueError("a database needs master_key, the same file for all processes")
        return self


class ServerSettings(Settings, DatabaseSettings):
    """Of relucent-server.

    models: compiled model files and folders of such; the first is the default. dealer: HOST:PORT.
    listen: for clients with an API token. listen_certified: for clients with a certificate of `client_ca`.
    stock_mb: all prepared material; client_stock_mb: one client's; memory_mb: of it, in memory too. lifetime_s: of material.
    sessions: calls that compute at once, client_sessions for one client; waiting, client_waiting: calls that may wait, for wait_s.
    client_rate: calls that one client may begin in a minute; 0 for any number.
    timeout_s, idle_s: of a call, and between two of its messages. timelines: tell clients that ask how long what took.
    processes: worker processes on one port.
    """

    model_config = SettingsConfigDict(env_prefix="RELUCENT_SERVER_", extra="forbid")

    models: list[Path] = Field(min_length=1)
    dealer: str
    listen: str = "127.0.0.1:7001"
    listen_certified: str | None = None
    client_ca: Path | None = None
    stock_mb: PositiveInt = 4096
    client_stock_mb: PositiveInt = 2048
    memory_mb: int = Field(2048, ge=0)
    lifetime_s: PositiveFloat = 3600.0
    max_batch: int = Field(32, ge=1, le=256)
    sessions: PositiveInt = 4
    client_sessions: PositiveInt = 2
    waiting: PositiveInt = 256
    client_waiting: PositiveInt = 32
    client_rate: float = Field(0.0, ge=0)
    wait_s: PositiveFloat = 30.0
    timeout_s: PositiveFloat = 600.0
    idle_s: PositiveFloat = 60.0
    timelines: bool = False
    processes: int = Field(1, ge=1, le=256)

    @model_validator(mode="after")
    def _together(self) -> ServerSettings:
        if (self.listen_certified is None) != (self.client_ca is None):
            raise ValueError("listen_certified and client_ca are given together")
        if self.processes > 1 and self.state is None and self.database is None:
            raise ValueError("several processes share their state: give a state folder")
        if self.wait_s >= self.idle_s:
            raise ValueError("wait_s must be below idle_s, or waiting calls are taken for idle ones")
        return self


class DealerSettings(Settings):
    """Of relucent-dealer.

    listen: for clients, and in plaintext for servers too. listen_servers: for servers, with a certificate of `ca`.
    master_key: file from which the masks of registered models are derived, so that they stay the same over restarts.
    deals: dealings at once. registrations: models held. timelines: tell clients that ask how long what took.
    """

    model_config = SettingsConfigDict(env_prefix="RELUCENT_DEALER_", extra="forbid")

    listen: str = "127.0.0.1:7002"
    listen_servers: str | None = None
    master_key: Path | None = None
    deals: PositiveInt = 4
    registrations: PositiveInt = 16
    timelines: bool = False

    @model_validator(mode="after")
    def _servers(self) -> DealerSettings:
        if not self.insecure and (self.listen_servers is None or self.ca is None):
            raise ValueError("servers are known by their certificates: give listen_servers and ca")
        return self


S = TypeVar("S", bound=BaseSettings)


def read_settings(kind: type[S], config: Path | None, flags: dict[str, Any]) -> S:
    """Settings from file, environment and flags (None: not given). Raises InputError with every mistake in one line."""
    from_file: dict[str, Any] = {}
    if config is not None:
        try:
            from_file = tomllib.loads(config.read_text())
        except OSError as error:
            raise InputError(f"cannot read {config}: {error.strerror}", "check --config") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{config} is no TOML file: {error}", "see the example in docs/operating.md") from error
    given = {name: value for name, value in flags.items() if value is not None}

    class Layered(kind):  # type: ignore[valid-type,misc]
        """The schema with the file below the environment, and flags above it."""

        @classmethod
        def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, env_settings: Any, dotenv_settings: Any,
                                       file_secret_settings: Any) -> tuple[Any, ...]:
            return init_settings, env_settings, lambda: from_file

    try:
        return Layered(**given)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise InputError(f"settings are wrong: {'; '.join(mistakes)}", "see `--help`, or docs/operating.md for the file") from None
