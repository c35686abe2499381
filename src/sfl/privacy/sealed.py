"""Parts that one reader alone can open: X25519 with a key of one use, HKDF, ChaCha20-Poly1305.

A part knows its number and how many there are, so none can be left out, doubled or put elsewhere without being noticed
(the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015, with the count in the place of its mark
of the last part).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sfl.errors import EngineError

_KEY = 32


class Reader:
    """Who can open what was sealed for ``public``.

    Args:
        purpose: What is sealed; parts of another purpose do not open.
        private: The other half, for a reader that has gone on in another process; by default a new one.
    """

    def __init__(self, purpose: bytes = b"sfl result", private: bytes | None = None) -> None:
        self._key = X25519PrivateKey.generate() if private is None else X25519PrivateKey.from_private_bytes(private)
        self._purpose = purpose
        self._ciphers: dict[bytes, ChaCha20Poly1305] = {}
        self.public = self._key.public_key().public_bytes_raw()

    @property
    def private(self) -> bytes:
        """The secret half, to be kept where only this reader comes to."""
        return self._key.private_bytes_raw()

    def open(self, part: bytes, number: int, count: int) -> bytes:
        """What was sealed as this part of so many.

        Raises:
            EngineError: If it was sealed for somebody else, is another part, or is not whole.
        """
        given, rest = part[:_KEY], part[_KEY:]
        try:
            if given not in self._ciphers:
                shared = self._key.exchange(X25519PublicKey.from_public_bytes(given))
                self._ciphers[given] = _cipher(shared, given, self.public, self._purpose)
            return self._ciphers[given].decrypt(_nonce(number), rest, _place(number, count))
        except (InvalidTag, ValueError) as error:
            raise EngineError(f"a sealed part must open, got {len(part)} bytes that do not.") from error


class Seal:
    """Seals the parts of one result, each number once.

    Args:
        reader: Public key of the only one who can open them.
        count: How many there are.
        purpose: What is sealed.
    """

    def __init__(self, reader: bytes, count: int, purpose: bytes = b"sfl result") -> None:
        once = X25519PrivateKey.generate()
        self._given, self._count = once.public_key().public_bytes_raw(), count
        shared = once.exchange(X25519PublicKey.from_public_bytes(reader))
        self._cipher = _cipher(shared, self._given, reader, purpose)
        self._next = 0

    def close(self, data: bytes) -> bytes:
        """The next part."""
        number, self._next = self._next, self._next + 1
        return self._given + self._cipher.encrypt(_nonce(number), data, _place(number, self._count))


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _place(number: int, count: int) -> bytes:
    return f"{number}/{count}".encode()


def _cipher(shared: bytes, given: bytes, reader: bytes, purpose: bytes) -> ChaCha20Poly1305:
    info = purpose + given + reader
    return ChaCha20Poly1305(HKDF(algorithm=SHA256(), length=_KEY, salt=None, info=info).derive(shared))
