"""How finely the server cuts what it sends online.

The client answers a layer's d piece by piece. On a slow link fine pieces keep both directions busy at once; on a fast one each costs
more than it saves.
"""

from __future__ import annotations

import time

from protocol.channel import Buffer, Duplex
from protocol.ring import ELEMENT_BYTES
from protocol.wire import CHUNK_BYTES, ChunkReceiver, ChunkSender

FIRST_PIECE_BYTES = 1 << 17
"""When the link is not known yet."""
MIN_PIECE_BYTES = 1 << 13
MAX_PIECE_BYTES = 1 << 18
"""A link on which pieces would be larger is fast: nothing is cut."""
PIECE_S = 6e-3
"""What a piece is to take there and back, at the rate of the fastest exchange so far: finer ones do not pay for their own handling."""


class Paced(Duplex[ChunkSender, ChunkReceiver]):
    """The server's end of an online call. An exchange is a message and the answer to it, of as many bytes."""

    def __init__(self, outgoing: ChunkSender, incoming: ChunkReceiver) -> None:
        super().__init__(outgoing, incoming)
        outgoing.chunk_bytes = FIRST_PIECE_BYTES
        self._fastest = 0.0  # bytes a second
        self._sending_s: float | None = None

    def send(self, *parts: Buffer, last: bool = True) -> None:
        started = time.perf_counter()
        super().send(*parts, last=last)
        self._sending_s = time.perf_counter() - started

    def receive(self, length: int) -> bytearray:
        started = time.perf_counter()
        data = super().receive(length)
        if self._sending_s is not None:  # not of the input, which answers nothing
            self._fastest = max(self._fastest, length / (self._sending_s + time.perf_counter() - started))
            piece = max(int(PIECE_S * self._fastest), MIN_PIECE_BYTES) & -ELEMENT_BYTES
            self.outgoing.chunk_bytes = piece if piece < MAX_PIECE_BYTES else CHUNK_BYTES
        return data
