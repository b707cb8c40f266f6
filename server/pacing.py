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
MAX_PIECE_BYTES = 1 << 17
"""A link on which pieces would be larger is fast: nothing is cut."""
PIECES = 16
"""Of one message, at most: more would cost the client's evaluation of comparisons more than they save."""
PIECE_S = 6e-3
"""What a piece is to take there and back, at the rate of the fastest exchange so far: finer ones do not pay for their own handling."""


class Paced(Duplex[ChunkSender, ChunkReceiver]):
    """The server's end of an online call. An exchange is a message and the answer to it, of as many bytes."""

    def __init__(self, outgoing: ChunkSender, incoming: ChunkReceiver) -> None:
        super().__init__(outgoing, incoming)
        self._piece = FIRST_PIECE_BYTES
        self._fastest = 0.0  # bytes a second
        self._sending_s: float | None = None

    def send(self, *parts: Buffer, last: bool = True) -> None:
        started = time.perf_counter()
        length = sum(memoryview(part).nbytes for part in parts)
        self.outgoing.chunk_bytes = min(max(self._piece, length // PIECES) & -ELEMENT_BYTES, CHUNK_BYTES)
        super().send(*parts, last=last)
        self._sending_s = time.perf_counter() - started

    def receive(self, length: int) -> bytearray:
        started = time.perf_counter()
        data = super().receive(length)
        if self._sending_s is not None:  # not of the input, which answers nothing
            self._fastest = max(self._fastest, length / (self._sending_s + time.perf_counter() - started))
            piece = max(int(PIECE_S * self._fastest), MIN_PIECE_BYTES)
            self._piece = piece if piece < MAX_PIECE_BYTES else CHUNK_BYTES
        return data
