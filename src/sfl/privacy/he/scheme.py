"""CKKS as sums need it: packed numbers, additions alone, no level left for anything else.

Cheon, Kim, Kim and Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers" (ASIACRYPT 2017), as TenSEAL
and Microsoft SEAL implement it. A ciphertext of ring degree N holds N/2 complex numbers z as the polynomial of Δ z,
under a modulus q: N real numbers, where nothing but sums is asked of it. A sum of n ciphertexts decrypts to the sum of
their numbers, but for an error that is close to Gaussian, of standard deviation

    symmetric:   (σ √n + n / √12) √(N / 2) / Δ                      σ = 3.2, the ring-LWE error
    public key:  (√((1 + 2N/3) / 12) √n + n / √12) √(N / 2) / Δ     what dropping the special prime leaves

n / √12 is the rounding of Δ z to whole coefficients, which is the same for all whose numbers are. With a public key a
place's error is as large as the secret polynomial is there, in some up to √(ln N) times as large as on average: bounds
count it double.

Parameters are those that the Homomorphic Encryption Standard (Albrecht et al. 2018, Table 1) lists at 128 bits of
security against classical attacks, for ternary secrets: at most 109 bits of modulus in all for N = 4096, 218 for
N = 8192. SEAL refuses others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfl.errors import CompositionError

__all__ = ["FLOOD", "HELD", "SECURITY", "SHARED", "Scheme"]

FLOOD = 2.0**-30
"""Standard deviation of the noise on what a holder tells, in clips."""

SECURITY = 128
_SIGMA = 3.2
_LEAST = 36  # bits of a scale at which the weights of a thousand sites still come out whole
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
        """log₂ Δ: as large as sums of at most ``largest`` leave room for, with a bit to spare.

        Raises:
            CompositionError: If that leaves them no precision.
        """
        bits = math.floor(self.bits - 2 - math.log2(largest))
        if bits < _LEAST:
            raise CompositionError(
                f"he_clip times the number of sites must be at most {2.0 ** (self.bits - 2 - _LEAST):.3g}, got "
                f"{largest:.3g}. Lower it."
            )
        return bits

    def error(self, scale_bits: int, count: int) -> float:
        """What each number of a sum of ``count`` ciphertexts is off by at most, but for a chance of 10⁻¹⁵."""
        spread = _SIGMA if self.symmetric else 2.0 * math.sqrt((1.0 + 2.0 * self.degree / 3.0) / 12.0)
        both = spread * math.sqrt(count) + count / math.sqrt(12.0)
        return _SURE * both * math.sqrt(self.degree / 2.0) / 2.0**scale_bits

    def __str__(self) -> str:
        return f"CKKS, N = {self.degree}, {sum(self.moduli)} bits of modulus, {SECURITY}-bit security"


SHARED = Scheme(4096, (54, 54), symmetric=True)
"""For sites that share a secret key: 7.6 bytes a number as a site encrypts it, 15.1 of a sum."""
HELD = Scheme(8192, (60, 50, 60), symmetric=False)
"""For a holder who tells what was decrypted, noised so that the key does not show: 31 bytes a number."""
