"""What must outlive a server process: API tokens, prepared material, registrations with the dealer.

SQLite in WAL mode in a folder by default; any database that SQLAlchemy reaches if several machines share it. Secrets
in it are encrypted under a master key that lies in a file of its own; tokens are stored as hashes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from protocol.errors import AccessDenied, InputError, StorageError
from protocol.sealed import KEY_BYTES, load_key, seal, unseal
from protocol.tls import Identity, check_name
from server.config import DatabaseSettings

TOKEN_PREFIX = "rlt_"  # noqa: S105  # what every token begins with, so that scanners recognise a leaked one
DAY_S = 86_400.0
POSTGRESQL_WAITS = {"connect_timeout": 10, "tcp_user_timeout": 15_000, "options": "-c statement_timeout=15000"}
"""A database that does not answer is an error, not a hang."""

_tables = MetaData()
tokens = Table(
    "tokens", _tables, Column("id", String(16), primary_key=True), Column("name", String(64), nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True), Column("created", Float, nullable=False), Column("expires", Float),
    Column("revoked", Float))
_SHOWN = (tokens.c.id, tokens.c.name, tokens.c.created, tokens.c.expires, tokens.c.revoked)
materials = Table(
    "materials", _tables, Column("id", LargeBinary(16), primary_key=True), Column("identity", String(128), nullable=False, index=True),
    Column("client_id", LargeBinary(32), nullable=False), Column("model_id", String(64), nullable=False),
    Column("batch", Integer, nullable=False), Column("size", BigInteger, nullable=False),
    Column("expires", Float, nullable=False, index=True), Column("state", String(8), nullable=False), Column("sealed_key", LargeBinary))
denials = Table("denials", _tables, Column("name", String(64), primary_key=True), Column("since", Float, nullable=False))
registrations = Table(
    "registrations", _tables, Column("model_id", String(64), primary_key=True), Column("sealed_secret", LargeBinary, nullable=False))


@dataclass(frozen=True)
class Token:
    """What is known of an API token; never the token itself. Times in seconds since 1970."""

    id: str
    name: str
    created: float
    expires: float | None
    revoked: float | None

    def valid(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


class State:
    """One database. Raises StorageError if it cannot be reached or written.

    Args:
        url: of SQLAlchemy, such as sqlite:////var/lib/relucent/state.db; "sqlite://" lives in memory.
        master_key: 32 bytes. existing: raise InputError if no server has made the database.
    """

    def __init__(self, url: str, master_key: bytes, clock: Callable[[], float] = time.time, existing: bool = False) -> None:
        self.clock, self._master_key = clock, master_key
        try:
            self._one_at_a_time: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if url == "sqlite://":  # one connection for all threads
                self._one_at_a_time = threading.Lock()
                self.engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
            else:
                waits = POSTGRESQL_WAITS if url.startswith("postgresql+psycopg:") else {}
                self.engine = create_engine(url, pool_pre_ping=True, connect_args=waits)
        except (ArgumentError, ImportError) as error:
            raise InputError(f"the database address cannot be used: {type(error).__name__}",
                             "write sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME, and install its driver") from error
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _set_up_sqlite)
            file = self.engine.url.database
            if existing and file is not None and not Path(file).exists():  # connecting would make it
                raise _no_database()
        if existing and not self.run(lambda connection: inspect(connection).has_table(materials.name)):
            raise _no_database()
        self.run(lambda connection: _tables.create_all(connection))

    def run(self, work: Callable[[Any], Any]) -> Any:
        """`work(connection)` in one transaction, durable when this returns."""
        try:
            with self._one_at_a_time, self.engine.begin() as connection:
                return work(connection)
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None)
            raise StorageError(f"the database cannot be used: {type(cause or error).__name__}",
                               "is it there, writable, and not full?") from None

    def close(self) -> None:
        self.engine.dispose()

    # --- API tokens ---------------------------------------------------------------------------------------------------

    def create_token(self, name: str, days: float | None) -> str:
        """A new token for a client; it is shown once and stored as a hash. Raises InputError."""
        check_name(name)
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now = self.clock()
        row = {"id": secrets.token_hex(4), "name": name, "digest": hashlib.sha256(token.encode()).digest(), "created": now,
               "expires": None if days is None else now + days * DAY_S, "revoked": None}
        self.run(lambda connection: connection.execute(insert(tokens).values(row)))
        return token

    def list_tokens(self) -> list[Token]:
        rows = self.run(lambda connection: connection.execute(select(*_SHOWN).order_by(tokens.c.created)).all())
        return [Token(*row) for row in rows]

    def revoke_token(self, which: str) -> list[Token]:
        """Revoke a token by its id, or all of a name; what was revoked. Raises InputError if there is none."""
        found = [t for t in self.list_tokens() if which in (t.id, t.name) and t.revoked is None]
        if not found:
            raise InputError(f"no token {which!r} that is not revoked yet", "see `relucent-server token list`")
        self.run(lambda connection: connection.execute(
            update(tokens).where(tokens.c.id.in_([t.id for t in found])).values(revoked=self.clock())))
        return found

    def identify(self, token: str) -> Identity:
        """Whose token it is. Raises AccessDenied if it is unknown, expired or revoked."""
        digest = hashlib.sha256(token.encode()).digest()
        row = self.run(lambda connection: connection.execute(select(*_SHOWN).where(tokens.c.digest == digest)).first())
        if row is None:
            raise AccessDenied("the API token is unknown here", "ask the operator for one")
        found = Token(*row)
        if not found.valid(self.clock()):
            raise AccessDenied("the API token has expired or was revoked", "ask the operator for a new one")
        return self.check_not_denied(Identity("client", found.name))

    def deny(self, name: str) -> None:
        """Refuse a client from now on, whatever certificate or token it shows."""
        check_name(name)
        with contextlib.suppress(IntegrityError):  # denied already
            self.run(lambda connection: connection.execute(insert(denials).values(name=name, since=self.clock())))

    def allow(self, name: str) -> None:
        """Take `deny` back. Raises InputError if the client is not denied."""
        if not self.run(lambda connection: connection.execute(delete(denials).where(denials.c.name == name))).rowcount:
            raise InputError(f"{name!r} is not denied", "see `relucent-server token list`")

    def check_not_denied(self, identity: Identity) -> Identity:
        """Raise AccessDenied if the operator has denied this client."""
        if self.run(lambda connection: connection.execute(select(denials.c.name).where(denials.c.name == identity.name)).first()):
            raise AccessDenied("this client is denied here", "ask the operator")
        return identity

    # --- registrations ------------------------------------------------------------------------------------------------

    def registration_secret(self, model_id: str) -> bytes:
        """The secret under which a model is registered with the dealer: the same for all processes and after a restart."""
        label = b"registration" + model_id.encode()

        def find(connection: Any) -> bytes | None:
            return connection.execute(select(registrations.c.sealed_secret).where(registrations.c.model_id == model_id)).scalar()  # type: ignore[no-any-return]

        sealed = self.run(find)
        if sealed is None:
            fresh = seal(self._master_key, secrets.token_bytes(32), label)
            with contextlib.suppress(IntegrityError):  # another process was faster
                self.run(lambda connection: connection.execute(insert(registrations).values(model_id=model_id, sealed_secret=fresh)))
            sealed = self.run(find)
        return unseal(self._master_key, sealed, label)

    # --- prepared material --------------------------------------------------------------------------------------------

    def material_bytes(self, identity: str | None = None) -> int:
        """Bytes of the materials that are prepared or being prepared, of one identity or all."""
        query = select(func.coalesce(func.sum(materials.c.size), 0)).where(materials.c.state != "spent")
        if identity is not None:
            query = query.where(materials.c.identity == identity)
        return int(self.run(lambda connection: connection.execute(query).scalar()))

    def add_material(self, material_id: bytes, identity: str, client_id: bytes, model_id: str, batch: int, size: int,
                     expires: float) -> bytes:
        """Reserve a material; returns the fresh key that will encrypt it."""
        key = secrets.token_bytes(KEY_BYTES)
        row = {"id": material_id, "identity": identity, "client_id": client_id, "model_id": model_id, "batch": batch, "size": size,
               "expires": expires, "state": "reserved", "sealed_key": seal(self._master_key, key, material_id)}
        self.run(lambda connection: connection.execute(insert(materials).values(row)))
        return key

    def mark_ready(self, material_id: bytes, expires: float) -> bool:
        """The reserved material is whole now; False if the reservation is gone."""
        changed = self.run(lambda connection: connection.execute(
            update(materials).where(materials.c.id == material_id, materials.c.state == "reserved").values(state="ready", expires=expires)))
        return bool(changed.rowcount == 1)

    def find_material(self, material_id: bytes) -> Any:
        """Its row, or None."""
        return self.run(lambda connection: connection.execute(select(materials).where(materials.c.id == material_id)).first())

    def spend(self, material_id: bytes) -> bytes | None:
        """Mark a ready material as used and return its key; None if somebody was faster. Its key is gone from the database."""
        row = self.find_material(material_id)
        if row is None or row.sealed_key is None:
            return None
        changed = self.run(lambda connection: connection.execute(
            update(materials).where(materials.c.id == material_id, materials.c.state == "ready").values(state="spent", sealed_key=None)))
        return unseal(self._master_key, row.sealed_key, material_id) if changed.rowcount == 1 else None

    def drop_material(self, material_id: bytes) -> None:
        """Give up a reservation or material: its key is destroyed, its id is refused."""
        self.run(lambda connection: connection.execute(
            update(materials).where(materials.c.id == material_id).values(state="spent", sealed_key=None)))

    def drop_materials_of(self, identity: str) -> list[bytes]:
        """Give up all materials of an identity; their ids."""
        return self._drop(materials.c.identity == identity)

    def materials_to_keep(self) -> set[bytes]:
        """Ids of all materials that are neither used, given up nor expired."""
        query = select(materials.c.id).where(materials.c.state != "spent", materials.c.expires >= self.clock())
        return {bytes(row.id) for row in self.run(lambda connection: connection.execute(query).all())}

    def expire_materials(self) -> list[bytes]:
        """Give up what has expired, and forget spent ids whose time is over; ids of the former."""
        now = self.clock()
        gone = self._drop(materials.c.expires < now)
        self.run(lambda connection: connection.execute(
            delete(materials).where(materials.c.state == "spent", materials.c.expires < now - DAY_S)))
        return gone

    def _drop(self, condition: Any) -> list[bytes]:
        change = update(materials).where(condition, materials.c.state != "spent").values(state="spent", sealed_key=None)
        return [bytes(row.id) for row in self.run(lambda connection: connection.execute(change.returning(materials.c.id)).all())]

    def empty_log(self) -> None:
        """Make SQLite overwrite its write-ahead log, which still holds the sealed keys of material that is used by now."""
        if self.engine.dialect.name == "sqlite":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def open_state(settings: DatabaseSettings, existing: bool = False) -> State:
    """The database of the settings, in memory if they name none; existing: of a server that has run. Raises InputError, StorageError."""
    folder = settings.state
    if folder is None and settings.database is None:
        if existing:
            raise _no_database()
        return State("sqlite://", os.urandom(32))
    key_file = settings.master_key or (folder / "master.key" if folder is not None else None)
    assert key_file is not None  # the schema says so
    if existing and not key_file.exists():  # it would be made
        raise _no_database()
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror}", "name another folder with --state") from error
    url = settings.database or f"sqlite:///{(folder / 'state.db').absolute()}"  # type: ignore[operator]
    return State(url, load_key(key_file), existing=existing)


def _no_database() -> InputError:
    return InputError("no server's database is there", "pass the server's own --config, or its --state")


def without_password(url: str) -> str:
    """A database's address as it may be shown."""
    shown = make_url(url)
    return shown.update_query_dict({key: "***" for key in shown.query if "pass" in key}).render_as_string(hide_password=True)


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for setting in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()
