"""Who a site is to the other sites: it signs its keys of a round, and they check whose they are.

A server hands keys on. Were they not signed, it could hand on its own, and read everything.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from sfl.errors import ConfigError, ProtocolError

__all__ = ["CertifiedIdentity", "Identity", "RehearsedIdentity"]

_Signer: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Identity(ABC):
    """What a site signs with, and what it holds other sites' signatures against.

    Attributes:
        binding: Whether it tells sites apart. One that does not is for rehearsals, where nobody needs to be told apart,
            and where a round may be repeated.
    """

    binding: bool = True

    @property
    @abstractmethod
    def certificate(self) -> bytes:
        """What it shows beside a signature."""

    @abstractmethod
    def sign(self, data: bytes) -> bytes:
        """Sign as this site."""

    @abstractmethod
    def check(self, name: str, certificate: bytes, data: bytes, signature: bytes) -> None:
        """Whether ``data`` was signed by the site of this name.

        Raises:
            ProtocolError: If it was not, or that cannot be known.
        """


@dataclass(frozen=True)
class RehearsedIdentity(Identity):
    """The identity of a simulated site, which anybody can work out from its name: all sites are one person's.

    It takes the same steps as a real one, and protects from nobody.

    Attributes:
        name: Of the site.
    """

    name: str
    binding = False

    @property
    def certificate(self) -> bytes:
        """Nothing: the name says it all."""
        return b""

    def sign(self, data: bytes) -> bytes:
        """Ed25519, with the key that the name stands for."""
        return _rehearsed(self.name).sign(data)

    def check(self, name: str, certificate: bytes, data: bytes, signature: bytes) -> None:  # noqa: ARG002
        """See ``Identity.check``."""
        try:
            _rehearsed(name).public_key().verify(signature, data)
        except InvalidSignature:
            raise _foreign(name, "another signature") from None


def _rehearsed(name: str) -> Ed25519PrivateKey:
    seed = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"sfl rehearsal").derive(name.encode())
    return Ed25519PrivateKey.from_private_bytes(seed)


class CertifiedIdentity(Identity):
    """A site with a certificate of its federation, such as a provisioned FLARE kit holds.

    Args:
        certificate: The site's, in PEM; its common name is the site's.
        key: Its private key, in PEM: RSA or of an elliptic curve.
        root: The federation's own certificate, in PEM. The site trusts what this has signed, and nothing else.
    """

    def __init__(self, certificate: bytes, key: bytes, root: bytes) -> None:
        signer = load_pem_private_key(key, None)
        if not isinstance(signer, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise ConfigError(f"a site's key must be RSA or of an elliptic curve, got {type(signer).__name__}.")
        self._signer: _Signer = signer
        self._root = x509.load_pem_x509_certificate(root)
        self._certificate = certificate
        shown = x509.load_pem_x509_certificate(certificate)
        if shown.public_key() != signer.public_key():
            raise ConfigError("a site's certificate must be that of its key, got another's. Put the right one there.")
        self.name = _common_name(shown)

    @classmethod
    def of_kit(cls, folder: Path) -> CertifiedIdentity:
        """That of a provisioned kit's ``startup`` folder.

        Raises:
            ConfigError: If there is none.
        """
        try:
            parts = [(folder / name).read_bytes() for name in ("client.crt", "client.key", "rootCA.pem")]
            return cls(*parts)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder} must hold the site's certificate, its key and the federation's root, got: {error}. "
                "Secure aggregation needs them, as sites must know each other. Provision the site."
            ) from None

    @property
    def certificate(self) -> bytes:
        """In PEM."""
        return self._certificate

    def sign(self, data: bytes) -> bytes:
        """RSA-PSS or ECDSA, over SHA-256."""
        if isinstance(self._signer, rsa.RSAPrivateKey):
            return self._signer.sign(data, _pss(), SHA256())
        return self._signer.sign(data, ec.ECDSA(SHA256()))

    def check(self, name: str, certificate: bytes, data: bytes, signature: bytes) -> None:
        """See ``Identity.check``."""
        try:
            shown = x509.load_pem_x509_certificate(certificate)
            shown.verify_directly_issued_by(self._root)
            now = datetime.datetime.now(datetime.UTC)
            if not shown.not_valid_before_utc <= now <= shown.not_valid_after_utc:
                raise _foreign(name, "a certificate that has expired or is not valid yet")
            if _common_name(shown) != name:
                raise _foreign(name, f"a certificate of {_common_name(shown)!r}")
            public = shown.public_key()
            if isinstance(public, rsa.RSAPublicKey):
                public.verify(signature, data, _pss(), SHA256())
            elif isinstance(public, ec.EllipticCurvePublicKey):
                public.verify(signature, data, ec.ECDSA(SHA256()))
            else:
                raise _foreign(name, f"a key that is {type(public).__name__}")
        except (InvalidSignature, ValueError, TypeError):
            raise _foreign(name, "a certificate of another federation, or another signature") from None


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH)


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _foreign(name: str, got: str) -> ProtocolError:
    return ProtocolError(
        f"keys of {name} must be signed by it, got {got}. The server, or who is between, has put them."
    )
