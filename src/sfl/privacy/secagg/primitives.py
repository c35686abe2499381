"""The primitives of secure aggregation, all from ``cryptography``: X25519, HKDF-SHA256, AES-256-GCM, AES-256-CTR."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sfl.errors import ProtocolError
from sfl.types import Array

__all__ = ["KEY", "OVERHEAD", "add_mask", "agree", "new_key", "opened", "public_of", "sealed"]

KEY = 32
"""Bytes of keys, public and private, and of seeds."""
OVERHEAD = 28
"""Bytes that a seal adds: a nonce and a tag."""
_NONCE = 12
_BLOCK = 1 << 18  # bytes of a mask that are made at a time: they stay in the processor's cache
_ZEROS = bytes(_BLOCK)


def new_key() -> bytes:
    """A private key of X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public half of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """The secret that two sites share for one purpose: HKDF-SHA256 of X25519, ``KEY`` bytes.

    Raises:
        ProtocolError: If ``public`` is no key, or one with which every secret would be the same (RFC 7748, 6.1).
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError(f"a public key must be one of X25519, got one that is not: {error}.") from None
    return HKDF(algorithm=SHA256(), length=KEY, salt=None, info=purpose).derive(shared)


def sealed(key: bytes, data: bytes, about: bytes) -> bytes:
    """``data`` for who shares the key; ``about`` must be the same when it is opened."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, data, about)


def opened(key: bytes, data: bytes, about: bytes) -> bytes:
    """What was sealed.

    Raises:
        ProtocolError: If it was sealed by somebody else, about something else, or changed on its way.
    """
    try:
        return AESGCM(key).decrypt(data[:_NONCE], data[_NONCE:], about)
    except (InvalidTag, ValueError):
        raise ProtocolError(f"a sealed share must open, got {len(data)} bytes that do not.") from None


def add_mask(words: Sequence[Array], seed: bytes, *, subtract: bool = False) -> None:
    """Add the mask that follows from a seed, modulo the size of a word, in place.

    The mask is the key stream of AES-256 in counter mode, read as little-endian words.

    Args:
        words: Contiguous arrays of unsigned integers, which take up the stream one after the other.
        seed: ``KEY`` bytes, for one mask alone.
        subtract: Take it away instead.
    """
    stream = Cipher(AES(seed), CTR(bytes(16))).encryptor()
    room = bytearray(_BLOCK + 15)  # what `update_into` asks for
    change = np.subtract if subtract else np.add
    for array in words:
        dtype = array.dtype.newbyteorder("<")
        step = _BLOCK // dtype.itemsize
        for start in range(0, array.size, step):
            block = array[start : start + step]
            stream.update_into(memoryview(_ZEROS)[: block.nbytes], room)
            change(block, np.frombuffer(room, dtype, block.size), out=block)
