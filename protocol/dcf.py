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

U64 = NDArray[np.uint64]
Bits = NDArray[np.uint8]

BLOCK_KEYS = 8192
"""Keys generated or evaluated together: the working set of a level stays in the cache."""

_ONE = np.uint64(1)
_MASK = np.array([0xFFFFFFFFFFFFFFFE, 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
_PAYLOAD = np.uint64(2)
# tweaks of the low word (whose bit 0 is always clear in a seed): 0 and 1 give the child seeds, 2 and 3 the payloads


class Hasher:
    """Matyas-Meyer-Oseas hashing of 128-bit blocks under one public AES-128 key. Not for several threads at once."""

    def __init__(self, public_key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(public_key), modes.ECB()).encryptor()  # noqa: S305 fixed-key hash
        self._buffer = np.empty(0, dtype=np.uint8)
        self.blocks = 0

    def __call__(self, x: U64) -> U64:
        """H of each row of x, uint64 (n, 2). Returns a new array."""
        count = x.nbytes
        out = np.empty(count + 16, dtype=np.uint8)
        self._encryptor.update_into(memoryview(x).cast("B"), memoryview(out))
        self.blocks += len(x)
        result: U64 = out[:count].view(np.uint64).reshape(x.shape)
        result ^= x
        return result


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


def _select(bit: NDArray[np.uint64], when_one: U64, when_zero: U64) -> U64:
    """Rows of `when_one` where bit is 1, else of `when_zero`, without a branch."""
    mask = (np.uint64(0) - bit)[:, None]
    result: U64 = when_zero ^ ((when_zero ^ when_one) & mask)
    return result


def generate(alpha: U64, payload: U64, bits: int, randomness: bytes) -> tuple[DcfKeys, DcfKeys]:
    """Keys of both parties for f(x) = payload if x < alpha else 0. Run by the dealer.

    Args:
        alpha: (n,) uint64 below 2^bits. payload: (n, 2) uint64.
        randomness: 16 + 32 n fresh random bytes: the public hash key and the two roots.
    """
    count = len(alpha)
    if len(randomness) != 16 + 32 * count:
        raise ValueError("wrong amount of randomness")
    hash_key = randomness[:16]
    hasher = Hasher(hash_key)
    roots = np.frombuffer(randomness, dtype=np.uint64, offset=16).reshape(2, count, 2) & _MASK
    s0, s1 = roots[0].copy(), roots[1].copy()
    t0, t1 = np.zeros(count, dtype=np.uint64), np.ones(count, dtype=np.uint64)
    value = np.zeros((count, 2), dtype=np.uint64)
    seed_words = np.empty((bits, count, 2), dtype=np.uint64)
    payload_words = np.empty((bits, count, 2), dtype=np.uint64)
    control = np.empty((bits, 2, count), dtype=np.uint8)
    tweak = np.zeros((4, 1, 2), dtype=np.uint64)
    tweak[:, 0, 0] = np.arange(4)
    for level in range(bits):
        bit = (alpha >> np.uint64(bits - 1 - level)) & _ONE
        expanded = hasher(np.concatenate([s0[None] ^ tweak, s1[None] ^ tweak]).reshape(-1, 2)).reshape(2, 4, count, 2)
        seeds, values = expanded[:, :2], expanded[:, 2:]
        controls = seeds[..., 0] & _ONE  # (party, side, n)
        seeds &= _MASK
        # keep the side that alpha takes, lose the other
        seed_word = _select(bit, seeds[0, 0] ^ seeds[1, 0], seeds[0, 1] ^ seeds[1, 1])
        lost0, lost1 = (_select(bit, values[b, 0], values[b, 1]) for b in (0, 1))
        kept0, kept1 = (_select(bit, values[b, 1], values[b, 0]) for b in (0, 1))
        sign = (_ONE - (t1 << _ONE))[:, None]  # (-1)^t1
        payload_word = sign * (lost1 - lost0 - value + payload * bit[:, None])
        value += kept0 - kept1 + sign * payload_word
        left = controls[0, 0] ^ controls[1, 0] ^ bit ^ _ONE
        right = controls[0, 1] ^ controls[1, 1] ^ bit
        kept_word = np.where(bit == 1, right, left)
        next_seeds, next_controls = [], []
        for b, t in ((0, t0), (1, t1)):
            kept = _select(bit, seeds[b, 1], seeds[b, 0])
            next_seeds.append(kept ^ (seed_word & (np.uint64(0) - t)[:, None]))
            next_controls.append(np.where(bit == 1, controls[b, 1], controls[b, 0]) ^ (t & kept_word))
        s0, s1 = next_seeds
        t0, t1 = next_controls
        seed_words[level], payload_words[level] = seed_word, payload_word
        control[level, 0], control[level, 1] = left, right
    final = (_ONE - (t1 << _ONE))[:, None] * (s1 - s0 - value)
    return tuple(  # type: ignore[return-value]
        DcfKeys(b, bits, hash_key, roots[b], seed_words, payload_words, control, final) for b in (0, 1)
    )


def evaluate(keys: DcfKeys, x: U64, hasher: Hasher | None = None) -> U64:
    """This party's additive shares of payload [x < alpha], (n, 2) uint64. Local.

    Args:
        x: (n,) uint64; the low `keys.bits` bits are compared.
        hasher: pass one to count AES blocks.
    """
    hasher = hasher or Hasher(keys.hash_key)
    count, bits = len(keys), keys.bits
    path = (x[None] >> np.arange(bits - 1, -1, -1, dtype=np.uint64)[:, None]) & _ONE
    # control bits of left and right child as bits 0 and 1 of one word
    controls = keys.control[:, 0] | (keys.control[:, 1] << 1)
    corrections = (controls.astype(np.uint64) >> path) & _ONE
    t = np.full(count, keys.party, dtype=np.uint64)
    value = np.zeros((count, 2), dtype=np.uint64)
    points, word = np.empty((2, count, 2), dtype=np.uint64), np.empty((count, 2), dtype=np.uint64)
    points[0] = keys.root
    for level in range(bits):
        points[0, :, 0] |= path[level]
        points[1] = points[0]
        points[1, :, 0] ^= _PAYLOAD
        expanded = hasher(points.reshape(-1, 2)).reshape(2, count, 2)
        mask = np.negative(t)[:, None]
        value += expanded[1]
        value += np.bitwise_and(keys.payload_words[level], mask, out=word)
        seed = expanded[0]
        t = (seed[:, 0] & _ONE) ^ (corrections[level] & t)
        seed &= _MASK
        np.bitwise_xor(seed, np.bitwise_and(keys.seed_words[level], mask, out=word), out=points[0])
    value += points[0]
    value += keys.final & np.negative(t)[:, None]
    return value if keys.party == 0 else np.negative(value)


def fresh_randomness(count: int) -> bytes:
    """The randomness that `generate` needs for `count` keys, from the operating system."""
    return secrets.token_bytes(16 + 32 * count)
