"""Between logical messages and protobuf chunks: pure, and the only code that knows both.

A logical message has a sequence number and travels as chunks of at most CHUNK_BYTES. Its length is never announced:
the receiver knows it from the plan, and anything else is a ProtocolViolation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from protocol.channel import Buffer
from protocol.errors import ProtocolViolation, VersionMismatch
from protocol.relucent_pb2 import Chunk

PROTOCOL_VERSION = 1
CHUNK_BYTES = 1 << 20
FRAME_BYTES = 5
"""gRPC's prefix of every message."""
ID_BYTES = 16
MAX_DISCARDS = 256
"""Materials that one Discard names at most."""
SECRET_BYTES = 32


def check_version(version: int) -> None:
    """Raise VersionMismatch unless the peer speaks this program's protocol version."""
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(f"the peer speaks protocol version {version}, this program speaks {PROTOCOL_VERSION}",
                              "install the same Relucent version on both sides")


def check_bytes(value: bytes, length: int, name: str) -> bytes:
    """Raise ProtocolViolation unless `value` has `length` bytes."""
    if len(value) != length:
        raise ProtocolViolation(f"{name} has {len(value)} bytes where {length} are due")
    return value


def to_chunks(sequence: int, parts: tuple[Buffer, ...], last: bool = True, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut one logical message, the concatenation of `parts`; without `last` its beginning, which is not empty."""
    views = [memoryview(part) for part in parts]
    left = sum(map(len, views))
    pending: list[memoryview] = []
    room = chunk_bytes
    for view in views:
        while len(view):
            piece, view = view[:room], view[room:]
            pending.append(piece)
            room -= len(piece)
            left -= len(piece)
            if room == 0 and left:
                yield Chunk(sequence=sequence, data=b"".join(pending))
                pending, room = [], chunk_bytes
    yield Chunk(sequence=sequence, last=last, data=b"".join(pending))


class ChunkSender:
    """`protocol.channel.Outgoing` over a function that transmits one chunk. chunk_bytes: of the largest chunk, CHUNK_BYTES at most."""

    def __init__(self, transmit: Callable[[Chunk], None]) -> None:
        self._transmit = transmit
        self._sequence = 0
        self.chunk_bytes = CHUNK_BYTES
        self.bytes = 0

    def send(self, *parts: Buffer, last: bool = True) -> None:
        for chunk in to_chunks(self._sequence, parts, last, self.chunk_bytes):
            self.bytes += chunk.ByteSize() + FRAME_BYTES
            self._transmit(chunk)
        self._sequence += last


class ChunkReceiver:
    """`protocol.channel.Incoming` over a function that waits for the next chunk."""

    def __init__(self, wait: Callable[[], Chunk]) -> None:
        self._wait = wait
        self._sequence = 0
        self.bytes = 0

    def receive(self, length: int) -> bytearray:
        out = bytearray()
        self.receive_into(out, length)
        return out

    def receive_into(self, out: bytearray, length: int) -> None:
        """Append the next message to `out`, which then has `length` bytes; what came before a failure stays there."""
        for piece in self.pieces(length - len(out)):
            out += piece

    def pieces(self, length: int) -> Iterator[bytes]:
        """The next message as it arrives; each chunk is checked before it is handed out."""
        arrived = 0
        while True:
            chunk = self._wait()
            self.bytes += chunk.ByteSize() + FRAME_BYTES
            if chunk.sequence != self._sequence:
                raise ProtocolViolation(f"message {chunk.sequence} arrived where {self._sequence} is due")
            if len(chunk.data) > CHUNK_BYTES:
                raise ProtocolViolation("a chunk is larger than the protocol allows")
            arrived += len(chunk.data)
            if arrived > length:
                raise ProtocolViolation(f"message {self._sequence} is longer than the {length:,} bytes due")
            if not chunk.last and not chunk.data:
                raise ProtocolViolation("an empty chunk inside a message")
            if chunk.last and arrived != length:
                raise ProtocolViolation(f"message {self._sequence} has {arrived:,} bytes where {length:,} are due")
            self._sequence += chunk.last
            yield chunk.data
            if chunk.last:
                return
