"""Seeds: streams against an independent AES, separation, and secrecy in print."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocol.prg import Seed


def test_stream_is_aes_256_in_counter_mode() -> None:
    key = bytes(range(32))
    derived = hashlib.blake2b(b"label", key=key, digest_size=32, person=b"relucent-stream").digest()
    ecb = Cipher(algorithms.AES(derived), modes.ECB()).encryptor()
    blocks = b"".join(ecb.update(i.to_bytes(16, "big")) for i in range(7))
    assert Seed(key).bytes("label", 100).tobytes() == blocks[:100]


def test_labels_and_seeds_separate_streams() -> None:
    a, b = Seed(bytes(32)), Seed(bytes(31) + b"\x01")
    streams = {s.bytes(label, 32).tobytes() for s in (a, b, a.derive("x"), a.derive("y")) for label in ("p", "q")}
    assert len(streams) == 8
    assert a.bytes("p", 32).tobytes() == Seed(bytes(32)).bytes("p", 32).tobytes()


def test_ring_elements_are_uniform() -> None:
    from tests.test_dcf import bias

    assert bias(Seed.fresh().ring("x", (1000, 100)).numpy().tobytes()) < 6


def test_empty_stream() -> None:
    assert Seed.fresh().ring("x", (0, 3)).shape == (0, 3)
    assert isinstance(Seed.fresh().bytes("x", 0), np.ndarray)


def test_seeds_hide_themselves() -> None:
    seed = Seed(bytes(32))
    assert repr(seed) == "Seed(<secret>)"
    with pytest.raises(TypeError):
        _ = seed == seed
    with pytest.raises(TypeError):
        hash(seed)
    with pytest.raises(ValueError, match="32 bytes"):
        Seed(b"short")
