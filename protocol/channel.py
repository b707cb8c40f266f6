"""Ordered byte messages between two parties, and the in-memory pair that tests and simulations use."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from protocol.errors import PeerError, PeerTimeout, ProtocolViolation

Buffer = bytes | bytearray | memoryview


class Sender(Protocol):
    """One direction of a connection, the sending end."""

    def send(self, *parts: Buffer) -> None:
        """Send one message, the concatenation of `parts`. The parts may be reused as soon as it returns."""


class Receiver(Protocol):
    """One direction of a connection, the receiving end."""

    def receive(self, length: int) -> bytearray:
        """The next message. Raises ProtocolViolation unless it has exactly `length` bytes, PeerError if the peer is gone."""


class Outgoing(Sender, Protocol):
    """A sender of messages that may be handed over in pieces."""

    def send(self, *parts: Buffer, last: bool = True) -> None:
        """As Sender's; without `last` this is the beginning of a message only."""


class Incoming(Receiver, Protocol):
    """A receiver of messages that may be read as they arrive."""

    def pieces(self, length: int) -> Iterator[Buffer]:
        """The next message, piece by piece; errors as of `receive`, at the first piece that cannot be part of it."""


Out = TypeVar("Out", bound=Outgoing)
In = TypeVar("In", bound=Incoming)


class MemoryPipe:
    """Both ends of one direction in one process; counts bytes and messages."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        self._timeout_s = timeout_s
        self._begun = b""
        self.bytes = 0
        self.messages = 0

    def send(self, *parts: Buffer, last: bool = True) -> None:
        self._begun = b"".join((self._begun, *parts))
        if last:
            self.bytes += len(self._begun)
            self.messages += 1
            self._queue.put(self._begun)
            self._begun = b""

    def receive(self, length: int) -> bytearray:
        try:
            data = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise PeerTimeout("no message within the deadline") from None
        if data is None:
            raise PeerError("the peer closed the connection")
        if len(data) != length:
            raise ProtocolViolation(f"a message has {len(data):,} bytes where {length:,} are due")
        return bytearray(data)

    def pieces(self, length: int) -> Iterator[Buffer]:
        yield self.receive(length)

    def close(self) -> None:
        """Make the receiving end fail with PeerError once all messages are read."""
        self._queue.put(None)


class Channel(Outgoing, Incoming, Protocol):
    """Both directions of a connection."""


class Duplex(Generic[Out, In]):
    """One party's end of a connection made of two directions."""

    def __init__(self, outgoing: Out, incoming: In) -> None:
        self.outgoing, self.incoming = outgoing, incoming

    def send(self, *parts: Buffer, last: bool = True) -> None:
        self.outgoing.send(*parts, last=last)

    def receive(self, length: int) -> bytearray:
        return self.incoming.receive(length)

    def pieces(self, length: int) -> Iterator[Buffer]:
        return self.incoming.pieces(length)


MemoryChannel = Duplex[MemoryPipe, MemoryPipe]


def memory_pair() -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected ends."""
    there, back = MemoryPipe(), MemoryPipe()
    return Duplex(there, back), Duplex(back, there)
