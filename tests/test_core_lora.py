"""LoRA's pairs by name, and what a site of a lower rank holds of them."""

from __future__ import annotations

import numpy as np
import pytest

from sfl.core.lora import Pair, frames, pairs, restored, restricted, rows, unrolled
from sfl.errors import ConfigError
from sfl.types import Parameters


def factors(rank: int = 3) -> Parameters:
    """A linear layer's pair, an embedding's, one A alone, and a head."""
    draw = np.random.default_rng(0)
    return {
        "h.lora_A.default.weight": draw.normal(size=(rank, 5)),
        "h.lora_B.default.weight": draw.normal(size=(4, rank)),
        "e.lora_embedding_A.default": draw.normal(size=(rank, 7)),
        "e.lora_embedding_B.default": draw.normal(size=(6, rank)),
        "alone.lora_A.weight": draw.normal(size=(rank, 2)),
        "head.weight": draw.normal(size=(2, 2)),
    }


def test_pairs_are_found_by_their_names() -> None:
    assert pairs(factors()) == [
        Pair("h.lora_A.default.weight", "h.lora_B.default.weight", 0, 3),
        Pair("e.lora_embedding_B.default", "e.lora_embedding_A.default", 1, 3),
    ]
    assert frames(factors()) == ("h.lora_A.default.weight", "e.lora_embedding_B.default")
    first = pairs(factors())[0]
    assert [first.axis(name) for name in (first.frame, first.grown)] == [0, 1]


@pytest.mark.parametrize(("a", "b"), [(np.ones((2, 5)), np.ones((3, 3))), (np.ones(2), np.ones((3, 2)))])
def test_factors_of_different_ranks_are_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="must be of one rank, got shapes"):
        pairs({"lora_A.weight": a, "lora_B.weight": b})


def test_a_model_without_pairs_has_no_frames() -> None:
    with pytest.raises(ConfigError, match="must have pairs lora_A and lora_B, got \\['w'\\]"):
        frames({"w": np.ones((2, 2))})


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_their_inverse(axis: int) -> None:
    value = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    flat = rows(value, axis)
    assert flat.shape == (value.shape[axis], 24 // value.shape[axis])
    np.testing.assert_array_equal(unrolled(flat, value, axis), value)


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_a_site_has_the_first_directions_and_gives_the_rest_back(rank: int) -> None:
    whole = factors()
    held = restricted(whole, rank)
    assert list(held) == list(whole)
    for pair in pairs(whole):
        product = unit(held[pair.grown], pair.axis(pair.grown)) @ unit(held[pair.frame], pair.axis(pair.frame)).T
        kept = [unit(whole[name], pair.axis(name))[:, :rank] for name in (pair.grown, pair.frame)]
        np.testing.assert_allclose(product, kept[0] @ kept[1].T)
    for name in ("alone.lora_A.weight", "head.weight"):
        assert held[name] is whole[name]
    trained = {name: value + 1.0 for name, value in held.items()}
    back = restored(trained, whole, rank)
    for pair in pairs(whole):
        for name in (pair.frame, pair.grown):
            found, sent = (unit(values[name], pair.axis(name)) for values in (back, whole))
            np.testing.assert_array_equal(found[:, :rank], sent[:, :rank] + 1.0)
            np.testing.assert_array_equal(found[:, rank:], sent[:, rank:])


def unit(value: np.ndarray, axis: int) -> np.ndarray:
    """A factor with its rank last."""
    return np.moveaxis(value, axis, -1)


@pytest.mark.parametrize("rank", [0, -1, True])
def test_a_rank_below_one_is_none(rank: int) -> None:
    with pytest.raises(ConfigError, match="a site's rank must be at least 1"):
        restricted(factors(), rank)
