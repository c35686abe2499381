"""Public randomness depends on its four arguments, all of them, and on nothing else."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.core import rng

ARGUMENTS = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.text(max_size=8), st.text(max_size=8))


@given(ARGUMENTS)
def test_the_same_arguments_draw_the_same(arguments: tuple[int, int, str, str]) -> None:
    first, again = rng.public(*arguments).random(8), rng.public(*arguments).random(8)
    np.testing.assert_array_equal(first, again)
    seed = rng.public_seed(*arguments)
    assert seed == rng.public_seed(*arguments)
    assert 0 <= seed < 2**63


@given(ARGUMENTS, ARGUMENTS)
def test_other_arguments_draw_other_numbers(one: tuple[int, int, str, str], two: tuple[int, int, str, str]) -> None:
    if one != two:
        assert rng.public_seed(*one) != rng.public_seed(*two)


@pytest.mark.parametrize(
    "other",
    [(8, 1, "mask", "a"), (7, 2, "mask", "a"), (7, 1, "drop", "a"), (7, 1, "mask", "b"), (7, 1, "mas", "ka")],
)
def test_each_argument_counts(other: tuple[int, int, str, str]) -> None:
    assert not (rng.public(7, 1, "mask", "a").random(4) == rng.public(*other).random(4)).any()


def test_separators_in_names_do_not_collide() -> None:
    assert rng.public_seed(1, 1, "a|b", "c") != rng.public_seed(1, 1, "a", "b|c")
    assert rng.public_seed(1, 1, "", "1||x") != rng.public_seed(1, 1, "1|", "x")


def test_numpy_integers_are_the_same_arguments() -> None:
    assert rng.public_seed(np.int64(7), np.int32(1), "mask") == rng.public_seed(7, 1, "mask")  # pyright: ignore


def test_neither_global_state_nor_the_process_matters() -> None:
    here = rng.public_seed(7, 3, "cohort", "site-1")
    code = "from sfl.core import rng; print(rng.public_seed(7, 3, 'cohort', 'site-1'))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert here == int(there)


def test_draws_are_pinned() -> None:
    """A change of the scheme would make every recorded run unreproducible: it must be deliberate."""
    assert rng.public_seed(0, 0, "cohort") == 3713771204458412107


def test_draws_are_uniform() -> None:
    sample = np.array([rng.public(0, r, "u", f"site-{s}").random() for r in range(50) for s in range(40)])
    assert abs(sample.mean() - 0.5) < 4 / np.sqrt(12 * sample.size)
    counts = np.histogram(sample, bins=10, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 35  # chi-squared, 9 degrees of freedom: p < 1e-4
