"""What a clip promises is checked by itself: a norm past its bound is a fact, and needs no statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sfl.core import arrays
from sfl.errors import ConfigError
from sfl.types import Array, Parameters

__all__ = ["NormCheck", "check_norm_bound"]

_ROUNDING = 1e-6  # relative; clipped values are float32, and what is sought is far larger


@dataclass(frozen=True, slots=True)
class NormCheck:
    """The largest norm that was seen, against its bound.

    Attributes:
        largest: The largest L2 norm.
        bound: C.
        checked: How many values were looked at.
        mechanism: Whose clip it is; empty if nobody said.
        slack: Share of the bound by which rounding may pass it.
    """

    largest: float
    bound: float
    checked: int
    mechanism: str = ""
    slack: float = _ROUNDING

    @property
    def holds(self) -> bool:
        """Whether no norm passed the bound, to rounding."""
        return self.largest <= self.bound * (1.0 + self.slack)

    @property
    def words(self) -> str:
        """The finding in a sentence."""
        times = self.largest / self.bound
        of = f" of {self.mechanism}" if self.mechanism else ""
        if self.holds:
            return f"norm bound{of}: kept by all {self.checked} clipped values (largest {times:.3g} C)"
        return f"norm bound{of}: broken: a clipped value has {times:.4g} times the bound C"


def check_norm_bound(
    clipped: Iterable[Parameters | Mapping[str, Array]],
    bound: float,
    *,
    mechanism: str = "",
    slack: float = _ROUNDING,
) -> NormCheck:
    """Whether the L2 norm of each value keeps its bound, before noise.

    A value is what one unit adds to a sum: a site's clipped update, or the clipped sum of a batch of one example, as
    DP-SGD makes it. Statistics need a large excess to notice; this notices a hundredth of a per cent.

    | input | result |
    |---|---|
    | a zero value | keeps any bound |
    | NaN or inf | breaks it |
    | no values | holds, with ``checked = 0`` |

    Args:
        clipped: Named arrays, one dict for each unit.
        bound: C, positive and finite.
        mechanism: Its name, for people.
        slack: Share of the bound by which rounding may pass it: no more than the books allow for
            (``sfl.privacy.noise.SLACK``).

    Raises:
        ConfigError: If the bound is none.

    Example:
        >>> import numpy as np
        >>> check_norm_bound([{"w": np.array([0.6, 0.8])}], 1.0).holds
        True
        >>> check_norm_bound([{"w": np.array([0.66, 0.88])}], 1.0).holds
        False
    """
    if not (math.isfinite(bound) and bound > 0.0):
        raise ConfigError(f"a norm's bound must be positive and finite, got {bound}.")
    largest, checked = 0.0, 0
    for value in clipped:
        norm = arrays.l2_norm(value)
        largest, checked = (norm if norm > largest or math.isnan(norm) else largest), checked + 1
        if math.isnan(largest):
            largest = math.inf
    return NormCheck(largest, bound, checked, mechanism, slack)
