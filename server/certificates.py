"""A certificate authority in a folder, for development and small deployments: one command, one certificate.

Keys are P-256, readable by their owner only. Larger deployments bring certificates of their own authority; these need a URI
`relucent:ROLE:NAME` among their alternative names where a peer checks identities (a server at its dealer, a client by certificate).
"""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.errors import InputError, StorageError
from protocol.tls import Identity, parse_identity

CA_DAYS, DAYS = 3650, 365


def _write(path: Path, data: bytes, secret: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free some space, or name another folder") from error


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _builder(subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    until = now + timedelta(days=days)
    return (x509.CertificateBuilder().subject_name(_name(subject)).issuer_name(issuer).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, until) - timedelta(minutes=5)).not_valid_after(until))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def holder(certificate: Path) -> tuple[Identity, list[str]]:
    """Whom a certificate names, and the DNS names and IP addresses that it is for. Raises InputError."""
    try:
        shown = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (identity,) = filter(None, map(parse_identity, names.get_values_for_type(x509.UniformResourceIdentifier)))
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise InputError(f"{certificate} does not say whom it names", "say so: pass --host, and for a server --name") from error
    return identity, names.get_values_for_type(x509.DNSName) + [str(a) for a in names.get_values_for_type(x509.IPAddress)]


class Authority:
    """The authority whose ca.pem and ca-key.pem lie in a folder; made there if there is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        certificate, key = folder / "ca.pem", folder / "ca-key.pem"
        if certificate.exists() != key.exists():
            raise InputError(f"{folder} holds only one of ca.pem and ca-key.pem",
                             "copy both there to issue certificates, or use another folder")
        if not certificate.exists():
            self._make(certificate, key)
        try:
            self._certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
            private = serialization.load_pem_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} holds no readable authority", "use another folder") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise InputError(f"{key} is no elliptic-curve key", "use another folder")
        self._key = private

    def _make(self, certificate: Path, key: Path) -> None:
        private = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
                              data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False)
        built = (_builder("Relucent development CA", _name("Relucent development CA"), private, CA_DAYS)
                 .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).add_extension(usage, critical=True)
                 .sign(private, hashes.SHA256()))
        _write(key, _pem(private), secret=True)
        _write(certificate, built.public_bytes(serialization.Encoding.PEM), secret=False)

    def issue(self, identity: Identity, hosts: list[str], days: int = DAYS, renew: bool = False) -> tuple[Path, Path]:
        """Certificate and key files ROLE.pem and ROLE-key.pem (clients: NAME.pem) for an identity.

        hosts: DNS names and IP addresses that it is reached at. Raises InputError if the files exist and `renew` is not set.
        """
        stem = identity.name if identity.role == "client" else identity.role
        if identity.role == "client" and (stem in ("ca", "server", "dealer") or stem.endswith("-key")):
            raise InputError(f"a client named {stem!r} would have the files of somebody else", "choose another name")
        certificate, key = self._folder / f"{stem}.pem", self._folder / f"{stem}-key.pem"
        if certificate.exists() and not renew:
            raise InputError(f"{certificate} exists", "pass --renew to replace it")
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        private = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([] if identity.role == "client" else [ExtendedKeyUsageOID.SERVER_AUTH])
        built = (_builder(identity.name, self._certificate.subject, private, days)
                 .add_extension(x509.SubjectAlternativeName(names), critical=False)
                 .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
                 .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
                 .sign(self._key, hashes.SHA256()))
        _write(key, _pem(private), secret=True)
        _write(certificate, built.public_bytes(serialization.Encoding.PEM), secret=False)
        return certificate, key
