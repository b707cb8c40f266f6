"""The DCF against plain comparison, its size, and what one key alone shows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import dcf
from protocol.material import ReluShare
from protocol.online import relu_share
from protocol.ring import Party


def check(alpha: np.ndarray, x: np.ndarray, bits: int) -> None:
    payload = np.random.default_rng(1).integers(0, 2**64, (len(alpha), 2), dtype=np.uint64)
    keys = dcf.generate(alpha, payload, bits, dcf.fresh_randomness(len(alpha)))
    read = [dcf.from_bytes(memoryview(b"".join(k.parts())), k.party, len(alpha), bits) for k in keys]
    total = dcf.evaluate(read[0], x) + dcf.evaluate(read[1], x)
    assert np.array_equal(total, payload * (x < alpha)[:, None])


@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_every_pair_of_small_numbers(bits: int) -> None:
    grid = np.arange(2**bits, dtype=np.uint64)
    alpha, x = (a.ravel() for a in np.meshgrid(grid, grid))
    check(alpha, x, bits)


@pytest.mark.parametrize("bits", [16, 23, 40, 61])
def test_edge_values(bits: int) -> None:
    top = 2**bits - 1
    edges = np.array([0, 1, 2, top // 2, top // 2 + 1, top - 1, top], dtype=np.uint64)
    alpha, x = (a.ravel() for a in np.meshgrid(edges, edges))
    check(alpha, x, bits)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**23 - 1), st.integers(0, 2**23 - 1)), min_size=1, max_size=50))
def test_random_values(pairs: list[tuple[int, int]]) -> None:
    alpha, x = np.array(pairs, dtype=np.uint64).T
    check(np.ascontiguousarray(alpha), np.ascontiguousarray(x), 23)


def test_more_keys_than_a_block() -> None:
    rng = np.random.default_rng(0)
    n = dcf.BLOCK_KEYS + 3
    check(rng.integers(0, 2**16, n, dtype=np.uint64), rng.integers(0, 2**16, n, dtype=np.uint64), 16)


def test_size_is_pinned() -> None:
    """Per key 32 + bits (32 + 1/4) bytes: the cost that the protocol promises."""
    alpha = np.arange(8, dtype=np.uint64)
    keys, _ = dcf.generate(alpha, np.ones((8, 2), dtype=np.uint64), 23, dcf.fresh_randomness(8))
    assert sum(map(len, keys.parts())) == keys.nbytes == 16 + 8 * (32 + 23 * 32) + 23 * 2


def bias(data: bytes) -> float:
    """Chi-square of the byte histogram, in standard deviations from its mean under uniformity."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum() - 255) / (2 * 255) ** 0.5


@pytest.mark.parametrize("party", [0, 1])
def test_one_key_looks_uniform_whatever_it_hides(party: int) -> None:
    n, bits = 4000, 16
    alpha = np.full(n, 12345, dtype=np.uint64)
    payload = np.zeros((n, 2), dtype=np.uint64)
    key = dcf.generate(alpha, payload, bits, dcf.fresh_randomness(n))[party]
    assert bias(key.payload_words.tobytes()) < 6
    assert bias(key.final.tobytes()) < 6
    assert bias((key.seed_words >> np.uint64(8)).astype(np.uint32).tobytes()) < 6
    assert abs(float(key.control.mean()) - 0.5) < 6 * 0.5 / (2 * n * bits) ** 0.5
    assert bias(dcf.evaluate(key, alpha).tobytes()) < 6
    assert bias(payload.tobytes()) > 1000  # the test itself sees structure where there is some


def test_fresh_keys_differ() -> None:
    alpha, payload = np.zeros(4, dtype=np.uint64), np.zeros((4, 2), dtype=np.uint64)
    first, second = (dcf.generate(alpha, payload, 8, dcf.fresh_randomness(4))[0] for _ in range(2))
    assert first.hash_key != second.hash_key
    assert not np.array_equal(first.root, second.root)


def test_wrong_amount_of_randomness_is_refused() -> None:
    alpha, payload = np.zeros(4, dtype=np.uint64), np.zeros((4, 2), dtype=np.uint64)
    with pytest.raises(ValueError, match="randomness"):
        dcf.generate(alpha, payload, 8, bytes(10))


def test_wrong_shapes_are_refused() -> None:
    """The compiled loops check no bounds, so their callers must."""
    alpha, payload = np.zeros(4, dtype=np.uint64), np.zeros((4, 2), dtype=np.uint64)
    key = dcf.generate(alpha, payload, 8, dcf.fresh_randomness(4))[0]
    for points in (alpha[:3], np.zeros(5, dtype=np.uint64), payload):
        with pytest.raises(ValueError, match="number of points"):
            dcf.evaluate(key, points)
    for wrong in (payload[:3], np.zeros((5, 2), dtype=np.uint64), alpha):
        with pytest.raises(ValueError, match="wrong shapes"):
            dcf.generate(alpha, wrong, 8, dcf.fresh_randomness(4))
    with pytest.raises(ValueError, match="bits"):
        dcf.generate(alpha, payload, 64, dcf.fresh_randomness(4))
    share = ReluShare(torch.zeros(4, dtype=torch.int64), (key,), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="another number of ReLUs"):
        relu_share(np.zeros(5, np.int64), share, 8, Party.SERVER)


def test_a_tampered_key_changes_the_result() -> None:
    alpha = np.full(1, 100, dtype=np.uint64)
    keys = dcf.generate(alpha, np.ones((1, 2), dtype=np.uint64), 8, dcf.fresh_randomness(1))
    data = bytearray(b"".join(keys[0].parts()))
    x = np.full(1, 50, dtype=np.uint64)
    other = dcf.evaluate(keys[1], x)
    assert (dcf.evaluate(dcf.from_bytes(memoryview(data), 0, 1, 8), x) + other == 1).all()
    data[-1] ^= 1
    data[20] ^= 2
    assert not (dcf.evaluate(dcf.from_bytes(memoryview(data), 0, 1, 8), x) + other == 1).all()


def test_keys_print_no_secret() -> None:
    keys, _ = dcf.generate(np.zeros(1, dtype=np.uint64), np.zeros((1, 2), dtype=np.uint64), 8, dcf.fresh_randomness(1))
    assert repr(keys) == "DcfKeys(party=0, bits=8, count=1, <secret>)"
