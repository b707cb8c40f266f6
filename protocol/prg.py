"""Pseudorandom ring elements from a seed: AES-256 in counter mode, one stream per label.

Security contract: outputs under one seed and different labels are independent and uniform to anybody without the
seed. The caller's one duty: a seed serves one preprocessing material (or one model registration) and no other.
"""

from __future__ import annotations

import hashlib
import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

SEED_BYTES = 32


class Seed:
    """A secret 256-bit seed. Prints its type only; compares with nothing."""

    __slots__ = ("_key",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, key: bytes) -> None:
        if len(key) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes, got {len(key)}")
        self._key = bytes(key)

    @classmethod
    def fresh(cls) -> Seed:
        """A new seed from the operating system."""
        return cls(secrets.token_bytes(SEED_BYTES))

    def __repr__(self) -> str:
        return "Seed(<secret>)"

    def __eq__(self, other: object) -> bool:
        raise TypeError("seeds are secret and not compared")

    def reveal(self) -> bytes:
        """The bytes, to send over an authenticated channel to the one party that may hold them."""
        return self._key

    def public_id(self) -> bytes:
        """32 bytes that name this seed and reveal nothing of it."""
        return hashlib.blake2b(key=self._key, digest_size=32, person=b"relucent-name").digest()

    def derive(self, label: str) -> Seed:
        """An independent seed for `label`."""
        return Seed(hashlib.blake2b(label.encode(), key=self._key, digest_size=32, person=b"relucent-derive").digest())

    def bytes(self, label: str, count: int) -> np.ndarray:
        """`count` pseudorandom bytes of the stream `label`, uint8."""
        key = hashlib.blake2b(label.encode(), key=self._key, digest_size=32, person=b"relucent-stream").digest()
        encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        out = np.zeros(count + 16, dtype=np.uint8)
        encryptor.update_into(memoryview(out)[:count], memoryview(out))
        return out[:count]

    def ring(self, label: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform int64 tensor of the stream `label`."""
        return torch.from_numpy(self.bytes(label, 8 * math.prod(shape)).view("<i8")).view(shape)
