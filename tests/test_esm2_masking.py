"""Masked language modelling: what is hidden, and what never is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.core import rng
from sfl.esm2.alphabet import CLS, EOS, MASK, PAD, PackedProteins, encode
from sfl.esm2.masking import ProteinExamples, epoch, mask, pad
from sfl.train.examples import repeated

PROTEINS = st.lists(st.text("LAGVSERTIDPKQNFYMHWCX", min_size=1, max_size=40), min_size=1, max_size=12)


@given(PROTEINS, st.integers(0, 2**32), st.booleans())
def test_special_tokens_and_padding_are_never_selected(proteins: list[str], seed: int, evaluation: bool) -> None:
    ids = pad([encode(p) for p in proteins])
    batch = mask(ids, rng.public(seed, 1, "t"), evaluation=evaluation)
    special = np.isin(ids, [CLS, PAD, EOS])
    assert not batch.selected[special].any()
    assert (batch.ids[~batch.selected] == ids[~batch.selected]).all()
    assert (batch.targets == ids[batch.selected]).all()
    assert batch.selected.any()
    assert batch.padded == bool((ids == PAD).any())
    if evaluation:
        assert (batch.ids[batch.selected] == MASK).all()


def test_the_shares_are_15_percent_and_80_10_10() -> None:
    generator = np.random.default_rng(0)
    ids = pad([generator.integers(4, 24, 500).astype(np.uint8) for _ in range(400)])
    batch = mask(ids, rng.public(3, 1, "t"))
    residues = 400 * 500
    selected = int(batch.selected.sum())
    # five standard deviations of a binomial: a share of 14 % or 16 % fails
    assert abs(selected / residues - 0.15) < 5 * np.sqrt(0.15 * 0.85 / residues)
    seen = batch.ids[batch.selected]
    masked = float((seen == MASK).mean())
    kept = float((seen == batch.targets).mean())
    assert abs(masked - 0.8) < 5 * np.sqrt(0.8 * 0.2 / selected)
    # a swap draws among twenty residues, so one in twenty swaps shows the true one
    assert abs(kept - (0.1 + 0.1 / 20)) < 5 * np.sqrt(0.1 * 0.9 / selected)
    swapped = seen[(seen != MASK) & (seen != batch.targets)]
    assert set(np.unique(swapped)) <= set(range(4, 24))


def test_masks_repeat_with_the_seed_and_differ_between_rounds_and_sites() -> None:
    ids = pad([encode("LAGVSERTIDPKQNFYMHWC" * 10)])
    draws = {
        (r, s): mask(ids, rng.public(7, r, "esm2-train", s)).selected.tobytes() for r in (1, 2) for s in ("a", "b")
    }
    assert len(set(draws.values())) == 4
    again = mask(ids, rng.public(7, 1, "esm2-train", "a")).selected.tobytes()
    assert again == draws[(1, "a")]


@given(PROTEINS, st.integers(1, 5), st.integers(1, 30))
def test_an_epoch_sees_every_protein_once_cropped_and_sorted_by_length(
    proteins: list[str], batch_size: int, max_length: int
) -> None:
    packed = PackedProteins.pack(proteins)
    batches = list(epoch(packed, batch_size, max_length, rng.public(1, 1, "t")))
    assert sum(len(batch) for batch in batches) == len(proteins)
    for batch in batches:
        assert batch.ids.shape[1] <= max_length + 2
    lengths = sorted(min(len(p), max_length) for p in proteins)
    widths = sorted(batch.ids.shape[1] - 2 for batch in batches)
    expected = sorted(max(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size))
    assert widths == expected


def test_crops_are_pieces_of_the_protein() -> None:
    protein = "".join(np.random.default_rng(0).choice(list("LAGVSERTIDPKQNFYMHWC"), 100))
    packed = PackedProteins.pack([protein])
    starts = set[int]()
    for round in range(30):
        (batch,) = epoch(packed, 4, 10, rng.public(1, round, "t"), evaluation=True)
        ids = batch.ids.copy()
        ids[batch.selected] = batch.targets
        crop = ids[0, 1:-1]
        where = [i for i in range(91) if (encode(protein)[i : i + 10] == crop).all()]
        assert len(where) == 1
        starts.add(where[0])
    assert len(starts) > 10


@pytest.mark.parametrize(("epochs", "steps", "expected"), [(None, None, 3), (2, None, 6), (None, 1, 1), (None, 7, 7)])
def test_local_work_is_counted_in_epochs_or_steps(epochs: int | None, steps: int | None, expected: int) -> None:
    packed = PackedProteins.pack(["LAGV"] * 9)
    generator = rng.public(0, 1, "t")
    batches = list(repeated(ProteinExamples(packed, 3, 8), epochs=epochs, steps=steps, generator=generator))
    assert len(batches) == expected


def test_rows_without_a_residue_are_left_alone() -> None:
    ids = np.array([[CLS, EOS]])
    batch = mask(ids, rng.public(0, 1, "t"))
    assert not batch.selected.any()
