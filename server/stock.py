"""The server's stock of preprocessed material: single use, bounded in memory and time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from protocol.errors import MaterialError, ResourceLimit
from protocol.material import Material, ServerContents
from protocol.plan import Plan
from protocol.wire import ID_BYTES

REMEMBERED = 1 << 16


@dataclass
class _Entry:
    client_id: bytes
    model_id: str
    size_bytes: int
    expires: float
    material: Material[ServerContents] | None = None


class Stock:
    """Materials by id. An id is chosen here at random, reserved while it is prepared, and gone once it is taken.

    Args:
        limit_bytes: memory for all materials, prepared or in preparation. lifetime_s: of one material.
    """

    def __init__(self, limit_bytes: int, lifetime_s: float) -> None:
        self._limit, self._lifetime = limit_bytes, lifetime_s
        self._entries: dict[bytes, _Entry] = {}
        self._spent: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def reserve(self, plan: Plan, client_id: bytes) -> bytes:
        """A fresh id with memory set aside. Raises ResourceLimit."""
        size = plan.server_material_bytes
        with self._lock:
            self._sweep()
            used = sum(e.size_bytes for e in self._entries.values())
            if used + size > self._limit:
                raise ResourceLimit(
                    f"no memory for this material: it needs {size / 1e6:,.0f} MB, {(self._limit - used) / 1e6:,.0f} MB are free",
                    "use up or discard material, or try again later")
            material_id = secrets.token_bytes(ID_BYTES)
            self._entries[material_id] = _Entry(client_id, plan.model.model_id, size, time.monotonic() + self._lifetime)
        return material_id

    def store(self, material: Material[ServerContents]) -> None:
        """Fill a reservation."""
        with self._lock:
            entry = self._entries.get(material.material_id)
            if entry is None:
                raise MaterialError("the reservation of this material has expired")
            entry.material = material

    def release(self, material_id: bytes) -> None:
        """Give up a reservation or material; never fails."""
        with self._lock:
            entry = self._entries.pop(material_id, None)
            self._mark(material_id)
        if entry is not None and entry.material is not None:
            entry.material.destroy()

    def take(self, material_id: bytes, client_secret: bytes, model_id: str) -> Material[ServerContents]:
        """The material, once, for the client that prepared it. Raises MaterialError."""
        hint = "preprocess again; material is used once"
        with self._lock:
            self._sweep()
            if material_id in self._spent:
                raise MaterialError("this preprocessing material has been used or discarded", hint)
            entry = self._entries.get(material_id)
            if entry is None or not hmac.compare_digest(hashlib.sha256(client_secret).digest(), entry.client_id):
                raise MaterialError("this preprocessing material is unknown here, or expired", hint)
            if entry.model_id != model_id:
                raise MaterialError("this preprocessing material belongs to another model", hint)
            if entry.material is None:
                raise MaterialError("this preprocessing material is not ready", hint)
            del self._entries[material_id]
            self._mark(material_id)
        return entry.material

    def discard(self, material_id: bytes, client_secret: bytes) -> None:
        """Destroy a material of this client's; ids of others and unknown ones are ignored."""
        with self._lock:
            entry = self._entries.get(material_id)
            mine = entry is not None and hmac.compare_digest(hashlib.sha256(client_secret).digest(), entry.client_id)
        if mine:
            self.release(material_id)

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def _mark(self, material_id: bytes) -> None:
        self._spent[material_id] = None
        while len(self._spent) > REMEMBERED:  # ids are random and never chosen again: forgetting only blurs the message
            self._spent.popitem(last=False)

    def _sweep(self) -> None:
        now = time.monotonic()
        for material_id in [k for k, e in self._entries.items() if e.expires < now]:
            entry = self._entries.pop(material_id)
            self._mark(material_id)
            if entry.material is not None:
                entry.material.destroy()
