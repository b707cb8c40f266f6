"""The ring Z_{2^64} as int64 tensors in two's complement, fixed point, and exact linear maps.

A real v with f fractional bits is round(v 2^f). PyTorch's int64 arithmetic wraps modulo 2^64, convolutions and
matrix products included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from protocol import kernels, parallel

RING_BITS = 64
ELEMENT_BYTES = 8


class Party(Enum):
    """Who holds a share; truncation rounds differently for the two."""

    SERVER = 0
    CLIENT = 1


def encode(x_float: Tensor, bits: int) -> Tensor:
    """Fixed-point encoding round(x 2^bits), int64. x must be finite and smaller than 2^(62-bits)."""
    return torch.round(x_float.double() * 2.0**bits).long()


def decode(x_ring: Tensor, bits: int) -> Tensor:
    """Inverse of `encode`, float64."""
    return x_ring.double() * 2.0**-bits


def truncate_local(share: Tensor, bits: int, party: Party) -> Tensor:
    """Divide a shared value by 2^bits without interaction (SecureML, Mohassel and Zhang 2017).

    Server: floor(share / 2^bits); client: -floor(-share / 2^bits). The reconstructed value is y / 2^bits rounded
    up or down at random without bias, except with probability at most |y| 2^-63 when it is garbage.
    """
    if bits == 0:
        return share
    if party is Party.SERVER:
        return share >> bits
    return -((-share) >> bits)


def truncate_nearest(value: Tensor, bits: int) -> Tensor:
    """y / 2^bits rounded to nearest: what the fixed-point simulation does."""
    return value if bits == 0 else (value + (1 << (bits - 1))) >> bits


@dataclass(frozen=True)
class Convolution:
    """A convolution modulo 2^64 as a function of x (N, C, H, W) and weight (O, C/groups, kh, kw), both int64."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_meta or weight.is_meta:
            return torch.empty(self._output_shape(x.shape, weight.shape), dtype=torch.int64, device="meta")
        if self.groups == 1 and self.dilation == (1, 1) and is_outputs_last(weight):
            return self._by_windows(x, weight)
        return torch.nn.functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _output_shape(self, x: torch.Size, weight: torch.Size) -> tuple[int, ...]:
        """PyTorch's "meta" kernel tells it too, but its first call imports the compiler, which takes seconds. Raises ValueError."""
        (count, channels, *image), (outputs, inputs, *kernel) = x, weight
        sides = [(side + 2 * padding - dilation * (extent - 1) - 1) // stride + 1 for side, extent, stride, padding, dilation
                 in zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)]
        if channels != inputs * self.groups or outputs % self.groups or min(sides) < 1:
            raise ValueError("a convolution's kernel does not fit its input")
        return (count, outputs, *sides)

    def _by_windows(self, x: Tensor, weight: Tensor) -> Tensor:
        """As one matrix product of all windows and a kernel that `outputs_last` has laid out."""
        (down, right), (top, left), (outputs, _, rows, columns) = self.stride, self.padding, weight.shape
        windows = torch.nn.functional.pad(x, (left, left, top, top)).unfold(2, rows, down).unfold(3, columns, right)
        count, _, high, wide = windows.shape[:4]
        matrix = weight.permute(1, 2, 3, 0).reshape(-1, outputs)
        products = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, len(matrix)) @ matrix
        return products.view(count, high, wide, outputs).permute(0, 3, 1, 2).contiguous()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, features) times a matrix (features, outputs); on "meta" if one of them is. Raises ValueError, RuntimeError."""
    if x.is_meta or weight.is_meta:
        if x.shape[1:] != weight.shape[:1]:
            raise ValueError("a matrix does not fit its input")
        return torch.empty((len(x), weight.shape[1]), dtype=torch.int64, device="meta")
    return torch.matmul(x, weight)


OUTPUTS_LAST_WEIGHTS = 1 << 20
"""Kernels from this size on meet few pixels: laid out by outputs they multiply three times as fast (measured on one core)."""


def outputs_last(weight: Tensor) -> Tensor:
    """The same weight; a large kernel, int64 (O, C, kh, kw), with its outputs side by side in memory, as `Convolution` likes it."""
    if weight.dim() != 4 or weight.numel() < OUTPUTS_LAST_WEIGHTS:
        return weight
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def is_outputs_last(weight: Tensor) -> bool:
    """Whether `outputs_last` has laid this weight out."""
    return weight.dtype == torch.int64 and not weight.is_contiguous() and weight.permute(1, 2, 3, 0).is_contiguous()


LIMB_BITS = 32
LIMB_MIN_WEIGHTS = 1 << 17
"""Below this many weights PyTorch's int64 convolution is as fast as two float64 ones (measured on two cores)."""


def limb_weight(weight: Tensor) -> Tensor | None:
    """A small weight as float64 for `map_in_limbs`, or None where that is not exact or not faster.

    Exact when every output's sum of |w| is at most 2^22: a limb has 31 bits and a sign, float64 holds 53.
    """
    if weight.numel() < LIMB_MIN_WEIGHTS or int(weight.abs().flatten(1).sum(1).max()) > 1 << (53 - LIMB_BITS + 1):
        return None
    result = weight.double()
    return result.contiguous(memory_format=torch.channels_last) if result.dim() == 4 else result


def map_in_limbs(x: Tensor, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """apply(x, weight) modulo 2^64 by two exact float64 maps over the 32-bit limbs of x, about twice as fast as int64.

    Args:
        x: int64, batch first. weight: from `limb_weight`. apply: bilinear.
    """
    low = x.int()  # the low 32 bits, signed
    high = (x - low) >> LIMB_BITS
    both = apply(torch.cat([low, high]).double(), weight)
    result = both[len(x) :].long()
    result <<= LIMB_BITS
    result += both[: len(x)].long()
    return result.contiguous()


DIGITS, DIGIT_BITS = 8, 8
DIGIT_MIN_WEIGHTS = 1 << 15
"""Below this many weights splitting x costs more than 8-bit products save (measured on two cores)."""
DIGIT_CHUNK_BYTES = 3 << 20
DIGITS_PAY = torch.cpu._is_vnni_supported()
"""Whether the processor multiplies vectors of 8-bit numbers (AVX-512 VNNI); without it PyTorch's 8-bit matrix product is a slow loop."""


@dataclass(frozen=True, repr=False)
class DigitWeight:
    """A kernel of 8-bit integers with a step for each output channel, for `convolve_in_digits`.

    matrix: int8 (kh kw C, O). step: int64 (O,). shape: of the kernel, (O, C, kh, kw).
    """

    matrix: Tensor
    step: Tensor
    shape: tuple[int, int, int, int]

    def __repr__(self) -> str:
        return f"DigitWeight(shape={self.shape}, <private>)"


def digit_weight(quantised: Tensor, step: Tensor) -> DigitWeight | None:
    """A kernel int8 (O, C, kh, kw) times step (O,), or None where digits are not exact or not faster."""
    count = quantised[0].numel()
    if not DIGITS_PAY or quantised.numel() < DIGIT_MIN_WEIGHTS or count * 2 ** (2 * DIGIT_BITS - 2) >= 1 << 31:
        return None
    outputs, channels, rows, columns = quantised.shape
    matrix = quantised.permute(2, 3, 1, 0).reshape(count, outputs).contiguous()
    return DigitWeight(matrix, step.long(), (outputs, channels, rows, columns))


def _blocks(count: int, high: int, image_bytes: int) -> list[tuple[slice, range]]:
    """Images and rows of a result in blocks that keep a core's share of the working set in its cache and all cores busy."""
    cores = parallel.cores()
    rows = min(max(DIGIT_CHUNK_BYTES * high // image_bytes, 1), high)
    if count < cores:
        rows = min(rows, -(-high * count // cores))
    images = min(max(DIGIT_CHUNK_BYTES // image_bytes, 1), -(-count // cores)) if rows == high else 1
    return [(slice(first, min(first + images, count)), range(row, min(row + rows, high)))
            for first in range(0, count, images) for row in range(0, high, rows)]


def convolve_in_digits(x: Tensor, weight: DigitWeight, how: Convolution, onto: Tensor | None = None) -> Tensor:
    """A convolution modulo 2^64 as 8-bit matrix products over the eight balanced digits of x, exact; `onto`, if given, takes it on top.

    The sums of products of 8-bit numbers fit 32 bits; the digits' results are joined modulo 2^64. Three times as fast as int64
    convolution where the processor multiplies 8-bit vectors. groups and dilation must be 1.
    """
    count, channels, height, width = x.shape
    outputs, _, rows, columns = weight.shape
    (down, right), (top, left) = how.stride, how.padding
    high, wide = (height + 2 * top - rows) // down + 1, (width + 2 * left - columns) // right + 1
    shape = (count, outputs, high, wide)
    joined = torch.zeros(shape, dtype=torch.int64) if onto is None else onto
    if tuple(joined.shape) != shape or not joined.is_contiguous():  # compiled loops check no bounds
        raise ValueError(f"a result of shape {shape} cannot be added to {tuple(joined.shape)}")
    source, target, step = x.contiguous().numpy(), joined.numpy().reshape(count, outputs, high * wide), weight.step.numpy()

    def convolve(block: tuple[slice, range]) -> None:
        images, out_rows = block
        here = images.stop - images.start
        start, stop = out_rows[0] * down - top, out_rows[-1] * down - top + rows  # of the rows of x, those of the padding included
        first, last = max(start, 0), max(min(stop, height), 0)
        padded = np.zeros((DIGITS, here, stop - start, width + 2 * left, channels), np.int8)
        kernels.split_digits(source[images], first, max(first, last), first - start, left, padded)
        s = padded.strides
        windows = torch.from_numpy(padded).as_strided((DIGITS, here, len(out_rows), wide, rows, columns * channels),
                                                      (s[0], s[1], s[2] * down, s[3] * right, s[2], 1))
        products = torch._int_mm(windows.reshape(DIGITS * here * len(out_rows) * wide, -1), weight.matrix)
        kernels.join_digits(products.numpy().reshape(DIGITS, here, len(out_rows) * wide, outputs), step, out_rows[0] * wide, target[images])

    parallel.run(convolve, _blocks(count, high, DIGITS * weight.matrix.shape[0] * high * wide))
    return joined


def sum_pool2d(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Sum over windows, zero padding. x (N, C, H, W) int64."""
    if padding == (0, 0) and kernel == tuple(x.shape[2:]) and not x.is_meta:
        return x.sum((2, 3), keepdim=True)
    windows = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = windows.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    return windows[..., 0, 0] if x.is_meta else windows.sum((-2, -1))


def to_bytes(x_ring: Tensor) -> memoryview:
    """The little-endian bytes of an int64 tensor, without a copy if it is contiguous."""
    return memoryview(x_ring.contiguous().numpy().reshape(-1).view(np.uint8))


def from_bytes(data: bytes | bytearray | memoryview, shape: tuple[int, ...]) -> Tensor:
    """An int64 tensor over `data`, without a copy if it is writable. The caller has checked the length."""
    array = np.frombuffer(data, dtype="<i8")
    return torch.from_numpy(array if array.flags.writeable else array.copy()).view(shape)
