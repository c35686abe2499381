"""What a run says on the screen: a calm line for each round, failures by name, a live bar where there is a terminal."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO, TypeAlias

from sfl.core.events import (
    AggregationFinished,
    AggregationStarted,
    BestModelSelected,
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    SiteFinished,
    SiteLogged,
    StageStarted,
    TransferProgress,
)
from sfl.core.task import EXAMPLE_EPSILON, Status
from sfl.errors import ConfigError
from sfl.io.jsonable import dump_line, to_jsonable
from sfl.io.summary import Summary
from sfl.io.words import best_source, first_metrics, metric_name, metric_value, one_line, outcomes, size, span
from sfl.io.words import traffic as traffic_words
from sfl.types import LogFormat, Metrics
from sfl.utils.bounds import upper

if TYPE_CHECKING:
    from rich.console import Console

    from sfl.io.progress import LiveBar

__all__ = ["ConsoleObserver", "console_observer"]

_Part: TypeAlias = tuple[str, str]
"""Text and its style."""

_ASCII = str.maketrans({"·": "-", "\N{MULTIPLICATION SIGN}": "x", "→": ">", "…": "...", "—": "-"})
_WARN = "yellow"
_METRICS_SHOWN = 4


class ConsoleObserver(Protocol):
    """An observer that holds the screen until it is closed: use it with ``with``, and no error leaves a bar behind."""

    def __call__(self, event: Event) -> None:
        """Says one event."""
        ...

    def close(self) -> None:
        """Gives the screen back. Closing twice is harmless."""
        ...

    def __enter__(self) -> ConsoleObserver: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def console_observer(
    format: LogFormat = "rich", verbose: bool = False, stream: TextIO | None = None
) -> ConsoleObserver:
    """An observer that tells people, or with ``"json"`` programs, how a run goes.

    Args:
        format: ``"rich"`` (live bar and colours on a terminal, else as simple), ``"simple"`` (plain lines) or
            ``"json"`` (one object an event: its class's name as ``event``, the UTC ``time``, its fields).
        verbose: Also a line for every site, and the traceback of what failed.
        stream: Where to; standard output if None. Colours are off if it is no terminal or ``NO_COLOR`` is set.

    Raises:
        ConfigError: ``format`` is none of the three.
    """
    if format not in ("rich", "simple", "json"):
        raise ConfigError(f"logging.format must be rich, simple or json, got {format!r}.")
    if format == "json":
        return _JsonLines(stream or sys.stdout)
    return _Screen(_make_console(format, stream or sys.stdout), verbose)


def _make_console(format: LogFormat, stream: TextIO) -> Console:
    from rich.console import Console

    if format == "rich" and stream.isatty():
        return Console(file=stream, highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)
    return Console(file=stream, highlight=False, color_system=None, force_terminal=False, width=120)


class _Closing:
    def close(self) -> None:
        """Nothing to give back."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _JsonLines(_Closing):
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> _JsonLines:
        return self

    def __call__(self, event: Event) -> None:
        head = {"event": type(event).__name__, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        self._stream.write(dump_line(head | to_jsonable(event)) + "\n")
        self._stream.flush()


class _Screen(_Closing):
    """Says events as lines; on a terminal there is a live bar below them."""

    def __init__(self, console: Console, verbose: bool) -> None:
        self._console = console
        self._verbose = verbose
        self._bar: LiveBar | None = None
        self._run: RunStarted | None = None
        self._best: BestModelSelected | None = None
        self._summary = Summary()

    def __enter__(self) -> _Screen:
        return self

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case StageStarted() | TransferProgress():
                self._live(event)
            case SiteFinished():
                self._site(event)
            case SiteLogged():
                self._logged(event)
            case RoundFinished():
                self._round(event)
            case Notice():
                self._notice(event)
            case BestModelSelected():
                self._best = event
            case RunFinished():
                self._finish(event)
            case RoundStarted() | AggregationStarted() | AggregationFinished() | RunFailed():
                pass  # a failed run's error is said by whoever catches it

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, gutter: _Part, *body: _Part) -> None:
        """One line; on a terminal what is too long goes on below the body, not at the margin."""
        from rich.table import Table
        from rich.text import Text

        start, *rest = [(self._encodable(one_line(text)), style) for text, style in (gutter, *body)]
        if not self._console.is_terminal:
            self._console.print(Text.assemble(start, *rest), soft_wrap=True)
            return
        line = Table.grid()
        line.add_column(no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(Text.assemble(start), Text.assemble(*rest))
        self._console.print(line)

    def _encodable(self, text: str) -> str:
        if self._console.encoding.startswith("utf"):
            return text
        return text.translate(_ASCII).encode(self._console.encoding, "replace").decode(self._console.encoding)

    def _start(self, event: RunStarted) -> None:
        self._run = event
        sites = f"{len(event.clients)} site{'s' if len(event.clients) != 1 else ''}"
        model = f"{event.num_parameters:,} parameters ({size(event.nbytes)})"
        rounds = f"{event.rounds} round{'s' if event.rounds != 1 else ''}"
        rounds += f", {event.done} done" if event.done else ""
        facts = f" · {sites} · {rounds} · {model}"
        if self._fits(event.job + facts + " · " + event.engine):
            self._say((event.job, "bold"), (facts, ""), (f" · {event.engine}", "dim"))
        else:
            self._say((event.job, "bold"), (facts, ""))
            self._say(("  ", ""), (event.engine, "dim"))
        if self._console.is_terminal and self._console.is_interactive:
            from sfl.io.progress import LiveBar

            self._bar = LiveBar(self._console, event)

    def _site(self, event: SiteFinished) -> None:
        if self._bar is not None:
            self._bar.site(event)
        if event.status is not Status.USED:
            head = f"{event.site} {event.status.value} in {event.stage}, round {event.round}"
            self._say(("! ", _WARN), (head, _WARN), (f": {event.reason}" if event.reason else "", ""))
            for line in event.details.splitlines() if self._verbose else ():
                self._say(("    ", ""), (line, "dim"))
        elif self._verbose:
            figures = _figures(event.metrics)
            tail = f"{event.num_examples:g} examples · {span(event.seconds)} · {size(event.nbytes)}"
            self._say(("    ", ""), (f"{event.site} {event.stage}  {figures}  {tail}", "dim"))

    def _live(self, event: StageStarted | TransferProgress) -> None:
        """What only the bar shows."""
        if self._bar is None:
            return
        if isinstance(event, StageStarted):
            self._bar.stage(event)
        else:
            self._bar.transfer(event)

    def _logged(self, event: SiteLogged) -> None:
        for line in event.lines:
            self._say(("    ", ""), (f"{event.site} ", "cyan"), (line, "dim"))

    def _notice(self, event: Notice) -> None:
        warning = event.level == "warning"
        self._say(("! " if warning else "  ", _WARN), (event.text, _WARN if warning else "dim"))

    def _round(self, event: RoundFinished) -> None:
        self._summary.add(event)
        label = self._label(event)
        source, metrics = best_source(event)
        figures: list[_Part] = [(f"{source} " if source else "no metrics", "dim")]
        for name in first_metrics(metrics, _METRICS_SHOWN):
            finite = metric_value(name, metrics[name])
            figures += [(" · " if len(figures) > 1 else "", "dim"), (metric_name(name) + " ", "dim")]
            figures.append((finite, "bold red" if finite in ("nan", "inf", "-inf") else "bold"))
        tail = self._tail(event)
        if self._fits(label + "".join(text for text, _ in figures) + "  " + tail):
            self._say((label, "cyan"), *figures, (f"  {tail}", "dim"))
        else:
            self._say((label, "cyan"), *figures)
            self._say((" " * len(label), ""), (tail, "dim"))
        if self._bar is not None:
            self._bar.round(event)

    def _fits(self, line: str) -> bool:
        return not self._console.is_terminal or len(line) <= self._console.width

    def _label(self, event: RoundFinished) -> str:
        rounds = str(self._run.rounds) if self._run is not None else "?"
        width = len(f"round {rounds}/{rounds}  ")
        return (f"round {event.round:>{len(rounds)}}/{rounds}" if event.round else "before").ljust(width)

    def _tail(self, event: RoundFinished) -> str:
        took = span(sum(event.seconds.values()))
        nbytes = self._run.nbytes if self._run is not None else 0
        if event.round == 0:
            return took
        spent = event.fit.get(EXAMPLE_EPSILON)
        words = "" if spent is None else f" · ε {upper(spent)} for each example so far"
        return f"{outcomes(event.sites)} · {took} · {traffic_words(event, nbytes)}{words}"

    def _finish(self, event: RunFinished) -> None:
        self.close()
        table = self._summary.table(self._console.width, self._encodable)
        if table is not None:
            self._console.print(table)
        rounds = f"{event.rounds} round{'s' if event.rounds != 1 else ''} in {span(event.seconds)}"
        if event.reason:
            self._say(("stopped early", f"bold {_WARN}"), (f" · {rounds} · {event.reason}", ""))
        else:
            self._say(("done", "bold green"), (f" · {rounds}", ""))
        best = self._best
        if best is not None and best.round != event.rounds:
            value = f"{metric_name(best.metric)} {metric_value(best.metric, best.value)}"
            self._say(("  ", ""), (f"best model: {value} after round {best.round}", "dim"))


def _figures(metrics: Metrics) -> str:
    shown = first_metrics(metrics, _METRICS_SHOWN)
    return " · ".join(f"{metric_name(name)} {metric_value(name, metrics[name])}" for name in shown)
