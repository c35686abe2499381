"""Evaluation without training, and every site's model on every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sfl.core import arrays
from sfl.core.algorithm import ServerState
from sfl.core.task import EVALUATE, Reply, Task
from sfl.server.workflow import Sites, Workflow, added
from sfl.types import Metrics, Parameters

MATRIX: Final = "matrix"
"""Under which the algorithm's state holds the figures: by model, by site."""

GLOBAL: Final = "global"
"""How the matrix calls the model that the run was given."""


@dataclass(frozen=True, kw_only=True)
class FederatedEvaluation(Workflow):
    """The given model on every site's held-out data, in one round that trains nothing."""

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        """The evaluation is that of the last round."""
        while sites.goes_on(state):
            state = sites.finish_round(state, [], state.parameters)
        return state


@dataclass(frozen=True, kw_only=True)
class CrossSiteEvaluation(Workflow):
    """Each site trains once from the given model; then every model, the given one too, is evaluated on every site.

    The matrix is in ``state.algorithm["matrix"]``: by model, by site, its figures. A diagonal above the rest of its row
    says that a site's data differ from the others'. Sites' models travel to all other sites.
    """

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        """Train, then one evaluation for each model."""
        while sites.goes_on(state):
            training = sites.broadcast(sites.fit_task(state))
            trained = training.wait()
            sites.check_enough(training)
            models: dict[str, Parameters] = {GLOBAL: state.parameters}
            models |= {r.site: added(state.parameters, r.update) for r in trained if r.update is not None}
            matrix = {name: _figures(sites, state.round + 1, model) for name, model in models.items()}
            state = replace(state, algorithm={MATRIX: matrix})
            state = sites.finish_round(state, trained, state.parameters, ask_sites=False)
            for line in in_words(matrix):
                sites.say(line)
        return state


def in_words(matrix: Mapping[str, Mapping[str, Metrics]]) -> list[str]:
    """A table for each figure: models in rows, sites in columns."""
    sites = sorted({site for row in matrix.values() for site in row})
    names = sorted({name for row in matrix.values() for figures in row.values() for name in figures})
    width = max(len(label) for label in (*matrix, *sites))
    lines: list[str] = []
    for name in names:
        lines.append(f"{name} of each model (rows) on each site's data (columns)")
        lines.append("  ".join([" " * width, *(site.rjust(width) for site in sites)]))
        for model, row in matrix.items():
            cells = (f"{row[site][name]:.4f}" if name in row.get(site, {}) else "-" for site in sites)
            lines.append("  ".join([model.ljust(width), *(cell.rjust(width) for cell in cells)]))
    return lines


def _figures(sites: Sites, round: int, model: Parameters) -> dict[str, Metrics]:
    task = Task(EVALUATE, round, arrays.read_only(model), {"seed": sites.seed})
    return _by_site(sites.broadcast(task).wait())


def _by_site(replies: Sequence[Reply]) -> dict[str, Metrics]:
    return {reply.site: dict(reply.update.metrics) for reply in replies if reply.update is not None}
