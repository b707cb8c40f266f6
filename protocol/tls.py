"""Certificates and identities: what TLS needs from files, and what a verified certificate says.

A certificate of ours names its holder in a URI, `relucent:ROLE:NAME`, among its alternative names. Roles: server, dealer,
client. Links use TLS 1.3 only (see `protocol.transport`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from protocol.errors import AccessDenied, InputError

ROLES = ("server", "dealer", "client")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Identity:
    """Who a peer is: its role and name, from its certificate or its token."""

    role: str
    name: str

    @property
    def uri(self) -> str:
        return f"relucent:{self.role}:{self.name}"


ANYBODY = Identity("client", "anybody")
"""The identity of every client under plaintext transport."""


def parse_identity(uri: str) -> Identity | None:
    """The identity in a URI, or None if it is not one of ours."""
    scheme, _, rest = uri.partition(":")
    role, _, name = rest.partition(":")
    return Identity(role, name) if scheme == "relucent" and role in ROLES and NAME.fullmatch(name) else None


def check_name(name: str) -> str:
    """Raise InputError unless `name` can name a party."""
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} is no valid name", "use 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}", "make one with `relucent-server init`") from error


def load_ca(path: Path) -> bytes:
    """The PEM certificates of those that a party trusts. Raises InputError."""
    data = _read(path, "the CA certificate")
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise InputError(f"{path} holds no PEM certificate", "pass the ca.pem that `init` wrote") from error
    return data


def load_key_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """PEM key and certificate chain, as gRPC wants them. Raises InputError if they are damaged, no pair, or expired."""
    chain, secret = _read(certificate, "the certificate"), _read(key, "the private key")
    try:
        own = x509.load_pem_x509_certificates(chain)[0]
        private = serialization.load_pem_private_key(secret, None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{certificate} and {key} are no PEM certificate and unencrypted private key",
                         "pass the files that `init` wrote") from error
    encoding, kind = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if own.public_key().public_bytes(encoding, kind) != private.public_key().public_bytes(encoding, kind):
        raise InputError(f"{key} is not the key of {certificate}", "pass the two files that belong together")
    if own.not_valid_after_utc < datetime.now(UTC):
        raise InputError(f"{certificate} expired on {own.not_valid_after_utc:%Y-%m-%d}", "issue a new one with `init --renew`")
    return secret, chain


def check_valid(pem: bytes) -> None:
    """Raise AccessDenied if a peer's certificate has expired: TLS looks at it when the connection is made only."""
    if x509.load_pem_x509_certificate(pem).not_valid_after_utc < datetime.now(UTC):
        raise AccessDenied("the certificate has expired", "ask for a new one")


def seconds_left(path: Path) -> float:
    """How long a certificate file is valid yet; negative if it has expired or cannot be read."""
    try:
        return (x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc - datetime.now(UTC)).total_seconds()
    except (OSError, ValueError):
        return -1.0
