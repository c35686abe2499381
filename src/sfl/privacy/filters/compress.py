"""Compression: few coordinates leave, and what was left out may come later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import numpy as np

from sfl.core.task import Update
from sfl.core.transform import Stateless, Transform
from sfl.errors import ConfigError
from sfl.privacy.filters.flat import flat, is_share, kept_count, largest, refuse_not_finite, unflat
from sfl.privacy.filters.percentile import sent_share
from sfl.types import Metrics, Parameters, StateTree

__all__ = ["ErrorFeedback", "RandomK", "TopK"]


@final
@dataclass(frozen=True, slots=True)
class TopK(Stateless):
    """Keeps the largest coordinates (Aji and Heafield, EMNLP 2017) and zeroes the rest; zeros do not travel.

    Attributes:
        ratio: Share that is kept, in (0, 1].

    | input | result |
    |---|---|
    | a zero delta | the same |
    | equal sizes | the first of them are kept |
    | NaN, inf | raises ``UpdateError`` |
    | fewer coordinates than 1 / ratio | one is kept |

    Formal guarantees: none; which coordinates are kept tells of the data. After noise of the site's own it costs no
    more privacy than the noise did (post-processing).
    """

    raises_norm: ClassVar[bool] = False

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)

    def change(self, update: Update) -> Update:
        """The largest coordinates."""
        refuse_not_finite(update)
        vector = flat(update.delta)
        vector[~largest(np.abs(vector), kept_count(self.ratio, vector.size))] = 0.0
        return replace(update, delta=unflat(vector, update.delta))

    def figures(self, update: Update) -> Metrics:
        """The share of coordinates that were sent."""
        return {"compress_sent_share": sent_share(update)}

    def caveat(self) -> str:
        """What it is for."""
        return f"compression (largest {self.ratio:g}): saves bytes, adds no formal guarantee"


@final
@dataclass(frozen=True, slots=True)
class RandomK(Transform):
    """Keeps coordinates drawn by public randomness, whatever their sizes.

    Attributes:
        ratio: Share that is kept, in (0, 1].
        unbiased: Multiply what is kept by (coordinates / kept), so that the mean over draws is the update itself
            (Wangni et al., NeurIPS 2018); ``False`` under error feedback, which sends the rest later.

    | input | result |
    |---|---|
    | a zero delta | the same |
    | NaN, inf | pass through, if they are drawn |
    | integer arrays | rounded to nearest |

    Formal guarantees: none. The choice tells nothing of the data; the values do.
    """

    ratio: float
    unbiased: bool = True

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """Nothing to remember."""
        return None

    def apply(self, update: Update, state: StateTree, rng: np.random.Generator) -> tuple[Update, StateTree]:
        """Some of the coordinates."""
        vector = flat(update.delta)
        count = kept_count(self.ratio, vector.size)
        kept = np.zeros(vector.size, dtype=bool)
        kept[rng.choice(vector.size, size=count, replace=False, shuffle=False)] = True
        vector[~kept] = 0.0
        if self.unbiased and count:
            vector *= vector.size / count
        return replace(update, delta=unflat(vector, update.delta)), state

    def figures(self, update: Update) -> Metrics:
        """The share of coordinates that were sent."""
        return {"compress_sent_share": sent_share(update)}

    def caveat(self) -> str:
        """What it is for."""
        return f"compression (random {self.ratio:g}): saves bytes, adds no formal guarantee"


@final
@dataclass(frozen=True, slots=True)
class ErrorFeedback(Transform):
    """Adds to each update what compression left out of those before (Stich, Cordonnier and Jaggi, NeurIPS 2018).

    With memory m, p = δ + m; C(p) leaves, and m becomes p − C(p) (Algorithm 1). What is remembered is kept by the site
    across rounds and checkpoints. The sum of all that left, and of the memory, is the sum of all updates.

    Attributes:
        compressor: C: ``TopK``, or ``RandomK`` with ``unbiased=False``.

    | input | result |
    |---|---|
    | a zero delta | a part of the memory |
    | NaN, inf | raises ``UpdateError``; the memory stays as it was |
    | a round that failed after it | its memory is gone with it, as is what it would have sent |

    Formal guarantees: none. The memory may raise an update's norm: a clip must come after it. It carries data from one
    round into others, which voids amplification by sampling of examples.
    """

    compressor: TopK | RandomK

    def __post_init__(self) -> None:
        if isinstance(self.compressor, RandomK) and self.compressor.unbiased:
            raise ConfigError(
                "RandomK must be unbiased=False under error feedback, got True: what is scaled up would be sent twice. "
                "Set unbiased=False."
            )

    def init(self, parameters: Parameters) -> StateTree:
        """An empty memory, in float32 or wider."""
        return {name: np.zeros(value.shape, _wide(value)) for name, value in parameters.items()}

    def apply(self, update: Update, state: StateTree, rng: np.random.Generator) -> tuple[Update, StateTree]:
        """A part of update and memory; the rest is the memory."""
        refuse_not_finite(update)
        memory = cast("dict[str, Any]", state)
        whole = {name: np.asarray(memory[name] + value) for name, value in update.delta.items()}
        sent, _ = self.compressor.apply(replace(update, delta=whole), None, rng)
        delta = unflat(flat(sent.delta), update.delta)
        after = {name: np.asarray(whole[name] - delta[name]).astype(memory[name].dtype) for name in delta}
        return replace(sent, delta=delta), {**memory, **after}

    def figures(self, update: Update) -> Metrics:
        """Those of the compressor."""
        return self.compressor.figures(update)

    def caveat(self) -> str:
        """That of the compressor, and what memory means."""
        return f"{self.compressor.caveat()}; what was left out is sent in later rounds"


def _wide(value: Any) -> np.dtype[Any]:
    return value.dtype if value.dtype.kind == "f" and value.dtype.itemsize >= 4 else np.dtype(np.float64)


def _check_ratio(ratio: float) -> None:
    if not is_share(ratio):
        raise ConfigError(f"a compression ratio must be the share that is kept, in (0, 1], got {ratio}.")
