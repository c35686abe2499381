"""FedOpt: a server optimizer on the mean of the sites' differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from sfl.core import arrays
from sfl.core.aggregator import sum_dtype
from sfl.core.algorithm import ServerState
from sfl.core.task import Update
from sfl.errors import ConfigError
from sfl.server.strategy import FedAvg, step
from sfl.types import Array, Parameters

ServerOptimizer = Literal["momentum", "adagrad", "yogi", "adam"]
Moments: TypeAlias = tuple[Array, Array]


@dataclass(frozen=True, kw_only=True)
class FedOpt(FedAvg):
    """Reddi et al., ICLR 2021, Algorithm 2, and server momentum (Hsu et al. 2019, FedAvgM).

    With Δ the mean of the sites' differences:

    - adagrad, yogi, adam: m ← β₁m + (1 − β₁)Δ, w ← w + η m / (√v + τ), where v ← v + Δ² (adagrad),
      v − (1 − β₂)Δ² sign(v − Δ²) (yogi), β₂v + (1 − β₂)Δ² (adam), from m = 0 and v = τ². As in the paper, moments
      are not corrected for their beginning.
    - momentum: m ← β₁m + Δ, w ← w + η m.

    Whole numbers and the statistics of BatchNorm are no parameters that a gradient moves: they take the mean, as in
    FedAvg. So does an array that no site sent stay as it is, its moments too.

    | input | result |
    |---|---|
    | Δ = 0 | w moves on by its momentum alone; for momentum with β₁ = 0 it stays |
    | momentum, β₁ = 0 | FedAvg with server learning rate η, the same bits |
    | one site | the same rule on that site's difference |

    Attributes:
        optimizer: Which rule. η is ``server_learning_rate``.
        beta1: β₁.
        beta2: β₂.
        tau: τ, how adaptive a step may be at most.
    """

    optimizer: ServerOptimizer = "adam"
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.optimizer not in _RULES:
            raise ConfigError(f"the server's optimizer must be one of {', '.join(_RULES)}, got {self.optimizer!r}.")
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0 and self.tau > 0.0):
            raise ConfigError(
                f"beta1 and beta2 must be in [0, 1) and tau positive, got {self.beta1}, {self.beta2} and {self.tau}."
            )

    def init(self, parameters: Parameters) -> ServerState:
        """Round 0, with the first moments."""
        state = super().init(parameters)
        floating = {name: value for name, value in parameters.items() if arrays.is_trained(name, value)}
        m = {name: np.zeros(value.shape, sum_dtype(value)) for name, value in floating.items()}
        moments: dict[str, Parameters] = {"m": m}
        if self.optimizer != "momentum":
            moments["v"] = {name: np.full_like(value, self.tau**2) for name, value in m.items()}
        return replace(state, algorithm=moments)

    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """One step of the optimizer."""
        before: Any = state.algorithm
        m, v = dict(before["m"]), dict(before.get("v", {}))
        moved: Parameters = {}
        for name in [name for name in aggregate.delta if name in m]:
            delta = aggregate.delta.pop(name)
            first, spread = _RULES[self.optimizer](self, delta, (m[name], v.get(name, m[name])))
            m[name] = np.asarray(first)  # arithmetic on an array without axes gives no array
            if name in v:
                v[name] = np.asarray(spread)
            direction = m[name] / (np.sqrt(spread) + self.tau) if name in v else m[name].copy()
            direction = np.asarray(direction, dtype=sum_dtype(state.parameters[name]))
            moved[name] = step(state.parameters[name], direction, self.server_learning_rate)
        plain = replace(self, server_learning_rate=1.0)
        after = super(FedOpt, plain).finish(state, aggregate)
        parameters = {name: moved.get(name, value) for name, value in after.parameters.items()}
        algorithm = {**before, "m": m, **({"v": v} if v else {})}
        return replace(after, parameters=parameters, algorithm=algorithm)


def _momentum(rule: FedOpt, delta: Array, moments: Moments) -> Moments:
    m = rule.beta1 * moments[0] + delta
    return m, m


def _first(rule: FedOpt, delta: Array, m: Array) -> Array:
    return rule.beta1 * m + (1.0 - rule.beta1) * delta


def _adagrad(rule: FedOpt, delta: Array, moments: Moments) -> Moments:
    return _first(rule, delta, moments[0]), moments[1] + delta * delta


def _yogi(rule: FedOpt, delta: Array, moments: Moments) -> Moments:
    square = delta * delta
    return _first(rule, delta, moments[0]), moments[1] - (1.0 - rule.beta2) * square * np.sign(moments[1] - square)


def _adam(rule: FedOpt, delta: Array, moments: Moments) -> Moments:
    return _first(rule, delta, moments[0]), rule.beta2 * moments[1] + (1.0 - rule.beta2) * delta * delta


_RULES: dict[str, Callable[[FedOpt, Array, Moments], Moments]] = {
    "momentum": _momentum,
    "adagrad": _adagrad,
    "yogi": _yogi,
    "adam": _adam,
}
