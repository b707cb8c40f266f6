"""Ring arithmetic is exact; truncation keeps its derived bound."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol import parallel, ring
from protocol.prg import Seed
from protocol.ring import Party

WORDS = st.integers(-(2**63), 2**63 - 1)


def exact_conv(x: torch.Tensor, w: torch.Tensor, stride: int, padding: int, groups: int) -> np.ndarray:
    """Convolution with Python integers, reduced modulo 2^64."""
    xs = np.pad(x.numpy(), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2)).astype(object)
    ws = w.numpy().astype(object)
    out_channels, per_group, kh, kw = ws.shape
    rows, columns = ((xs.shape[i] - k) // stride + 1 for i, k in ((2, kh), (3, kw)))
    out = np.zeros((len(xs), out_channels, rows, columns), dtype=object)
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for i in range(rows):
            for j in range(columns):
                window = xs[:, first : first + per_group, i * stride : i * stride + kh, j * stride : j * stride + kw]
                out[:, o, i, j] = (window * ws[o]).sum((1, 2, 3))
    return (((out + 2**63) % 2**64) - 2**63).astype(np.int64)


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (2, 1, 1), (1, 1, 2), (2, 2, 4)])
def test_convolution_is_exact_modulo_2_64(stride: int, padding: int, groups: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**63), 2**63 - 1, (2, 4, 5, 5), generator=g)
    w = torch.randint(-(2**63), 2**63 - 1, (4, 4 // groups, 3, 3), generator=g)
    got = ring.Convolution((stride, stride), (padding, padding), (1, 1), groups)(x, w)
    assert np.array_equal(got.numpy(), exact_conv(x, w, stride, padding, groups))


def test_limbs_equal_int64_at_the_edges() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-700, 700, (128, 128, 3, 3), generator=g)
    w[0] = 3640  # sum of |w| just below 2^22
    limbs = ring.limb_weight(w)
    assert limbs is not None
    x = torch.randint(-(2**63), 2**63 - 1, (2, 128, 4, 4), generator=g)
    x[0, :, 0, 0] = torch.tensor([-(2**63), 2**63 - 1, -1, 0]).repeat(32)
    x[1] = -(2**31)
    conv = lambda a, b: torch.nn.functional.conv2d(a, b, padding=1)
    assert torch.equal(ring.map_in_limbs(x, limbs, conv), conv(x, w))


@pytest.mark.usefixtures("digits_pay")
@pytest.mark.parametrize(("kernel", "stride", "padding", "batch"), [(3, 1, 1, 1), (3, 2, 1, 3), (1, 2, 0, 2), (5, 1, 2, 1)])
def test_digits_equal_int64_at_the_edges(kernel: int, stride: int, padding: int, batch: int) -> None:
    """Random ring elements, and those whose digits carry: all bytes 0x7f, 0x80 and 0xff."""
    torch.manual_seed(0)
    how = ring.Convolution((stride, stride), (padding, padding), (1, 1), 1)
    x = torch.randint(-(2**63), 2**63 - 1, (batch, 40, 7, 9))
    edges = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 0x7F7F7F7F7F7F7F7F, -0x7F7F7F7F7F7F7F80, 0x0080008000800080])
    x.view(-1)[: 7 * 50] = edges.repeat(50)
    quantised = torch.randint(-127, 128, (840, 40, kernel, kernel), dtype=torch.int8)
    quantised[0] = 127
    quantised[1] = -127
    step = torch.randint(1, 60, (840,))
    digits = ring.digit_weight(quantised, step)
    assert digits is not None
    weight = quantised.long() * step.view(-1, 1, 1, 1)
    assert torch.equal(ring.convolve_in_digits(x, digits, how), how(x, weight))


@pytest.mark.usefixtures("digits_pay")
@pytest.mark.parametrize("cores", [1, 3, 64])
@pytest.mark.parametrize("chunk", [1, 100_000, 1 << 30])
def test_blocks_of_a_convolution_cover_it(monkeypatch: pytest.MonkeyPatch, cores: int, chunk: int) -> None:
    """Rows, images and several images at once: every element once, whatever the number of cores."""
    monkeypatch.setattr(parallel, "cores", lambda: cores)
    monkeypatch.setattr(parallel, "run", lambda work, parts: [work(part) for part in parts])
    monkeypatch.setattr(ring, "DIGIT_CHUNK_BYTES", chunk)
    quantised, x = torch.randint(-128, 128, (128, 32, 3, 3), dtype=torch.int8), torch.randint(-(2**63), 2**63 - 1, (5, 32, 7, 5))
    how = ring.Convolution((2, 1), (1, 2), (1, 1), 1)
    digits = ring.digit_weight(quantised, torch.ones(128))
    assert digits is not None
    for batch in (1, 5):
        assert torch.equal(ring.convolve_in_digits(x[:batch], digits, how), how(x[:batch], quantised.long()))
        blocks = ring._blocks(batch, 4, 9 * 32 * 8 * 4 * 7)
        covered = [(image, row) for images, rows in blocks for image in range(images.start, images.stop) for row in rows]
        assert sorted(covered) == [(image, row) for image in range(batch) for row in range(4)]


def test_a_part_that_fails_is_told() -> None:
    def work(part: int) -> None:
        assert torch.get_num_threads() == 1 or parallel.cores() == 1
        if part == 3:
            raise ValueError("part 3")

    parallel.run(work, range(3))
    with pytest.raises(ValueError, match="part 3"):
        parallel.run(work, range(5))
    assert parallel.cores() == torch.get_num_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    parallel.run(lambda _: None, range(3))
    child = os.fork()
    if child == 0:
        parallel.run(lambda _: None, range(3))
        os._exit(7)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 7


def test_digits_are_refused_where_they_would_not_pay_or_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ring.digit_weight(torch.ones(4, 4, 3, 3, dtype=torch.int8), torch.ones(4)) is None
    assert ring.digit_weight(torch.ones(1, 1 << 17, 1, 1, dtype=torch.int8), torch.ones(1)) is None
    monkeypatch.setattr(ring, "DIGITS_PAY", False)
    assert ring.digit_weight(torch.ones(128, 64, 3, 3, dtype=torch.int8), torch.ones(128)) is None


def test_limbs_are_refused_where_they_would_round() -> None:
    w = torch.full((128, 128, 3, 3), 3641 + 100)
    assert ring.limb_weight(w) is None


@given(st.lists(WORDS, min_size=1, max_size=20), st.lists(WORDS, min_size=20, max_size=20), st.integers(1, 20))
def test_truncation_error_is_at_most_one_unit(values: list[int], masks: list[int], bits: int) -> None:
    y = torch.tensor(values) >> 12  # small against the ring: the exceptional event needs a mask within |y| of the wrap
    client = torch.tensor(masks[: len(values)])
    server = y - client
    wrapped = (server.numpy().astype(object) + client.numpy().astype(object)) != y.numpy().astype(object)
    got = ring.truncate_local(server, bits, Party.SERVER) + ring.truncate_local(client, bits, Party.CLIENT)
    error = got - (y >> bits)
    ok = torch.from_numpy(~wrapped.astype(bool)) & (client != -(2**63))  # the one share that has no negative
    # without a wrap the sum is rounded up or down; a wrap adds exactly +-2^(64-bits) and is what the failure bound counts
    assert ((error[ok] == 0) | (error[ok] == 1)).all()


def test_truncation_is_unbiased() -> None:
    y = torch.full((200_000,), 5)
    client = torch.from_numpy(np.frombuffer(np.random.default_rng(0).bytes(8 * len(y)), np.int64).copy())
    got = ring.truncate_local(y - client, 3, Party.SERVER) + ring.truncate_local(client, 3, Party.CLIENT)
    assert abs(float(got.double().mean()) - 5 / 8) < 5 * (0.25 / len(y)) ** 0.5 * 2


def test_a_mask_near_the_wrap_does_spoil_the_element() -> None:
    """The exceptional event exists: the failure bound is not vacuous."""
    y, client = torch.tensor([100]), torch.tensor([-(2**63) + 50])
    server = y - client  # wraps
    got = ring.truncate_local(server, 4, Party.SERVER) + ring.truncate_local(client, 4, Party.CLIENT)
    assert abs(int(got) - 6) > 2**50


@given(st.lists(st.floats(-1000, 1000), min_size=1), st.integers(4, 20))
def test_encoding_rounds_to_nearest(values: list[float], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    assert ((ring.decode(ring.encode(x, bits), bits) - x).abs() <= 2.0 ** -(bits + 1)).all()


def test_sum_pool_matches_average_pool() -> None:
    x = torch.randint(-1000, 1000, (2, 3, 7, 7))
    got = ring.sum_pool2d(x, (3, 3), (2, 2), (1, 1)).double() / 9
    assert torch.allclose(got, torch.nn.functional.avg_pool2d(x.double(), 3, 2, 1))


def test_bytes_round_trip() -> None:
    x = torch.tensor([[1, -1], [2**63 - 1, -(2**63)]])
    assert bytes(ring.to_bytes(x)[:8]) == b"\x01" + bytes(7)
    assert torch.equal(ring.from_bytes(bytes(ring.to_bytes(x)), (2, 2)), x)


@pytest.mark.parametrize(("stride", "padding", "size"), [((1, 1), (1, 1), (4, 4)), ((2, 1), (0, 1), (5, 3)), ((2, 2), (1, 0), (3, 6))])
def test_kernels_laid_out_by_outputs_give_the_same(stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    seed = Seed.fresh()
    x, weight = seed.ring("x", (2, 5, *size)), seed.ring("w", (7, 5, 3, 2))
    assert ring.outputs_last(weight) is weight  # too small
    monkeypatch.setattr(ring, "OUTPUTS_LAST_WEIGHTS", 1)
    matrix = seed.ring("m", (4, 3))
    assert ring.outputs_last(matrix) is matrix
    laid_out = ring.outputs_last(weight)
    assert torch.equal(laid_out, weight) and ring.is_outputs_last(laid_out) and not ring.is_outputs_last(weight)
    assert bytes(ring.to_bytes(laid_out)) == bytes(ring.to_bytes(weight))
    how = ring.Convolution(stride, padding, (1, 1), 1)
    assert torch.equal(how(x, laid_out), how(x, weight))
    dilated = ring.Convolution((1, 1), (2, 2), (2, 2), 1)
    assert torch.equal(dilated(x, laid_out), dilated(x, weight))
