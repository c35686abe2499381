"""The server's own look at the size of updates: no site's word is taken for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core import arrays
from sfl.core.aggregator import Aggregator, Needs, sum_dtype
from sfl.core.task import Task, Update
from sfl.errors import ConfigError, UpdateError
from sfl.types import Array, Parameters, StateTree

__all__ = ["NormBound", "NormReport", "verify_update_norms"]


@dataclass(frozen=True, slots=True)
class NormReport:
    """What a look at the norms found.

    Attributes:
        updates: Those that may be used, in site order; clipped ones are new, the others the very same.
        norms: Every site's L2 norm as it arrived.
        rejected: Names of the sites whose update may not be used.
        clipped: Names of the sites whose update was clipped.
    """

    updates: tuple[Update, ...]
    norms: Mapping[str, float]
    rejected: tuple[str, ...]
    clipped: tuple[str, ...]


def verify_update_norms(updates: Iterable[Update], max_norm: float, *, clip: bool = False) -> NormReport:
    """Measure every update, and reject or clip those above a bound.

    Args:
        updates: As they arrived.
        max_norm: The largest L2 norm over all arrays together.
        clip: Scale what is larger down to the bound instead of rejecting it.

    Raises:
        ConfigError: If the bound is not positive and finite.

    Edge cases: a norm exactly at the bound passes; one that is NaN or inf is rejected, also with ``clip``; whole
    numbers that are clipped become float64.
    """
    if not 0.0 < max_norm < math.inf:
        raise ConfigError(f"max_norm must be positive and finite, got {max_norm!r}.")
    norms: dict[str, float] = {}
    kept: list[Update] = []
    rejected: list[str] = []
    clipped: list[str] = []
    for update in updates:
        norm = norms[update.site] = arrays.l2_norm(update.delta)
        if norm <= max_norm:
            kept.append(update)
        elif clip and math.isfinite(norm):
            clipped.append(update.site)
            kept.append(replace(update, delta=_scaled(update.delta, max_norm / norm)))
        else:
            rejected.append(update.site)
    return NormReport(tuple(kept), norms, tuple(rejected), tuple(clipped))


@final
@dataclass(frozen=True)
class NormBound(Aggregator):
    """A rule over updates whose norm the server has verified.

    Sites that it clips or rejects are named in the log, with their norms.

    Attributes:
        rule: Any aggregator.
        max_norm: The largest L2 norm of an update.
        clip: Scale what is larger down to the bound; otherwise the site is rejected.
    """

    needs: ClassVar[Needs] = "individual"

    rule: Aggregator
    max_norm: float
    clip: bool = True

    @property
    def rebuilds(self) -> str:
        """What the rule does."""
        return self.rule.rebuilds

    def __post_init__(self) -> None:
        verify_update_norms((), self.max_norm)

    def require(self, cohort: int) -> None:
        """What the rule needs."""
        self.rule.require(cohort)

    def screen(self, update: Update) -> None:
        """Without ``clip``, whether the norm is within the bound; and what the rule asks."""
        if not self.clip and update.site in verify_update_norms((update,), self.max_norm).rejected:
            norm = arrays.l2_norm(update.delta)
            raise UpdateError(
                f"{update.site}: the norm of an update must be at most {self.max_norm:g}, got {norm:.4g}."
            )
        self.rule.screen(update)

    def init(self, parameters: Parameters) -> StateTree:
        """What the rule remembers."""
        return self.rule.init(parameters)

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """The rule's aggregate of the verified updates."""
        return self.rule.aggregate(self._verified(updates))

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:
        """The rule's round over the verified updates."""
        return self.rule.step(self._verified(updates), task, state)

    def _verified(self, updates: Iterable[Update]) -> tuple[Update, ...]:
        report = verify_update_norms(updates, self.max_norm, clip=self.clip)
        for done, sites in (("clipped", report.clipped), ("left out", report.rejected)):
            if sites:
                said = ", ".join(f"{site} ({report.norms[site]:.3g})" for site in sites)
                logging.getLogger(__name__).warning("norm above %g, %s: %s", self.max_norm, done, said)
        return report.updates


def _scaled(delta: Parameters, factor: float) -> Parameters:
    return {name: _times(value, factor) for name, value in delta.items()}


def _times(value: Array, factor: float) -> Array:
    dtype = value.dtype if value.dtype.kind == "f" else sum_dtype(value)
    return np.asarray(np.multiply(value, factor, dtype=dtype))
