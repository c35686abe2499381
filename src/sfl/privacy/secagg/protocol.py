"""Secure aggregation as a job is given it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.core.secure import Keeper, SecureSum, Summing
from sfl.core.task import Task
from sfl.errors import CompositionError, ConfigError, MissingExtraError, check_rules
from sfl.privacy.secagg.fixed import CLIPPED, FixedPoint
from sfl.privacy.secagg.graph import Degree, check_threshold, degree, least_threshold
from sfl.types import Metrics, Parameters, StateTree

if TYPE_CHECKING:
    from sfl.privacy.secagg.identity import Identity
    from sfl.privacy.secagg.site import SecAggSite

__all__ = ["SecAgg"]

_BITS = (16, 24, 32, 40, 48)


@dataclass(frozen=True, kw_only=True)
class SecAgg(SecureSum):
    """SecAgg+ (Bell et al., CCS 2020): pairwise masks over a random graph, which cancel in the sum.

    Every site knows it from its own copy of the job, and takes none of it from a server.

    Attributes:
        bits: Of a masked word: 16, 24, 32, 40 or 48. More sites and finer rounding need more.
        clip: Largest value of an update's coordinate; what is larger is cut off.
        max_weight: Largest weight of a site; one that has more examples counts as if it had so many.
        shares: k, sites that each site masks with; even, or 0 for as few as are safe.
        threshold: t, shares that give a site's secret back; at least ⌈2k/3⌉, or 0 for that.
        corrupt: Share of the sites that may pool what they know with the server; below 1/3.
        dropped: Share of the sites that may drop out of a round.
        least: Sites below which a sum is refused: by the server, and by each site as far as it is told who is in it.
        grid: Set by a job whose sites add discrete noise: the power of two that its values are multiples of.

    Raises:
        ConfigError: If one of them is out of its range.
        CompositionError: If the threshold is below ⌈2k/3⌉.
    """

    bits: int = 32
    clip: float = 8.0
    max_weight: int = 1
    shares: int = 0
    threshold: int = 0
    corrupt: float = 0.2
    dropped: float = 0.1
    least: int = 2
    grid: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("secagg_bits", self.bits, self.bits in _BITS, "one of 16, 24, 32, 40 and 48"),
            ("secagg_clip", self.clip, 0.0 < self.clip < math.inf, "positive and finite"),
            ("secagg_max_weight", self.max_weight, 1 <= self.max_weight <= 2**31, "between 1 and 2**31"),
            (
                "secagg_shares",
                self.shares,
                self.shares >= 0 and (self.shares % 2 == 0 or self.shares == 1),
                "even, or 0 for as few as are safe",
            ),
            ("corrupt", self.corrupt, 0.0 <= self.corrupt < 1 / 3, "at least 0 and below 1/3"),
            ("dropped", self.dropped, 0.0 <= self.dropped < 1 / 3, "at least 0 and below 1/3"),
        )
        check_rules(rules)
        if self.shares:
            check_threshold(self.shares, self.threshold or self.shares)

    @property
    def heaviest(self) -> float:
        """See ``SecureSum.heaviest``."""
        return float(self.max_weight)

    @property
    def fixed(self) -> FixedPoint:
        """How updates become words; its ``count`` is set by each round."""
        return FixedPoint(self.bits, self.clip, 1, float(self.max_weight), self.grid)

    def needed(self, n: int) -> int:
        """Of n sites, how many must say that a sum is of the same sites: two such groups have an honest site in common,
        while fewer than a third pool what they know with the server.
        """
        return max(self.least, -(-2 * n // 3))

    def degree(self, n: int) -> Degree:
        """Neighbours and threshold in a round of n sites: those that were asked for, as far as there are so many.

        Raises:
            CompositionError: If the threshold would not do.
        """
        if not self.shares:
            found = degree(n, self.corrupt, self.dropped)
            if not self.threshold:
                return found
            check_threshold(found.neighbours, self.threshold)
            return Degree(found.neighbours, self.threshold)
        k = self.shares if self.shares < n - 1 else n - 1
        given = self.threshold if k == self.shares else 0  # with fewer sites than planned, the threshold follows
        threshold = given or least_threshold(k)
        check_threshold(k, threshold)
        return Degree(k, threshold)

    def require(self, cohort: int) -> None:
        """See ``SecureSum.require``."""
        try:
            import cryptography  # noqa: F401 # pyright: ignore[reportUnusedImport] - asked for before a run needs it
        except ImportError:
            raise MissingExtraError("cryptography", "privacy") from None
        if cohort < 2:
            raise CompositionError(
                f"secure aggregation must have rounds of at least 2 sites, got {cohort}: the sum of one hides nothing. "
                "Raise num_clients or fraction_fit."
            )
        self.fixed.of(cohort).scale  # noqa: B018 - refuses words without room
        self.degree(cohort)

    def among(self, least: int, planned: int, threads: int = 1) -> SecAgg:  # noqa: ARG002 - each round says how many it is of
        """See ``SecureSum.among``."""
        return replace(self, least=max(least, 2))

    def on_grid(self, grid: float, reach: float) -> SecAgg:
        """See ``SecureSum.on_grid``.

        Raises:
            CompositionError: If such a sum would not fit a word.
        """
        if grid * 2.0 ** (self.bits - 1) <= reach:
            need = next((bits for bits in _BITS if grid * 2.0 ** (bits - 1) > reach), None)
            remedy = f"Set {need}." if need else "Use fewer sites or less noise."
            raise CompositionError(
                f"secagg_bits must hold sums of {reach:.3g} in steps of {grid:.3g}, got {self.bits}. {remedy}"
            )
        return replace(self, grid=grid)

    def begin(self, model: Parameters, sent: Parameters, sites: Sequence[str]) -> StateTree:  # noqa: ARG002
        """The name of the run: what a site has signed for one run counts for no other."""
        return {"run": secrets.token_hex(16)}

    def summing(self, task: Task, cohort: Sequence[str], expected: Parameters, memory: StateTree) -> Summing:
        """See ``SecureSum.summing``."""
        from sfl.privacy.secagg.server import summing  # needs cryptography

        if not isinstance(memory, dict) or "run" not in memory:
            raise ConfigError(
                "a run must go on with secure aggregation as it was begun, got one that was begun without."
            )
        return summing(task, cohort, expected, self, str(memory["run"]))

    def identity(self, name: str, kit: Path) -> Identity:
        """That of the kit's certificate, with which other sites know it.

        Raises:
            ConfigError: If it is that of another site, or not whole.
        """
        try:
            from sfl.privacy.secagg.identity import CertifiedIdentity
        except ImportError:
            raise MissingExtraError("cryptography", "privacy") from None
        identity = CertifiedIdentity.of_kit(kit)
        if identity.name != name:
            raise ConfigError(
                f"a site's kit must be its own, got that of {identity.name!r} for {name}. Give its folder."
            )
        return identity

    def site(self, name: str, keeper: Keeper, identity: Identity | None = None) -> SecAggSite:
        """See ``SecureSum.site``."""
        from sfl.privacy.secagg.identity import RehearsedIdentity
        from sfl.privacy.secagg.memory import Memory
        from sfl.privacy.secagg.site import SecAggSite

        return SecAggSite(name, self, identity or RehearsedIdentity(name), Memory(keeper))

    def remarks(self, figures: Metrics) -> list[str]:
        """See ``SecureSum.remarks``."""
        share = figures.get(CLIPPED, 0.0)
        if not share:
            return []
        return [f"{share:.2%} of the values of updates were cut off at secagg_clip = {self.clip:g}. Set it higher."]

    def described(self, cohort: int) -> list[str]:
        """See ``SecureSum.described``."""
        degree, fixed = self.degree(cohort), self.fixed.of(cohort)
        moved = "added up exactly" if fixed.grid else f"rounded: it moves a mean of all by {fixed.error:.2g} at most"
        fewest = self.needed(cohort)
        return [
            f"secure aggregation: the server never saw a site's update, only sums of at least {fewest} sites",
            f"each site masks with {degree.neighbours} others, and {degree.threshold} of them give a lost one's secret "
            f"back; it holds while fewer than {-(-cohort // 3)} of {cohort} sites pool what they know with the server",
            f"it hides updates in their sum, and is no differential privacy; {fixed.bits} bits a number, {moved}",
        ]
