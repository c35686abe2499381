"""A certificate authority for one run, the server's certificate, and a key pair for each site's node."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from sfl.engine.kit import CERTIFICATE
from sfl.io.tree import write_secret

_VALID = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """Files of a server's TLS.

    Attributes:
        authority: Certificate that clients trust.
        certificate: The server's own.
        key: The server's private key.
    """

    authority: Path
    certificate: Path
    key: Path


def make_server_keys(folder: Path) -> ServerKeys:
    """An authority whose key is forgotten at once, and a certificate of it for this machine's loopback interface."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = _certificate("sfl run authority", authority_key, None, None)
    server = _certificate("localhost", server_key, authority, authority_key)
    files = ServerKeys(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    files.authority.write_bytes(authority.public_bytes(Encoding.PEM))
    files.certificate.write_bytes(server.public_bytes(Encoding.PEM))
    write_secret(files.key, server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def make_node_keys(folder: Path, site: str) -> tuple[Path, Path]:
    """A key pair that a site's node proves its identity with: private and public file, in OpenSSH's form."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / f"{site}.key", folder / f"{site}.pub"
    write_secret(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return private, public


def make_kits(folder: Path, sites: Sequence[str]) -> dict[str, Path]:
    """By site, a folder with what it proves to other sites who it is; the key of their authority is forgotten."""
    authority_key = ec.generate_private_key(ec.SECP384R1())
    authority = _certificate("sfl run sites", authority_key, None, None)
    kits: dict[str, Path] = {}
    for site in sites:
        kit, key = folder / site, ec.generate_private_key(ec.SECP384R1())
        kit.mkdir(parents=True)
        (kit / "rootCA.pem").write_bytes(authority.public_bytes(Encoding.PEM))
        (kit / CERTIFICATE).write_bytes(_certificate(site, key, authority, authority_key).public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_secret(kit / "client.key", private)
        kits[site] = kit
    return kits


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey | None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = issuer_key or key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer is not None else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if issuer is not None:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA384())
