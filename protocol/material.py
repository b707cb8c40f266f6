"""What preprocessing leaves behind for one inference, usable once.

Security contract: `take` hands the contents out once; afterwards, or after `destroy`, the material is spent for
ever. The two halves come from any implementation of `ClientCorrelations` and `ServerCorrelations`; the online
phase cannot tell which.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from protocol.dcf import DcfKeys
from protocol.errors import MaterialError
from protocol.plan import ActivationStep, Plan


@dataclass(frozen=True, repr=False)
class ReluShare:
    """One party's correlated randomness for a layer's ReLUs: masks A, DCF keys, shares of mu and A mu; flat int64."""

    mask: Tensor
    keys: tuple[DcfKeys, ...]
    sign: Tensor
    masked_sign: Tensor

    def __repr__(self) -> str:
        return f"ReluShare(count={len(self.mask)}, <secret>)"

    def part(self, first: int, last: int) -> ReluShare:
        """Those of ReLUs first to last - 1."""
        keys, start = [], 0
        for block in self.keys:
            end = start + len(block)
            if start < last and first < end:
                keys.append(block.part(max(first, start) - start, min(last, end) - start))
            start = end
        return ReluShare(self.mask[first:last], tuple(keys), self.sign[first:last], self.masked_sign[first:last])


@dataclass(frozen=True, repr=False)
class SquareShare:
    """One party's correlated randomness for a layer's squares: alpha and w_S, or beta and w_C; flat int64."""

    mask: Tensor
    product: Tensor

    def __repr__(self) -> str:
        return f"SquareShare(count={len(self.mask)}, <secret>)"


class ClientCorrelations(Protocol):
    """Source of the client's correlated randomness, in plan order. The dealer is one implementation."""

    def fresh_mask(self, shape: tuple[int, ...]) -> Tensor:
        """A mask r of the client's that the source knows."""

    def linear(self, shape: tuple[int, ...]) -> Tensor:
        """t_C of a private map's output."""

    def squares(self, step: ActivationStep) -> SquareShare:
        """beta and w_C."""

    def relus(self, step: ActivationStep) -> ReluShare:
        """a_C, keys, shares."""


class ServerCorrelations(Protocol):
    """Source of the server's correlated randomness, in plan order."""

    def linear(self, shape: tuple[int, ...]) -> Tensor:
        """t_S = B*r - t_C."""

    def squares(self, step: ActivationStep) -> SquareShare:
        """alpha and w_S."""

    def relus(self, step: ActivationStep) -> ReluShare:
        """a_S, keys, shares."""


@dataclass(frozen=True, repr=False)
class ClientActivation:
    """The client's half of one activation layer, all tensors (batch, active pixels) unless said otherwise.

    twice: 2 z_C. base: z_C^2 + 2 w_C. next_mask: r' of the result at the active pixels.
    """

    step: ActivationStep
    twice: Tensor
    base: Tensor
    relu: ReluShare | None
    next_mask: Tensor

    def __repr__(self) -> str:
        return "ClientActivation(<secret>)"


@dataclass(frozen=True, repr=False)
class ServerActivation:
    """The server's half of one activation layer, tensors (batch, active pixels) unless said otherwise.

    opening: what is subtracted from z_S to give d: alpha at squares, -(a_S + e) at ReLUs. cross: 2 (alpha e + w_S).
    passed: the client's message M at the identity pixels (batch, identities).
    """

    step: ActivationStep
    opening: Tensor
    cross: Tensor
    relu: ReluShare | None
    passed: Tensor

    def __repr__(self) -> str:
        return "ServerActivation(<secret>)"


@dataclass(frozen=True, repr=False)
class ClientContents:
    """All the client needs online: the mask of its input, its activations, its share of the logits."""

    input_mask: Tensor
    activations: tuple[ClientActivation, ...]
    logits: Tensor


@dataclass(frozen=True, repr=False)
class ServerContents:
    """All the server needs online: t_S of each private map, messages of re-maskings, activations; in plan order."""

    linear: tuple[Tensor, ...]
    remask: tuple[Tensor, ...]
    activations: tuple[ServerActivation, ...]


C = TypeVar("C", ClientContents, ServerContents)


class Material(Generic[C]):
    """One party's half of one inference's preprocessing; single use, thread-safe."""

    def __init__(self, material_id: bytes, plan: Plan, contents: C) -> None:
        self.material_id, self.plan = material_id, plan
        self._contents: C | None = contents
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Material(id={self.material_id.hex()[:8]}, batch={self.plan.batch}, <secret>)"

    def take(self) -> C:
        """The contents, the first time. Raises MaterialError afterwards."""
        with self._lock:
            contents, self._contents = self._contents, None
        if contents is None:
            raise MaterialError("this preprocessing material has been used", "preprocess again; material is used once")
        return contents

    def destroy(self) -> None:
        """Forget the contents."""
        with self._lock:
            self._contents = None
