"""What encrypts, adds and decrypts: Microsoft SEAL, as TenSEAL brings it, with as many keys as its owner has.

TenSEAL's own vectors hold one real number in a place for two, and forget that a symmetric ciphertext is half a seed;
what they are made of (``tenseal.sealapi``) needs a quarter of their bytes and half of their time.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np

from sfl.errors import ConfigError, MissingExtraError, ProtocolError
from sfl.privacy.he.scheme import Scheme
from sfl.types import Array

__all__ = ["Cipher"]

_MOST = 1 << 20  # bytes of one ciphertext, which hostile ones may not pass
_PUBLIC, _PRIVATE, _KEY = 2, 3, 1  # fields of TenSEAL's contexts, and, in both, of a key


class Cipher:
    """Encrypts, adds and decrypts, as far as it has the keys.

    Args:
        scheme: The parameters.
        data: A context of TenSEAL's with keys; empty for none, as a server needs none to add.
    """

    def __init__(self, scheme: Scheme, data: bytes = b"") -> None:
        seal = _library("tenseal.sealapi")
        self.scheme, self.data, self._seal = scheme, data, seal
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(scheme.degree)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(scheme.degree, list(scheme.moduli)))
        self._context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        self._encoder, self._evaluator = seal.CKKSEncoder(self._context), seal.Evaluator(self._context)
        keys = _keys_of(data)
        self._secret = self._key(seal.SecretKey(), keys.get(_PRIVATE))
        self._public = self._key(seal.PublicKey(), keys.get(_PUBLIC))
        own = self._secret if scheme.symmetric else self._public
        self._encryptor: Any = None if own is None else seal.Encryptor(self._context, own)
        self._decryptor: Any = None if self._secret is None else seal.Decryptor(self._context, self._secret)

    @classmethod
    def fresh(cls, scheme: Scheme) -> Cipher:
        """One with new keys."""
        tenseal = _library("tenseal")
        kind = tenseal.ENCRYPTION_TYPE
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=scheme.degree,
            coeff_mod_bit_sizes=list(scheme.moduli),
            encryption_type=kind.SYMMETRIC if scheme.symmetric else kind.ASYMMETRIC,
            n_threads=1,
        )
        return cls(scheme, _serialized(context, secret=True, public=not scheme.symmetric))

    @classmethod
    def of(cls, data: bytes, scheme: Scheme, where: str) -> Cipher:
        """That of a context's file.

        Args:
            data: The file.
            scheme: The parameters that it must have.
            where: Its name.

        Raises:
            ConfigError: If it is none, or has others.
        """
        try:
            inside = _library("tenseal").context_from(data, n_threads=1).seal_context().data
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{where} must be a context of TenSEAL, got another file: {error}.") from error
        got = inside.key_context_data()
        if list(inside.key_parms_id()) != list(cls(scheme)._context.key_parms_id()):
            raise ConfigError(
                f"{where} must be a context of {scheme}, got N = {got.parms().poly_modulus_degree()} and "
                f"{got.total_coeff_modulus_bit_count()} bits. Make it with `sfl he keys`; FLARE's HEBuilder makes such "
                f"a one with poly_modulus_degree={scheme.degree}, coeff_mod_bit_sizes={list(scheme.moduli)}."
            )
        cipher = cls(scheme, data)
        if cipher._encryptor is None:
            kind = "secret" if scheme.symmetric else "public"
            raise ConfigError(f"{where} must hold the sites' {kind} key, got none. It is the server's: give a site's.")
        return cipher

    @staticmethod
    def holds_secret(data: bytes) -> bool:
        """Whether a context's file would let its owner decrypt."""
        try:
            return bool(_library("tenseal").context_from(data, n_threads=1).has_secret_key())
        except (ValueError, RuntimeError):
            return False

    @property
    def is_secret(self) -> bool:
        """Whether it can decrypt."""
        return self._decryptor is not None

    def exported(self, *, secret: bool, public: bool = True) -> bytes:
        """The context as a file, with the keys that are asked for."""
        context = _library("tenseal").context_from(self.data, n_threads=1)
        return _serialized(context, secret=secret, public=public and not self.scheme.symmetric)

    def encrypted(self, values: Array, scale_bits: int) -> bytes:
        """A ciphertext of a full row of float64 numbers."""
        plain, made = self._seal.Plaintext(), self._seal.Ciphertext()
        self._encoder.encode(values.view(np.complex128).tolist(), 2.0**scale_bits, plain)
        if self.scheme.symmetric:
            return _saved(self._encryptor.encrypt_symmetric(plain))
        self._encryptor.encrypt(plain, made)
        return _saved(made)

    def loaded(self, data: bytes, scale_bits: int) -> Any:
        """A ciphertext that has come.

        Raises:
            ProtocolError: If it is none under the job's parameters and this scale.
        """
        found = self._read(data)
        if found.scale != 2.0**scale_bits:
            raise ProtocolError(f"a ciphertext must be of scale 2^{scale_bits}, got {found.scale:g}.")
        return found

    def add(self, total: Any, more: Any) -> None:
        """Add one ciphertext to another, in its place."""
        try:
            self._evaluator.add_inplace(total, more)
        except (ValueError, RuntimeError):
            if not total.is_transparent():  # where two sites have sent opposites SEAL has added, and dislikes the sum
                raise

    def packed(self, ciphertext: Any) -> bytes:
        """A ciphertext as it travels."""
        return _saved(ciphertext)

    def decrypted(self, data: bytes) -> Array:
        """The numbers of a ciphertext, in float64.

        Raises:
            ProtocolError: If it is none.
        """
        plain = self._seal.Plaintext()
        self._decryptor.decrypt(self._read(data), plain)
        return np.asarray(self._encoder.decode_complex(plain), np.complex128).view(np.float64)

    def _read(self, data: bytes) -> Any:
        """A ciphertext of two polynomials at the one level that there is.

        Raises:
            ProtocolError: If it is none.
        """
        found = self._seal.Ciphertext()
        try:
            if len(data) > _MOST:
                raise ValueError("it is too long")
            found.load(self._context, _scratch().written(data))
            ours = found.size() == 2 and list(found.parms_id()) == list(self._context.first_parms_id())
            if not ours or not found.is_ntt_form() or found.is_transparent():
                raise ValueError("it has other parameters, another form, or nothing in it")
        except (ValueError, RuntimeError) as error:
            raise ProtocolError(
                f"a ciphertext must be one under the job's parameters, got another: {error}."
            ) from error
        return found

    def _key(self, key: Any, data: bytes | None) -> Any:
        if data is None:
            return None
        key.load(self._context, _scratch().written(data))
        return key


def _serialized(context: Any, *, secret: bool, public: bool) -> bytes:
    return bytes(
        context.serialize(save_public_key=public, save_secret_key=secret, save_galois_keys=False, save_relin_keys=False)
    )


def _saved(thing: Any) -> bytes:
    scratch = _scratch()
    thing.save(scratch.path)
    return scratch.read()


class _Scratch:
    """A file in memory: SEAL reads and writes files alone. A thread has one."""

    def __init__(self) -> None:
        self.process = os.getpid()
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("sfl-he", os.MFD_CLOEXEC)
            self.path = f"/proc/self/fd/{self._file}"
        else:
            self._file, self.path = tempfile.mkstemp(prefix="sfl-he-")
            atexit.register(os.unlink, self.path)

    def written(self, data: bytes) -> str:
        """Its name, with this in it."""
        with open(self.path, "wb") as file:  # noqa: PTH123 - of a descriptor
            file.write(data)
        return self.path

    def read(self) -> bytes:
        """What is there."""
        return os.pread(self._file, os.fstat(self._file).st_size, 0)


_HERE = threading.local()


def _scratch() -> _Scratch:
    """This thread's; another in a process that was forked off."""
    found: _Scratch | None = getattr(_HERE, "scratch", None)
    if found is None or found.process != os.getpid():
        found = _HERE.scratch = _Scratch()
    return found


def _keys_of(data: bytes) -> dict[int, bytes]:
    """The keys of a context, by whose they are."""
    whole = {number: part for number, part in _fields(data) if number in (_PUBLIC, _PRIVATE)}
    inside = {number: dict(_fields(part)).get(_KEY) for number, part in whole.items()}
    return {number: key for number, key in inside.items() if key}


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a message in Protocol Buffers' encoding that are bytes, by number; TenSEAL ships no description."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 2:
            size, at = _varint(data, at)
            yield number, data[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        else:
            at += 8 if kind == 1 else 4


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _library(name: str) -> Any:
    """TenSEAL, or a part of it; it says nothing of its types.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtraError("tenseal", "he") from None
