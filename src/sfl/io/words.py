"""Figures and outcomes in words: what the console and the report both say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from sfl.core.events import RoundFinished, SiteFinished
from sfl.core.task import FIT, Status

__all__ = [
    "best_source",
    "cohort",
    "first_metrics",
    "metric_name",
    "metric_value",
    "one_line",
    "outcomes",
    "size",
    "span",
    "traffic",
]

_FIRST = ("loss", "perplexity", "masked_accuracy", "accuracy")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_NAMES_SHOWN = 3


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> size(10_912_345), size(512)
    ('10.9 MB', '512 B')
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def span(seconds: float) -> str:
    """Seconds for people.

    >>> span(0.25), span(12.34), span(75), span(4000)
    ('0.25 s', '12.3 s', '1 min 15 s', '1 h 06 min')
    """
    if not math.isfinite(seconds):
        return "? s"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def metric_name(name: str) -> str:
    """A metric's name for people: ``masked_accuracy`` is ``masked accuracy``."""
    return one_line(name.replace("_", " "))


def metric_value(name: str, value: float) -> str:
    """A metric's value for people: accuracies in percent, others in a few digits.

    >>> metric_value("masked_accuracy", 0.1234), metric_value("loss", 2.81234), metric_value("perplexity", 16.651)
    ('12.3 %', '2.8123', '16.65')
    """
    if not math.isfinite(value):
        return str(value)
    if "accuracy" in name and 0.0 <= value <= 1.0:
        return f"{100 * value:.1f} %"
    magnitude = abs(value)
    if magnitude >= 1e6 or 0.0 < magnitude < 1e-3:
        return f"{value:.3g}"
    return f"{value:.2f}" if magnitude >= 10 or "perplexity" in name else f"{value:.4f}"


def first_metrics(metrics: Iterable[str], limit: int | None = None) -> list[str]:
    """The names in the order people ask for them: loss, perplexity, accuracies, then the others as they came."""
    names = list(dict.fromkeys(metrics))
    known = [name for name in _FIRST if name in names]
    return (known + [name for name in names if name not in known])[:limit]


def best_source(event: RoundFinished) -> tuple[str, Mapping[str, float]]:
    """The figures that tell most about the global model, and where they come from."""
    sources = (("global", event.central), ("sites", event.evaluation), ("training", event.fit))
    return next(((name, metrics) for name, metrics in sources if metrics), ("", {}))


def one_line(text: str) -> str:
    """Foreign text without control characters: a site's error must not move the cursor of a terminal.

    >>> one_line("bad\\x1b[2J\\nline")
    'bad [2J line'
    """
    return _UNPRINTABLE.sub(" ", text)


def outcomes(sites: Sequence[SiteFinished]) -> str:
    """How the sites of a round ended, failures by name.

    >>> outcomes([SiteFinished(round=1, stage="fit", site="a", status=Status.USED)])
    '1 used'
    """
    stages = dict.fromkeys(entry.stage for entry in sites)
    main = FIT if FIT in stages else next(iter(stages), "")
    parts: list[str] = []
    for stage in sorted(stages, key=lambda name: name != main):
        where = "" if stage == main else f" in {one_line(stage)}"
        for status in Status:
            names = [entry.site for entry in sites if entry.stage == stage and entry.status == status]
            if status is Status.USED and stage == main:
                parts.append(f"{len(names)} used")
            elif names and status is not Status.USED:
                parts.append(f"{len(names)} {status.value}{where} ({cohort(names)})")
    return ", ".join(parts)


def cohort(names: Sequence[str], shown: int = _NAMES_SHOWN) -> str:
    """Some names and how many more.

    >>> cohort(["a", "b", "c", "d", "e"])
    'a, b, c, +2'
    """
    head = ", ".join(one_line(name) for name in names[:shown])
    return f"{head}, +{len(names) - shown}" if len(names) > shown else head


def traffic(event: RoundFinished, nbytes: int) -> str:
    """Bytes down and up, in copies of a model of ``nbytes`` where it comes out even.

    >>> from dataclasses import replace
    >>> empty = {"fit": {}, "evaluation": {}, "central": {}, "sites": (), "seconds": {}}
    >>> event = RoundFinished(round=1, **empty, bytes_down=8, bytes_up=8)
    >>> traffic(event, 4), traffic(replace(event, bytes_up=4), 4), traffic(event, 3)
    ('2 × 4 B each way', '2 × 4 B down, 4 B up', '8 B each way')
    """
    down, up = _copies(event.bytes_down, nbytes), _copies(event.bytes_up, nbytes)
    return f"{down} each way" if down == up else f"{down} down, {up} up"


def _copies(total: int, nbytes: int) -> str:
    if nbytes > 0 and total > nbytes and total % nbytes == 0:
        return f"{total // nbytes} \N{MULTIPLICATION SIGN} {size(nbytes)}"
    return size(total)
