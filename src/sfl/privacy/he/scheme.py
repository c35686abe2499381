"""CKKS as sums need it: packed numbers, additions alone, no level left for anything else.

Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers" (ASIACRYPT 2017), as TenSEAL
and Microsoft SEAL implement it. A ciphertext of ring degree N holds N/2 complex numbers z as the polynomial of Δ z,
under a modulus q: N real numbers, where nothing but sums is asked of it. A sum of n ciphertexts decrypts to the sum of
their numbers, but for an error that is close to Gaussian:

    symmetric:   σ √(n N / 2) / Δ,                      σ = 3.2, the ring-LWE error
    public key:  √((1 + 2N/3) / 12) √(n N / 2) / Δ,     what rounding leaves when the special prime is dropped

Parameters are those that the Homomorphic Encryption Standard (Albrecht et al. 2018, Table 1) lists at 128 bits of
security against classical attacks, for ternary secrets: at most 109 bits of modulus in all for N = 4096, 218 for
N = 8192. SEAL refuses others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfl.errors import CompositionError

__all__ = ["HELD", "SECURITY", "SHARED", "Scheme"]

SECURITY = 128
_SIGMA = 3.2
_SURE = 8.0  # standard deviations: one slot in 10^15 passes them


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
        """Real numbers in a ciphertext: two in each of its N/2 places."""
        return self.degree

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
        return _SURE * spread * math.sqrt(count * self.degree / 2.0) / 2.0**scale_bits

    def __str__(self) -> str:
        return f"CKKS, N = {self.degree}, {sum(self.moduli)} bits of modulus, {SECURITY}-bit security"


SHARED = Scheme(4096, (54, 54), symmetric=True)
"""For sites that share a secret key: 7.6 bytes a number as a site encrypts it, 15.1 of a sum."""
HELD = Scheme(8192, (60, 50, 60), symmetric=False)
"""For a holder who tells what was decrypted, noised so that the key does not show: 31 bytes a number."""
