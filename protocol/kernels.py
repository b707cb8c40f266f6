"""The protocol's innermost loops, compiled by numba: one pass over memory where numpy would take a dozen.

No kernel branches on a secret or takes an index from one. Arithmetic is modulo 2^64. Compiled for this processor when first imported, then
kept beside the module or in the user's cache, where that can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

_ONE, _ZERO = np.uint64(1), np.uint64(0)
_SEED = np.uint64(0xFFFFFFFFFFFFFFFE)
"""Of a block's low word: all but its last bit, which is the control bit."""
PAYLOAD = np.uint64(2)
"""Tweak of the low word, whose last bit is always clear in a seed: 0 and 1 give the child seeds, 2 and 3 the payloads."""


_TILE = 8
"""Pixels between two orders of pixels and channels: a cache line of either order is whole while it is at hand."""


def _words(dimensions: int, written: bool = False) -> types.Array:
    """uint64, row-major; arguments that are only read may lie at any address."""
    return types.Array(types.uint64, dimensions, "C", readonly=not written, aligned=written)


def _elements(dimensions: int, written: bool = False) -> types.Array:
    """int64, row-major, at any address."""
    return types.Array(types.int64, dimensions, "C", readonly=not written, aligned=False)


def _compiled(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def compile_now(function: Callable[..., None]) -> Callable[..., None]:
        signature = types.void(*arguments)
        try:
            return njit(signature, cache=True, nogil=True)(function)  # type: ignore[no-any-return]
        except (RuntimeError, OSError):  # no folder to keep it in can be written, or no space is left there
            return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]

    return compile_now


@_compiled(_words(3), _words(1), types.uint64, types.uint64, types.Array(types.uint8, 2, "C", readonly=True, aligned=False), _words(2),
           _words(2), _words(1, True), _words(2, True), _words(3, True))
def evaluate_level(hashed: Any, x: Any, shift: Any, next_shift: Any, controls: Any, seed_words: Any, payload_words: Any, t: Any, value: Any,
                   points: Any) -> None:
    """One level of `dcf.evaluate` for all keys.

    hashed: AES of `points`, whose two rows are, for each key, the blocks of the child's seed and of its payload. x: below 2^63; its bit
    `shift` has chosen the child, bit `next_shift` chooses the next. controls: (2, n), 0 or 1. t, value, points are updated.
    """
    for i in range(len(x)):
        mask = _ZERO - t[i]
        value[i, 0] += (hashed[1, i, 0] ^ points[1, i, 0]) + (payload_words[i, 0] & mask)
        value[i, 1] += (hashed[1, i, 1] ^ points[1, i, 1]) + (payload_words[i, 1] & mask)
        low, high = hashed[0, i, 0] ^ points[0, i, 0], hashed[0, i, 1] ^ points[0, i, 1]
        both = np.uint64(controls[0, i]) | (np.uint64(controls[1, i]) << _ONE)
        t[i] = (low & _ONE) ^ (((both >> ((x[i] >> shift) & _ONE)) & _ONE) & t[i])
        low = ((low & _SEED) ^ (seed_words[i, 0] & mask)) | ((x[i] >> next_shift) & _ONE)
        high ^= seed_words[i, 1] & mask
        points[0, i, 0], points[0, i, 1] = low, high
        points[1, i, 0], points[1, i, 1] = low ^ PAYLOAD, high


@_compiled(_words(4), _words(1), types.uint64, _words(2), _words(2, True), _words(2, True), _words(4, True), _words(2, True),
           _words(2, True), types.Array(types.uint8, 2, "C"))
def generate_level(hashed: Any, alpha: Any, shift: Any, payload: Any, t: Any, value: Any, points: Any, seed_words: Any,
                   payload_words: Any, controls: Any) -> None:
    """One level of `dcf.generate` for all keys.

    hashed: AES of `points`, (party, tweak, key, word): the blocks of both children's seeds, then of both children's payloads. Bit `shift`
    of alpha says which child is kept. t (party, key), value and points are updated; seed_words, payload_words (key, word) and
    controls (child, key) take this level of the keys.
    """
    for i in range(len(alpha)):
        bit = (alpha[i] >> shift) & _ONE
        right = _ZERO - bit  # all ones if the right child is kept
        left = ~right
        t0, t1 = t[0, i], t[1, i]
        sign = _ONE - (t1 << _ONE)  # (-1)^t1
        l0, r0 = hashed[0, 0, i, 0] ^ points[0, 0, i, 0], hashed[0, 1, i, 0] ^ points[0, 1, i, 0]
        l1, r1 = hashed[1, 0, i, 0] ^ points[1, 0, i, 0], hashed[1, 1, i, 0] ^ points[1, 1, i, 0]
        control_left = ((l0 ^ l1) & _ONE) ^ bit ^ _ONE
        control_right = ((r0 ^ r1) & _ONE) ^ bit
        control = (control_left & left) | (control_right & right)
        kept0, kept1 = (l0 & left) | (r0 & right), (l1 & left) | (r1 & right)
        lost = ((l0 ^ l1) & right) | ((r0 ^ r1) & left)
        seed_words[i, 0] = lost & _SEED
        low0, low1 = (kept0 ^ (lost & (_ZERO - t0))) & _SEED, (kept1 ^ (lost & (_ZERO - t1))) & _SEED
        l0, r0 = hashed[0, 0, i, 1] ^ points[0, 0, i, 1], hashed[0, 1, i, 1] ^ points[0, 1, i, 1]
        l1, r1 = hashed[1, 0, i, 1] ^ points[1, 0, i, 1], hashed[1, 1, i, 1] ^ points[1, 1, i, 1]
        lost = ((l0 ^ l1) & right) | ((r0 ^ r1) & left)
        seed_words[i, 1] = lost
        high0 = ((l0 & left) | (r0 & right)) ^ (lost & (_ZERO - t0))
        high1 = ((l1 & left) | (r1 & right)) ^ (lost & (_ZERO - t1))
        for w in range(2):
            l0, r0 = hashed[0, 2, i, w] ^ points[0, 2, i, w], hashed[0, 3, i, w] ^ points[0, 3, i, w]
            l1, r1 = hashed[1, 2, i, w] ^ points[1, 2, i, w], hashed[1, 3, i, w] ^ points[1, 3, i, w]
            lost_value = ((l1 & right) | (r1 & left)) - ((l0 & right) | (r0 & left))
            kept_value = ((l0 & left) | (r0 & right)) - ((l1 & left) | (r1 & right))
            word = sign * (lost_value - value[i, w] + payload[i, w] * bit)
            payload_words[i, w] = word
            value[i, w] += kept_value + sign * word
        t[0, i], t[1, i] = (kept0 & _ONE) ^ (t0 & control), (kept1 & _ONE) ^ (t1 & control)
        controls[0, i], controls[1, i] = np.uint8(control_left), np.uint8(control_right)
        for tweak in range(4):
            points[0, tweak, i, 0], points[0, tweak, i, 1] = low0 ^ np.uint64(tweak), high0
            points[1, tweak, i, 0], points[1, tweak, i, 1] = low1 ^ np.uint64(tweak), high1


@_compiled(types.Array(types.int64, 4, "C", readonly=True), types.int64, types.int64, types.int64, types.int64,
           types.Array(types.int8, 5, "C"))
def split_digits(x: Any, first: Any, last: Any, top: Any, left: Any, digits: Any) -> None:
    """The eight balanced 8-bit digits of x (N, C, H, W), -128 to 127 with sum_i digit_i 2^(8 i) = x modulo 2^64.

    Those of rows `first` to `last` - 1 go into digits (8, N, last - first + ..., W + ..., C) from row `top` and column `left` on.
    """
    count, channels, _, width = x.shape
    balance = np.int64(-0x7F7F7F7F7F7F7F80)  # 0x80 in every byte: x + this, xor this, has the digits as its bytes
    tile = np.empty((_TILE, channels), np.int64)
    for n in range(count):
        for row in range(first, last):
            for start in range(0, width, _TILE):
                wide = min(_TILE, width - start)
                for c in range(channels):
                    for j in range(wide):
                        tile[j, c] = (x[n, c, row, start + j] + balance) ^ balance
                for j in range(wide):
                    for i in range(8):
                        for c in range(channels):
                            digits[i, n, top + row - first, left + start + j, c] = np.int8(tile[j, c] >> np.int64(8 * i))


@_compiled(types.Array(types.int32, 4, "C", readonly=True), types.Array(types.int64, 1, "C", readonly=True), types.int64,
           _elements(3, True))
def join_digits(products: Any, step: Any, first: Any, out: Any) -> None:
    """out[n, o, first + p] += step[o] sum_i products[i, n, p, o] 2^(8 i) modulo 2^64, for eight digits i."""
    _, count, pixels, outputs = products.shape
    tile = np.empty((_TILE, outputs), np.int64)
    for n in range(count):
        for start in range(0, pixels, _TILE):
            wide = min(_TILE, pixels - start)
            for j in range(wide):
                for o in range(outputs):
                    tile[j, o] = products[7, n, start + j, o]
                for i in range(6, -1, -1):
                    for o in range(outputs):
                        tile[j, o] = (tile[j, o] << np.int64(8)) + products[i, n, start + j, o]
                for o in range(outputs):
                    tile[j, o] *= step[o]
            for o in range(outputs):
                for j in range(wide):
                    out[n, o, first + start + j] += tile[j, o]


@_compiled(_elements(2), _elements(1), types.int64, _elements(1), _elements(2), _elements(2, True))
def open_share(share: Any, shift: Any, bits: Any, active: Any, opening: Any, d: Any) -> None:
    """The server's d = floor((share + shift) / 2^bits) - opening at the active pixels.

    share (batch, pixels); shift (pixels,), or empty for none; active: indices (A,), or empty for all pixels; opening, d (batch, A).
    """
    for n in range(len(d)):
        for i in range(d.shape[1]):
            pixel = active[i] if len(active) else i
            d[n, i] = ((share[n, pixel] + (shift[pixel] if len(shift) else 0)) >> bits) - opening[n, i]


@_compiled(_elements(2), _elements(2), _elements(1), types.int64, _elements(1), _elements(2, True))
def square_server(d: Any, opening: Any, factor: Any, bits: Any, constant: Any, y: Any) -> None:
    """The server's part of the squares: from 2 (alpha e + w_S) in y to floor(factor (y + (d + opening)^2) / 2^bits) + constant.

    d, opening, y (batch, A); factor, constant (A,), or empty for none.
    """
    for n in range(len(d)):
        for i in range(d.shape[1]):
            z = d[n, i] + opening[n, i]
            square = (y[n, i] + z * z) * (factor[i] if len(factor) else 1)
            y[n, i] = (square >> bits) + (constant[i] if len(constant) else 0)


@_compiled(_elements(1), _elements(1), _elements(1), types.int64, types.int64, _elements(1), _elements(1, True))
def square_client(d: Any, twice: Any, factor: Any, first: Any, bits: Any, mask: Any, y: Any) -> None:
    """The client's part of the squares: from z_C^2 + 2 w_C in y to -floor(-factor (y + 2 z_C d) / 2^bits) - mask.

    d, twice, mask, y: any run of a layer's elements, of all images one after another, the first of them element `first`; factor: of
    one image's elements, or empty for none.
    """
    for i in range(len(d)):
        square = (y[i] + twice[i] * d[i]) * (factor[(first + i) % len(factor)] if len(factor) else 1)
        y[i] = -((-square) >> bits) - mask[i]


@_compiled(_words(1), _words(2), _words(1), _words(1), _words(1), types.uint64, types.uint64, _words(1, True))
def finish_relu(d: Any, shares: Any, sign: Any, masked_sign: Any, mask: Any, bits: Any, server: Any, out: Any) -> None:
    """A party's share of ReLU(d - A) from its shares of the comparison's payloads (protocol section 5). d is public; server: 1 or 0."""
    for i in range(len(d)):
        core = d[i] * (shares[i, 0] - sign[i]) + masked_sign[i] - shares[i, 1]
        upper = _ZERO - ((d[i] >> bits) & _ONE)  # all ones if d lies in the upper half
        outside = (d[i] & (_ZERO - server)) - mask[i]
        out[i] = ((_ZERO - core) & upper) | ((core + outside) & ~upper)
