"""Rules that compare each update with a reference: FLTrust, and trust by cosine alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias, final

import numpy as np

from sfl.core.aggregator import Aggregator, Needs
from sfl.core.check import check_finite
from sfl.core.task import Task, Update
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.server.robust.base import answer, enough
from sfl.server.robust.coordinates import median
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters, StateTree

__all__ = ["CosineTrust", "FLTrust", "Root", "cosines"]

Root: TypeAlias = Parameters | Callable[[Parameters, int], Parameters]
"""The server's own update: arrays, or a function of the parameters that were sent and the round."""


def cosines(stack: Stack, reference: Parameters) -> tuple[Array, Array, float]:
    """Cosine of each update to a reference over all coordinates, each update's norm, and the reference's.

    A zero update has cosine 0; so has everything to a zero reference, and an update whose norm has no float64.
    """
    products, squares, own = np.zeros(len(stack)), np.zeros(len(stack)), 0.0
    at = stack.aligned(reference)
    with np.errstate(over="ignore", invalid="ignore"):
        for name, place, block in stack.blocks():
            there = np.broadcast_to(np.asarray(at(name, place), np.float64), block.shape[1:])
            products += block @ there
            squares += np.einsum("ij,ij->i", block, block)
            own += float(there @ there)
        lengths = np.sqrt(squares * own)
        found = np.divide(products, lengths, out=np.zeros(len(stack)), where=(lengths > 0.0) & np.isfinite(lengths))
    return np.clip(found, -1.0, 1.0), np.sqrt(squares), float(np.sqrt(own))


class _Trust(Aggregator):
    """What both have in common: a reference, and coefficients that follow from the comparison with it."""

    needs: ClassVar[Needs] = "individual"

    @abstractmethod
    def reference(self, stack: Stack, task: Task | None) -> Parameters:
        """What updates are compared with."""

    @abstractmethod
    def coefficients(self, cosine: Array, norms: Array, norm: float) -> Array:
        """What each update is multiplied with in the aggregate."""

    def aggregate(self, updates: Iterable[Update]) -> Update:
        """The aggregate outside of a run: the root update must be given as arrays."""
        return self._trusted(updates, None)

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:
        """The aggregate of a round: the root update is that of the parameters that were sent."""
        return self._trusted(updates, task), state

    def _trusted(self, updates: Iterable[Update], task: Task | None) -> Update:
        stack = Stack.of(updates)
        enough("", stack)
        found = cosines(stack, self.reference(stack, task))
        return answer(stack.combined(self.coefficients(*found)), stack)


@final
@dataclass(frozen=True, eq=False)
class FLTrust(_Trust):
    """Trust by a small clean data set of the server's own (Cao, Fang, Liu and Gong, NDSS 2021, Algorithm 2).

    With g₀ the server's update: TSᵢ = max(cos(gᵢ, g₀), 0), and the aggregate is
    Σ TSᵢ · (‖g₀‖/‖gᵢ‖) gᵢ / Σ TSᵢ. No number of liars is assumed; what is assumed is that g₀ points the right way.

    | input | result |
    |---|---|
    | equal updates | their direction, with the norm of g₀ |
    | an update of any finite size | counts with the norm of g₀, or not at all |
    | no update with a positive cosine, or a zero g₀ | zero: the model stays as it is |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that the root update lacks | refused |

    Attributes:
        root_update: The server's own update as arrays, or a function that trains the parameters that were sent on the
            server's data, called as ``root_update(parameters, round)``.
    """

    root_update: Root

    def reference(self, stack: Stack, task: Task | None) -> Parameters:
        """The root update."""
        return root_of(self.root_update, stack, task)

    def coefficients(self, cosine: Array, norms: Array, norm: float) -> Array:
        """TSᵢ ‖g₀‖ / (‖gᵢ‖ Σ TS)."""
        trust = np.maximum(cosine, 0.0)
        lengths = np.where(trust > 0.0, norms, 1.0)
        return trust * norm / lengths / (trust.sum() or 1.0)


@final
@dataclass(frozen=True, eq=False)
class CosineTrust(_Trust):
    """The mean of updates weighted by their cosine to a reference; those below a threshold do not count.

    This is what ``--aggregation foundation-fl`` names: a trust score sᵢ = cos(gᵢ, g₀), and Σ sᵢ gᵢ / Σ sᵢ over the
    updates with sᵢ ≥ threshold and sᵢ > 0. It is not the method of the paper of that name (``FoundationFL``), and it
    bounds no norm: an update that points the right way may be of any length. Put ``NormBound`` around it, or take
    ``FLTrust``.

    | input | result |
    |---|---|
    | equal updates, whose cosine reaches the threshold | that update |
    | no update that is trusted, or a zero reference | zero: the model stays as it is |
    | NaN, inf | refused; in a run such a reply is rejected before |
    | a name that the root update lacks | refused |

    Attributes:
        threshold: The least cosine, in [0, 1].
        root_update: g₀, as for ``FLTrust``.
        allow_untrusted_reference: Without a root update compare with the median of each coordinate of the updates
            themselves: then all rests on an honest majority, as for any other rule.
    """

    threshold: float = 0.0
    root_update: Root | None = None
    allow_untrusted_reference: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold must be a cosine in [0, 1], got {self.threshold!r}.")

    def require(self, cohort: int) -> None:  # noqa: ARG002
        """Something to trust."""
        if reason := self._lacks():
            raise CompositionError(reason)

    def reference(self, stack: Stack, task: Task | None) -> Parameters:
        """The root update, or the median of the updates if that was allowed."""
        if self.root_update is not None:
            return root_of(self.root_update, stack, task)
        if reason := self._lacks():
            raise RoundError(reason)
        return stack.coordinatewise(median)

    def coefficients(self, cosine: Array, norms: Array, norm: float) -> Array:  # noqa: ARG002
        """sᵢ / Σ s over the trusted."""
        trust = np.where(cosine >= self.threshold, np.maximum(cosine, 0.0), 0.0)
        return trust / (trust.sum() or 1.0)

    def _lacks(self) -> str:
        if self.root_update is not None or self.allow_untrusted_reference:
            return ""
        return (
            "trust by cosine must have a root_update of the server's own clean data, got none. Give one, or say "
            "allow_untrusted_reference=True to compare with the updates' own median."
        )


def root_of(root: Root, stack: Stack, task: Task | None) -> Parameters:
    """The root update for a round.

    Raises:
        ConfigError: If it is a function and there is no round, or it is not finite arrays under the updates' names.
    """
    if callable(root):
        if task is None:
            raise ConfigError("root_update must be arrays outside of a run, got a function of what was sent.")
        root = root(dict(task.parameters), task.round)
    if not isinstance(root, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"root_update must be a dict of named arrays, got {type(root).__name__}.")
    lacking = [name for name in stack.specs if name not in root]
    if lacking:
        raise ConfigError(f"root_update must hold every array that sites send, got none of {lacking[0]!r}.")
    check_finite("root_update", root)
    return root
