"""What all roles share: one CrypTensor over the ring whose layers follow the same public rules in every role.

The compiled graph runs unchanged under each role's subclass. This base class decides, from public facts alone,
where values are rescaled, truncated and re-masked, so that dealer, client, server and simulation always agree; a
subclass says what a private map, a truncation, a re-masking and an activation mean for its role.

Invariant (protocol section 2): every tensor between two activations is additively shared, and the client's share
is known to it after preprocessing. A tensor is `dealt` when the dealer knows the client's share too: then private
maps apply directly. Data on the "meta" device stands for values that this role does not know, only their shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from protocol import ring
from protocol.crypten_adapter import CrypTensor, PartialActivation
from protocol.errors import ModelFileError
from protocol.model import RELU, ActivationLayer, FixedPoint

MAX_POOL_ELEMENTS = 1 << 28
POOL_BITS = 12
"""Fractional bits of 1/area in an average pool whose area is no power of two."""
POOLED_BITS = 50
"""Largest scale of what an average pool gives; the ring's other bits hold values and their margin."""


@dataclass(frozen=True, repr=False)
class Weight:
    """A role's view of a private weight: W at the server, Delta at the client, B at the dealer, int64.

    limbs, digits: the same for `ring.map_in_limbs` and `ring.convolve_in_digits`, where these are exact and faster.
    """

    data: Tensor
    limbs: Tensor | None = None
    digits: ring.DigitWeight | None = None

    def t(self) -> Weight:
        return Weight(self.data.t(), None if self.limbs is None else self.limbs.t())

    def map(self, x: Tensor, apply: Callable[[Tensor, Tensor], Tensor], onto: Tensor | None = None) -> Tensor:
        """apply(x, this weight) modulo 2^64; added to `onto`, in place, if given."""
        if self.digits is not None and isinstance(apply, ring.Convolution) and apply.groups == 1 and apply.dilation == (1, 1):
            return ring.convolve_in_digits(x, self.digits, apply, onto)
        result = apply(x, self.data) if self.limbs is None else ring.map_in_limbs(x, self.limbs, apply)
        return result if onto is None else onto.add_(result)

    def __repr__(self) -> str:
        return f"Weight(shape={tuple(self.data.shape)}, <private>)"


@dataclass(frozen=True, repr=False)
class Constant:
    """A private constant that the server adds, float64; None in roles that do not hold it."""

    data: Tensor | None
    _encoded: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def unsqueeze(self, dim: int) -> Constant:
        return self if self.data is None else Constant(self.data.unsqueeze(dim), self._encoded)

    def encoded(self, kind: str, scale: int, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Ring elements derived from this constant, made once for all sessions."""
        assert self.data is not None
        key = kind, scale, self.data.dim()
        if key not in self._encoded:
            self._encoded[key] = make(self.data)
        return self._encoded[key]

    def __repr__(self) -> str:
        return "Constant(<private>)"


class RingTensor(CrypTensor):  # type: ignore[misc]
    """A tensor of ring elements with `scale` fractional bits, as one role sees it.

    Args:
        session: the role's state during this pass.
        data: this role's share or knowledge, int64, batch first; on "meta" if unknown.
        dealt: whether the dealer knows the client's share.
    """

    # CrypTen's attribute hook serves automatic differentiation and switches global state; nothing here is differentiated
    __getattribute__ = object.__getattribute__
    data: Tensor = None  # type: ignore[assignment]  # replaces CrypTensor's property

    def __init__(self, session: Any, data: Tensor, scale: int, dealt: bool) -> None:
        self.session, self.data, self.scale, self.dealt = session, data, scale, dealt
        self.requires_grad = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.data.shape)}, scale={self.scale}, <shared>)"

    def __bool__(self) -> bool:
        raise TypeError("shared values have no truth value")

    def __float__(self) -> float:
        raise TypeError("shared values are not revealed")

    # --- structure -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def size(self, dim: int) -> int:
        return self.data.shape[dim]

    def dim(self) -> int:
        return self.data.dim()

    def view(self, *shape: int) -> Self:
        return self._with(self.data.reshape(*shape))

    def _with(self, data: Tensor, scale: int | None = None) -> Self:
        return type(self)(self.session, data, self.scale if scale is None else scale, self.dealt)

    @property
    def fixed_point(self) -> FixedPoint:
        point: FixedPoint = self.session.fixed_point
        return point

    # --- public linear operations: local in every role -----------------------------------------------------------

    def add(self, other: RingTensor | Constant) -> RingTensor:
        """Sum of two shared tensors, scales aligned exactly, or with a constant of the server's."""
        if isinstance(other, Constant):
            return self._add_constant(other)
        coarse, fine = (self, other) if self.scale <= other.scale else (other, self)
        a, b = fine.data, coarse.data
        total = fine._with(_if_known(lambda: torch.add(a, b, alpha=1 << (fine.scale - coarse.scale)), a, b))
        total.dealt = fine.dealt and coarse.dealt
        return total

    def sub(self, other: RingTensor) -> RingTensor:
        return self.add(other._with(_if_known(lambda: -other.data, other.data)))

    def _align(self, scale: int) -> Self:
        return self if self.scale >= scale else self._with(_if_known(lambda: self.data << (scale - self.scale), self.data), scale)

    def avg_pool2d(self, kernel_size: tuple[int, int], stride: tuple[int, int] | None = None,
                   padding: tuple[int, int] = (0, 0), ceil_mode: bool = False) -> RingTensor:
        """Average pooling, zero padding counted: a sum, with 1/area in the scale or as a public factor.

        Truncated before where the scale would leave too few bits to the values: pools in a row.
        """
        if ceil_mode:
            raise ModelFileError("average pooling with ceil_mode is not supported")
        area = kernel_size[0] * kernel_size[1]
        factor = area & (area - 1) != 0
        bits = POOL_BITS + area.bit_length() if factor else area.bit_length() - 1
        x = self if self.scale + bits <= POOLED_BITS else self._rescale()
        summed = ring.sum_pool2d(x.data, kernel_size, stride or kernel_size, padding)
        return x._with(_if_known(lambda: summed * round(2**bits / area), summed) if factor else summed, x.scale + bits)

    def max_pool2d(self, kernel_size: tuple[int, int], padding: tuple[int, int] = (0, 0),
                   stride: tuple[int, int] | None = None, dilation: int = 1, ceil_mode: bool = False) -> RingTensor:
        """Max pooling as a tree of max(a, b) = b + ReLU(a - b), one round per tree level."""
        if ceil_mode or dilation != 1:
            raise ModelFileError("max pooling with ceil_mode or dilation is not supported")
        step = stride or kernel_size
        height, width = self.data.shape[2:]
        candidates = []
        for i in range(kernel_size[0]):
            # a window that reaches beyond the border repeats the border pixel, which it contains anyway
            rows = _window_index(height, kernel_size[0], step[0], padding[0], i)
            for j in range(kernel_size[1]):
                columns = _window_index(width, kernel_size[1], step[1], padding[1], j)
                candidates.append(self._with(self._picked(rows, columns)))
        level: list[RingTensor] = list(candidates)
        batch = self.data.shape[0]
        while len(level) > 1:
            pairs = len(level) // 2
            a = self._stack(level[:pairs])
            b = self._stack(level[pairs : 2 * pairs])
            rest = level[2 * pairs :]
            difference = a.sub(b)
            if difference.data.numel() > MAX_POOL_ELEMENTS:
                raise ModelFileError("a max pooling of this model and batch is too large")
            mask = torch.full(tuple(difference.data.shape[1:]), RELU, dtype=torch.uint8)
            larger = difference._activation(ActivationLayer("max", mask, 0, None), None, None).add(b)
            level = [larger._with(part) for part in larger.data.view(batch, pairs, -1, *larger.data.shape[2:]).unbind(1)]
            level += rest
        return level[0]

    def _picked(self, rows: Tensor, columns: Tensor) -> Tensor:
        if self.data.is_meta:
            return torch.empty((*self.data.shape[:2], len(rows), len(columns)), dtype=torch.int64, device="meta")
        return self.data.index_select(2, rows).index_select(3, columns)

    def _stack(self, parts: list[RingTensor]) -> RingTensor:
        """Concatenate along the channels."""
        scale = max(p.scale for p in parts)
        aligned = [p._align(scale) for p in parts]
        if any(p.data.is_meta for p in aligned):
            count, _, *sides = aligned[0].data.shape
            data = torch.empty((count, sum(p.data.shape[1] for p in aligned), *sides), dtype=torch.int64, device="meta")
        else:
            data = torch.cat([p.data for p in aligned], 1)
        stacked = parts[0]._with(data, scale)
        stacked.dealt = all(p.dealt for p in parts)
        return stacked

    # --- private linear maps ----------------------------------------------------------------------------------

    def conv2d(self, weight: Weight, bias: None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
               groups: int = 1) -> RingTensor:
        """Convolution with a private weight (protocol section 3)."""
        x = self._ready_for_private_map()
        how = ring.Convolution(_pair(stride), _pair(padding), _pair(dilation), groups)
        return x._mapped(x._private_map(weight, how))

    def matmul(self, weight: Weight) -> RingTensor:
        """Product with a private matrix (protocol section 3)."""
        x = self._ready_for_private_map()
        return x._mapped(x._private_map(weight, ring.product))

    def mul(self, weight: Weight) -> RingTensor:
        """Product, pixel by pixel, with a private tensor of one image's shape (protocol section 3)."""
        x = self._ready_for_private_map()
        return x._mapped(x._private_map(weight, _times))

    def _ready_for_private_map(self) -> RingTensor:
        x: RingTensor = self
        if x.scale >= self.fixed_point.activation_bits + self.fixed_point.weight_bits:
            x = x._rescale()
        return x if x.dealt else x._remask()

    def _mapped(self, data: Tensor) -> RingTensor:
        result = self._with(data, self.scale + self.fixed_point.weight_bits)
        result.dealt = False
        return result

    def _rescaled(self, shift: Tensor | None) -> Self:
        """This value plus the shift at scale f_a."""
        return (self if shift is None else self._with(self.data + shift))._rescale()

    def _rescale(self) -> Self:
        """To the activation scale f_a: exact upwards, truncation downwards."""
        target = self.fixed_point.activation_bits
        if self.scale <= target:
            return self._align(target)
        return self._with(self._truncate(self.scale - target), target)

    # --- activations --------------------------------------------------------------------------------------------

    def partial_activation(self, module: PartialActivation) -> RingTensor:
        """The mixed activation of one layer (protocol sections 4 to 6): one round trip online."""
        return self._activation(module.layer, getattr(module, "c1", None), getattr(module, "c0", None))

    def _activation(self, layer: ActivationLayer, c1: Constant | None, c0: Constant | None) -> RingTensor:
        shift = constant = None
        if len(layer.square) and c1 is not None and c1.data is not None and c0 is not None and c0.data is not None:
            # only who holds the coefficients adds them: the shift before the square, the constant after it
            r1, r0 = c1.data, c0.data
            shift = c1.encoded("shift", self.scale, lambda _: encode_at_squares(layer, square_constants(layer, r1, r0)[0], self.scale))
            bits = self.fixed_point.activation_bits
            constant = c0.encoded("constant", bits, lambda _: encode_at_squares(layer, square_constants(layer, r1, r0)[1], bits))
        return self._activate(layer, shift, constant)

    # --- what a role defines ------------------------------------------------------------------------------------

    @abstractmethod
    def _add_constant(self, constant: Constant) -> RingTensor:
        """Add a constant of the server's."""

    @abstractmethod
    def _truncate(self, bits: int) -> Tensor:
        """This role's data divided by 2^bits."""

    @abstractmethod
    def _private_map(self, weight: Weight, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """This role's data of the map's output; the input is dealt."""

    @abstractmethod
    def _remask(self) -> RingTensor:
        """The same value with a fresh mask that the dealer knows."""

    @abstractmethod
    def _activate(self, layer: ActivationLayer, shift: Tensor | None, constant: Tensor | None) -> RingTensor:
        """The activation of this value, which `_rescaled` brings to scale f_a; the result is dealt.

        shift, constant: what the square pixels lack before, at this value's scale, and after the square, at scale f_a; ring elements
        of the layer's shape for the role that holds them.
        """


def _if_known(elementwise: Callable[[], Tensor], *operands: Tensor) -> Tensor:
    """The result of an operation pixel by pixel; on "meta" if an operand is.

    The result's shape is told without PyTorch's "meta" kernels: the first of these imports its compiler, which takes seconds.
    """
    if any(operand.is_meta for operand in operands):
        return torch.empty(np.broadcast_shapes(*(tuple(operand.shape) for operand in operands)), dtype=torch.int64, device="meta")
    return elementwise()


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return _if_known(lambda: x * weight, x, weight)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _window_index(size: int, kernel: int, stride: int, padding: int, offset: int) -> Tensor:
    count = (size + 2 * padding - kernel) // stride + 1
    return (torch.arange(count) * stride + offset - padding).clamp(0, size - 1)


def square_constants(layer: ActivationLayer, c1: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
    """shift and constant per channel with c2 z^2 + c1 z + c0 = c2 (z + shift)^2 + constant. float64 (C,)."""
    c2: Tensor | float = 2.0**-layer.c2_shift
    if layer.c2_factor is not None:
        c2 = torch.tensor(layer.c2_factor, dtype=torch.float64) * c2
    shift = c1.flatten().double() / (2 * c2)
    return shift, c0.flatten().double() - c2 * shift**2


def encode_at_squares(layer: ActivationLayer, per_channel: Tensor, scale: int) -> Tensor:
    """A per-channel real at the square pixels, 0 elsewhere; ring elements of the layer's shape."""
    dense = torch.zeros(layer.mask.numel(), dtype=torch.int64)
    dense[layer.square] = ring.encode(per_channel, scale)[layer.channel_of(layer.square)]
    return dense.view(layer.mask.shape)
