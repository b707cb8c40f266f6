"""Secrets at rest: the key in a file, and files and short values encrypted with AES-256-GCM.

A file is a sequence of sealed chunks; the nonce is the chunk's number, and number, end mark and the file's label are
authenticated, so that chunks cannot be swapped, cut off or moved to another file. Each key encrypts one file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.channel import Buffer
from protocol.errors import InputError, MaterialError, StorageError

CHUNK_BYTES = 4 << 20
TAG_BYTES = 16
KEY_BYTES = 32


def load_key(path: Path, private: bool = True) -> bytes:
    """A key that encrypts secrets at rest; made on first use, readable by its owner only. Raises InputError, StorageError.

    private: whether it may be readable by nobody but the owner and, as orchestrators mount secrets, a group.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
            try:
                with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                    out.write(os.urandom(KEY_BYTES))
                    out.flush()
                    os.fsync(out.fileno())
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.link(part, path)
            finally:
                part.unlink(missing_ok=True)
        if private and path.stat().st_mode & 0o037:
            raise InputError(f"others can read the key {path}", f"chmod 600 {path}")
        key = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot use the key {path}: {error.strerror}", "check the folder and its permissions") from error
    if len(key) != KEY_BYTES:
        raise InputError(f"{path} is no key of {KEY_BYTES} bytes", "restore it from a backup; stored material is lost without it")
    return key


def seal(key: bytes, secret: bytes, label: bytes) -> bytes:
    """A short secret, encrypted under `key` for the place that `label` names."""
    nonce = os.urandom(12)
    return nonce + AESGCM(key).encrypt(nonce, secret, label)


def unseal(key: bytes, sealed: bytes, label: bytes) -> bytes:
    """Inverse of `seal`. Raises StorageError if key or place are others, or the bytes were changed."""
    try:
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], label)
    except InvalidTag:
        raise StorageError("a stored secret cannot be decrypted", "is the master key the one that it was stored with?") from None


def _frames(parts: Iterable[Buffer]) -> Iterator[bytearray]:
    """Cut concatenated parts into chunks of CHUNK_BYTES, the last one shorter, perhaps empty."""
    frame = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            room = CHUNK_BYTES - len(frame)
            frame += view[:room]
            view = view[room:]
            if len(frame) == CHUNK_BYTES:
                yield frame
                frame = bytearray()
    yield frame


def write_sealed(path: Path, key: bytes, label: bytes, parts: Iterable[Buffer]) -> int:
    """Write an encrypted file readable by its owner only, durable when this returns; its size. Raises StorageError."""
    cipher = AESGCM(key)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as out:
                for number, frame in enumerate(_frames(parts)):
                    last = len(frame) < CHUNK_BYTES
                    out.write(cipher.encrypt(_nonce(number, last), bytes(frame), label))
                out.flush()
                os.fsync(out.fileno())
                return out.tell()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free some space, or move the folder") from error


def read_sealed(path: Path, key: bytes, label: bytes) -> bytearray:
    """The contents of an encrypted file. Raises MaterialError if it is missing, cut off or changed."""
    cipher, out = AESGCM(key), bytearray()
    try:
        with path.open("rb") as source:
            number, last = 0, False
            while not last:
                sealed = source.read(CHUNK_BYTES + TAG_BYTES)
                last = len(sealed) < CHUNK_BYTES + TAG_BYTES
                out += cipher.decrypt(_nonce(number, last), sealed, label)
                number += 1
    except (OSError, InvalidTag, ValueError):
        raise MaterialError("stored material is missing or damaged", "preprocess again") from None
    return out


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "little") + bytes([last])
