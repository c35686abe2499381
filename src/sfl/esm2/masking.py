"""Masked language modelling: which residues are hidden, and how proteins become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfl.esm2.alphabet import CLS, EOS, FIRST_RESIDUE, MASK, PAD, STANDARD, PackedProteins, Tokens
from sfl.train.batching import length_sorted_batches
from sfl.train.examples import Examples

Ids = NDArray[np.int64]

SELECTED = 0.15
MASKED, SWAPPED = 0.8, 0.1  # of the selected; the rest stay as they are


@dataclass(frozen=True, slots=True, eq=False)
class MaskedBatch:
    """Crops of proteins with some residues hidden.

    Attributes:
        ids: Token ids with the corruption applied, int64, shape (proteins, length).
        selected: What the model must predict, bool, shape (proteins, length).
        targets: The true ids there, int64, shape (selected,), in row-major order.
        padded: Whether any row is padded.
    """

    ids: Ids
    selected: NDArray[np.bool_]
    targets: Ids
    padded: bool

    def __len__(self) -> int:
        return len(self.ids)


def mask(ids: Ids, generator: np.random.Generator, *, evaluation: bool = False, apart: bool = False) -> MaskedBatch:
    """Hide residues as in BERT (Devlin et al. 2019, §3.1): 15 % selected; of them 80 % masked, 10 % swapped, 10 % kept.

    For an evaluation all of the selected are masked: a kept residue could be read off the input, so counting it would
    flatter the model (and no baseline could be compared with it).

    ``<cls>``, ``<eos>`` and padding are never selected. A batch always has one selected residue, drawn at random if
    the 15 % select none, so that its loss exists; but not where proteins must be ``apart``.

    Args:
        ids: Token ids, int64, shape (proteins, length).
        generator: Draws everything.
        evaluation: Mask all that is selected.
        apart: What is selected of a protein depends on it alone, as example-level privacy needs.
    """
    residue = (ids >= FIRST_RESIDUE) & (ids < MASK)
    selected = residue & (generator.random(ids.shape) < SELECTED)
    if not apart and not selected.any():
        candidates = np.flatnonzero(residue)
        if candidates.size:
            selected.reshape(-1)[generator.choice(candidates)] = True
    kind = np.zeros(ids.shape) if evaluation else generator.random(ids.shape)
    corrupted = ids.copy()
    corrupted[selected & (kind < MASKED)] = MASK
    swapped = selected & (kind >= MASKED) & (kind < MASKED + SWAPPED)
    corrupted[swapped] = generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + len(STANDARD), size=int(swapped.sum()))
    return MaskedBatch(corrupted, selected, ids[selected], bool((ids == PAD).any()))


def pad(crops: Sequence[Tokens]) -> Ids:
    """``<cls>`` residues ``<eos>`` ``<pad>`` …, int64, shape (proteins, longest + 2)."""
    ids = np.full((len(crops), max(len(crop) for crop in crops) + 2), PAD, dtype=np.int64)
    for row, crop in enumerate(crops):
        ids[row, 0] = CLS
        ids[row, 1 : 1 + len(crop)] = crop
        ids[row, 1 + len(crop)] = EOS
    return ids


def epoch(
    proteins: PackedProteins,
    batch_size: int,
    max_length: int,
    generator: np.random.Generator,
    *,
    evaluation: bool = False,
) -> Iterator[MaskedBatch]:
    """One pass over the proteins in length-sorted batches; longer ones than ``max_length`` are cropped at random."""
    lengths = np.minimum(proteins.lengths, max_length)
    for batch in length_sorted_batches(lengths, batch_size, generator):
        spare = proteins.lengths[batch] - lengths[batch]
        starts = generator.integers(0, spare + 1)
        crops = [proteins[int(i)][start : start + max_length] for i, start in zip(batch, starts, strict=True)]
        yield mask(pad(crops), generator, evaluation=evaluation)


@dataclass(frozen=True)
class ProteinExamples(Examples[MaskedBatch]):
    """Proteins as masked crops.

    Attributes:
        proteins: The proteins.
        batch_size: Proteins in a batch.
        max_length: Residues of a crop.
    """

    proteins: PackedProteins
    batch_size: int
    max_length: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each protein's crops."""
        return np.minimum(self.proteins.lengths, self.max_length)

    def epoch(self, generator: np.random.Generator) -> Iterator[MaskedBatch]:
        """One pass to train on; see ``epoch``."""
        return epoch(self.proteins, self.batch_size, self.max_length, generator)

    def evaluation(self, generator: np.random.Generator) -> Iterator[MaskedBatch]:
        """One pass to evaluate on: all that is selected is masked."""
        return epoch(self.proteins, self.batch_size, self.max_length, generator, evaluation=True)

    def apart(self, chosen: NDArray[np.int64], generator: np.random.Generator) -> MaskedBatch:
        """Just these proteins, each cropped and masked by itself."""
        spare = np.maximum(self.proteins.lengths[chosen] - self.max_length, 0)
        starts = generator.integers(0, spare + 1)
        crops = [self.proteins[int(i)][at : at + self.max_length] for i, at in zip(chosen, starts, strict=True)]
        return mask(pad(crops), generator, apart=True)
