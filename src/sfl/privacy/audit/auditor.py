"""The auditor: canaries, coins, guesses, and what they say of a claim."""

from __future__ import annotations

import math
from typing import Literal, Protocol, TypedDict

import numpy as np

from sfl.core.mechanism import Mechanism
from sfl.errors import ConfigError
from sfl.privacy.accountant import Guarantee
from sfl.privacy.audit.norm import NormCheck
from sfl.privacy.audit.one_run import lower_bound, strongest_bound
from sfl.privacy.audit.report import AuditReport
from sfl.privacy.audit.scoring import Scoring
from sfl.privacy.audit.simulated import MechanismPipeline
from sfl.privacy.noise import secret
from sfl.types import Array

__all__ = ["Pipeline", "PrivacyAuditor"]


class _How(TypedDict):
    delta: float
    confidence: float
    heads_only: bool


class Pipeline(Protocol):
    """Something that canaries are sent through. ``sfl.audit.RecipePipeline`` is that of a whole run."""

    @property
    def canaries(self) -> int:
        """How many take part in one run."""
        ...

    @property
    def rounds(self) -> int:
        """How many rounds a run has."""
        ...

    @property
    def sees(self) -> Literal["models", "updates"]:
        """What the adversary of the claim sees."""
        ...

    @property
    def claim(self) -> Guarantee:
        """What the ledger says such a run costs."""
        ...

    @property
    def scoring(self) -> Scoring:
        """How what is seen becomes scores."""
        ...

    def observe(self, coins: Array, seed: int) -> Array:
        """Run once, with canary i in where ``coins[i]``: what was seen of each, shape (rounds, canaries).

        Args:
            coins: Shape (canaries,).
            seed: Of the canaries' directions, which the adversary knows.
        """
        ...

    def norms(self) -> tuple[NormCheck, ...]:
        """What leaves a canary before its noise, against the bound of its clip."""
        ...


class PrivacyAuditor:
    """Measures a lower bound on ε by one-run auditing, and sets it beside the ledger's upper bound.

    Args:
        canaries: How many, at least; a pipeline with fewer in a run is run until there are as many.
        confidence: Of the bound: a sound claim is contradicted with at most the remaining probability.

    Raises:
        ConfigError: If the number or the confidence is out of its range.

    Example:
        >>> from sfl.privacy.dp import GaussianMechanism
        >>> auditor = PrivacyAuditor(canaries=200)
        >>> report = auditor.run_audit(GaussianMechanism(clip_norm=1.0, noise_multiplier=4.0), rounds=3)
        >>> report.contradicted
        False
    """

    def __init__(self, *, canaries: int = 500, confidence: float = 0.95) -> None:
        if canaries < 2 or not 0.0 < confidence < 1.0:
            raise ConfigError(
                f"canaries must be at least 2 and confidence in (0, 1), got {canaries} and {confidence}. "
                "A few hundred canaries show an ε of 3 or 4 at most."
            )
        self.canaries, self.confidence = canaries, confidence

    def run_audit(
        self,
        mechanism: Mechanism,
        *,
        rounds: int = 1,
        delta: float = 1e-5,
        size: int | None = None,
        length: float = 10.0,
    ) -> AuditReport:
        """Audit a mechanism by itself: its clip, a sum, its noise, without clients, server or engine.

        Args:
            mechanism: It must say its bound as ``clip_norm`` or ``initial_clip``.
            rounds: Rounds in a run.
            delta: δ of the claim.
            size: Parameters of the model that is made up for it; by default four for each canary.
            length: Norm of what a canary sends, over the clip bound.

        Raises:
            ConfigError: If the mechanism does not say its bound.
        """
        return self.run_pipeline_audit(
            MechanismPipeline(
                mechanism=mechanism,
                canaries=self.canaries,
                rounds=rounds,
                delta=delta,
                size=size or 4 * self.canaries,
                length=length,
            )
        )

    def run_pipeline_audit(self, pipeline: Pipeline) -> AuditReport:
        """Audit whatever canaries can be sent through: ``sfl.audit.RecipePipeline`` takes a run's own chain and engine.

        Several runs are one audit: each canary has its coin in one of them, and they share nothing else.
        """
        runs = math.ceil(self.canaries / pipeline.canaries)
        coins = secret().integers(0, 2, (runs, pipeline.canaries)).astype(bool)
        scoring, claim = pipeline.scoring, pipeline.claim
        scores = np.concatenate([scoring.scores(pipeline.observe(row, _seed())) for row in coins])
        how: _How = {"delta": claim.delta, "confidence": self.confidence, "heads_only": scoring.heads_only}
        found = lower_bound(scores, coins.reshape(-1), **how)
        return AuditReport(
            epsilon_lower=found.epsilon,
            epsilon_claimed=claim.epsilon,
            epsilon_strongest=strongest_bound(coins.size, **how),
            delta=claim.delta,
            confidence=self.confidence,
            canaries=coins.size,
            guesses=found.guesses,
            correct=found.correct,
            rounds=pipeline.rounds,
            runs=runs,
            unit=claim.unit,
            sees=pipeline.sees,
            norms=pipeline.norms(),
        )


def _seed() -> int:
    return int(secret().integers(0, 2**62))
