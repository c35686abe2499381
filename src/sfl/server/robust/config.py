"""What a runner can be told about aggregation, and about attacks on it; imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sfl.errors import ConfigError, check_rules

__all__ = ["AggregationConfig", "AttackName", "Rule"]

Rule: TypeAlias = Literal[
    "mean",
    "krum",
    "multi-krum",
    "trimmed-mean",
    "median",
    "geometric-median",
    "bulyan",
    "centered-clipping",
    "foundation-fl",
    "foundation-fl-ndss",
    "fltrust",
]
AttackName: TypeAlias = Literal[
    "sign-flip",
    "label-flip",
    "gaussian",
    "inf",
    "nan",
    "alie",
    "ipm",
    "mimic",
    "min-max",
    "min-sum",
    "num-examples",
    "replay",
]


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """How updates become one, and which sites of a simulation lie.

    Attributes:
        aggregation: mean (weighted by examples), or a rule that stands sites which lie: krum, multi-krum, bulyan,
            trimmed-mean, median, geometric-median, centered-clipping, foundation-fl (trust by cosine to a root
            update), foundation-fl-ndss (synthetic updates, the method of the paper) or fltrust (needs a root update).
        krum_byzantine: f, the sites that may lie, for krum, multi-krum, bulyan, foundation-fl-ndss and nnm.
        krum_projection: Measure distances after a random projection to so many coordinates; by default on all.
        trim_ratio: Share of the values that trimmed-mean drops at each end.
        ffl_threshold: The least cosine to the reference at which foundation-fl trusts an update, in [0, 1].
        allow_untrusted_reference: Let foundation-fl compare with the updates' own median, without a root update.
        clip_radius: How far a site may lie from the centre before centered-clipping clips it, as an L2 norm.
        clip_iterations: Iterations of centered-clipping in a round.
        pre_aggregation: none, nnm (each update becomes the mean of its nearest) or bucketing (means of random groups).
        bucket_size: Updates in a group of bucketing.
        max_update_norm: Largest L2 norm of an update that the server lets in; larger ones are clipped there.
        attack: Sites of a simulation lie, to see what the aggregation stands: sign-flip, label-flip, gaussian, inf,
            nan, alie, ipm, mimic, min-max, min-sum, num-examples or replay.
        attackers: How many lie, the last ones by name.
        attack_scale: How strongly; by default as the attack's paper has it.
    """

    aggregation: Rule = "mean"
    krum_byzantine: int = 1
    krum_projection: int | None = None
    trim_ratio: float = 0.1
    ffl_threshold: float = 0.0
    allow_untrusted_reference: bool = False
    clip_radius: float = 1.0
    clip_iterations: int = 1
    pre_aggregation: Literal["none", "nnm", "bucketing"] = "none"
    bucket_size: int = 2
    max_update_norm: float | None = None
    attack: AttackName | None = None
    attackers: int = 1
    attack_scale: float | None = None

    def __post_init__(self) -> None:
        norm, projection = self.max_update_norm, self.krum_projection
        rules = (
            ("krum_byzantine", self.krum_byzantine, self.krum_byzantine >= 0, "0 or more"),
            ("krum_projection", projection, projection is None or projection >= 1, "at least 1"),
            ("trim_ratio", self.trim_ratio, 0.0 <= self.trim_ratio < 0.5, "in [0, 0.5)"),
            ("ffl_threshold", self.ffl_threshold, 0.0 <= self.ffl_threshold <= 1.0, "in [0, 1]"),
            ("clip_radius", self.clip_radius, 0.0 < self.clip_radius < math.inf, "positive and finite"),
            ("clip_iterations", self.clip_iterations, self.clip_iterations >= 1, "at least 1"),
            ("bucket_size", self.bucket_size, self.bucket_size >= 1, "at least 1"),
            ("max_update_norm", norm, norm is None or 0.0 < norm < math.inf, "positive and finite"),
            ("attackers", self.attackers, self.attackers >= 1, "at least 1"),
        )
        check_rules(rules)
        if self.allow_untrusted_reference and self.aggregation != "foundation-fl":
            raise ConfigError(
                f"allow_untrusted_reference must come with aggregation=foundation-fl, got {self.aggregation}. "
                "Leave it out."
            )
        if self.attack_scale is not None and self.attack is None:
            raise ConfigError("attack_scale must come with an attack, got none. Name one, or leave it out.")

    @property
    def needs_root(self) -> bool:
        """Whether the server must train on data of its own."""
        return self.aggregation == "fltrust" or (
            self.aggregation == "foundation-fl" and not self.allow_untrusted_reference
        )
