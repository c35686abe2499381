"""What an audit found, as figures and in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sfl.privacy.audit.norm import NormCheck
from sfl.utils.bounds import upper

__all__ = ["AuditReport"]

_OWN = {"site": "each site's own updates", "example": "the noisy sums of steps"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """A lower bound on ε that was measured, beside the upper bound that the ledger claims for the same events.

    Attributes:
        epsilon_lower: The measured bound; 0 says nothing.
        epsilon_claimed: The ledger's; infinite if it claims nothing.
        epsilon_strongest: What would have been measured with every guess right: no audit of so many canaries shows
            more, however broken the mechanism.
        delta: δ of both.
        confidence: Probability with which the measured bound is below the true ε.
        canaries: How many took part or not by a coin.
        guesses: How many coins were guessed.
        correct: How many of the guesses were right.
        rounds: Rounds that the adversary saw.
        runs: Runs in which they were.
        unit: Whose presence or data the coins decided.
        sees: What the adversary saw: ``"models"`` or ``"updates"``.
        norms: What was found of the clips' bounds.
    """

    epsilon_lower: float
    epsilon_claimed: float
    epsilon_strongest: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    rounds: int
    runs: int = 1
    unit: str = "site"
    sees: str = "models"
    norms: tuple[NormCheck, ...] = ()

    @property
    def statistics_contradict(self) -> bool:
        """Whether the measured bound is above the claim."""
        return self.epsilon_lower > self.epsilon_claimed

    @property
    def contradicted(self) -> bool:
        """Whether anything that was found contradicts the claim."""
        return self.statistics_contradict or not all(norm.holds for norm in self.norms)

    @property
    def can_contradict(self) -> bool:
        """Whether so many canaries could have contradicted the claim at all, by statistics."""
        return self.epsilon_strongest > self.epsilon_claimed

    @property
    def verdict(self) -> str:
        """One sentence."""
        reasons = [norm.words for norm in self.norms if not norm.holds]
        if self.statistics_contradict:
            shown = f"with {self.confidence:.0%} confidence ε is at least {self.epsilon_lower:.3g}"
            reasons.insert(0, f"{shown}, and the ledger says at most {_figure(self.epsilon_claimed)}")
        if reasons:
            return f"the ledger's claim is contradicted: {'; '.join(reasons)}"
        if math.isinf(self.epsilon_claimed):
            return "nothing is claimed, so there is nothing to contradict"
        if not self.can_contradict:
            return (
                f"no contradiction found, but {self.canaries} canaries can show no more than "
                f"ε = {self.epsilon_strongest:.3g}, so statistics could not have contradicted this claim"
            )
        return "no contradiction found"

    def statement(self) -> list[str]:
        """The audit in words, for a data-protection officer."""
        runs = f" in {self.runs} runs" if self.runs > 1 else ""
        seen = "the models of" if self.sees == "models" else f"{_OWN.get(self.unit, 'updates')} in"
        return [
            f"audit: {self.verdict}",
            f"measured: ε ≥ {self.epsilon_lower:.3g} at δ = {self.delta:g} for each {self.unit}, with "
            f"{self.confidence:.0%} confidence; claimed: ε ≤ {_figure(self.epsilon_claimed)}",
            f"{self.correct} of {self.guesses} guesses right about {self.canaries} canaries{runs}, from {seen} "
            f"{self.rounds} round{'s' if self.rounds != 1 else ''}; all right would have shown "
            f"ε ≥ {self.epsilon_strongest:.3g}",
            *(norm.words for norm in self.norms),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, which has no infinity: a claim of nothing is ``None``."""
        figures = asdict(self)
        figures["epsilon_claimed"] = None if math.isinf(self.epsilon_claimed) else self.epsilon_claimed
        figures["norms"] = [
            {**asdict(norm), "largest": None if math.isinf(norm.largest) else norm.largest, "holds": norm.holds}
            for norm in self.norms
        ]
        return {
            **figures,
            "contradicted": self.contradicted,
            "can_contradict": self.can_contradict,
            "verdict": self.verdict,
            "statement": self.statement(),
        }


def _figure(epsilon: float) -> str:
    return "infinity (no guarantee)" if math.isinf(epsilon) else upper(epsilon)
