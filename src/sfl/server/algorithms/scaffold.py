"""SCAFFOLD's half on the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sfl.client.scaffold import CONTROL, ScaffoldRule
from sfl.core.algorithm import ServerState
from sfl.core.task import NUM_UPDATES, Task, Update
from sfl.errors import ConfigError
from sfl.server.strategy import FedAvg
from sfl.types import Parameters


@dataclass(frozen=True, kw_only=True)
class Scaffold(FedAvg):
    """Stochastic controlled averaging (Karimireddy et al., ICML 2020, Algorithm 1).

    x ← x + η_g · mean Δyᵢ and c ← c + |S|/N · mean Δcᵢ, over the sites S that answered of the N there are. The paper's
    means are unweighted (``weighting=equal``); weighted by examples they serve the objective that is weighted so.
    ``sfl.client.scaffold`` has the sites' half.

    | input | result |
    |---|---|
    | all control variates zero, first round | FedAvg's first round, the same bits |
    | one site | c = c₁, so its drift is zero: local training |
    | a site that answers too late | it keeps its new cᵢ, and the server has not heard of it |

    Attributes:
        planned: |S| of a round in which how many answered must not show, as under central noise.
    """

    planned: float = 1.0

    def init(self, parameters: Parameters) -> ServerState:
        """Round 0; c = 0.

        Raises:
            ConfigError: If a parameter's name is that of a control variate.
        """
        taken = next((name for name in parameters if name.startswith(CONTROL)), None)
        if taken is not None:
            raise ConfigError(f"names of parameters must not begin with {CONTROL!r} in SCAFFOLD, got {taken!r}.")
        controlled = ScaffoldRule().carried(parameters)
        control = {name: np.zeros_like(value) for name, value in controlled.items() if name.startswith(CONTROL)}
        return replace(super().init(parameters), algorithm={"control": control, "population": 0})

    def joined(self, state: ServerState, clients: Sequence[str]) -> ServerState:
        """With N, the number of sites there are."""
        state = super().joined(state, clients)
        kept: Any = state.algorithm
        return replace(state, algorithm={**kept, "population": len(clients)})

    def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
        """The global parameters and c."""
        task, cohort = super().plan(state, clients)
        kept: Any = state.algorithm
        return replace(task, parameters={**task.parameters, **kept["control"]}), cohort

    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """x and c after the round."""
        kept: Any = state.algorithm
        used = aggregate.metrics.get(NUM_UPDATES, self.planned)
        share = used / max(kept["population"], 1)
        control = {
            name: np.asarray(value + share * aggregate.delta.pop(name), dtype=value.dtype)
            if name in aggregate.delta
            else value
            for name, value in kept["control"].items()
        }
        after = super().finish(state, aggregate)
        return replace(after, algorithm={**kept, "control": control})
