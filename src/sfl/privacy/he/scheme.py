"""CKKS as sums need it: packed real numbers, additions alone, no level left for anything else.

Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers" (ASIACRYPT 2017), as TenSEAL
and Microsoft SEAL implement it. A ciphertext of ring degree N holds N/2 numbers z as the polynomial of Δ z, under a
modulus q. A sum of n ciphertexts decrypts to the sum of their numbers, but for an error that is close to Gaussian:

    symmetric:   σ √(n N) / Δ,                      σ = 3.2, the ring-LWE error
    public key:  √((1 + 2N/3) / 12) √(n N) / Δ,     what rounding leaves when the special prime is dropped

Parameters are those that the Homomorphic Encryption Standard (Albrecht et al. 2018, Table 1) lists at 128 bits of
security against classical attacks, for ternary secrets: at most 109 bits of modulus in all for N = 4096, 218 for
N = 8192. SEAL refuses others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from sfl.errors import CompositionError, ConfigError, MissingExtraError, ProtocolError
from sfl.types import Array

__all__ = ["HELD", "SECURITY", "SHARED", "Cipher", "Scheme"]

SECURITY = 128
_SIGMA = 3.2
_SURE = 8.0  # standard deviations: one slot in 10^15 passes them
_MOST = 1 << 20  # bytes of one ciphertext, which hostile ones may not pass


@dataclass(frozen=True, slots=True)
class Scheme:
    """Parameters of the encryption.

    Attributes:
        degree: N.
        moduli: Bits of the primes; the last is the special one, which ciphertexts do not have.
        symmetric: Whether who encrypts has the secret key; else a public one.
    """

    degree: int
    moduli: tuple[int, ...]
    symmetric: bool

    @property
    def slots(self) -> int:
        """Numbers in a ciphertext."""
        return self.degree // 2

    @property
    def bits(self) -> int:
        """Of q."""
        return sum(self.moduli[:-1])

    def scale_bits(self, largest: float) -> int:
        """log₂ Δ: as large as sums whose numbers are at most ``largest`` leave room for, with a bit to spare.

        Raises:
            CompositionError: If that leaves them no precision.
        """
        bits = math.floor(self.bits - 2 - math.log2(max(largest, 1.0)))
        if bits < 20:
            raise CompositionError(
                f"he_clip times the number of sites must be at most {2.0 ** (self.bits - 22):.3g}, got {largest:.3g}. "
                "Lower it."
            )
        return bits

    def error(self, scale_bits: int, count: int) -> float:
        """What each number of a sum of ``count`` ciphertexts is off by at most, but for a chance of 10⁻¹⁵."""
        spread = _SIGMA if self.symmetric else math.sqrt((1.0 + 2.0 * self.degree / 3.0) / 12.0)
        return _SURE * spread * math.sqrt(count * self.degree) / 2.0**scale_bits

    def __str__(self) -> str:
        return f"CKKS, N = {self.degree}, {sum(self.moduli)} bits of modulus, {SECURITY}-bit security"


SHARED = Scheme(4096, (54, 54), symmetric=True)
"""For sites that share a secret key: 30.1 bytes a number."""
HELD = Scheme(8192, (60, 50, 60), symmetric=False)
"""For a holder who tells what was decrypted, noised so that the key does not show: 61 bytes a number."""


class Cipher:
    """Encrypts, adds and decrypts, as far as its context has the keys.

    Args:
        context: TenSEAL's.
        scheme: Its parameters.
    """

    def __init__(self, context: Any, scheme: Scheme) -> None:
        self._context, self.scheme = context, scheme

    @classmethod
    def fresh(cls, scheme: Scheme) -> Cipher:
        """One with keys that nobody else has: for who makes keys, and for a server, which needs none."""
        tenseal = _tenseal()
        kind = tenseal.ENCRYPTION_TYPE
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=scheme.degree,
            coeff_mod_bit_sizes=list(scheme.moduli),
            encryption_type=kind.SYMMETRIC if scheme.symmetric else kind.ASYMMETRIC,
            n_threads=1,
        )
        return cls(context, scheme)

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
            context = _tenseal().context_from(data, n_threads=1)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{where} must be a context of TenSEAL, got another file: {error}.") from error
        cipher, like = cls(context, scheme), cls.fresh(scheme)
        if cipher._parameters != like._parameters:
            got = context.seal_context().data.key_context_data()
            raise ConfigError(
                f"{where} must be a context of {scheme}, got N = {got.parms().poly_modulus_degree()} and "
                f"{got.total_coeff_modulus_bit_count()} bits. Make it with `sfl he keys`; FLARE's HEBuilder makes such "
                f"a one with poly_modulus_degree={scheme.degree}, coeff_mod_bit_sizes={list(scheme.moduli)}."
            )
        if scheme.symmetric and not cipher.is_secret:
            raise ConfigError(
                f"{where} must hold the sites' secret key, got none. It is the server's: give the site's."
            )
        return cipher

    @staticmethod
    def holds_secret(data: bytes) -> bool:
        """Whether a context's file would let its owner decrypt."""
        try:
            return bool(_tenseal().context_from(data, n_threads=1).has_secret_key())
        except (ValueError, RuntimeError):
            return False

    @property
    def _parameters(self) -> object:
        return self._context.seal_context().data.key_parms_id()

    @property
    def is_secret(self) -> bool:
        """Whether it can decrypt."""
        return bool(self._context.has_secret_key())

    def exported(self, *, secret: bool, public: bool = True) -> bytes:
        """The context as a file, with the keys that are asked for."""
        return bytes(
            self._context.serialize(
                save_public_key=public and not self.scheme.symmetric,
                save_secret_key=secret,
                save_galois_keys=False,
                save_relin_keys=False,
            )
        )

    def encrypted(self, values: Array, scale_bits: int) -> bytes:
        """A ciphertext of a full row of float64 numbers."""
        vector = _tenseal().ckks_vector(self._context, values.tolist(), scale=2.0**scale_bits)
        return bytes(vector.serialize())

    def loaded(self, data: bytes) -> Any:
        """A ciphertext that has come.

        Raises:
            ProtocolError: If it is none of a full row.
        """
        try:
            if len(data) > _MOST:
                raise ValueError("it is too long")
            vector = _tenseal().ckks_vector_from(self._context, data)
            if vector.size() != self.scheme.slots:
                raise ValueError(f"it holds {vector.size()} numbers")
        except (ValueError, RuntimeError) as error:
            raise ProtocolError(
                f"a ciphertext must hold {self.scheme.slots} numbers under the job's parameters, got another: {error}."
            ) from error
        return vector

    @staticmethod
    def add(total: Any, more: Any) -> None:
        """Add one ciphertext to another, in its place.

        Raises:
            ProtocolError: If they are of different scales.
        """
        try:
            total.add_(more)
        except (ValueError, RuntimeError) as error:
            raise ProtocolError(f"ciphertexts of a sum must be alike, got one that is not: {error}.") from error

    def decrypted(self, data: bytes) -> Array:
        """The numbers of a ciphertext, in float64.

        Raises:
            ProtocolError: If it is none.
        """
        return np.asarray(self.loaded(data).decrypt(), np.float64)


def _tenseal() -> Any:
    """The library, which says nothing of its types.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return import_module("tenseal")
    except ImportError:
        raise MissingExtraError("tenseal", "he") from None
