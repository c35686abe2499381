"""Transforms: pairs of pure functions on an update, and how they are chained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, final

import numpy as np

from sfl.core.task import Update
from sfl.errors import CompositionError, ConfigError
from sfl.types import Parameters, StateTree


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


@final
class Chain(Transform):
    """Transforms one after the other; its state is the list of theirs. The empty chain is the identity."""

    def __init__(self, transforms: Sequence[Transform] = ()) -> None:
        self.transforms = tuple(transforms)

    def init(self, parameters: Parameters) -> StateTree:
        """One state for each transform."""
        return [transform.init(parameters) for transform in self.transforms]

    def apply(self, update: Update, state: StateTree, rng: np.random.Generator) -> tuple[Update, StateTree]:
        """Each in turn."""
        states: list[StateTree] = []
        for transform, before in zip(self.transforms, state, strict=True):
            update, after = transform.apply(update, before, rng)
            states.append(after)
        return update, states


@final
class Divide(Transform):
    """Divides an aggregate by a fixed number: the planned size of the cohort, after noise was added to the sum."""

    raises_norm: ClassVar[bool] = False

    def __init__(self, divisor: float) -> None:
        if not divisor >= 1.0:
            raise ConfigError(f"divisor must be at least 1, got {divisor}. Give the planned size of the cohort.")
        self.divisor = divisor

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """Nothing to remember."""
        return None

    def apply(
        self,
        update: Update,
        state: StateTree,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[Update, StateTree]:
        """``delta / divisor``."""
        delta = {name: np.asarray(value / self.divisor) for name, value in update.delta.items()}
        return replace(update, delta=delta), state


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
    for transform in _flat(transforms):
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


def _flat(transforms: Sequence[Transform]) -> Iterator[Transform]:
    """The transforms, those inside nested chains too: a chain of chains obeys the same order."""
    for transform in transforms:
        if isinstance(transform, Chain):
            yield from _flat(transform.transforms)
        else:
            yield transform
