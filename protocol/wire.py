"""Between logical messages and protobuf chunks: pure, and the only code that knows both.

A logical message has a sequence number and travels as chunks of at most CHUNK_BYTES. Its length is never announced:
the receiver knows it from the plan, and anything else is a ProtocolViolation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


def _wire_bytes(sequence: int, last: bool, length: int) -> int:
    """What a chunk with `length` bytes of data takes on the wire. To tell it, protobuf would serialise them."""
    data = 1 + (length.bit_length() + 6) // 7 + length if length else 0
    return FRAME_BYTES + Chunk(sequence=sequence, last=last).ByteSize() + data


def _cut(parts: tuple[Buffer, ...], chunk_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """The concatenation of `parts` in pieces, each with whether it is the last; at least one, which may be empty."""
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
                yield b"".join(pending), False
                pending, room = [], chunk_bytes
    yield b"".join(pending), True


def _chunk(carrier: type[Any], sequence: int, last: bool, data: bytes) -> Any:
    message = carrier()
    chunk = message if carrier is Chunk else message.chunk  # filled where it lies: protobuf copies what is put into a message
    chunk.sequence, chunk.last, chunk.data = sequence, last, data
    return message


def to_chunks(sequence: int, parts: tuple[Buffer, ...], carrier: type[Any] = Chunk) -> Iterator[Any]:
    """Cut one logical message, the concatenation of `parts`. carrier: Chunk, or a type of message that has one as its field `chunk`."""
    for data, last in _cut(parts, CHUNK_BYTES):
        yield _chunk(carrier, sequence, last, data)


class ChunkSender:
    """`protocol.channel.Outgoing` over a function that transmits one message of the type `carrier`, as of `to_chunks`.

    chunk_bytes: of the largest chunk, CHUNK_BYTES at most.
    """

    def __init__(self, transmit: Callable[[Any], None], carrier: type[Any] = Chunk) -> None:
        self._transmit, self._carrier = transmit, carrier
        self._sequence = 0
        self.chunk_bytes = CHUNK_BYTES
        self.bytes = 0

    def send(self, *parts: Buffer, last: bool = True) -> None:
        for data, end in _cut(parts, self.chunk_bytes):
            self.bytes += _wire_bytes(self._sequence, last and end, len(data))
            self._transmit(_chunk(self._carrier, self._sequence, last and end, data))
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
            data = chunk.data  # a copy each time
            self.bytes += _wire_bytes(chunk.sequence, chunk.last, len(data))
            if chunk.sequence != self._sequence:
                raise ProtocolViolation(f"message {chunk.sequence} arrived where {self._sequence} is due")
            if len(data) > CHUNK_BYTES:
                raise ProtocolViolation("a chunk is larger than the protocol allows")
            arrived += len(data)
            if arrived > length:
                raise ProtocolViolation(f"message {self._sequence} is longer than the {length:,} bytes due")
            if not chunk.last and not data:
                raise ProtocolViolation("an empty chunk inside a message")
            if chunk.last and arrived != length:
                raise ProtocolViolation(f"message {self._sequence} has {arrived:,} bytes where {length:,} are due")
            self._sequence += chunk.last
            yield data
            if chunk.last:
                return
