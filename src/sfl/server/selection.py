"""Which global model is the best one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from sfl.types import Metrics, StateTree

Mode = Literal["auto", "min", "max"]
_BY_DEFAULT = ("accuracy", "loss")
_LOWER = {"loss", "perplexity", "error", "err", "mae", "mse", "rmse", "nll", "deviance", "brier", "entropy", "distance"}


def lower_is_better(metric: str) -> bool:
    """Whether a figure of this name is better when it is lower: losses, errors and their kin.

    Example:
        >>> lower_is_better("val_loss"), lower_is_better("accuracy")
        (True, False)
    """
    return not _LOWER.isdisjoint(re.split(r"[^a-z]+", metric.lower()))


def is_better(value: float, than: float, *, lower: bool) -> bool:
    """Whether a value beats another; what is no number beats nothing, and any number beats it."""
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value < than if lower else value > than


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the best global model of a run is found.

    Attributes:
        metric: The figure to compare; ``None`` takes ``accuracy`` where it is reported, else ``loss``.
        mode: ``"min"``, ``"max"``, or ``"auto"``: see ``lower_is_better``.
        received: Whether what sites report as they train describes the model that they were sent, as the Client API
            has it. Else only evaluations count.
    """

    metric: str | None = None
    mode: Mode = "auto"
    received: bool = False

    def better(self, best: StateTree, round: int, figures: Metrics) -> StateTree:
        """The new best (``round``, ``metric``, ``value``) if the model after ``round`` is one, else ``None``."""
        known = best if isinstance(best, dict) else {}
        names = [str(known["metric"])] if known else [self.metric] if self.metric is not None else list(_BY_DEFAULT)
        name = next((name for name in names if name in figures), None)
        if name is None:
            return None
        value, lower = figures[name], lower_is_better(name) if self.mode == "auto" else self.mode == "min"
        before = known.get("value", math.nan)
        if not (isinstance(before, float) and is_better(value, before, lower=lower)):
            return None
        return {"round": round, "metric": name, "value": value}
