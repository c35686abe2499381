"""Shamir's secret sharing over a prime field of more than 256 bits (Shamir, CACM 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from sfl.errors import ConfigError, ProtocolError

__all__ = ["PRIME", "SHARE", "recovered", "shared"]

PRIME = 2**256 + 297
"""The smallest prime above 2^256: any 32 bytes are an element of the field."""
SHARE = 33
"""Bytes of a share."""
_SECRET = 32


def shared(secret: bytes, threshold: int, places: Sequence[int]) -> list[bytes]:
    """A share of the secret for each place; any ``threshold`` of them give it back, fewer say nothing about it.

    Args:
        secret: 32 bytes.
        threshold: How many give it back, at least 1.
        places: Where the polynomial is read, all different and not 0.

    Raises:
        ConfigError: If there could be no such shares.
    """
    if not (len(secret) == _SECRET and 1 <= threshold <= len(set(places)) == len(places) and 0 not in places):
        raise ConfigError(
            f"a secret of 32 bytes must be shared out to at least its threshold of places, got {len(secret)} bytes, "
            f"{threshold} and {len(places)}."
        )
    powers = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(powers, place).to_bytes(SHARE, "little") for place in places]


def _value(powers: Sequence[int], place: int) -> int:
    value = 0
    for power in reversed(powers):
        value = (value * place + power) % PRIME
    return value


def recovered(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from shares by place: as many as its threshold, or more.

    Shares that do not belong together give another secret, or none; who needs to know compares it with what is known
    of it.

    Raises:
        ProtocolError: If the shares are of no secret of 32 bytes.
    """
    places = tuple(sorted(shares))
    values = [int.from_bytes(shares[place], "little") for place in places]
    secret = sum(weight * value for weight, value in zip(_weights(places), values, strict=True)) % PRIME
    if not places or secret >> (8 * _SECRET) or any(value >= PRIME for value in values):
        raise ProtocolError("shares must be of a secret of 32 bytes, got some that are not. A site has changed one.")
    return secret.to_bytes(_SECRET, "little")


@lru_cache(maxsize=4096)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's polynomials at 0."""
    weights: list[int] = []
    for place in places:
        above = below = 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
