"""The server's stock of prepared material: single use, bounded for each client and in total, in memory or on disk.

With a folder every material is an encrypted file whose key lies, encrypted, in the database, and it survives a restart.
Using a material destroys that key in a durable transaction before the first message of the online phase, so that no crash, at
whatever point, lets it be used again. Recent material is also kept in memory, up to a limit, to be at hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from protocol.errors import MaterialElsewhere, MaterialError, ResourceLimit, StorageError
from protocol.material import Material, ServerContents
from protocol.plan import Plan
from protocol.sealed import load_key, read_sealed, write_sealed
from protocol.storage import read_server, server_parts
from protocol.wire import ID_BYTES
from server.state import State

PREPARING_S = 900.0
"""How long a reservation waits for its material."""
YOUNG_S = 600.0
"""Age from which a file without material is a stray in a running service."""


class Stock:
    """Materials by id. An id is chosen here at random, reserved while it is prepared, and gone once it is taken.

    Args:
        state: the database. folder: for encrypted files; None keeps material in memory only.
        limit_bytes, client_bytes: for all materials and for one client's, prepared or in preparation.
        memory_bytes: of those, how much is kept in memory too. lifetime_s: of one material.
    """

    def __init__(self, state: State, *, folder: Path | None = None, limit_bytes: int = 4 << 30, client_bytes: int = 4 << 30,
                 memory_bytes: int = 4 << 30, lifetime_s: float = 3600.0) -> None:
        self._state, self._folder, self.lifetime_s = state, folder, lifetime_s
        self._limit, self._client_limit, self._memory_limit = limit_bytes, client_bytes, memory_bytes
        self._keys: dict[bytes, bytes] = {}
        self._memory: OrderedDict[bytes, Material[ServerContents]] = OrderedDict()
        self._memory_bytes = 0
        self._lock, self._tidied = threading.Lock(), False
        self.holder = secrets.token_bytes(ID_BYTES)
        """Names the folder, or this process's memory, to clients: what one holds is not on another server."""
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise StorageError(f"cannot make {folder}: {error.strerror}", "name another folder") from error
            self.holder = hashlib.sha256(load_key(folder.with_name(f"{folder.name}.id"), private=False)).digest()[:ID_BYTES]
            self.tidy()

    def reserve(self, plan: Plan, client_id: bytes, identity: str) -> bytes:
        """A fresh id with room set aside. Raises ResourceLimit."""
        size = plan.server_material_bytes
        self.sweep()
        with self._lock:
            self._check_room(size, identity)
            material_id = secrets.token_bytes(ID_BYTES)
            key = self._state.add_material(
                material_id, identity, client_id, plan.model.model_id, plan.batch, size, self._state.clock() + PREPARING_S)
            try:
                self._check_room(size, identity, size)  # again: other processes may have reserved meanwhile
            except ResourceLimit:
                self._state.drop_material(material_id)
                raise
            self._keys[material_id] = key
        return material_id

    def _check_room(self, size: int, identity: str, own: int = 0) -> None:
        """Raise ResourceLimit unless `size` bytes fit beside all others. own: how many of the bytes in use are these."""
        for used, limit, whose in ((self._state.material_bytes(), self._limit, "the server's stock"),
                                   (self._state.material_bytes(identity), self._client_limit, "this client's stock")):
            free = max(limit - (used - own), 0)
            if size > free:
                raise ResourceLimit(f"no room for this material: it needs {size / 1e6:,.1f} MB, {whose} has {free / 1e6:,.1f} MB left",
                                    "use up or discard material, or try again later")

    def store(self, material_id: bytes, plan: Plan, contents: ServerContents) -> None:
        """Fill a reservation; durable when this returns, if there is a folder. Raises MaterialError, StorageError."""
        key = self._keys.pop(material_id, None)
        if key is None:
            raise MaterialError("the reservation of this material has expired")
        if self._folder is not None:
            write_sealed(self._path(material_id), key, material_id, server_parts(contents))
        with self._lock:
            self._memory[material_id] = Material(material_id, plan, contents)
            self._memory_bytes += plan.server_material_bytes
            while self._folder is not None and self._memory_bytes > self._memory_limit:
                _, oldest = self._memory.popitem(last=False)
                self._memory_bytes -= oldest.plan.server_material_bytes
        if not self._state.mark_ready(material_id, self._state.clock() + self.lifetime_s):
            self._forget(material_id)
            raise MaterialError("the reservation of this material has expired")

    def take(self, material_id: bytes, client_secret: bytes, model_id: str, make_plan: Callable[[int], Plan]) -> Material[ServerContents]:
        """The material, once, for the client that prepared it. make_plan: from a batch size. Raises MaterialError.

        MaterialElsewhere if it is not here: it is not spent then.
        """
        hint = "preprocess again; material is used once"
        row = self._state.find_material(material_id)
        if row is None or not hmac.compare_digest(hashlib.sha256(client_secret).digest(), row.client_id):
            raise MaterialError("this preprocessing material is unknown here, or expired", hint)
        if row.model_id != model_id:
            raise MaterialError("this preprocessing material belongs to another model", hint)
        if row.state == "reserved":
            raise MaterialError("this preprocessing material is not ready", hint)
        if row.expires < self._state.clock():
            self.release(material_id)
            raise MaterialError("this preprocessing material has expired", hint)
        material = self._remembered(material_id)
        if row.state == "ready" and material is None and (self._folder is None or not self._path(material_id).exists()):
            raise MaterialElsewhere("this preprocessing material is not on this server", "preprocess again, or ask the server that has it")
        key = self._state.spend(material_id)  # from here on it is spent, whatever happens
        if key is None:
            raise MaterialError("this preprocessing material has been used or discarded", hint)
        try:
            if material is not None:
                return material
            plan = make_plan(row.batch)
            return Material(material_id, plan, read_server(plan, read_sealed(self._path(material_id), key, material_id)))
        finally:
            self._forget(material_id)

    def discard(self, material_id: bytes, client_secret: bytes) -> None:
        """Destroy a material of this client's; ids of others and unknown ones are ignored."""
        row = self._state.find_material(material_id)
        if row is not None and hmac.compare_digest(hashlib.sha256(client_secret).digest(), row.client_id):
            self.release(material_id)

    def release(self, material_id: bytes) -> None:
        """Give up a reservation or material."""
        self._state.drop_material(material_id)
        self._forget(material_id)

    def revoke(self, identity: str) -> int:
        """Destroy all materials of a client; how many there were."""
        gone = self._state.drop_materials_of(identity)
        for material_id in gone:
            self._forget(material_id)
        return len(gone)

    def sweep(self) -> None:
        """Destroy what has expired."""
        for material_id in self._state.expire_materials():
            self._forget(material_id)

    def bytes_used(self) -> int:
        """Of all materials, prepared or in preparation."""
        return self._state.material_bytes()

    def _path(self, material_id: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{material_id.hex()}.material"

    def _remembered(self, material_id: bytes) -> Material[ServerContents] | None:
        with self._lock:
            material = self._memory.pop(material_id, None)
            if material is not None:
                self._memory_bytes -= material.plan.server_material_bytes
        return material

    def _forget(self, material_id: bytes) -> None:
        """Remove what this process and the disk still hold; the key is destroyed already."""
        self._forget_in_memory(material_id)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._path(material_id).unlink(missing_ok=True)

    def _forget_in_memory(self, material_id: bytes) -> None:
        self._keys.pop(material_id, None)
        material = self._remembered(material_id)
        if material is not None:
            material.destroy()

    def tidy(self) -> None:
        """Destroy what this process and its folder hold of material that others have given up, or a dead process has left."""
        self.sweep()
        with self._lock:
            held = {*self._keys, *self._memory}
        files = {p.stem: p for p in self._folder.glob("*.material")} if self._folder is not None else {}
        young = self._state.clock() - YOUNG_S
        kept = self._state.materials_to_keep()  # after the lists: what is in them and not here is over
        for material_id in held - kept:
            self._forget_in_memory(material_id)
        keep = {material_id.hex() for material_id in kept}
        for stem, path in files.items():
            with contextlib.suppress(OSError):
                if stem not in keep and not (self._tidied and path.stat().st_mtime > young):  # it may be read just now
                    path.unlink()
        self._tidied = True
        self._state.empty_log()
