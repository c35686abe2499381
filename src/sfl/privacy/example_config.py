"""What a runner can be told about the privacy of single examples; imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfl.errors import ConfigError, check_rules

__all__ = ["ExampleConfig"]


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """How sites train so that no single example shows (DP-SGD).

    Attributes:
        dpsgd: Example-level differential privacy: each site clips every example's gradient and adds noise as it trains.
        dpsgd_noise: Noise multiplier: standard deviation of the noise on a step's sum over the clip bound.
        dpsgd_clip: Largest L2 norm of an example's gradient.
        dpsgd_delta: The δ at which the examples' ε is reported; below 1 over a site's number of examples.
        dpsgd_target_epsilon: Find the noise with which all planned rounds cost each example at most this ε.
        dpsgd_max_epsilon: A site trains no more once its examples would pass this ε.
        dpsgd_autoclip: Normalise every gradient instead of clipping it (AUTO-S); no bound to choose.
        dpsgd_ghost: Clip by a second backward pass, in less memory.
        dpsgd_physical_batch: Examples whose gradients are held at once; by default batch_size.
    """

    dpsgd: bool = False
    dpsgd_noise: float = 1.0
    dpsgd_clip: float = 1.0
    dpsgd_delta: float = 1e-5
    dpsgd_target_epsilon: float | None = None
    dpsgd_max_epsilon: float | None = None
    dpsgd_autoclip: bool = False
    dpsgd_ghost: bool = False
    dpsgd_physical_batch: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("dpsgd_noise", self.dpsgd_noise, 0.0 <= self.dpsgd_noise < math.inf, "finite and 0 or more"),
            ("dpsgd_clip", self.dpsgd_clip, 1e-9 <= self.dpsgd_clip <= 1e9, "between 1e-9 and 1e9"),
            ("dpsgd_delta", self.dpsgd_delta, 1e-30 <= self.dpsgd_delta < 1.0, "at least 1e-30 and below 1"),
            (
                "dpsgd_physical_batch",
                self.dpsgd_physical_batch,
                self.dpsgd_physical_batch is None or self.dpsgd_physical_batch >= 1,
                "at least 1",
            ),
        )
        check_rules(rules)
        for name in ("dpsgd_target_epsilon", "dpsgd_max_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {value}.")
        asked = [name for name in _WITH_DPSGD if getattr(self, name) != getattr(ExampleConfig, name)]
        if asked and not self.dpsgd:
            raise ConfigError(f"{', '.join(asked)} must come with dpsgd, got none. Add --dpsgd.")


_WITH_DPSGD = (
    "dpsgd_noise",
    "dpsgd_clip",
    "dpsgd_delta",
    "dpsgd_target_epsilon",
    "dpsgd_max_epsilon",
    "dpsgd_autoclip",
    "dpsgd_ghost",
    "dpsgd_physical_batch",
)
