"""Distributed comparison function with payload in (Z_{2^64})^2, vectorised over many keys.

Realises the DCF of Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar, Rathee, EUROCRYPT 2021 (eprint 2020/1392, figure
1) for "x < alpha". Traffic: dealer to both parties, once; evaluation is local. PRG: AES-128 under one fixed
public key in Matyas-Meyer-Oseas form, H(x) = AES(x) ^ x, whole levels at a time. The key is public and fresh for
each block of keys, so that precomputation against one block does not serve another.

Security contract: either key alone is computationally independent of alpha and of the payload. A key is evaluated
on one public point only; the caller uses it once.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from protocol import kernels

U64 = NDArray[np.uint64]
Bits = NDArray[np.uint8]

BLOCK_KEYS = 8192
"""Keys generated or evaluated together: the working set of a level stays in the cache."""

_ONE = np.uint64(1)
_MASK = np.array([0xFFFFFFFFFFFFFFFE, 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
_MAX_BITS = 63
_SHIFTS = np.arange(_MAX_BITS - 1, -2, -1).astype(np.uint64) & np.uint64(_MAX_BITS)
"""From a number's bits down to its last; then one that is clear in all that is compared."""


class Hasher:
    """AES-128 under one public key, for Matyas-Meyer-Oseas hashing; the caller adds the input. Not for several threads at once.

    Args:
        x: what each call hashes, as it is then.
    """

    def __init__(self, public_key: bytes, x: U64) -> None:
        self._encryptor = Cipher(algorithms.AES(public_key), modes.ECB()).encryptor()  # noqa: S305 fixed-key hash
        out = np.empty(x.nbytes + 16, dtype=np.uint8)  # a block more, which the library asks for
        self._from, self._to = memoryview(x).cast("B"), memoryview(out)
        self._hashed: U64 = out[: x.nbytes].view(np.uint64).reshape(x.shape)
        self.blocks = 0

    def __call__(self) -> U64:
        """AES of each pair of words of x; overwritten by the next call."""
        self._encryptor.update_into(self._from, self._to)
        self.blocks += len(self._from) // 16
        return self._hashed


@dataclass(frozen=True, repr=False)
class DcfKeys:
    """One party's keys for `count` comparisons of `bits`-bit numbers.

    party: 0 or 1. root: (count, 2) uint64. seed_words, payload_words: (bits, count, 2) uint64 (seed_words lacks the
    last level, where children are not expanded). control: (bits, 2, count) of 0 and 1. final: (count, 2) uint64.
    """

    party: int
    bits: int
    hash_key: bytes
    root: U64
    seed_words: U64
    payload_words: U64
    control: Bits
    final: U64

    def __repr__(self) -> str:
        return f"DcfKeys(party={self.party}, bits={self.bits}, count={len(self.root)}, <secret>)"

    def __len__(self) -> int:
        return len(self.root)

    @property
    def nbytes(self) -> int:
        return key_bytes(len(self.root), self.bits)

    def part(self, first: int, last: int) -> DcfKeys:
        """Keys first to last - 1: views, but for the control bits."""
        if (first, last) == (0, len(self)):
            return self
        control = np.ascontiguousarray(self.control[:, :, first:last])
        return DcfKeys(self.party, self.bits, self.hash_key, self.root[first:last], self.seed_words[:, first:last],
                       self.payload_words[:, first:last], control, self.final[first:last])

    def parts(self) -> Iterator[memoryview]:
        """The keys as raw bytes, in the order that `from_bytes` reads."""
        yield memoryview(self.hash_key)
        for array in (self.root, self.seed_words, self.payload_words, np.packbits(self.control.reshape(-1)), self.final):
            yield memoryview(np.ascontiguousarray(array)).cast("B")


def key_bytes(count: int, bits: int) -> int:
    """Size in bytes of one party's serialised keys."""
    return 16 + count * (16 + 32 * bits + 16) + (2 * bits * count + 7) // 8


def from_bytes(data: memoryview, party: int, count: int, bits: int) -> DcfKeys:
    """Read what `DcfKeys.parts` wrote. The caller has checked the length against `key_bytes`."""
    position = 16

    def words(*shape: int) -> U64:
        nonlocal position
        size = 8 * int(np.prod(shape))
        part = np.frombuffer(data[position : position + size], dtype=np.uint64).reshape(shape)
        position += size
        return part

    root = words(count, 2)
    seed_words, payload_words = words(bits, count, 2), words(bits, count, 2)
    packed = np.frombuffer(data[position : position + (2 * bits * count + 7) // 8], dtype=np.uint8)
    position += packed.nbytes
    control = np.unpackbits(packed, count=2 * bits * count).reshape(bits, 2, count)
    return DcfKeys(party, bits, bytes(data[:16]), root, seed_words, payload_words, control, words(count, 2))


def generate(alpha: U64, payload: U64, bits: int, randomness: bytes) -> tuple[DcfKeys, DcfKeys]:
    """Keys of both parties for f(x) = payload if x < alpha else 0. Run by the dealer.

    Args:
        alpha: (n,) uint64 below 2^bits. payload: (n, 2) uint64.
        randomness: 16 + 32 n fresh random bytes: the public hash key and the two roots.
    """
    count = len(alpha)
    if len(randomness) != 16 + 32 * count:
        raise ValueError("wrong amount of randomness")
    if alpha.shape != (count,) or payload.shape != (count, 2) or not 0 < bits <= _MAX_BITS:  # compiled loops check no bounds
        raise ValueError("wrong shapes of alpha and payload, or number of bits")
    hash_key = randomness[:16]
    roots = np.frombuffer(randomness, dtype=np.uint64, offset=16).reshape(2, count, 2) & _MASK
    points = np.repeat(roots[:, None], 4, axis=1)  # (party, tweak, key, word)
    points[..., 0] ^= np.arange(4, dtype=np.uint64)[:, None]
    t = np.repeat(np.array([[0], [1]], dtype=np.uint64), count, axis=1)
    value = np.zeros((count, 2), dtype=np.uint64)
    seed_words = np.empty((bits, count, 2), dtype=np.uint64)
    payload_words = np.empty((bits, count, 2), dtype=np.uint64)
    control = np.empty((bits, 2, count), dtype=np.uint8)
    hasher = Hasher(hash_key, points)
    for shift, *words in zip(_SHIFTS[-bits - 1 :], seed_words, payload_words, control):
        kernels.generate_level(hasher(), alpha, shift, payload, t, value, points, *words)
    final = (_ONE - (t[1] << _ONE))[:, None] * (points[1, 0] - points[0, 0] - value)
    return tuple(  # type: ignore[return-value]
        DcfKeys(b, bits, hash_key, roots[b], seed_words, payload_words, control, final) for b in (0, 1)
    )


def evaluate(keys: DcfKeys, x: U64) -> U64:
    """This party's additive shares of payload [x < alpha], (n, 2) uint64. Local.

    Args:
        x: (n,) uint64; the low `keys.bits` bits are compared.
    """
    count, bits = len(keys), keys.bits
    if x.shape != (count,) or not 0 < bits <= _MAX_BITS:  # compiled loops check no bounds
        raise ValueError("wrong number of points or of bits")
    x = x & np.uint64((1 << bits) - 1)
    t = np.full(count, keys.party, dtype=np.uint64)
    value = np.zeros((count, 2), dtype=np.uint64)
    points = np.empty((2, count, 2), dtype=np.uint64)
    points[0] = keys.root
    points[0, :, 0] |= x >> np.uint64(bits - 1)
    points[1] = points[0]
    points[1, :, 0] ^= kernels.PAYLOAD
    hasher, shifts = Hasher(keys.hash_key, points), _SHIFTS[-bits - 1 :]
    for words in zip(shifts, shifts[1:], keys.control, keys.seed_words, keys.payload_words):
        kernels.evaluate_level(hasher(), x, *words, t, value, points)
    value += points[0]
    value += keys.final & np.negative(t)[:, None]
    return value if keys.party == 0 else np.negative(value)


def fresh_randomness(count: int) -> bytes:
    """The randomness that `generate` needs for `count` keys, from the operating system."""
    return secrets.token_bytes(16 + 32 * count)
