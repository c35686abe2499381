"""The tables of a report, as plain rows that the template writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfl.core.events import RoundFinished, SiteFinished
from sfl.core.task import EVALUATE, FIT, Status
from sfl.io.report_charts import PHASES
from sfl.io.words import best_source, first_metrics, metric_name, metric_value, one_line, outcomes, size, span, traffic

__all__ = [
    "config_facts",
    "figure_columns",
    "headline",
    "metric_names",
    "problems",
    "round_rows",
    "site_rows",
    "totals",
]

_SOURCES = {
    "global": "on the global held-out data",
    "sites": "mean of the sites' held-out data",
    "training": "training",
}


def metric_names(rounds: Sequence[RoundFinished]) -> list[str]:
    """All metrics of the global model (of training, if it was never evaluated), best known first."""
    names = first_metrics(name for event in rounds for name in (*event.central, *event.evaluation))
    return names or first_metrics(name for event in rounds for name in event.fit)


def headline(rounds: Sequence[RoundFinished]) -> dict[str, Any]:
    """Before and after of each metric, from the best source that any round has."""
    scored = [(event, *best_source(event)) for event in rounds]
    source = next((name for name in _SOURCES if any(seen == name for _, seen, _ in scored)), "")
    chosen = [(event, metrics) for event, seen, metrics in scored if seen == source]
    if not source:
        return {"source": "", "tiles": []}
    (first, before), (last, after) = chosen[0], chosen[-1]
    tiles = [_tile(name, before.get(name), after[name]) for name in first_metrics(after)]
    start = "before training" if first.round == 0 else f"after round {first.round}"
    return {"source": _SOURCES[source], "start": start, "end": f"after round {last.round}", "tiles": tiles}


def _tile(name: str, before: float | None, after: float) -> dict[str, str]:
    return {
        "name": metric_name(name),
        "before": "" if before is None else metric_value(name, before),
        "after": metric_value(name, after),
        "change": "" if before is None else _change(name, before, after),
    }


def _change(name: str, before: float, after: float) -> str:
    if not (math.isfinite(before) and math.isfinite(after)):
        return "not a finite figure"
    if "accuracy" in name:
        return f"{100 * (after - before):+.1f} points"
    return f"{100 * (after - before) / abs(before):+.1f} %" if before else f"{after - before:+.3g}"


def figure_columns(rounds: Sequence[RoundFinished], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """For each metric the sources that ever had it."""
    seen = {(source, name) for event in rounds for source, figures in _sources(event).items() for name in figures}
    return [(name, [source for source in _SOURCES if (source, name) in seen]) for name in names]


def round_rows(rounds: Sequence[RoundFinished], columns: Sequence[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    """One row a round: figures of each source, outcomes, seconds, bytes."""
    return [
        {
            "round": event.round or "before",
            "figures": [_figure(name, _sources(event)[source]) for name, sources in columns for source in sources],
            "outcomes": outcomes(event.sites),
            "seconds": span(sum(event.seconds.values())),
            "traffic": traffic(event, 0) if event.round else "",
        }
        for event in rounds
    ]


def _sources(event: RoundFinished) -> dict[str, Mapping[str, float]]:
    return {"global": event.central, "sites": event.evaluation, "training": event.fit}


def _figure(name: str, metrics: Mapping[str, float]) -> str:
    return metric_value(name, metrics[name]) if name in metrics else ""


def site_rows(rounds: Sequence[RoundFinished], data: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """One row a site: how often each status in training, and what became of ``metric`` on its own held-out data."""
    facts = {str(site.get("name")): site for site in data.get("sites", ())}
    entries = [entry for event in rounds for entry in event.sites]
    names = sorted({entry.site for entry in entries} | set(facts))
    return [_site_row(name, [e for e in entries if e.site == name], facts.get(name, {}), metric) for name in names]


def _site_row(name: str, entries: Sequence[SiteFinished], facts: Mapping[str, Any], metric: str) -> dict[str, Any]:
    fits = [entry for entry in entries if entry.stage == FIT]
    scores = [entry.metrics[metric] for entry in entries if entry.stage == EVALUATE and metric in entry.metrics]
    return {
        "name": name,
        "counts": [sum(entry.status == status for entry in fits) for status in Status],
        "before": metric_value(metric, scores[0]) if scores else "",
        "after": metric_value(metric, scores[-1]) if len(scores) > 1 else "",
        "seconds": span(sum(entry.seconds for entry in fits)),
        "sent": size(sum(entry.nbytes for entry in fits)),
        "train": _count(facts.get("train")),
        "heldout": _count(facts.get("heldout")),
        "size": _count(facts.get("size", facts.get("residues"))),
        "top": [f"{item[0]} ({item[1]})" for item in facts.get("top", ()) if len(item) == 2],
    }


def shown_rows(shown: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What a model said to each prompt, before and after."""
    before = {str(prompt): str(text) for prompt, text in shown.get("before", ())}
    return [(str(prompt), before.get(str(prompt), ""), str(text)) for prompt, text in shown.get("after", ())]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else ""


def problems(rounds: Sequence[RoundFinished]) -> list[SiteFinished]:
    """Every planned site that did not end as used, in order."""
    out = [entry for event in rounds for entry in event.sites if entry.status is not Status.USED]
    return [replace(entry, reason=one_line(entry.reason)) for entry in out]


def totals(rounds: Sequence[RoundFinished]) -> list[tuple[str, str]]:
    """What the run took in all."""
    phases = dict.fromkeys(PHASES, 0.0)
    for event in rounds:
        for phase, seconds in event.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    down, up = sum(event.bytes_down for event in rounds), sum(event.bytes_up for event in rounds)
    rows = [("Time in rounds", span(sum(phases.values())))]
    rows += [(f"of it {one_line(phase)}", span(seconds)) for phase, seconds in phases.items() if seconds]
    return [*rows, ("Parameters sent to the sites", size(down)), ("Updates received from them", size(up))]


def config_facts(config: object, otherwise: str) -> dict[str, Any]:
    """The job's name and how many rounds it planned; the name is ``otherwise`` where the configuration has none."""
    tree: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    federation = tree.get("federation")
    job = next((tree[key] for key in ("job", "recipe", "name") if isinstance(tree.get(key), str)), None)
    planned = federation.get("num_rounds") if isinstance(federation, Mapping) else None
    planned = planned.get("value") if isinstance(planned, Mapping) else planned
    return {"job": job or otherwise, "planned": planned if isinstance(planned, int) else None}
