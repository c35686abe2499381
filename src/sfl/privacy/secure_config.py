"""What a runner can be told about keeping single updates from the server; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfl.errors import ConfigError

__all__ = ["SecureConfig"]

_WITH_SECAGG = ("secagg_shares", "secagg_threshold", "secagg_clip", "secagg_bits", "secagg_max_weight")
_WITH_HE = ("he_layers", "he_clip", "he_max_weight", "he_holder")


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
        he: Homomorphic encryption (CKKS): sites encrypt what they send, and the server adds up ciphertexts.
        he_layers: A regular expression: only arrays in whose name it is found are encrypted; empty encrypts all.
        he_clip: Largest number that is encrypted: of a model, or, with a holder, of an update.
        he_max_weight: Largest number of examples that a site counts with, under weighting=examples.
        he_holder: The one site that can decrypt sums, and tells the server their mean; empty if all sites share the
            key, and the server keeps the model as ciphertext.
    """

    secagg: bool = False
    secagg_shares: int = 0
    secagg_threshold: int = 0
    secagg_clip: float = 8.0
    secagg_bits: int = 32
    secagg_max_weight: int = 1
    he: bool = False
    he_layers: str = ""
    he_clip: float = 64.0
    he_max_weight: int = 1
    he_holder: str = ""

    def __post_init__(self) -> None:
        for kind, names in (("secagg", _WITH_SECAGG), ("he", _WITH_HE)):
            asked = [name for name in names if getattr(self, name) != getattr(SecureConfig, name)]
            if asked and not getattr(self, kind):
                raise ConfigError(f"{', '.join(asked)} must come with {kind}, got none. Add --{kind}.")
        if self.secagg and self.he:
            raise ConfigError("secagg and he must not come together, got both: each keeps updates from the server.")
        if self.secagg:
            from sfl.privacy.secagg.protocol import SecAgg  # it knows the ranges

            SecAgg(**self.secagg_terms)
        if self.he:
            from sfl.privacy.he import CKKS

            CKKS(**self.he_terms)

    @property
    def he_terms(self) -> dict[str, Any]:
        """What ``CKKS`` is told."""
        terms = {name.removeprefix("he_"): getattr(self, name) for name in _WITH_HE}
        return {**terms, "layers": self.he_layers or None}

    @property
    def seals(self) -> bool:
        """Whether the server has the model as ciphertext alone."""
        return self.he and not self.he_holder

    @property
    def secagg_terms(self) -> dict[str, Any]:
        """What ``SecAgg`` is told."""
        return {name.removeprefix("secagg_"): getattr(self, name) for name in _WITH_SECAGG}
