"""Quantisation: an update leaves in fewer bits, and what rounding left out may come later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast, final

import numpy as np

from sfl.core import quantise
from sfl.core.codes import CODED
from sfl.core.task import Update
from sfl.core.transform import Stateless, Transform
from sfl.errors import ConfigError
from sfl.privacy.filters.flat import refuse_not_finite
from sfl.types import Parameters, StateTree

__all__ = ["Quantise", "QuantiseBounded"]


@final
@dataclass(frozen=True, slots=True)
class Quantise(Transform):
    """An update as codes (``core.quantise``), to the nearest; its last transform, as nothing after it can read them.

    With feedback, memory m is what rounding left out before: p = δ + m, Q(p) leaves, m becomes p − Q(p) (Seide et al.,
    INTERSPEECH 2014; Stich, Cordonnier and Jaggi, NeurIPS 2018, Algorithm 1). Where δ is zero nothing leaves and m
    waits, so that what a filter left out stays out. All that left, and the memory, add up to all updates.

    Attributes:
        form: ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"nf4"``.
        feedback: Whether to remember.
        thin: Whether zeros are left out.
        smallest: Arrays of fewer elements leave as they are.

    | input | result |
    |---|---|
    | a zero delta | zeros |
    | NaN, inf | raises ``UpdateError``; the memory stays as it was |
    | past the largest number of the form | that largest; the rest is remembered |
    | whole numbers, statistics of BatchNorm, few elements | as they are |
    | a round that failed after it | its memory is gone with it, as is what it would have sent |

    Formal guarantees: none; after noise of the site's own it costs no more privacy than the noise did. Rounding and
    memory may raise an update's norm: under a clip use ``QuantiseBounded``.
    """

    form: str
    feedback: bool = True
    thin: bool = True
    smallest: int = quantise.SMALLEST

    def __post_init__(self) -> None:
        _check_form(self.form)

    def init(self, parameters: Parameters) -> StateTree:  # noqa: ARG002
        """No memory yet; it has the size of the model from the first update on."""
        return {} if self.feedback else None

    def apply(
        self,
        update: Update,
        state: StateTree,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> tuple[Update, StateTree]:
        """The codes of update and memory; the rest is the memory."""
        refuse_not_finite(update)
        if not self.feedback:
            coded = quantise.packed(update.delta, self.form, thin=self.thin, smallest=self.smallest)
            return replace(update, delta=coded), state
        memory = cast("dict[str, Any]", state)
        travels, _, after = quantise.remembering(
            update.delta, memory, self.form, thin=self.thin, smallest=self.smallest
        )
        return replace(update, delta=travels), after


@final
@dataclass(frozen=True, slots=True)
class QuantiseBounded(Stateless):
    """An update as codes whose norm is at most the update's: what may follow a clip.

    bfloat16 and float16 are rounded toward zero. int8 and nf4 are rounded to the nearest, and the scales of a piece of
    65,536 numbers are lowered where its norm would have risen, which costs less than rounding toward zero. There is no
    memory, which would carry one round's data past the next round's clip.

    Attributes:
        form: ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"nf4"``.
        thin: Whether zeros are left out.
        smallest: Arrays of fewer elements leave as they are.

    | input | result |
    |---|---|
    | a zero delta | zeros |
    | NaN, inf | raises ``UpdateError`` |
    | past the largest number of the form | that largest |
    | whole numbers, statistics of BatchNorm, few elements | as they are |

    Formal guarantees: each array's L2 norm is at most what it was, in float arithmetic too, so what is clipped
    stays clipped.
    """

    raises_norm: ClassVar[bool] = False

    form: str
    thin: bool = True
    smallest: int = quantise.SMALLEST

    def __post_init__(self) -> None:
        _check_form(self.form)

    def change(self, update: Update) -> Update:
        """The codes."""
        refuse_not_finite(update)
        coded = quantise.packed(update.delta, self.form, thin=self.thin, bounded=True, smallest=self.smallest)
        return replace(update, delta=coded)


def _check_form(form: str) -> None:
    if form not in CODED:
        raise ConfigError(f"a message's dtype must be one of {', '.join(CODED)} to be quantised, got {form!r}.")
