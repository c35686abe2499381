"""Transforms: pairs of pure functions on an update, and how they are chained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import numpy as np

from sfl.core.task import Update
from sfl.errors import CompositionError, ConfigError
from sfl.types import Config, Metrics, Parameters, StateTree


class Transform(ABC):
    """One step that an update takes: freeze, clip, compress, noise, quantise …

    Both methods are pure: what must be remembered travels in ``state``, which is checkpointed with the site.
    A transform that raises drops its site's reply: a raw update never leaves.

    Attributes:
        raises_norm: Whether the output's norm may exceed the input's (true unless a class says otherwise).
        clips: Whether it bounds the norm; nothing after it may raise it again, except noise.
        adds_noise: Whether it adds the noise that a clip before it was calibrated for.
    """

    raises_norm: ClassVar[bool] = True
    clips: ClassVar[bool] = False
    adds_noise: ClassVar[bool] = False

    @abstractmethod
    def init(self, parameters: Parameters) -> StateTree:
        """The state before the first round, for a model of these parameters."""

    @abstractmethod
    def apply(self, update: Update, state: StateTree, rng: np.random.Generator) -> tuple[Update, StateTree]:
        """The transformed update, and the state for the next round. ``rng`` is public and reproducible."""

    def sends(self, parameters: Parameters) -> Parameters:
        """What an update may hold after it, as arrays of the right shapes, given what it may hold before.

        It follows from the configuration alone, never from data: noise is added to all of it, whoever sent what.
        """
        return parameters

    def figures(self, update: Update) -> Metrics:  # noqa: ARG002
        """What the server may say of an update that arrived: it follows from the update alone."""
        return {}

    def remarks(self, figures: Metrics) -> list[str]:  # noqa: ARG002
        """What a person should know of a round with these figures, on average over its sites."""
        return []

    def caveat(self) -> str:
        """What it may be taken to promise and does not, for the run's statement; empty if nothing."""
        return ""

    def tells(self, state: StateTree) -> Config:  # noqa: ARG002
        """Scalars that a server's half sends to its sites' halves, with the next task."""
        return {}

    def told(self, config: Config) -> Self:  # noqa: ARG002
        """The same transform for one task, which came with these scalars."""
        return self


class Stateless(Transform):
    """A transform that remembers nothing, and draws nothing from the public generator."""

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """Nothing to remember."""
        return None

    def apply(
        self,
        update: Update,
        state: StateTree,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[Update, StateTree]:
        """See ``change``."""
        return self.change(update), state

    @abstractmethod
    def change(self, update: Update) -> Update:
        """The transformed update."""


@final
@dataclass(frozen=True)
class Chain(Transform):
    """Transforms one after the other; its state is the list of theirs. The empty chain is the identity."""

    transforms: Sequence[Transform] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))

    def init(self, parameters: Parameters) -> StateTree:
        """One state for each transform."""
        states: list[StateTree] = []
        for transform in self.transforms:
            states.append(transform.init(parameters))
            parameters = transform.sends(parameters)
        return states

    def apply(self, update: Update, state: StateTree, rng: np.random.Generator) -> tuple[Update, StateTree]:
        """Each in turn."""
        states: list[StateTree] = []
        for transform, before in zip(self.transforms, state, strict=True):
            update, after = transform.apply(update, before, rng)
            states.append(after)
        return update, states

    def sends(self, parameters: Parameters) -> Parameters:
        """Each in turn."""
        for transform in self.transforms:
            parameters = transform.sends(parameters)
        return parameters

    def figures(self, update: Update) -> Metrics:
        """All of theirs."""
        return {name: value for transform in self.transforms for name, value in transform.figures(update).items()}

    def remarks(self, figures: Metrics) -> list[str]:
        """All of theirs."""
        return [line for transform in self.transforms for line in transform.remarks(figures)]

    def tells(self, state: StateTree) -> Config:
        """All of theirs."""
        told: Config = {}
        for transform, own in zip(self.transforms, state, strict=True):
            told |= transform.tells(own)
        return told

    def told(self, config: Config) -> Self:
        """All of them, told the same."""
        return replace(self, transforms=tuple(transform.told(config) for transform in self.transforms))


@final
@dataclass(frozen=True)
class Divide(Stateless):
    """Divides an aggregate by a fixed number: the planned size of the cohort, after noise was added to the sum."""

    divisor: float
    raises_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.divisor >= 1.0:
            raise ConfigError(f"divisor must be at least 1, got {self.divisor}. Give the planned size of the cohort.")

    def change(self, update: Update) -> Update:
        """``delta / divisor``."""
        delta = {name: np.asarray(value / self.divisor) for name, value in update.delta.items()}
        return replace(update, delta=delta)


def chain(*transforms: Transform) -> Chain:
    """Compose transforms, first to last, after checking their order.

    Raises:
        CompositionError: If noise comes before its clip, or something after a clip could raise the norm again.
    """
    check_order(transforms)
    return Chain(transforms)


def check_order(transforms: Sequence[Transform]) -> None:
    """Clip last among what can raise a norm; noise after clip.

    Raises:
        CompositionError: Naming the two transforms to swap.
    """
    last_clip: Transform | None = None
    for transform in flat(transforms):
        name = type(transform).__name__
        if transform.adds_noise:
            if last_clip is None:
                raise CompositionError(f"{name} must come after a clip, got no clip before it. Put the clip first.")
            continue
        if transform.clips:
            last_clip = transform
        elif transform.raises_norm and last_clip is not None:
            raise CompositionError(
                f"{type(last_clip).__name__} must come after what can raise a norm, got it before {name}. "
                f"Swap {type(last_clip).__name__} and {name}."
            )


def flat(transforms: Sequence[Transform]) -> Iterator[Transform]:
    """The transforms, those inside nested chains too: a chain of chains obeys the same order."""
    for transform in transforms:
        if isinstance(transform, Chain):
            yield from flat(transform.transforms)
        else:
            yield transform
