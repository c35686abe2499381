"""Before and after: what a run did to the metrics, overall and at every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sfl.core.events import RoundFinished
from sfl.core.task import EVALUATE
from sfl.io.words import first_metrics, metric_name, metric_value

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Summary"]

_SITES_SHOWN = 20
_NOTHING = "-"

Scores = dict[str, Mapping[str, float]]


class Summary:
    """Remembers the first and the last round that evaluated the global model."""

    def __init__(self) -> None:
        self._first: RoundFinished | None = None
        self._last: RoundFinished | None = None

    def add(self, event: RoundFinished) -> None:
        """Takes note of a finished round."""
        if _scores(event):
            self._first = self._first or event
            self._last = event

    def table(self, width: int, encodable: Callable[[str], str]) -> Table | None:
        """A table of at most ``width`` columns, or None if there is nothing to compare."""
        if self._first is None or self._last is None or self._first is self._last:
            return None
        before, after = _scores(self._first), _scores(self._last)
        names = first_metrics(name for scores in after.values() for name in scores)
        scopes = list(after)
        rows = [[scope] + [_change(name, before.get(scope, {}), after[scope]) for name in names] for scope in scopes]
        kept = _columns_that_fit(rows, names, width)
        return self._drawn([row[: kept + 1] for row in rows], names[:kept], encodable)

    def _drawn(self, rows: list[list[str]], names: list[str], encodable: Callable[[str], str]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", border_style="dim")
        table.add_column(Text(encodable(self._header())), style="cyan", overflow="fold")
        for name in names:
            table.add_column(Text(encodable(metric_name(name))), justify="right", no_wrap=True)
        for row in rows[: _SITES_SHOWN + 2]:
            table.add_row(*(Text(encodable(cell)) for cell in row))
        if len(rows) > _SITES_SHOWN + 2:
            table.add_row(Text(f"and {len(rows) - _SITES_SHOWN - 2} more sites", style="dim"))
        return table

    def _header(self) -> str:
        start = "before" if self._first is None or self._first.round == 0 else f"round {self._first.round}"
        return f"{start} → after"


def _scores(event: RoundFinished) -> Scores:
    """The global model's figures by scope: the global held-out data, the mean over the sites, each site."""
    scores: Scores = {"global": event.central, "all sites": event.evaluation}
    scores |= {entry.site: entry.metrics for entry in event.sites if entry.stage == EVALUATE}
    return {scope: metrics for scope, metrics in scores.items() if metrics}


def _change(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    old, new = (metric_value(name, scores[name]) if name in scores else _NOTHING for scores in (before, after))
    return f"{old} → {new}"


def _columns_that_fit(rows: list[list[str]], names: list[str], width: int) -> int:
    used = max(len("before → after"), *(len(row[0]) for row in rows))
    for number, name in enumerate(names):
        used += 3 + max(len(name), *(len(row[number + 1]) for row in rows))
        if used > width:
            return max(number, 1)
    return len(names)
