"""An engine on which some sites lie, to see what an aggregation rule stands. It wraps any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from sfl.core import arrays, rng, sparse
from sfl.core.task import FIT, Reply, Status, Task, Update
from sfl.engine import attacks
from sfl.engine.base import Engine, owned
from sfl.errors import CompositionError, ConfigError, UpdateError, nearest
from sfl.types import Parameters

__all__ = ["ATTACKS", "Attack", "AttackedEngine", "FLIP_LABELS", "check_attack"]  # noqa: RUF022 - plain order

FLIP_LABELS: Final = "flip_labels"
"""In the configuration of a task: the client should train on exchanged labels."""

LABEL_FLIP: Final = "label-flip"


@dataclass(frozen=True)
class Attack:
    """Which sites lie, and how; see ``sfl.engine.attacks`` for the names.

    Attributes:
        name: What they do.
        attackers: How many, the last ones by name, or their names.
        scale: s in the table of attacks; by default that of the table.
        seed: Of the noise of ``gaussian``.
    """

    name: str
    attackers: int | tuple[str, ...] = 1
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise ConfigError(f"attack must be one that is known, got {self.name!r}. {nearest(self.name, ATTACKS)}")
        if isinstance(self.attackers, int) and self.attackers < 1:
            raise ConfigError(f"attackers must be at least 1, got {self.attackers}. Leave the attack out for none.")
        if self.scale is not None and not np.isfinite(self.scale):
            raise ConfigError(f"attack_scale must be finite, got {self.scale}.")

    def sites(self, clients: Sequence[str]) -> tuple[str, ...]:
        """The attackers among these sites.

        Raises:
            CompositionError: If they are not there, or nobody would be honest.
        """
        if not isinstance(self.attackers, int):
            unknown = [name for name in self.attackers if name not in clients]
            if unknown:
                raise CompositionError(f"attackers must be sites, got {unknown[0]!r}. {nearest(unknown[0], clients)}")
            chosen = tuple(sorted(self.attackers))
        else:
            chosen = tuple(clients[-self.attackers :])
        if len(chosen) >= len(clients):
            raise CompositionError(
                f"attackers must leave a site that is honest, got {len(chosen)} of {len(clients)}. Lower attackers."
            )
        return chosen


def check_attack(attack: Attack, client: object) -> None:
    """Whether the sites of a job can play an attack.

    Args:
        attack: The attack.
        client: The client class. One that exchanges labels where a task's configuration says ``flip_labels`` has the
            class attribute ``flips_labels = True``.

    Raises:
        CompositionError: If they cannot.
    """
    if attack.name == LABEL_FLIP and not getattr(client, "flips_labels", False):
        raise CompositionError(
            f"{LABEL_FLIP} must be played by a client with flips_labels = True, which exchanges its labels when "
            f"config[{FLIP_LABELS!r}] is set, got {getattr(client, '__name__', client)}. Choose another attack."
        )


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

    def exchange(self, task: Task, cohort: Sequence[str], timeout: float | None = None) -> Iterator[Reply]:
        """The inner engine's replies; after training those of attackers are lies."""
        liars = [site for site in cohort if site in self._liars]
        if task.name != FIT or not liars:
            yield from self._inner.exchange(task, cohort, timeout)
            return
        if self._attack.name == LABEL_FLIP:
            honest = [site for site in cohort if site not in liars]
            told = replace(task, config={**task.config, FLIP_LABELS: True})
            replies = [owned(reply) for reply in self._inner.exchange(task, honest, timeout)]
            replies += [owned(reply) for reply in self._inner.exchange(told, liars, timeout)]
            by_site = {reply.site: reply for reply in replies}
            yield from (by_site[site] for site in cohort)
            return
        yield from self._with_lies(task, [owned(reply) for reply in self._inner.exchange(task, cohort, timeout)])

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
            replace(reply, update=lies[reply.site], known_finite=False) if reply.site in lies else reply
            for reply in whole
        ]

    def describe(self) -> str:
        """The inner engine, and who attacks."""
        return f"{self._inner.describe()}, UNDER ATTACK: {self._attack.name} by {', '.join(self._liars)}"

    def close(self) -> None:
        """Close the inner engine."""
        self._inner.close()


@dataclass(frozen=True)
class Scene:
    """What the attackers of a round know.

    Attributes:
        known: The honest updates; the attackers' own where nobody honest is in the round.
        round: The round.
        attack: The attack.
        first: Each attacker's own first delta.
    """

    known: tuple[Update, ...]
    round: int
    attack: Attack
    first: dict[str, Parameters]

    def scale(self, default: float) -> float:
        """s, as given or by default."""
        return default if self.attack.scale is None else self.attack.scale

    @property
    def deltas(self) -> list[Parameters]:
        """The known deltas."""
        return [update.delta for update in self.known]


Lie = Callable[[Update], Update]


def _all_send(delta: Parameters) -> Lie:
    return lambda own: replace(own, delta=arrays.copy(delta))


def _gaussian(scene: Scene) -> Lie:
    def lie(own: Update) -> Update:
        generator = rng.public(scene.attack.seed, scene.round, "attack", own.site)
        return replace(own, delta=attacks.gaussian(scene.deltas, scene.scale(10.0), generator))

    return lie


ATTACKS: Final[dict[str, Callable[[Scene], Lie]]] = {
    "alie": lambda scene: _all_send(attacks.alie(scene.deltas, scene.scale(1.5))),
    "gaussian": _gaussian,
    "inf": lambda _: lambda own: replace(own, delta=attacks.filled(own.delta, np.inf)),
    "ipm": lambda scene: _all_send(attacks.scaled_mean(scene.deltas, -scene.scale(0.5))),
    LABEL_FLIP: lambda _: lambda own: own,  # the task has told the client
    "mimic": lambda scene: _all_send(scene.deltas[attacks.mimic(scene.deltas)]),
    "min-max": lambda scene: _all_send(attacks.min_max(scene.deltas)),
    "min-sum": lambda scene: _all_send(attacks.min_sum(scene.deltas)),
    "nan": lambda _: lambda own: replace(own, delta=attacks.filled(own.delta, np.nan)),
    "num-examples": lambda scene: lambda own: replace(own, weight=own.weight * scene.scale(1e6)),
    "replay": lambda scene: lambda own: replace(own, delta=arrays.copy(scene.first[own.site])),
    "sign-flip": lambda scene: _all_send(attacks.scaled_mean(scene.deltas, -scene.scale(1.0))),
}
"""What every attack makes of an attacker's own update."""


def _whole(reply: Reply, task: Task) -> Reply:
    """With all its zeros: a wire leaves them out."""
    update = reply.update
    if update is None or not sparse.is_packed(update.delta):
        return reply
    try:
        return replace(reply, update=replace(update, delta=sparse.unpacked(update.delta, dict(task.parameters))))
    except UpdateError as error:
        return Reply(reply.site, Status.REJECTED, reason=str(error), seconds=reply.seconds, ticket=reply.ticket)
