"""Who lies in a simulation, how, and what they know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from sfl.client.site import SiteProgram
from sfl.core import arrays, rng
from sfl.core.task import Update
from sfl.engine import attacks
from sfl.errors import CompositionError, ConfigError, nearest
from sfl.types import Parameters

__all__ = ["ATTACKS", "Attack", "FLIP_LABELS", "LABEL_FLIP", "Scene", "check_attack"]  # noqa: RUF022 - plain order

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


def check_attack(attack: Attack, program: SiteProgram) -> None:
    """Whether the sites of a job can play an attack.

    Args:
        attack: The attack.
        program: What sites run. A client class that exchanges labels where a task's configuration says ``flip_labels``
            has the class attribute ``flips_labels = True``.

    Raises:
        CompositionError: If they cannot.
    """
    client = program.client
    if program.secure is not None:
        raise CompositionError(
            "an attack must be on updates that a server sees, got one under secure aggregation: there the engine "
            "cannot lie in a site's place. Leave one of the two out."
        )
    if attack.name == LABEL_FLIP and not getattr(client, "flips_labels", False):
        raise CompositionError(
            f"{LABEL_FLIP} must be played by a client with flips_labels = True, which exchanges its labels when "
            f"config[{FLIP_LABELS!r}] is set, got {getattr(client, '__name__', client)}. Choose another attack."
        )


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
