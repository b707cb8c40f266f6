"""The client's stock of prepared inferences, each used once: in memory, or on disk where it outlives the process.

On disk every material is an encrypted file; its key and the secret that proves it to the server lie, encrypted under the
stock's key, in an SQLite database. Taking one deletes its row in a durable transaction before a byte of it is used, so that
neither a crash at whatever point nor a second process brings it back.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protocol.errors import MaterialError, StorageError
from protocol.material import ClientContents, Material
from protocol.plan import Plan
from protocol.sealed import KEY_BYTES, load_key, read_sealed, seal, unseal, write_sealed
from protocol.storage import client_parts, read_client
from protocol.wire import SECRET_BYTES


@dataclass(frozen=True, repr=False)
class Prepared:
    """Material for one inference, the secret that proves it to the server, and when it expires, in seconds since 1970.

    stored: it comes from disk, of which there may be a copy. The image's mask may then be used after the server has accepted
    the material only, which it does once, whoever asks. holder: names the stock at the server, one of several behind an address.
    """

    material: Material[ClientContents]
    secret: bytes
    expires: float
    stored: bool = False
    holder: bytes = b""

    def __repr__(self) -> str:
        return f"Prepared(batch={self.material.plan.batch}, <secret>)"


class Stock(Protocol):
    """Prepared inferences of one registration of one model; safe for several threads. `away`: holders whose material is left alone."""

    def count(self, batch: int, away: Collection[bytes] = ()) -> int:
        """How many of this batch size are ready."""

    def add(self, prepared: Prepared) -> None:
        """Put one in; what has expired goes. Raises StorageError."""

    def take(self, plan: Plan, away: Collection[bytes] = ()) -> Prepared | None:
        """Take one out, for ever; None if none is ready. Raises StorageError."""

    def close(self) -> list[tuple[bytes, bytes]]:
        """Ids and secrets of what is lost with this stock, for the server to forget."""


class MemoryStock:
    """A stock that ends with the process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ready: dict[int, deque[Prepared]] = {}
        self._lock = threading.Lock()

    def count(self, batch: int, away: Collection[bytes] = ()) -> int:
        with self._lock:
            return sum(p.expires > self._clock() and p.holder not in away for p in self._ready.get(batch, ()))

    def add(self, prepared: Prepared) -> None:
        with self._lock:
            now = self._clock()
            expired = [p for ready in self._ready.values() for p in ready if p.expires <= now]
            self._ready = {batch: deque(p for p in ready if p.expires > now) for batch, ready in self._ready.items()}
            self._ready.setdefault(prepared.material.plan.batch, deque()).append(prepared)
        for gone in expired:
            gone.material.destroy()

    def take(self, plan: Plan, away: Collection[bytes] = ()) -> Prepared | None:
        with self._lock:
            ready = self._ready.get(plan.batch, deque())
            for _ in range(len(ready)):
                prepared = ready.popleft()
                if prepared.expires <= self._clock():
                    prepared.material.destroy()
                elif prepared.holder in away:
                    ready.append(prepared)
                else:
                    return prepared
        return None

    def close(self) -> list[tuple[bytes, bytes]]:
        with self._lock:
            left = [p for ready in self._ready.values() for p in ready]
            self._ready.clear()
        for prepared in left:
            prepared.material.destroy()
        return [(p.material.material_id, p.secret) for p in left]


USABLE = "registration = ? AND batch = ? AND ready AND expires > ? AND holder NOT IN (SELECT value FROM json_each(?))"


class DiskStock:
    """A stock in a folder, which several processes may share.

    Args:
        folder: made if need be, for its owner only. key: file of the key that encrypts what the folder holds; made if need be.
        registration: what the materials belong to: model id, registration id and Delta id.
    """

    def __init__(self, folder: Path, key: Path, registration: bytes, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._registration, self._clock = folder, registration, clock
        self._key = load_key(key)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror}", "name another folder") from error
        with self._database() as database:
            database.execute("CREATE TABLE IF NOT EXISTS prepared (id BLOB PRIMARY KEY, registration BLOB NOT NULL, batch INTEGER NOT NULL,"
                             " expires REAL NOT NULL, ready INTEGER NOT NULL, sealed BLOB NOT NULL)")
            if "holder" not in {row[1] for row in database.execute("PRAGMA table_info(prepared)")}:
                database.execute("ALTER TABLE prepared ADD COLUMN holder TEXT NOT NULL DEFAULT ''")
        self._sweep()

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody else writes beside, durable at the end."""
        path = self._folder / "stock.db"
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as connection:
                path.chmod(0o600)
                for setting in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                    connection.execute(f"PRAGMA {setting}")
                connection.execute("BEGIN IMMEDIATE")
                with connection:
                    yield connection
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"the stock in {self._folder} cannot be used: {error}", "is there space? delete it to start anew") from error

    def _path(self, material_id: bytes) -> Path:
        return self._folder / f"{material_id.hex()}.material"

    def _sweep(self) -> None:
        """Delete what has expired, and files that no row belongs to."""
        with self._database() as database:
            database.execute("DELETE FROM prepared WHERE expires < ?", (self._clock(),))
            known = {bytes(row[0]).hex() for row in database.execute("SELECT id FROM prepared")}
            for path in self._folder.glob("*.material"):
                if path.stem not in known:
                    path.unlink(missing_ok=True)

    def _usable(self, batch: int, away: Collection[bytes]) -> tuple[bytes, int, float, str]:
        """The values of USABLE."""
        return self._registration, batch, self._clock(), json.dumps([holder.hex() for holder in away])

    def count(self, batch: int, away: Collection[bytes] = ()) -> int:
        with self._database() as database:
            return int(database.execute(f"SELECT count(*) FROM prepared WHERE {USABLE}", self._usable(batch, away)).fetchone()[0])  # noqa: S608

    def add(self, prepared: Prepared) -> None:
        material_id, plan = prepared.material.material_id, prepared.material.plan
        file_key = secrets.token_bytes(KEY_BYTES)
        sealed = seal(self._key, file_key + prepared.secret, material_id)
        with self._database() as database:
            expired = database.execute("DELETE FROM prepared WHERE expires < ? RETURNING id", (self._clock(),)).fetchall()
            database.execute("INSERT INTO prepared VALUES (?, ?, ?, ?, 0, ?, ?)",
                             (material_id, self._registration, plan.batch, prepared.expires, sealed, prepared.holder.hex()))
        try:
            for row in expired:  # their own files only: another process may just read one that it has taken
                self._path(bytes(row[0])).unlink(missing_ok=True)
            write_sealed(self._path(material_id), file_key, material_id, client_parts(prepared.material.take()))
            with self._database() as database:
                database.execute("UPDATE prepared SET ready = 1 WHERE id = ?", (material_id,))
        except BaseException:
            with contextlib.suppress(StorageError):
                self._forget(material_id)
            raise

    def take(self, plan: Plan, away: Collection[bytes] = ()) -> Prepared | None:
        while True:
            with self._database() as database:
                row = database.execute(f"DELETE FROM prepared WHERE id = (SELECT id FROM prepared WHERE {USABLE} ORDER BY expires LIMIT 1)"  # noqa: S608
                                       " RETURNING id, expires, sealed, holder", self._usable(plan.batch, away)).fetchone()
            if row is None:
                return None
            material_id = bytes(row[0])  # from here on it is spent, whatever happens
            try:
                keys = unseal(self._key, row[2], material_id)
                contents = read_client(plan, read_sealed(self._path(material_id), keys[:KEY_BYTES], material_id))
                return Prepared(Material(material_id, plan, contents), keys[KEY_BYTES:][:SECRET_BYTES], row[1], True,
                                bytes.fromhex(row[3]))
            except MaterialError:
                continue  # a damaged file: the next one
            finally:
                self._path(material_id).unlink(missing_ok=True)

    def _forget(self, material_id: bytes) -> None:
        self._path(material_id).unlink(missing_ok=True)
        with self._database() as database:
            database.execute("DELETE FROM prepared WHERE id = ?", (material_id,))

    def close(self) -> list[tuple[bytes, bytes]]:
        return []
