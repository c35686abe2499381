"""Reproducible randomness: one counter-based generator for every (seed, round, purpose, site).

Nothing carries a generator from one round to the next, so a run that resumes at round r draws what an uninterrupted
run would have drawn. Noise, masks and keys never come from here: they come from a cryptographic source.
"""

from __future__ import annotations

import hashlib

import numpy as np


def public(seed: int, round: int, purpose: str, site: str = "") -> np.random.Generator:
    """A generator that depends on its four arguments alone.

    Args:
        seed: The run's seed.
        round: The round, 0 before the first.
        purpose: What is drawn, e.g. ``"cohort"`` or ``"mask"``: two purposes never share draws.
        site: The site that draws, or empty on the server.

    Example:
        >>> a, b = public(7, 1, "cohort"), public(7, 1, "cohort")
        >>> bool((a.random(3) == b.random(3)).all())
        True
    """
    label = f"sfl|{seed}|{round}|{len(purpose)}|{purpose}|{site}".encode()
    key = int.from_bytes(hashlib.blake2b(label, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def public_seed(seed: int, round: int, purpose: str, site: str = "") -> int:
    """The same as one 63-bit integer, for a library that takes only a seed (torch's dropout)."""
    return int(public(seed, round, purpose, site).integers(0, 2**63 - 1))
