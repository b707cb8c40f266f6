"""Every error that Relucent raises on purpose.

RelucentError
├── InputError             the user's own input: file, image, option
│   └── ModelFileError     a model file is missing, damaged, or of another version
├── ProtocolViolation      the peer broke the protocol; the session is destroyed
├── MaterialError          preprocessing material is unknown, used, expired, or of another model
│   └── MaterialElsewhere  another server keeps it
├── ModelMismatch          the parties hold different models or an outdated Delta
├── VersionMismatch        the peer speaks another protocol version
├── AccessDenied           the peer does not know this identity, or does not let it do this
├── ResourceLimit          the peer refuses for now: too much work or memory
├── StorageError           a file cannot be written: disk full, no permission
└── PeerError              the peer is unreachable, gone, or failed inside
    └── PeerTimeout        a deadline passed

Messages never contain a share, a mask, a key, an input or a weight.
"""

from __future__ import annotations


class RelucentError(Exception):
    """Base class. `hint` says what the reader can do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def one_line(text: str, limit: int = 500) -> str:
    """Text on one line of bounded length, without control characters that a peer may have put into it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's own error, or PyTorch's, which is a RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))


class InputError(RelucentError):
    """The user's own input is wrong."""


class ModelFileError(InputError):
    """A model file is missing, damaged, or of another version."""


class ProtocolViolation(RelucentError):
    """The peer sent what the protocol does not allow here."""


class MaterialError(RelucentError):
    """Preprocessing material cannot be used."""


class MaterialElsewhere(MaterialError):
    """Another server keeps the preprocessing material; it is not spent."""


class ModelMismatch(RelucentError):
    """The parties hold different models."""


class VersionMismatch(RelucentError):
    """The peer speaks another protocol version."""


class AccessDenied(RelucentError):
    """The peer does not accept this identity."""


class ResourceLimit(RelucentError):
    """The peer refuses for now."""


class StorageError(RelucentError):
    """A file cannot be written."""


class PeerError(RelucentError):
    """The peer is unreachable, gone, or failed inside."""


class PeerTimeout(PeerError):
    """A deadline passed."""
