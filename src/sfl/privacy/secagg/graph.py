"""Who masks with whom: a random regular graph, and how many neighbours it takes.

Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS
2020, sections 3.2 and 3.4: nodes stand on a circle in random order, each is joined to the k/2 on either side (a Harary
graph). With a share γ of sites that pool what they know with the server, and a share δ that drops out, three things
must hold but for a small probability: no site has t or more of the former among its neighbours; what is left of the
graph without either is connected; and every site keeps t neighbours that stay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sfl.errors import CompositionError

__all__ = ["Degree", "arranged", "check_threshold", "degree", "least_threshold", "neighbours"]


@dataclass(frozen=True, slots=True)
class Degree:
    """How a cohort masks.

    Attributes:
        neighbours: k: sites that each site masks with, and shares its secrets out to.
        threshold: t: how many of them give a secret back.
    """

    neighbours: int
    threshold: int


def least_threshold(shares: int) -> int:
    """The smallest threshold that keeps a server from learning both secrets of a site: ⌈2k/3⌉.

    A neighbour gives one share of the two. Were 2t ≤ k + c, with c neighbours that pool what they know with the
    server, it could ask some for the one and the others for the other; from 3t ≥ 2k on it cannot, while 3c < k.
    """
    return -(-2 * shares // 3)


def check_threshold(shares: int, threshold: int) -> None:
    """Refuse a threshold that would let a server learn both secrets of a site.

    Raises:
        CompositionError: A ``ValueError``; saying which would do.
    """
    least = least_threshold(shares)
    if not (shares >= 1 and least <= threshold <= shares):
        raise CompositionError(
            f"secagg_threshold must be between ceil(2 * shares / 3) = {least} and the {shares} shares, got "
            f"{threshold}. Set {least} or more."
        )


def arranged(names: Sequence[str], seed: bytes) -> list[str]:
    """Names in the random order that follows from a seed, the same for all who know both."""
    return sorted(names, key=lambda name: hashlib.sha256(seed + name.encode()).digest())


def neighbours(circle: Sequence[str], name: str, k: int) -> list[str]:
    """The k sites that a site is joined with, sorted by name.

    Args:
        circle: All sites, in random order.
        name: The site.
        k: Even, or one less than there are sites.
    """
    n = len(circle)
    if k >= n - 1:
        return sorted(other for other in circle if other != name)
    at = circle.index(name)
    return sorted(circle[(at + step) % n] for step in (*range(-(k // 2), 0), *range(1, k // 2 + 1)))


@lru_cache(maxsize=256)
def degree(n: int, corrupt: float, dropped: float, security: int = 40, correctness: int = 20) -> Degree:
    """The smallest k, with a threshold, for which n sites are safe and their rounds succeed.

    Args:
        n: Sites of a round, at least 2.
        corrupt: γ: share of them that may pool what they know with the server; below 1/3.
        dropped: δ: share of them that may drop out.
        security: Bits of the probability that γ n of them, wherever they stand, learn more than the sum.
        correctness: Bits of the probability that a round fails though no more than δ n of them drop out.

    Returns:
        k and t. Where no smaller graph will do, all are joined with all.

    Example:
        >>> degree(10, 0.2, 0.1)
        Degree(neighbours=9, threshold=6)
    """
    bad, gone = math.ceil(corrupt * n), math.ceil(dropped * n)
    for k in range(2, n - 1, 2):
        for threshold in range(least_threshold(k), k + 1):
            if n * _at_least(n - 1, bad, k, threshold) > 2.0**-security:
                continue
            apart = n * ((bad + gone) / n) ** (k // 2)
            short = n * _at_least(n - 1, gone, k, k - threshold + 1)
            if apart <= 2.0**-security and short <= 2.0**-correctness:
                return Degree(k, threshold)
            break  # a higher threshold fails the sooner
    return Degree(n - 1, least_threshold(n - 1))


def _at_least(population: int, marked: int, drawn: int, least: int) -> float:
    """P[X ≥ least] for a hypergeometric X: of ``drawn`` out of ``population``, how many are ``marked``."""
    top = min(marked, drawn)
    total = _log_choose(population, drawn)
    logs = [
        _log_choose(marked, hits) + _log_choose(population - marked, drawn - hits) - total
        for hits in range(max(least, drawn - (population - marked), 0), top + 1)
    ]
    return min(1.0, math.fsum(math.exp(log) for log in logs))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
