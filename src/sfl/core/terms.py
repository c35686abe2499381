"""What an algorithm adds to a site's own training, and what a client says that it heeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sfl.types import Array, Parameters, Scalar

PROXIMAL: Final = "proximal"
DRIFT: Final = "drift"
LEARNING_RATE: Final = "learning_rate"

PROXIMAL_MU: Final = "proximal_mu"
"""Under which a task says μ of the proximal term."""

LEARNING_RATE_FACTOR: Final = "learning_rate_factor"
"""Under which a task says what the local learning rate is multiplied with."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalTerms:
    """What a client adds to its own training, for algorithms that need more of it than averaging does.

    A client that takes steps y ← y − η·g takes y ← y − η·(g + ``added(y)``) instead, with η the
    ``learning_rate_factor`` times its own.

    Attributes:
        proximal_mu: μ of the term μ/2 ‖y − anchor‖² of the local loss (Li et al. 2020, FedProx, equation 2).
        anchor: What the proximal term pulls to.
        drift: Added to the direction of every step (Karimireddy et al. 2020, SCAFFOLD, equation 3: c − cᵢ); arrays
            that it does not name are left alone.
        learning_rate_factor: What the local learning rate is multiplied with.
    """

    proximal_mu: float = 0.0
    anchor: Mapping[str, Array] | None = None
    drift: Mapping[str, Array] | None = None
    learning_rate_factor: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Scalar], anchor: Mapping[str, Array]) -> LocalTerms:
        """Those that a task names; the proximal term pulls to what was sent."""
        factor = float(config.get(LEARNING_RATE_FACTOR, 1.0))
        return cls(float(config.get(PROXIMAL_MU, 0.0)), anchor, learning_rate_factor=factor)

    @property
    def needs(self) -> frozenset[str]:
        """What a client must heed for these terms to have their effect."""
        asked = {PROXIMAL: self.proximal_mu != 0.0, DRIFT: self.drift is not None}
        asked[LEARNING_RATE] = self.learning_rate_factor != 1.0
        return frozenset(name for name, is_asked in asked.items() if is_asked)

    def named(self) -> dict[str, Any]:
        """Those that have an effect, under their names, for a training script."""
        found: dict[str, Any] = {PROXIMAL_MU: self.proximal_mu} if self.proximal_mu != 0.0 else {}
        if self.drift is not None:
            found[DRIFT] = dict(self.drift)
        if self.learning_rate_factor != 1.0:
            found[LEARNING_RATE_FACTOR] = self.learning_rate_factor
        return found

    def added(self, parameters: Mapping[str, Array]) -> Parameters:
        """What is added to the gradient at ``parameters``: μ (y − anchor) + drift; zeros where there is neither.

        Example:
            >>> terms = LocalTerms(0.5, {"w": np.ones(2)}, drift={"w": np.array([0.0, 1.0])})
            >>> terms.added({"w": np.array([3.0, 3.0])})["w"]
            array([1., 2.])
        """
        return {name: self._added(name, value) for name, value in parameters.items()}

    def _added(self, name: str, value: Array) -> Array:
        total = np.zeros_like(value)
        if self.proximal_mu != 0.0 and self.anchor is not None and value.dtype.kind == "f":
            total = self.proximal_mu * (value - self.anchor[name])
        drift = None if self.drift is None else self.drift.get(name)
        return total if drift is None else np.asarray(total + drift, dtype=value.dtype)


NO_TERMS: Final = LocalTerms()
