"""Learning rates that change from round to round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sfl.errors import ConfigError

ScheduleKind = Literal["constant", "linear", "cosine", "step"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the sites' learning rate is multiplied with in a round.

    Example:
        >>> [round(Schedule(kind="linear", rounds=4).factor(r), 2) for r in (1, 2, 3, 4)]
        [1.0, 0.75, 0.5, 0.25]

    Attributes:
        kind: constant; linear (from 1 towards 0 after the last round); cosine (Loshchilov & Hutter, ICLR 2017, equation
            5, one cycle); step (times ``gamma`` after every ``every`` rounds).
        rounds: Rounds of the run.
        warmup: Rounds in which it rises linearly to 1 first.
        gamma: Factor of a step.
        every: Rounds between two steps.
    """

    kind: ScheduleKind = "constant"
    rounds: int = 1
    warmup: int = 0
    gamma: float = 0.5
    every: int = 10

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine", "step"):
            raise ConfigError(f"a schedule must be constant, linear, cosine or step, got {self.kind!r}.")
        if not (0 <= self.warmup < self.rounds and 0.0 < self.gamma <= 1.0 and self.every >= 1):
            raise ConfigError(
                "a schedule must have fewer rounds of warm-up than rounds, gamma in (0, 1] and every >= 1, got "
                f"{self.warmup} of {self.rounds}, {self.gamma} and {self.every}."
            )

    @property
    def changes(self) -> bool:
        """Whether any round has another factor than 1."""
        return self.kind != "constant" or self.warmup > 0

    def factor(self, round: int) -> float:
        """The factor of a round, from 1; a round past the last has that of the last."""
        if round <= self.warmup:
            return round / (self.warmup + 1)
        done = min(round, self.rounds) - 1 - self.warmup
        share = done / (self.rounds - self.warmup)
        if self.kind == "linear":
            return 1.0 - share
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        return self.gamma ** (done // self.every) if self.kind == "step" else 1.0
