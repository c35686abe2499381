"""Top-k whose choice is private, too: the sound variant of the percentile filter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from sfl.core.task import Update
from sfl.core.transform import Stateless, Transform
from sfl.errors import ConfigError
from sfl.privacy.filters.flat import flat, is_share, kept_count, largest, unflat
from sfl.privacy.filters.values import SELECTION_SHARE, Selection, laplace_release
from sfl.privacy.noise import secret
from sfl.types import Metrics

__all__ = ["PrivateTopK"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateTopK(Selection):
    """A fixed number k of coordinates, chosen by the exponential mechanism, released with Laplace noise.

    Coordinates are clamped to [-γ, γ]. A third of ε chooses: k draws without replacement by the exponential mechanism
    with ε/3k each (McSherry and Talwar 2007), done at once by Gumbel noise of scale 2γ · 3k/ε on the sizes (Durfee and
    Rogers, NeurIPS 2019). Two thirds release the values, whose L1 distance between neighbours is at most 2γk.

    Formal guarantees: ε-differential privacy of each update for the site's data (replace one), against the server, too.
    The noise grows with k: it hides an update of a thousand coordinates unless ε is in the thousands, and is meant for
    few. A run says what it was.

    | input | result |
    |---|---|
    | a zero delta | k coordinates of noise |
    | NaN, inf | raises ``UpdateError`` |
    | fewer coordinates than 1 / share | one is kept |

    Attributes:
        epsilon: ε of each update.
        share: k over the number of coordinates, in (0, 1].
        gamma: γ.
    """

    name: ClassVar[str] = "private top-k"

    share: float

    def __post_init__(self) -> None:
        Selection.__post_init__(self)
        if not is_share(self.share):
            raise ConfigError(f"share must be in (0, 1], got {self.share}.")

    def noise(self) -> Transform:
        """Choice and values."""
        return _Choose(self)


@final
@dataclass(frozen=True, slots=True)
class _Choose(Stateless):
    """Both draws, from secret randomness."""

    adds_noise: ClassVar[bool] = True

    mechanism: PrivateTopK

    def change(self, update: Update) -> Update:
        mechanism, generator = self.mechanism, secret()
        vector = flat(update.delta)
        count = kept_count(mechanism.share, vector.size)
        if not count:
            return update
        scale = 2.0 * mechanism.gamma * count / (mechanism.epsilon * SELECTION_SHARE)
        kept = largest(np.abs(vector) + generator.gumbel(0.0, scale, size=vector.size), count)
        out = np.zeros(vector.size)
        left = mechanism.epsilon * (1.0 - SELECTION_SHARE)
        out[kept] = laplace_release(vector[kept], count, mechanism.gamma, left, generator)
        return replace(update, delta=unflat(out, update.delta))

    def figures(self, update: Update) -> Metrics:
        size = sum(value.size for value in update.delta.values())
        return {"percentile_sent_share": kept_count(self.mechanism.share, size) / size} if size else {}
