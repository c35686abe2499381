"""Bytes that one reader alone can open: X25519 with a key of one use, HKDF, ChaCha20-Poly1305."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sfl.errors import EngineError

_KEY = 32
_NONCE = bytes(12)  # each key seals once


class Reader:
    """Who can open what was sealed for ``public``. The other half never leaves this process."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def open(self, sealed: bytes) -> bytes:
        """What was sealed.

        Raises:
            EngineError: If it was sealed for somebody else, or is not whole.
        """
        given, rest = sealed[:_KEY], sealed[_KEY:]
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(given))
            return _cipher(shared, given, self.public).decrypt(_NONCE, rest, None)
        except (InvalidTag, ValueError) as error:
            raise EngineError(f"a sealed result must open, got {len(sealed)} bytes that do not.") from error


def seal(data: bytes, reader: bytes) -> bytes:
    """The bytes, for the reader with this public key alone."""
    once = X25519PrivateKey.generate()
    given = once.public_key().public_bytes_raw()
    shared = once.exchange(X25519PublicKey.from_public_bytes(reader))
    return given + _cipher(shared, given, reader).encrypt(_NONCE, data, None)


def _cipher(shared: bytes, given: bytes, reader: bytes) -> ChaCha20Poly1305:
    info = b"sfl result" + given + reader
    return ChaCha20Poly1305(HKDF(algorithm=SHA256(), length=_KEY, salt=None, info=info).derive(shared))
