"""A lower confidence bound on ε from one run, with many canaries (Steinke, Nasr and Jagielski, NeurIPS 2023).

Each of m canaries takes part or not, by a fair coin of its own. Somebody who sees only what the run released guesses
the coins of some of them, and abstains on the others. If the run is (ε, δ)-private for each canary, then of r guesses v
or more are right with probability at most

    P[W ≥ v] + 2mδ · max_i P[v − i ≤ W < v] / i,    W ~ Binomial(r, e^ε / (1 + e^ε))

(Corollary 5.4; the program in Appendix D computes the same). An ε under which that is too small to believe is rejected;
the bound is where that ends. It holds whatever the canaries are and however the guesses are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sfl.errors import ConfigError
from sfl.types import Array

__all__ = ["Guesses", "choices", "epsilon_lower_bound", "lower_bound", "one_run_p_value", "strongest_bound"]

_STEPS = 40  # of a bisection: to 1e-12 of the bracket
_MOST = 64.0  # ε past which no number of canaries on a machine says anything
_BOTH = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of the canaries that are guessed in, and as many out
_HEADS = (1 / 16, 1 / 8, 1 / 4, 3 / 8)  # that are guessed in, where none is guessed out


@dataclass(frozen=True, slots=True)
class Guesses:
    """What the guesses came to.

    Attributes:
        epsilon: The lower bound on ε; 0 says nothing.
        guesses: How many were made, for the highest scores and, unless ``heads_only``, as many for the lowest.
        correct: How many of them were right.
    """

    epsilon: float
    guesses: int
    correct: int


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float = 0.0) -> float:
    """The largest probability of so many right guesses under (ε, δ)-privacy (Corollary 5.4).

    Args:
        correct: v, right guesses.
        guesses: r, guesses made.
        canaries: m, canaries that each took part or not by a fair coin.
        epsilon: ε of the claim, 0 or more.
        delta: δ of the claim.

    Raises:
        ConfigError: Unless 0 ≤ v ≤ r ≤ m, ε ≥ 0 and 0 ≤ δ ≤ 1.

    Example:
        >>> round(one_run_p_value(75, 100, 100, 1.0986122886681098), 3)
        0.553
    """
    if not (0 <= correct <= guesses <= canaries and epsilon >= 0.0 and 0.0 <= delta <= 1.0):
        raise ConfigError(
            "guesses must be 0 <= correct <= guesses <= canaries, with epsilon of 0 or more and delta in [0, 1], got "
            f"{correct}, {guesses}, {canaries}, {epsilon} and {delta}."
        )
    pmf = _binomial(guesses, epsilon)
    tail = float(pmf[correct:].sum())
    if delta > 0.0 and correct:
        below = np.cumsum(pmf[:correct][::-1])  # P[v − i ≤ W < v] for i = 1, 2 …
        tail += 2.0 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(tail, 1.0)


def epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest ε that so many right guesses contradict: every ε below it is rejected at this confidence.

    | input | result |
    |---|---|
    | no guesses, or none right | 0 |
    | all right | finite: m canaries can show no more than ``strongest_bound`` |
    | 2mδ above 1 | 0: the correction for δ is then larger than any probability |

    Args:
        correct: v.
        guesses: r, fixed before the run, or chosen without looking at the coins.
        canaries: m.
        delta: δ of the claim.
        confidence: Probability with which the bound lies below the true ε.

    Raises:
        ConfigError: If the confidence is not in (0, 1), or see ``one_run_p_value``.
    """
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence must be in (0, 1), got {confidence}.")
    if 2.0 * canaries * delta > 1.0:  # up to there the p-value rises with ε, so that one crossing is the only one
        return 0.0

    def rejected(epsilon: float) -> bool:
        return one_run_p_value(correct, guesses, canaries, epsilon, delta) <= 1.0 - confidence

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, _MOST
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def choices(canaries: int, *, heads_only: bool = False) -> list[tuple[int, int]]:
    """The pairs (k₊, k₋) that ``lower_bound`` tries: how many are guessed in, and how many out.

    Args:
        canaries: m.
        heads_only: Whether none is guessed out.

    Example:
        >>> choices(512)
        [(16, 16), (32, 32), (64, 64), (128, 128), (256, 256)]
        >>> choices(512, heads_only=True)
        [(32, 0), (64, 0), (128, 0), (192, 0)]
    """
    if heads_only:
        return sorted({(max(1, int(canaries * share)), 0) for share in _HEADS})
    sizes = sorted({max(1, int(canaries * share)) for share in _BOTH})
    return [(size, size) for size in sizes]


def lower_bound(
    scores: Array, coins: Array, *, delta: float = 0.0, confidence: float = 0.95, heads_only: bool = False
) -> Guesses:
    """The best bound over ``choices``, with Bonferroni's correction for their number.

    Few guesses, on the canaries that stand out most, suit noise that is too small; guesses on all suit noise that is
    missing. Which is best is not known beforehand, so each is tested at its share of the allowed error.

    Args:
        scores: One for each canary: the higher, the more it looks as if it took part; shape (m,).
        coins: Whether it did; shape (m,).
        delta: δ of the claim.
        confidence: Of the best bound.
        heads_only: Guess none out, where one that is in may leave no trace (sampling). Decided before the run.

    Raises:
        ConfigError: If there are fewer than two canaries, or the shapes differ, or a score is no number.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(coins, bool)
    if values.shape != truth.shape or values.ndim != 1 or values.size < 2 or np.isnan(values).any():
        raise ConfigError(
            f"scores and coins must be one number for each of two canaries or more, got {values.shape}, {truth.shape}."
        )
    tried = choices(values.size, heads_only=heads_only)
    each = 1.0 - (1.0 - confidence) / len(tried)
    ordered = truth[np.argsort(values, kind="stable")]
    found = [_guessed(ordered, *sizes, delta, each) for sizes in tried]
    return max(found, key=lambda guesses: guesses.epsilon)


def strongest_bound(canaries: int, *, delta: float = 0.0, confidence: float = 0.95, heads_only: bool = False) -> float:
    """What ``lower_bound`` gives if every guess is right: no audit with so many canaries can show a larger ε.

    Example:
        >>> round(strongest_bound(1000, delta=1e-5), 1)
        5.3
    """
    ranks = np.arange(canaries)
    coins = ranks >= canaries // 2
    return lower_bound(ranks, coins, delta=delta, confidence=confidence, heads_only=heads_only).epsilon


def _guessed(ordered: Array, heads: int, tails: int, delta: float, confidence: float) -> Guesses:
    """The bound from guessing the last ``heads`` in and the first ``tails`` out."""
    right = int(ordered[ordered.size - heads :].sum()) + tails - int(ordered[:tails].sum())
    made = heads + tails
    return Guesses(epsilon_lower_bound(right, made, ordered.size, delta=delta, confidence=confidence), made, right)


def _binomial(trials: int, epsilon: float) -> Array:
    """P[W = 0 … trials] with success e^ε / (1 + e^ε); from logarithms, so that no tail is lost."""
    counts = np.arange(trials + 1)
    steps = np.log(np.arange(1, trials + 1, dtype=np.float64))
    factorial = np.concatenate(([0.0], np.cumsum(steps)))
    # log q and log(1 − q) exactly, also where 1 − q is far below the smallest step of a float near 1
    hit, miss = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    logs = factorial[-1] - factorial - factorial[::-1] + counts * hit + (trials - counts) * miss
    return np.exp(logs)
