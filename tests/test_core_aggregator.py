"""Means and sums against float64 brute force, and the promises they make about memory."""

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfl.core import arrays
from sfl.core.aggregator import Aggregator, Sum, WeightedMean, weighted_sum
from sfl.core.task import SERVER, Reply, Status, Update
from sfl.errors import RoundError
from sfl.types import Array, Parameters

STREAMING = [WeightedMean(), Sum()]


@st.composite
def cohorts(draw: st.DrawFn) -> list[Update]:
    """One to five sites with the same names and shapes, small dtypes, integers and empty arrays among them."""
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), min_size=1, max_size=3))
    dtypes = [draw(st.sampled_from([np.float16, np.float32, np.float64, np.int32])) for _ in shapes]
    elements = [st.integers(-99, 99) if d is np.int32 else st.floats(-100, 100, width=16) for d in dtypes]
    like = list(enumerate(zip(shapes, dtypes, elements, strict=True)))
    return [
        Update(
            f"site-{index + 1}",
            {f"p{i}": draw(hnp.arrays(dtype, shape, elements=element)) for i, (shape, dtype, element) in like},
            draw(st.floats(0.5, 1e5)),
            {"loss": 1.0},
        )
        for index in range(draw(st.integers(1, 5)))
    ]


def brute_force(updates: list[Update], weights: list[float]) -> Parameters:
    """Σ wᵢ δᵢ in float64, all at once."""
    return {
        name: np.asarray(sum(w * u.delta[name].astype(np.float64) for w, u in zip(weights, updates, strict=True)))
        for name in updates[0].delta
    }


def close(got: Parameters, expected: Parameters, scale: Parameters) -> None:
    """To 1e-5 of the magnitudes that were added: sums may cancel."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert isinstance(got[name], np.ndarray)
        assert got[name].shape == value.shape
        assert (np.abs(got[name] - value) <= 1e-5 * scale[name] + 1e-30).all()


def magnitudes(updates: list[Update]) -> list[Update]:
    absolute = [{k: np.abs(v.astype(np.float64)) for k, v in u.delta.items()} for u in updates]
    return [Update(u.site, delta, u.weight) for u, delta in zip(updates, absolute, strict=True)]


@given(cohorts())
def test_the_mean_is_the_float64_brute_force(updates: list[Update]) -> None:
    shares = [u.weight / sum(v.weight for v in updates) for u in updates]
    got = WeightedMean().aggregate(updates)
    close(got.delta, brute_force(updates, shares), brute_force(magnitudes(updates), shares))
    assert got.weight == pytest.approx(sum(u.weight for u in updates))
    assert (got.site, got.metrics) == (SERVER, {})


@given(cohorts())
def test_the_sum_ignores_weights(updates: list[Update]) -> None:
    ones = [1.0] * len(updates)
    got = Sum().aggregate(updates)
    close(got.delta, brute_force(updates, ones), brute_force(magnitudes(updates), ones))
    assert (got.site, got.weight) == (SERVER, len(updates))


@given(cohorts(), st.randoms())
def test_a_permutation_changes_nothing_beyond_rounding(updates: list[Update], random: Random) -> None:
    shuffled = list(updates)
    random.shuffle(shuffled)
    for aggregator in STREAMING:
        first, second = aggregator.aggregate(updates), aggregator.aggregate(shuffled)
        close(second.delta, first.delta, Sum().aggregate(magnitudes(updates)).delta)


@given(cohorts())
def test_the_mean_of_one_site_is_that_site(updates: list[Update]) -> None:
    got = WeightedMean().aggregate(updates[:1])
    close(got.delta, updates[0].delta, magnitudes(updates)[0].delta)


@given(cohorts())
def test_equal_sites_have_their_own_value_as_mean(updates: list[Update]) -> None:
    same = [Update(u.site, updates[0].delta, u.weight) for u in updates]
    close(WeightedMean().aggregate(same).delta, updates[0].delta, magnitudes(updates)[0].delta)


def lend(updates: list[Update]) -> Iterator[Update]:
    """Each update in the same buffers, overwritten as soon as the next is drawn, as an engine may."""
    buffers = {name: np.empty_like(value) for name, value in updates[0].delta.items()}
    for update in updates:
        for name, value in update.delta.items():
            buffers[name][...] = value
        yield Update(update.site, buffers, update.weight)
        for buffer in buffers.values():
            buffer[...] = 77


@pytest.mark.parametrize("aggregator", STREAMING, ids=lambda a: type(a).__name__)
@given(cohorts())
def test_what_streams_never_keeps_a_lent_array(aggregator: Aggregator, updates: list[Update]) -> None:
    assert aggregator.needs == "sum"
    kept, lent = aggregator.aggregate(updates), aggregator.aggregate(lend(updates))
    assert lent.weight == kept.weight
    for name, value in kept.delta.items():
        np.testing.assert_array_equal(lent.delta[name], value)


@pytest.mark.parametrize("aggregator", STREAMING, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("sites", [1, 2])
def test_the_aggregate_belongs_to_the_caller(aggregator: Aggregator, sites: int) -> None:
    frozen = arrays.read_only({"a": np.ones((4, 3), np.float32), "zero": np.array(2.0)})
    got = aggregator.aggregate([Update(f"s{i}", frozen, 1.0) for i in range(sites)])
    for name, value in got.delta.items():
        value += 1.0
        assert not np.shares_memory(value, frozen[name])
    assert (frozen["a"] == 1).all()


@pytest.mark.parametrize("make", [np.asfortranarray, lambda x: x[::-1], lambda x: x.T.copy().T, lambda x: x[:, ::-1]])
@pytest.mark.parametrize("aggregator", STREAMING, ids=lambda a: type(a).__name__)
def test_large_arrays_of_any_memory_layout(aggregator: Aggregator, make: Callable[[Array], Array]) -> None:
    value = np.random.default_rng(0).normal(size=(300, arrays.BLOCK // 100)).astype(np.float32)
    plain = [Update("a", {"w": value}, 1.0), Update("b", {"w": 3 * value}, 3.0)]
    odd = [Update(u.site, {"w": make(u.delta["w"])}, u.weight) for u in plain]
    same = [Update(u.site, {"w": np.ascontiguousarray(u.delta["w"])}, u.weight) for u in odd]
    mixed = [same[0], odd[1]]
    expected = aggregator.aggregate(same).delta["w"]
    for updates in (odd, mixed, list(mixed[:1]) + odd[1:]):
        np.testing.assert_array_equal(aggregator.aggregate(updates).delta["w"], expected)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(np.float16, "f8"), (np.float32, "f4"), (np.float64, "f8"), (np.int64, "f8"), (np.uint8, "f8"), (np.bool_, "f8")],
)
@pytest.mark.parametrize("size", [0, 3, 2 * arrays.BLOCK + 1])
def test_small_dtypes_are_averaged_in_float64(dtype: type, result: str, size: int) -> None:
    ones = np.ones(size, dtype)
    got = WeightedMean().aggregate([Update("a", {"w": ones}, 1e5), Update("b", {"w": ones}, 3e5)]).delta["w"]
    assert got.dtype == result
    np.testing.assert_allclose(got, 1.0, rtol=1e-6)


def test_zero_dimensions_are_averaged_too() -> None:
    got = WeightedMean().aggregate([Update("a", {"w": np.array(1.0)}, 1.0), Update("b", {"w": np.array(3.0)}, 3.0)])
    assert got.delta["w"] == 2.5


def test_a_name_that_a_site_left_out_counts_as_zero_there() -> None:
    one = np.ones(2)
    updates = [Update("a", {"v": one}, 1.0), Update("b", {"v": one, "w": 4 * one}, 3.0), Update("c", {}, 4.0)]
    got = WeightedMean().aggregate(updates).delta
    np.testing.assert_array_equal(got["v"], 0.5 * one)
    np.testing.assert_array_equal(got["w"], 1.5 * one)
    np.testing.assert_array_equal(Sum().aggregate(updates).delta["w"], 4 * one)


@pytest.mark.parametrize("aggregator", STREAMING, ids=lambda a: type(a).__name__)
def test_no_update_is_an_error(aggregator: Aggregator) -> None:
    with pytest.raises(RoundError, match="at least one update, got none"):
        aggregator.aggregate(iter(()))


def test_an_update_of_no_arrays_still_counts() -> None:
    assert weighted_sum([Update("a", {}, 2.0)]) == ({}, 2.0)
    assert Sum().aggregate([Update("a", {}, 2.0)]).weight == 1.0


def test_an_aggregator_that_says_nothing_gets_individuals() -> None:
    assert Aggregator.needs == "individual"


def test_a_reply_counts_the_bytes_of_its_delta() -> None:
    delta: dict[str, Array] = {"a": np.zeros(3, np.float32)}
    assert Reply("s", Status.USED, Update("s", delta, 1.0)).nbytes == 12
    assert Reply("s", Status.FAILED, reason="x").nbytes == 0
