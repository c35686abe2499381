"""What a runner can be told about keeping single updates from the server; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfl.errors import ConfigError

__all__ = ["SecureConfig"]

_WITH_SECAGG = ("secagg_shares", "secagg_threshold", "secagg_clip", "secagg_bits", "secagg_max_weight")


@dataclass(frozen=True, kw_only=True)
class SecureConfig:
    """Whether the server sees sums alone.

    Attributes:
        secagg: Secure aggregation (SecAgg+): sites mask their updates, and the masks cancel in the sum.
        secagg_shares: Sites that each site masks with and shares its secrets out to; 0 takes as few as are safe.
        secagg_threshold: Shares that give a secret of a site that dropped out back; at least two thirds of them, which
            is what 0 takes.
        secagg_clip: Largest value of an update's coordinate; what is larger is cut off.
        secagg_bits: Bits of a masked number: 16, 24, 32, 40 or 48.
        secagg_max_weight: Largest number of examples that a site counts with, under weighting=examples; by default all
            sites count the same.
    """

    secagg: bool = False
    secagg_shares: int = 0
    secagg_threshold: int = 0
    secagg_clip: float = 8.0
    secagg_bits: int = 32
    secagg_max_weight: int = 1

    def __post_init__(self) -> None:
        asked = [name for name in _WITH_SECAGG if getattr(self, name) != getattr(SecureConfig, name)]
        if asked and not self.secagg:
            raise ConfigError(f"{', '.join(asked)} must come with secagg, got none. Add --secagg.")
        if self.secagg:
            from sfl.privacy.secagg.protocol import SecAgg  # it knows the ranges

            SecAgg(**self.secagg_terms)

    @property
    def secagg_terms(self) -> dict[str, Any]:
        """What ``SecAgg`` is told."""
        return {name.removeprefix("secagg_"): getattr(self, name) for name in _WITH_SECAGG}
