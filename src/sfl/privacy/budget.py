"""What a run may spend, and how it says what it has spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sfl.core.mechanism import Adjacency, Adversary, DpEvent
from sfl.errors import BudgetExhausted, ConfigError
from sfl.privacy.accountant import Guarantee, Method, PrivacyAccountant, guarantees, worst_off
from sfl.utils.bounds import upper

__all__ = ["PrivacyBudget", "example_report", "example_statement", "statement"]

_WEAK = 20.0  # an ε past this bounds nothing that matters: odds may change by a factor of 5e8
_POINTS = 12  # of a chart; each is a composition of its own
_UNITS = {
    ("site", "add_remove"): "whether any one site took part, and with which data",
    ("site", "replace_one"): "with which data any one site took part; not whether it did",
    ("example", "add_remove"): "whether any one example was among a site's data",
    ("example", "replace_one"): "which example stood in any one place of a site's data",
}
_ADJACENCY = {
    "add_remove": "neighbours differ by adding or removing one {unit}",
    "replace_one": "neighbours differ by replacing one {unit}'s data",
}
_ADVERSARY = {
    "server_trusted": "it holds against everyone who sees the models; the server itself is trusted with each update",
    "server_curious": "it holds against the server, too",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyBudget:
    """The largest ε of a run, for each unit by itself.

    Attributes:
        delta: δ.
        max_epsilon: The largest ε; infinite sets no limit.
        accountant: ``"pld"`` or ``"prv"``.
        dataset: Name of the data set whose runs are counted together; empty counts this run alone.
    """

    delta: float = 1e-5
    max_epsilon: float = math.inf
    accountant: Method = "pld"
    dataset: str = ""

    def __post_init__(self) -> None:
        if not self.max_epsilon > 0.0:
            raise ConfigError(f"max_epsilon must be positive, got {self.max_epsilon}.")
        self.make_accountant()

    def make_accountant(self) -> PrivacyAccountant:
        """An accountant at this δ."""
        return PrivacyAccountant(delta=self.delta, method=self.accountant)

    def check(self, events: Sequence[DpEvent], earlier: Sequence[Sequence[DpEvent]] = ()) -> None:
        """Refuse ``events`` if they pass the budget together, and together with what ``earlier`` runs have spent.

        Raises:
            BudgetExhausted: If they do.
        """
        if math.isinf(self.max_epsilon):
            return
        alone = [(guarantee, "") for guarantee in self.spent(events)]
        total = self.spent(events, earlier) if earlier else []
        for guarantee, since in alone + [(each, ", with earlier runs on the same data,") for each in total]:
            if guarantee.epsilon > self.max_epsilon:
                raise BudgetExhausted(
                    f"the next round would spend{since} ε = {upper(guarantee.epsilon)} for each {guarantee.unit}, "
                    f"past the budget of {self.max_epsilon:g} (δ = {self.delta:g})"
                )

    def spent(self, events: Sequence[DpEvent], earlier: Sequence[Sequence[DpEvent]] = ()) -> list[Guarantee]:
        """What ``events`` have spent, one guarantee for each unit and adversary.

        With earlier runs, a unit may have been in the group that was worst off in each of them, and what is claimed is
        what all of them claim: see ``_alike``.
        """
        accountant = self.make_accountant()
        if earlier:
            events = [event for run in _alike((*earlier, events)) for event in worst_off(run, accountant)]
        return guarantees(events, accountant)

    def report(self, events: Sequence[DpEvent], earlier: Sequence[Sequence[DpEvent]] = ()) -> dict[str, Any]:
        """The same for ``privacy.json``: figures, and the statement in words."""
        total = self.spent(events, earlier) if earlier else []
        return {
            "statement": self.statement(events, earlier),
            "guarantees": [_plain(guarantee) for guarantee in self.spent(events)],
            "with_earlier_runs": [_plain(guarantee) for guarantee in total],
            "dataset": self.dataset,
            "budget": {"max_epsilon": _number(self.max_epsilon), "delta": self.delta},
            "accountant": self.accountant,
        }

    def over_rounds(self, spent: Sequence[tuple[int, DpEvent]]) -> list[dict[str, Any]]:
        """ε by the end of rounds, for a chart: each unit and adversary by itself, at a dozen rounds at most.

        Args:
            spent: Events with their rounds, in order.
        """
        rounds = sorted({round for round, _ in spent})
        shown = (
            rounds
            if len(rounds) <= _POINTS
            else [rounds[i * (len(rounds) - 1) // (_POINTS - 1)] for i in range(_POINTS)]
        )
        return [
            {
                "round": last,
                "unit": guarantee.unit,
                "adversary": guarantee.adversary,
                "epsilon": _number(guarantee.epsilon),
            }
            for last in shown
            for guarantee in self.spent([event for round, event in spent if round <= last])
        ]

    def statement(self, events: Sequence[DpEvent], earlier: Sequence[Sequence[DpEvent]] = ()) -> list[str]:
        """What was spent, in words; the last lines say what other runs have added."""
        lines = [line for guarantee in self.spent(events) for line in statement(guarantee)]
        if not lines:
            return []
        if not self.dataset:
            return [*lines, "earlier runs on the same data are not counted: no --dataset-id names it"]
        if not earlier:
            return [*lines, f"no earlier private run on data set {self.dataset} is known here"]
        runs = f"{len(earlier)} earlier run{'s' if len(earlier) != 1 else ''}"
        return [
            *lines,
            *(
                f"with {runs} on data set {self.dataset}: {_figure(total)} for each {total.unit}{_less(total, events)}"
                for total in self.spent(events, earlier)
            ),
        ]


def statement(guarantee: Guarantee) -> list[str]:
    """A guarantee in words, for a data-protection officer: the figure first, then what it depends on."""
    if math.isinf(guarantee.epsilon):
        head = f"privacy: no formal guarantee for a {guarantee.unit}: there was no noise that can be accounted"
    else:
        weak = " - too large to mean much" if guarantee.epsilon > _WEAK else ""
        head = f"privacy: {_figure(guarantee)} for each {guarantee.unit}{weak}"
    adjacency = _ADJACENCY[guarantee.adjacency].format(unit=guarantee.unit)
    rounds = f"{guarantee.events} noisy release{'s' if guarantee.events != 1 else ''}"
    return [
        head,
        f"hidden: {_UNITS[guarantee.unit, guarantee.adjacency]}; {adjacency}",
        f"{_ADVERSARY[guarantee.adversary]}; {rounds}; sampling: {'; '.join(guarantee.sampling)}",
    ]


def example_statement(epsilons: Mapping[str, float], budget: PrivacyBudget) -> list[str]:
    """What sites' own ledgers have said of their examples, in words.

    Args:
        epsilons: ε by site.
        budget: At which δ.
    """
    if not epsilons:
        return []
    worst = max(epsilons.values())
    said = f"the largest of {len(epsilons)} sites, each " if len(epsilons) > 1 else ""
    runs = f"with earlier runs on data set {budget.dataset}" if budget.dataset else "without earlier runs on this data"
    if math.isinf(worst):
        head = "privacy: no formal guarantee for an example: there was no noise that can be accounted"
    else:
        weak = " - too large to mean much" if worst > _WEAK else ""
        head = f"privacy: ε = {upper(worst)} at δ = {budget.delta:g} for each example of a site{weak}"
    return [
        head,
        f"hidden: {_UNITS['example', 'add_remove']}; {_ADJACENCY['add_remove'].format(unit='example')}",
        f"{_ADVERSARY['server_curious']}, and against other sites; {said}by its own ledger when its last update came, "
        f"{runs}; how many examples a site has is taken to be public",
    ]


def example_report(epsilons: Mapping[str, float], budget: PrivacyBudget | None) -> dict[str, Any]:
    """The same for ``privacy.json``; empty if the job promises examples nothing."""
    if budget is None:
        return {}
    sites = {site: _number(epsilon) for site, epsilon in epsilons.items()}
    return {"sites": sites, "budget": {"max_epsilon": _number(budget.max_epsilon), "delta": budget.delta}}


def _less(total: Guarantee, events: Sequence[DpEvent]) -> str:
    """What a total is of, where this run alone claims more."""
    if (total.adjacency, total.adversary) in {_claim(event) for event in events}:
        return ""
    return f", by what all of them claim: {_ADJACENCY[total.adjacency].format(unit=total.unit)}"


def _alike(runs: Sequence[Sequence[DpEvent]]) -> list[list[DpEvent]]:
    """Of runs on the same data, the events of the guarantees that all of them give.

    What only some claim, such as that it holds against the server, is not true of all together. Where they have no
    claim in common, every event counts as what each of them is at least: replace one, against who sees the models.
    """
    out: list[list[DpEvent]] = [[] for _ in runs]
    for unit in dict.fromkeys(event.unit for run in runs for event in run):
        own = [[event for event in run if event.unit == unit] for run in runs]
        common = set.intersection(*({_claim(event) for event in run} for run in own if run))
        for events, run in zip(out, own, strict=True):
            events += [event for event in run if _claim(event) in common] if common else map(_weakened, run)
    return out


def _claim(event: DpEvent) -> tuple[Adjacency, Adversary]:
    return event.adjacency, event.adversary


def _weakened(event: DpEvent) -> DpEvent:
    return replace(event, adjacency="replace_one", adversary="server_trusted")


def _figure(guarantee: Guarantee) -> str:
    if math.isinf(guarantee.epsilon):
        return "no formal guarantee"
    return f"ε = {upper(guarantee.epsilon)} at δ = {guarantee.delta:g}"


def _plain(guarantee: Guarantee) -> dict[str, Any]:
    return {**asdict(guarantee), "epsilon": _number(guarantee.epsilon)}


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return None if math.isinf(value) else value
