"""Aggregating LoRA: the mean of the sites' products, brought back to the rank of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, final

import numpy as np

from sfl.core.aggregator import Aggregator, Needs, WeightedMean, sum_dtype
from sfl.core.check import check_finite
from sfl.core.lora import Pair, pairs, rows, unrolled
from sfl.core.task import SERVER, Task, Update
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.server.robust.norms import NormBound
from sfl.types import Array, Metrics, Parameters, StateTree

__all__ = ["LoraAggregation", "LoraProductMean", "MEAN_ERROR", "TRUNCATION", "lora_aggregator"]  # noqa: RUF022 - plain order

LoraAggregation: TypeAlias = Literal["mean", "exact", "freeze-a"]

TRUNCATION = "lora_truncation"
"""Among a round's figures: what the truncation lost, ‖ΔW - ΔWᵣ‖ / ‖ΔW‖ in Frobenius norms over all pairs."""

MEAN_ERROR = "lora_mean_error"
"""Among a round's figures: how far the product of the mean factors, which plain averaging takes, was from the mean of
the products, ‖B̄Ā - ΔW‖ / ‖ΔW‖."""

_TINY = 1e-12  # singular values below this share of the largest are rounding, whose directions mean nothing
_Factors: TypeAlias = tuple[Array, Array]  # frame (r, m) and grown (r, n): the product is grownᵀ · frame


@final
@dataclass(frozen=True)
class LoraProductMean(Aggregator):
    """The mean of LoRA's products, ΔW = Σ wᵢ BᵢAᵢ / Σ wᵢ, truncated to rank r.

    Bᵢ and Aᵢ are a site's own factors: what was sent and its delta. ΔW has a rank of up to Σ rᵢ; its best approximation
    of rank r (Eckart and Young 1936) becomes the new pair, as in FlexLoRA (Bai et al., NeurIPS 2024). ΔW is never
    formed: of the stacked factors [wᵢBᵢ] and [Aᵢ] (FLoRA, Wang et al., NeurIPS 2024) a QR decomposition each, and the
    SVD of the core between, cost O((out + in)(Σ rᵢ)² + (Σ rᵢ)³), in float64.

    The aggregate is the difference to what was sent. Directions are ordered, the largest singular value first. The
    frame (A; B of an embedding) has orthogonal rows of one length, the root mean square of those that were sent, so
    that it keeps its norm from round to round; the singular values lie in the other factor. Of each direction the
    frame's largest entry is positive. All arrays in no pair are weighted means.

    | input | result |
    |---|---|
    | one site | that site's product, to rounding |
    | a pair that nobody moved | stays as it is, to the bit |
    | ΔW of a rank below r, also zero | directions without use get zeros in the grown factor and, in the frame, what was sent, made orthogonal to those in use: they can be trained on |
    | a pair of which one factor was sent by nobody (frozen) | the mean of the other: exact, no truncation |
    | a site that left a name out | its factor is what was sent |
    | a site of a lower rank | see ``restricted`` and ``restored`` of ``sfl.core.lora`` |
    | NaN, inf | raises ``UpdateError``; in a run such a reply is rejected before |
    | DoRA's magnitudes | weighted means: exact for the directions alone |

    Figures of the round: ``lora_truncation`` and ``lora_mean_error``, where anything was moved.
    """  # noqa: E501 - a table's rows

    needs: ClassVar[Needs] = "individual"

    @property
    def rebuilds(self) -> str:
        """Each round describes the product by other factors."""
        return "lora_aggregation=exact"

    def init(self, parameters: Parameters) -> StateTree:
        """Nothing; a look at the model.

        Raises:
            ConfigError: If it has no pair, or factors of one pair are of different ranks.
        """
        if not pairs(parameters):
            names = list(parameters)[:3]
            raise ConfigError(f"a model must have pairs lora_A and lora_B, got {names}. Aggregate it by the mean.")

    def aggregate(self, updates: Iterable[Update]) -> Update:  # noqa: ARG002
        """Refused: factors follow from what was sent, which ``step`` alone is told.

        Raises:
            RoundError: Always.
        """
        raise RoundError(f"{type(self).__name__} must be told what the sites were sent, got updates alone. Use step.")

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:
        """The aggregate of a round; see the class.

        Raises:
            RoundError: If there is no update, or one holds a name that was not sent.
            UpdateError: If one of them is not finite.
        """
        kept = list(updates)
        for update in kept:
            check_finite(update.site, update.delta)
        names = dict.fromkeys(name for update in kept for name in update.delta)
        if strange := next((name for name in names if name not in task.parameters), None):
            raise RoundError(f"updates must answer the task that they are aggregated for, got {strange!r} beyond it.")
        found = [pair for pair in pairs(task.parameters) if {pair.frame, pair.grown} <= set(names)]
        paired = {name for pair in found for name in (pair.frame, pair.grown)}
        plain = [replace(u, delta={n: v for n, v in u.delta.items() if n not in paired}) for u in kept]
        mean = WeightedMean().aggregate(plain)
        delta, squares = dict(mean.delta), np.zeros(3)
        for pair in found:
            changed, squared = _pair_changed(pair, kept, task.parameters)
            delta |= changed
            squares += squared
        return Update(SERVER, {name: delta[name] for name in names}, mean.weight, _figures(squares)), state


def lora_aggregator(kind: LoraAggregation, chosen: Aggregator | None = None) -> Aggregator:
    """The aggregator of a LoRA run.

    Args:
        kind: ``mean`` averages A and B by themselves, ``exact`` is ``LoraProductMean``. ``freeze-a`` averages, too:
            what makes it exact is ``FreezeLayers(frames(parameters))`` among the transforms.
        chosen: What ``build_aggregator`` made of the other options; by default the weighted mean.

    Raises:
        ConfigError: If there is no such kind.
        CompositionError: If ``exact`` meets another rule than the mean.
    """
    chosen = WeightedMean() if chosen is None else chosen
    if kind not in ("mean", "exact", "freeze-a"):
        raise ConfigError(f"lora_aggregation must be mean, exact or freeze-a, got {kind!r}.")
    if kind != "exact":
        return chosen
    if isinstance(chosen, NormBound):
        return replace(chosen, rule=lora_aggregator(kind, chosen.rule))
    if not isinstance(chosen, WeightedMean):
        raise CompositionError(
            f"lora_aggregation=exact must come with aggregation=mean, got {type(chosen).__name__}: both say what "
            "becomes of the sites' factors. Choose one."
        )
    return LoraProductMean()


def _pair_changed(pair: Pair, updates: Sequence[Update], sent: Parameters) -> tuple[Parameters, Array]:
    """What is to be added to the two factors, and what the figures are made of."""
    names = (pair.frame, pair.grown)
    like = {name: next(u.delta[name] for u in updates if name in u.delta) for name in names}
    if not any(name in u.delta and u.delta[name].any() for u in updates for name in names):
        return {name: np.zeros(value.shape, sum_dtype(value)) for name, value in like.items()}, np.zeros(3)
    was = (rows(sent[pair.frame], pair.frame_axis), rows(sent[pair.grown], 1 - pair.frame_axis))
    own = [_own(pair, update, was) for update in updates]
    weights = np.array([update.weight for update in updates])
    new, squares = _mean_product(was, own, weights / weights.sum())
    changed: Parameters = {}
    for name, before, after in zip(names, was, new, strict=True):
        change = unrolled(after - before, sent[name], pair.axis(name))
        changed[name] = np.ascontiguousarray(change, dtype=sum_dtype(like[name]))
    return changed, squares


def _own(pair: Pair, update: Update, was: _Factors) -> _Factors:
    frame, grown = (
        before + rows(update.delta[name], pair.axis(name)) if name in update.delta else before
        for name, before in zip((pair.frame, pair.grown), was, strict=True)
    )
    return frame, grown


def _mean_product(was: _Factors, own: Sequence[_Factors], weights: Array) -> tuple[_Factors, Array]:
    """New factors, and the squares of what truncation loses, of what plain averaging would err by, and of ‖ΔW‖."""
    rank = len(was[0])
    q_frame, r_frame = np.linalg.qr(np.concatenate([frame for frame, _ in own]).T)
    scaled = [weight * grown for weight, (_, grown) in zip(weights, own, strict=True)]
    q_grown, r_grown = np.linalg.qr(np.concatenate(scaled).T)
    core = r_grown @ r_frame.T
    left, values, right = np.linalg.svd(core, full_matrices=False)
    used = min(int(np.count_nonzero(values > _TINY * values[0])), rank)
    by_site = r_frame.reshape(len(r_frame), len(own), rank)
    means = r_grown.reshape(len(r_grown), len(own), rank).sum(1), np.tensordot(by_site, weights, (1, 0))
    off = means[0] @ means[1].T - core
    directions = right[:used] @ q_frame.T
    signs = _signs(directions)
    length = math.sqrt(float(np.square(was[0]).sum()) / rank) or 1.0
    frame, grown = np.zeros_like(was[0]), np.zeros_like(was[1])
    completed = _completed(signs * directions, was[0])
    frame[: len(completed)] = length * completed
    grown[:used] = signs * (left[:, :used] * (values[:used] / length)).T @ q_grown.T
    return (frame, grown), np.array([np.square(part).sum() for part in (values[used:], off, values)])


def _completed(used: Array, was: Array) -> Array:
    """Orthonormal rows: those in use, then what ``was`` holds beyond them, then unit vectors; up to its rank."""
    rank, width = was.shape
    for source in (was, np.eye(rank, width)):
        rest = source
        for _ in range(2):  # once leaves what rounding of the first pass left
            rest = rest - (rest @ used.T) @ used
        _, values, right = np.linalg.svd(rest, full_matrices=False)
        beyond = right[values > 1e-6 * np.linalg.norm(source)][: rank - len(used)]
        used = np.concatenate([used, _signs(beyond) * beyond])
    return used


def _signs(directions: Array) -> Array:
    """What makes the largest entry of each row positive, shape (rows, 1)."""
    largest = np.abs(directions).argmax(1, keepdims=True)
    return np.where(np.take_along_axis(directions, largest, 1) < 0.0, -1.0, 1.0)


def _figures(squares: Array) -> Metrics:
    lost, off, whole = np.sqrt(squares).tolist()
    return {TRUNCATION: lost / whole, MEAN_ERROR: off / whole} if whole > 0.0 else {}
