"""The charts of a report. Colours are Okabe and Ito's, which stay apart for the colour-blind, on light and on dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sfl.core.events import RoundFinished
from sfl.core.task import EVALUATE
from sfl.errors import MissingExtraError

__all__ = ["PHASES", "Series", "epsilon_chart", "metric_chart", "plotly_js", "size_chart", "time_chart"]

_BLUE, _VERMILION, _GREEN, _PINK, _SKY, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
_GREY = "#8a8f98"
_SITE_COLOURS = (_GREEN, _ORANGE, _PINK, _SKY)
_SITE_MARKS = ("square", "diamond", "triangle-up", "x", "triangle-down", "cross")
PHASES: tuple[str, ...] = ("fit", "aggregate", "evaluate", "central", "checkpoint")
"""The phases of a round, in order."""
_PHASE_COLOURS: dict[str, str] = dict(zip(PHASES, (_BLUE, _ORANGE, _GREEN, _SKY, _PINK), strict=True))
_SITES_NAMED = 8
_INK = "#5c626b"  # readable on white and on black, for what the style sheet of the page does not reach

Series = Mapping[int, float]
"""Round to figure."""


def plotly_js() -> str:
    """The plotly library, for a page that works without a network.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report") from error
    return get_plotlyjs()


def metric_chart(metric: str, rounds: Sequence[RoundFinished]) -> str | None:
    """One metric per round: global, mean, training, and each site. None if no round has it as a finite figure."""
    traces: list[dict[str, Any]] = []
    sources = (
        ("global held-out data", {r.round: r.central for r in rounds}, {"color": _BLUE, "width": 3.5}, "circle"),
        ("mean of the sites", {r.round: r.evaluation for r in rounds}, {"color": _VERMILION, "width": 2.5}, "circle"),
        (
            "while training",
            {r.round: r.fit for r in rounds},
            {"color": _GREY, "width": 2, "dash": "dot"},
            "circle-open",
        ),
    )
    for name, metrics, line, mark in sources:
        series = {number: figures[metric] for number, figures in metrics.items() if metric in figures}
        traces += _line(name, series, line, mark)
    by_site = _by_site(metric, rounds)
    for number, (site, series) in enumerate(by_site.items()):
        named = len(by_site) <= _SITES_NAMED
        colour = _SITE_COLOURS[number % len(_SITE_COLOURS)] if named else _GREY
        mark = _SITE_MARKS[number % len(_SITE_MARKS)]
        line = {"color": colour, "width": 1.5 if named else 0.7, "dash": "dash"}
        traces += [trace | {"showlegend": named} for trace in _line(site, series, line, mark)]
    if not traces:
        return None
    layout = {"yaxis": {"tickformat": _tick_format(metric)}}
    return _chart(f"chart-{_slug(metric)}", traces, layout | {"xaxis": _round_axis(rounds)})


def time_chart(rounds: Sequence[RoundFinished]) -> str | None:
    """Seconds of each phase, stacked per round."""
    phases = dict.fromkeys([*_PHASE_COLOURS, *(phase for r in rounds for phase in r.seconds)])
    traces = [
        {
            "type": "bar",
            "name": html.escape(phase),
            "x": [r.round for r in rounds],
            "y": [_finite(r.seconds.get(phase, 0.0)) for r in rounds],
            "marker": {"color": _PHASE_COLOURS.get(phase, _GREY)},
            "hovertemplate": "round %{x}: %{y:.2f} s",
        }
        for phase in phases
        if any(r.seconds.get(phase) for r in rounds)
    ]
    layout = {"barmode": "stack", "bargap": 0.35, "yaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"}}
    return _chart("chart-time", traces, layout | {"xaxis": _round_axis(rounds)}) if traces else None


def epsilon_chart(spent: Sequence[Mapping[str, Any]], budget: float | None) -> str | None:
    """ε by the end of each round, of each unit and adversary by itself, against the budget.

    Args:
        spent: ``round``, ``unit``, ``adversary`` and ``epsilon``, which is ``None`` without a guarantee.
        budget: The largest ε; ``None`` if there is no limit.
    """
    kinds: dict[tuple[str, str], dict[int, float]] = {}
    for entry in spent:
        if entry["epsilon"] is not None:
            kind = (str(entry["unit"]), str(entry["adversary"]).replace("_", " "))
            kinds.setdefault(kind, {})[int(entry["round"])] = float(entry["epsilon"])
    traces: list[dict[str, Any]] = []
    for number, ((unit, adversary), series) in enumerate(kinds.items()):
        colour = (_BLUE, _VERMILION, _GREEN, _PINK)[number % 4]
        traces += _line(f"each {unit}, {adversary}", series, {"color": colour, "width": 2.5}, _SITE_MARKS[number % 6])
    rounds = [number for series in kinds.values() for number in series]
    if not traces:
        return None
    if budget is not None:
        ends = {min(rounds): budget, max(rounds): budget}
        traces += _line("budget", ends, {"color": _GREY, "width": 2, "dash": "dash"}, "line-ew")
    layout = {"yaxis": {"title": {"text": "ε"}, "rangemode": "tozero"}, "xaxis": {"title": {"text": "round"}}}
    return _chart("chart-epsilon", traces, layout)


def size_chart(sites: Sequence[Mapping[str, Any]]) -> str | None:
    """Training and held-out examples of each site."""
    names = [html.escape(str(site.get("name", "?"))) for site in sites]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [site.get(key, 0) for site in sites],
            "marker": {"color": colour},
            "hovertemplate": "%{y}: %{x:,}",
        }
        for key, name, colour in (("train", "training", _BLUE), ("heldout", "held out", _ORANGE))
        if any(site.get(key) for site in sites)
    ]
    layout = {
        "barmode": "stack",
        "height": 150 + 28 * len(names),
        "xaxis": {"title": {"text": "examples"}, "tickformat": ",d"},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    return _chart("chart-sizes", traces, layout) if traces else None


def _by_site(metric: str, rounds: Sequence[RoundFinished]) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {}
    for event in rounds:
        for entry in event.sites:
            if entry.stage == EVALUATE and metric in entry.metrics:
                series.setdefault(entry.site, {})[event.round] = entry.metrics[metric]
    return dict(sorted(series.items()))


def _line(name: str, series: Series, line: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    if not any(math.isfinite(value) for value in series.values()):
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": html.escape(name),
            "x": list(series),
            "y": [_finite(value) for value in series.values()],
            "line": line,
            "marker": {"symbol": mark, "size": 7},
        }
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _slug(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)


def _tick_format(metric: str) -> str:
    return ".0%" if "accuracy" in metric else ""


def _round_axis(rounds: Sequence[RoundFinished]) -> dict[str, Any]:
    step = max(1, math.ceil(max((r.round for r in rounds), default=1) / 15))
    return {"title": {"text": "round"}, "tick0": 0, "dtick": step, "zeroline": False}


def _chart(name: str, traces: list[dict[str, Any]], layout: dict[str, Any]) -> str:
    from plotly.io import to_html

    axes = {"gridcolor": "rgba(128,128,128,0.25)", "linecolor": "rgba(128,128,128,0.5)", "zeroline": False}
    base: dict[str, Any] = {
        "height": 340,
        "margin": {"l": 56, "r": 12, "t": 40, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "xaxis": axes | layout.get("xaxis", {}),
        "yaxis": axes | layout.get("yaxis", {}),
    }
    figure = {"data": traces, "layout": layout | base | {"height": layout.get("height", base["height"])}}
    config = {"displayModeBar": False, "displaylogo": False, "responsive": True}
    return to_html(figure, config=config, include_plotlyjs=False, full_html=False, div_id=name)
