"""The compiled loops of an activation against the same formulas in PyTorch, on any ring elements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from protocol import kernels, ring
from protocol.online import _array
from protocol.ring import Party

ROOT = Path(__file__).resolve().parent.parent
EDGES = torch.tensor([-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1])


def elements(shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform ring elements, the extreme ones among them."""
    values = torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(seed))
    flat = values.view(-1)
    flat[: len(EDGES)] = EDGES[: len(flat)]
    return values


def test_a_full_disk_costs_the_cache_only(tmp_path: Path) -> None:
    """Where files can be made but not written the loops are compiled all the same."""
    pytest.importorskip("resource")
    code = ("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
            "import os, numpy as np\nfrom numba import types\nfrom protocol.kernels import _compiled\n"
            "@_compiled(types.Array(types.int64, 1, 'C'))\ndef first(x):\n    x[0] = 7\n"
            "x = np.zeros(1, np.int64)\nfirst(x)\nprint(x[0], len(os.listdir(os.environ['NUMBA_CACHE_DIR'])))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False,
                          env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 ")


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 100))
def test_what_the_server_opens(batch: int, pixels: int, bits: int, shifted: bool, some: bool, seed: int) -> None:
    share, shift = elements((batch, pixels), seed), elements((pixels,), seed + 1) if shifted else None
    active = torch.arange(0, pixels, 2) if some else None
    chosen = torch.arange(pixels) if active is None else active
    opening = elements((batch, len(chosen)), seed + 2)
    d = torch.empty_like(opening)
    kernels.open_share(share.numpy(), _array(shift), bits, _array(active), opening.numpy(), d.numpy())
    total = share if shift is None else share + shift
    assert torch.equal(d, ring.truncate_local(total, bits, Party.SERVER)[:, chosen] - opening)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 100))
def test_both_parts_of_the_squares(batch: int, pixels: int, bits: int, factors: bool, constants: bool, seed: int) -> None:
    d, second, third, y = (elements((batch, pixels), seed + i).roll(i, 1) for i in range(4))
    factor = torch.randint(-4, 5, (pixels,)) if factors else None
    constant = elements((pixels,), seed + 5) if constants else None
    by = 1 if factor is None else factor
    server, client = y.clone(), y.clone()
    kernels.square_server(d.numpy(), second.numpy(), _array(factor), bits, _array(constant), server.numpy())
    expected = ring.truncate_local((y + (d + second) ** 2) * by, bits, Party.SERVER)
    assert torch.equal(server, expected if constant is None else expected + constant)
    first = seed % client.numel()  # any run of elements
    runs = [t.flatten()[first:] for t in (d, second, third, client)]
    kernels.square_client(runs[0].numpy(), runs[1].numpy(), _array(factor), first, bits, runs[2].numpy(), runs[3].numpy())
    expected = ring.truncate_local((y + second * d) * by, bits, Party.CLIENT) - third
    assert torch.equal(client.flatten()[first:], expected.flatten()[first:])
    assert torch.equal(client.flatten()[:first], y.flatten()[:first])


@pytest.mark.usefixtures("digits_pay")
def test_a_convolution_joins_what_it_is_added_to() -> None:
    how = ring.Convolution((1, 1), (1, 1), (1, 1), 1)
    digits = ring.digit_weight(torch.ones(64, 64, 3, 3, dtype=torch.int8), torch.ones(64))
    assert digits is not None
    x, onto = elements((2, 64, 5, 5), 0), elements((2, 64, 5, 5), 1)
    expected = onto + how(x, torch.ones(64, 64, 3, 3, dtype=torch.int64))
    assert ring.convolve_in_digits(x, digits, how, onto) is onto and torch.equal(onto, expected)
    for wrong in (onto[:1], onto.transpose(2, 3)):
        with pytest.raises(ValueError, match="cannot be added"):
            ring.convolve_in_digits(x, digits, how, wrong)
