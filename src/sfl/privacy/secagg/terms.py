"""What a job says of its secure aggregation: known to every site from its own copy of the job, not from a server."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.privacy.secagg.fixed import FixedPoint
from sfl.privacy.secagg.graph import Degree, check_threshold, degree, least_threshold

__all__ = ["Terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Terms of every round.

    Attributes:
        fixed: How updates become words; its ``count`` is set by each round.
        shares: Neighbours of a site; 0 takes as few as are safe.
        threshold: Shares that give a secret back; 0 takes the smallest that is safe.
        corrupt: Share of the sites that may pool what they know with the server.
        dropped: Share of the sites that may drop out of a round.
        least: Sites that a sum must be of.
    """

    fixed: FixedPoint
    shares: int = 0
    threshold: int = 0
    corrupt: float = 0.2
    dropped: float = 0.1
    least: int = 2

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
