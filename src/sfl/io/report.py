"""``report.html``: one page about a run, built from the files in its folder alone, that opens without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfl.core.task import Status
from sfl.errors import DataError, MissingExtraError
from sfl.io import report_charts, report_tables
from sfl.io.metrics import JSONL, read_rounds
from sfl.io.tree import write_text
from sfl.io.words import metric_name

__all__ = ["write_report"]

_CHARTS_SHOWN = 8


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into a run's folder.

    Reads ``metrics.jsonl``, and where they exist ``config.yaml``, ``environment.json``, ``data.json``,
    ``privacy.json`` and ``shown.json``. The page carries its own style, script and figures: it asks no other machine
    for anything.

    Args:
        folder: The folder of a run, finished or not.

    Returns:
        The page's path.

    Raises:
        DataError: ``metrics.jsonl`` is missing, or one of the files is broken.
        MissingExtraError: plotly or jinja2 is not installed.
    """
    folder = Path(folder)
    context = _context(folder)
    page = folder / "report.html"
    write_text(page, _rendered(context))
    return page


def _context(folder: Path) -> dict[str, Any]:
    rounds = read_rounds(folder / JSONL)
    data = _json(folder / "data.json")
    config_text = _text(folder / "config.yaml")
    environment = _json(folder / "environment.json")
    privacy = _json(folder / "privacy.json")
    shown = _json(folder / "shown.json")
    names = report_tables.metric_names(rounds)
    columns = report_tables.figure_columns(rounds, names)
    charts = [(metric_name(name), report_charts.metric_chart(name, rounds)) for name in names[:_CHARTS_SHOWN]]
    return {
        **report_tables.config_facts(_yaml(config_text, folder), environment.get("job") or folder.resolve().name),
        "done": rounds[-1].round if rounds else 0,
        "headline": report_tables.headline(rounds),
        "charts": [(name, chart) for name, chart in charts if chart is not None],
        "columns": [(metric_name(name), sources) for name, sources in columns],
        "rounds": report_tables.round_rows(rounds, columns),
        "first_metric": metric_name(names[0]) if names else "",
        "sites": report_tables.site_rows(rounds, data, names[0] if names else "loss"),
        "statuses": [status.value for status in Status],
        "problems": report_tables.problems(rounds),
        "data": data,
        "sizes": report_charts.size_chart(data.get("sites", [])),
        "time": report_charts.time_chart(rounds),
        "totals": report_tables.totals(rounds),
        "shown": report_tables.shown_rows(shown),
        "privacy": privacy,
        "epsilons": _epsilons(privacy),
        "config": config_text,
        "environment": environment,
        "plotly_js": report_charts.plotly_js(),
    }


def _epsilons(privacy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Charts of ε over rounds: the run's own ledger."""
    chart = report_charts.epsilon_chart(privacy.get("over_rounds", []), privacy.get("budget", {}).get("max_epsilon"))
    return [("ε of the run's ledger, over the rounds", chart)] if chart is not None else []


def _rendered(context: Mapping[str, Any]) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report") from error
    environment = Environment(
        loader=PackageLoader("sfl.io", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be readable text: {error}. Remove it to leave it out of the report.") from error


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        tree = json.loads(text or "{}")
    except ValueError as error:
        raise DataError(f"{path} must be JSON: {error}. Remove it to leave it out of the report.") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(tree).__name__}. Remove it to leave it out.")
    return tree


def _yaml(text: str, folder: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{folder / 'config.yaml'} must be YAML: {error}. Remove it to leave it out.") from error
