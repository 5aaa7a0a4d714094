"""TLS of the averaging service: its self-signed certificate, and how a client looks at one. Trust comes from the run key, not from here."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from decentra.errors import ConfigError, Unreachable
from decentra.invite import split_address

# Not a host name: clients pin the certificate itself, so the name only has to be the same on both sides.
TLS_NAME = "averaging.decentra"
_CERTIFICATE_MARK = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True)
class ServerTls:
    """A service's TLS key and certificate in PEM; ``fingerprint`` is the sha256 of the certificate in DER."""

    key_pem: bytes
    certificate_pem: bytes
    fingerprint: bytes

    def __repr__(self) -> str:
        return f"ServerTls({self.fingerprint.hex()})"


def fingerprint_of(certificate_der: bytes) -> bytes:
    """32 bytes: sha256 of a certificate in DER."""
    return hashlib.sha256(certificate_der).digest()


def create_tls() -> ServerTls:
    """A new P-256 key (gRPC's TLS library speaks no Ed25519) and its self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, TLS_NAME)])
    builder = x509.CertificateBuilder(subject_name=name, issuer_name=name, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    # Valid for ever: the certificate signed by the run key carries the expiry, and a home clock that is off must not lock anyone out.
    builder = builder.not_valid_before(datetime(2000, 1, 1, tzinfo=UTC)).not_valid_after(datetime(2199, 1, 1, tzinfo=UTC))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _tls(key_pem, certificate.public_bytes(serialization.Encoding.PEM))


def load_or_create_tls(path: Path) -> ServerTls:
    """Read key and certificate from one file (mode 0600), or make it at the first start. Raises ConfigError."""
    if not path.exists():
        _save(path, create_tls())
    try:
        key_pem, mark, rest = path.read_bytes().partition(_CERTIFICATE_MARK)
        serialization.load_pem_private_key(key_pem, password=None)
        return _tls(key_pem, mark + rest)
    except OSError as error:
        raise ConfigError(f"TLS file {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigError(
            f"TLS file {path}: expected a private key and a certificate in PEM; restore it from your backup,"
            " or delete it and issue a new service certificate with the run key"
        ) from None


def _save(path: Path, tls: ServerTls) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(tls.key_pem + tls.certificate_pem)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)


def _tls(key_pem: bytes, certificate_pem: bytes) -> ServerTls:
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    return ServerTls(key_pem, certificate_pem, fingerprint_of(certificate.public_bytes(serialization.Encoding.DER)))


async def fetch_certificate(address: str, timeout_s: float) -> bytes:
    """The certificate (DER) that whoever listens at ``host:port`` shows; nothing is sent but the handshake. Raises Unreachable."""
    host, port = split_address(address)
    context = ssl.create_default_context()
    context.check_hostname = False  # the certificate is judged by its fingerprint, after the run key's word for it is known
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=TLS_NAME)
    except TimeoutError:
        raise Unreachable(f"the averaging service at {address} did not answer within {timeout_s:.0f} s") from None
    except ssl.SSLError as error:
        raise Unreachable(f"{address} answers, but not with TLS ({error.reason}); is it the averaging service's port?") from None
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"the averaging service at {address} cannot be reached ({error}); is it running, is the port open?") from None
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    if not isinstance(der, bytes) or not der:
        raise Unreachable(f"{address} showed no certificate; is it the averaging service's port?")
    return der


def pem_of(certificate_der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(certificate_der).encode()
