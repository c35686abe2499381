"""The live bar under a run's lines: rounds, and the sites of the stage that is on."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sfl.core.events import RoundFinished, RunStarted, SiteFinished, StageStarted, TransferProgress
from sfl.io.words import cohort, one_line, size

__all__ = ["LiveBar"]

_MOVING_SHOWN = 2


class LiveBar:
    """Two transient lines. Only what this class started is stopped; stopping twice is harmless."""

    def __init__(self, console: Console, run: RunStarted) -> None:
        self._waiting: list[str] = []
        self._moving: dict[str, TransferProgress] = {}
        self._progress = Progress(
            TextColumn("{task.description}", style="cyan"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._rounds = self._progress.add_task("rounds", total=run.rounds, completed=run.done, note="")
        self._sites = self._progress.add_task("sites", total=len(run.clients), visible=False, note="")
        self._progress.start()

    def stage(self, event: StageStarted) -> None:
        """A new stage: the lower line starts again."""
        self._waiting, self._moving = list(event.cohort), {}
        self._progress.reset(
            self._sites,
            total=max(len(event.cohort), 1),
            description=one_line(event.stage).replace("[", "\\["),
            visible=True,
            note=self._note(),
        )

    def site(self, event: SiteFinished) -> None:
        """One site less to wait for."""
        if event.site in self._waiting:
            self._waiting.remove(event.site)
            self._moving.pop(event.site, None)
            self._progress.update(self._sites, advance=1, note=self._note())

    def transfer(self, event: TransferProgress) -> None:
        """How far a large model or update has come, until it is there."""
        self._moving[event.site] = event
        if event.done >= event.total:
            del self._moving[event.site]
        self._progress.update(self._sites, note=self._note())

    def round(self, event: RoundFinished) -> None:
        """The round is over."""
        self._progress.update(self._rounds, completed=event.round)
        self._progress.update(self._sites, visible=False)

    def stop(self) -> None:
        """Takes both lines off the screen."""
        self._progress.stop()

    def _note(self) -> str:
        words = [_words(event) for event in self._moving.values()]
        shown = words if len(words) <= _MOVING_SHOWN else [*words[:_MOVING_SHOWN], "…"]
        return ", ".join(shown) or (f"waiting for {cohort(self._waiting)}" if self._waiting else "")


def _words(event: TransferProgress) -> str:
    where = "from" if event.direction == "up" else "to"
    return f"{where} {one_line(event.site)} {event.done / event.total:.0%} of {size(event.total)}"
