"""An engine on which some sites lie, to see what an aggregation rule stands. It wraps any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sfl.core import arrays
from sfl.core.events import TransferProgress
from sfl.core.task import FIT, Reply, Status, Task
from sfl.core.unpack import unpacked
from sfl.engine.attacker import ATTACKS, FLIP_LABELS, LABEL_FLIP, Attack, Scene
from sfl.engine.base import Engine, owned
from sfl.errors import CompositionError, UpdateError
from sfl.types import Parameters, StateTree

__all__ = ["AttackedEngine"]


class AttackedEngine(Engine):
    """Lets some sites of another engine lie when they train. Everything else passes as it is.

    The attackers see all honest updates of a round before they send theirs, so a round's updates are held in memory
    together. An attacker that failed by itself, or is late, stays so. Evaluations are honest.

    Args:
        inner: Carries the tasks; closed with this one.
        attack: Who lies, and how.

    Raises:
        CompositionError: If the attackers are not among its sites.
    """

    def __init__(self, inner: Engine, attack: Attack) -> None:
        self._inner, self._attack = inner, attack
        self._liars = attack.sites(inner.clients())
        self._first: dict[str, Parameters] = {}

    def clients(self) -> list[str]:
        """Those of the inner engine."""
        return self._inner.clients()

    def send(self, task: Task, clients: Sequence[str]) -> int:
        """Hand on a task that is no training.

        Raises:
            CompositionError: If it is: a lie is made of a whole round's updates.
        """
        if task.name == FIT and set(clients) & set(self._liars):
            raise CompositionError(
                "an attack must be on an algorithm of whole rounds, got a workflow that sends tasks of its own. "
                "Leave the attack out."
            )
        return self._inner.send(task, clients)

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        """Those of the inner engine."""
        return self._inner.replies(timeout, ticket=ticket)

    def cancel(self, ticket: int) -> None:
        """See ``Engine.cancel``."""
        self._inner.cancel(ticket)

    def present(self, at_least: int) -> list[str]:
        """See ``Engine.present``."""
        return self._inner.present(at_least)

    def watch(self, listener: Callable[[TransferProgress], object]) -> None:
        """See ``Engine.watch``."""
        self._inner.watch(listener)

    def remembers(self) -> StateTree:
        """What attackers replay, and what the inner engine remembers."""
        return {"first": self._first, "inner": self._inner.remembers()}

    def recall(self, state: StateTree) -> None:
        """Go on from there."""
        kept: Any = state
        if "first" in kept:
            self._first = {str(site): arrays.copy(delta) for site, delta in kept["first"].items()}
            kept = kept["inner"]
        if kept is not None:
            self._inner.recall(kept)

    def simulated_seconds(self) -> float | None:
        """See ``Engine.simulated_seconds``."""
        return self._inner.simulated_seconds()

    def exchange(
        self, task: Task, cohort: Sequence[str], timeout: float | None = None, *, enough: int = 0
    ) -> Iterator[Reply]:
        """The inner engine's replies; after training those of attackers are lies.

        Raises:
            CompositionError: If labels are to be flipped in rounds that wait for some sites alone.
        """
        liars = [site for site in cohort if site in self._liars]
        if task.name != FIT or not liars:
            yield from self._inner.exchange(task, cohort, timeout, enough=enough)
            return
        if self._attack.name == LABEL_FLIP:
            if enough:
                raise CompositionError(f"wait_for must be 0 under {LABEL_FLIP}, got {enough}. Leave it out.")
            honest = [site for site in cohort if site not in liars]
            told = replace(task, config={**task.config, FLIP_LABELS: True})
            replies = [owned(reply) for reply in self._inner.exchange(task, honest, timeout)]
            replies += [owned(reply) for reply in self._inner.exchange(told, liars, timeout)]
            by_site = {reply.site: reply for reply in replies}
            yield from (by_site[site] for site in cohort)
            return
        yield from self._with_lies(task, [owned(r) for r in self._inner.exchange(task, cohort, timeout, enough=enough)])

    def _with_lies(self, task: Task, replies: list[Reply]) -> list[Reply]:
        whole = [_whole(reply, task) for reply in replies]
        used = [reply.update for reply in whole if reply.update is not None and reply.status is Status.USED]
        honest = [update for update in used if update.site not in self._liars]
        own = [update for update in used if update.site in self._liars]
        if not own:
            return replies
        for update in own:
            self._first.setdefault(update.site, arrays.copy(update.delta))
        scene = Scene(tuple(honest or own), task.round, self._attack, self._first)
        lie = ATTACKS[self._attack.name](scene)
        lies = {update.site: lie(update) for update in own}
        return [
            replace(seen, update=lies[seen.site], known_finite=False)
            if seen.site in lies
            else (reply if seen.status is Status.USED else seen)  # what is honest goes on in the bytes that it came in
            for reply, seen in zip(replies, whole, strict=True)
        ]

    def describe(self) -> str:
        """The inner engine, and who attacks."""
        return f"{self._inner.describe()}, UNDER ATTACK: {self._attack.name} by {', '.join(self._liars)}"

    def close(self) -> None:
        """Close the inner engine."""
        self._inner.close()


def _whole(reply: Reply, task: Task) -> Reply:
    """With all its zeros, in floats: it may have come without, or as codes."""
    update = reply.update
    if update is None:
        return reply
    try:
        return replace(reply, update=replace(update, delta=unpacked(update.delta, dict(task.parameters))))
    except UpdateError as error:
        return Reply(reply.site, Status.REJECTED, reason=str(error), seconds=reply.seconds, ticket=reply.ticket)
