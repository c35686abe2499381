"""Robust rules against brute force in float64, closed forms and worked examples, and the laws of their papers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import trim_mean

import clients
from sfl.core import arrays
from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.core.task import FIT, SERVER, Task, Update
from sfl.errors import CompositionError, ConfigError, RoundError, SflError, UpdateError
from sfl.recipe import FedAvgRecipe
from sfl.server.robust import (
    NNM,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    CosineTrust,
    FLTrust,
    FoundationFL,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBound,
    PreAggregated,
    TrimmedMean,
    foundation,
    verify_update_norms,
)
from sfl.server.robust import gram as gram_module
from sfl.server.robust.gram import squared_distances
from sfl.server.robust.stack import Stack
from sfl.types import Array, FederationConfig, Parameters

EXAMPLE = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


def updates_of(rows: Array, weights: list[float] | None = None) -> list[Update]:
    """Each row as an update of two arrays."""
    half = rows.shape[1] // 2
    return [
        Update(f"site-{i + 1:02d}", {"a": row[:half].copy(), "b": row[half:].copy()}, weights[i] if weights else 1.0)
        for i, row in enumerate(rows)
    ]


def joined(delta: Parameters) -> Array:
    return np.concatenate([np.asarray(value, np.float64).reshape(-1) for value in delta.values()])


def result(rule: Aggregator, rows: Array) -> Array:
    return joined(rule.aggregate(updates_of(rows)).delta)


def cohort(seed: int, n: int = 11, d: int = 7, dtype: str = "f8") -> Array:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


# Brute force, written from the papers' definitions


def brute_distance(x: Array, y: Array) -> float:
    return float(sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)))


def brute_krum_score(rows: Array, i: int, among: list[int], neighbours: int) -> float:
    """The smallest sum over any set of so many others."""
    others = [brute_distance(rows[i], rows[j]) for j in among if j != i]
    return min(sum(subset) for subset in itertools.combinations(others, neighbours))


def brute_krum(rows: Array, f: int) -> Array:
    every = list(range(len(rows)))
    return rows[min(every, key=lambda i: brute_krum_score(rows, i, every, len(rows) - f - 2))]


def brute_bulyan(rows: Array, f: int) -> Array:
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        neighbours = min(max(len(left) - f - 2, 1), len(left) - 1)
        best = min(
            left,
            key=lambda i: (
                brute_krum_score(rows, i, left, neighbours),
                sum(brute_distance(rows[i], rows[j]) for j in left),
            ),
        )
        chosen.append(best)
        left.remove(best)
    out = []
    for column in rows[chosen].T:
        middle = statistics.median(column.tolist())
        out.append(statistics.fmean(sorted(column.tolist(), key=lambda v: abs(v - middle))[: len(chosen) - 2 * f]))
    return np.array(out)


def brute_foundation(rows: Array, f: int, copies: int) -> Array:
    high, low = rows.max(axis=0), rows.min(axis=0)
    scores = [min(brute_distance(row, high), brute_distance(row, low)) for row in rows]
    extended = [*rows.tolist(), *[rows[scores.index(max(scores))].tolist()] * copies]
    columns = [sorted(column) for column in zip(*extended, strict=True)]
    return np.array([statistics.fmean(column[f : len(column) - f]) for column in columns])


def brute_clipping(rows: Array, centre: Array, radius: float, iterations: int) -> Array:
    for _ in range(iterations):
        moves = [(row - centre) * min(1.0, radius / np.linalg.norm(row - centre)) for row in rows]
        centre = centre + sum(moves) / len(rows)
    return centre


# Worked examples


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(1 / 3), GeometricMedian(), FoundationFL(1)])
def test_worked_examples_of_the_middle(rule: Aggregator) -> None:
    np.testing.assert_allclose(result(rule, EXAMPLE), [4, 5, 6], atol=1e-5)


def test_worked_example_of_nnm() -> None:
    mixed = NNM(1).mix(Stack.of(updates_of(EXAMPLE)))
    np.testing.assert_allclose(
        [joined(u.delta) for u in mixed], [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]], atol=1e-12
    )


def test_worked_example_of_fltrust() -> None:
    # cosines to (1, 0): 1, 0.6, -1; lengths of all become that of the root, 2
    rows = np.array([[3.0, 0.0], [3.0, 4.0], [-9.0, 0.0]])
    rule = FLTrust({"a": np.array([2.0]), "b": np.array([0.0])})
    expected = (1.0 * np.array([2.0, 0.0]) + 0.6 * np.array([1.2, 1.6])) / 1.6
    np.testing.assert_allclose(result(rule, rows), expected, atol=1e-12)


def test_worked_example_of_trust_by_cosine() -> None:
    rows = np.array([[3.0, 0.0], [3.0, 4.0], [-9.0, 0.0]])
    root = {"a": np.array([2.0]), "b": np.array([0.0])}
    np.testing.assert_allclose(result(CosineTrust(0.5, root), rows), (1.0 * rows[0] + 0.6 * rows[1]) / 1.6, atol=1e-12)
    np.testing.assert_allclose(result(CosineTrust(0.7, root), rows), rows[0], atol=1e-12)


# Brute force


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "f"), [(5, 1), (9, 3), (11, 2), (3, 0)])
def test_krum_is_the_brute_force(seed: int, n: int, f: int) -> None:
    rows = cohort(seed, n)
    every = list(range(n))
    scores = [brute_krum_score(rows, i, every, n - f - 2) for i in every]
    if len(set(np.round(scores, 12))) == n:
        np.testing.assert_array_equal(result(Krum(f), rows), brute_krum(rows, f))
        best = sorted(every, key=lambda i: scores[i])
        np.testing.assert_allclose(result(MultiKrum(f), rows), rows[best[: n - f]].mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(result(MultiKrum(f, keep=2), rows), rows[best[:2]].mean(axis=0), atol=1e-12)
    else:
        assert f == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (13, 2), (4, 0)])
def test_bulyan_is_the_brute_force(seed: int, n: int, f: int) -> None:
    rows = cohort(seed, n)
    np.testing.assert_allclose(result(Bulyan(f), rows), brute_bulyan(rows, f), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.49])
def test_the_trimmed_mean_is_scipys(seed: int, ratio: float) -> None:
    rows = cohort(seed)
    np.testing.assert_allclose(result(TrimmedMean(ratio), rows), trim_mean(rows, ratio, axis=0), atol=1e-12)


@pytest.mark.parametrize("n", [3, 4, 10])
def test_the_median_is_that_of_the_standard_library(n: int) -> None:
    rows = cohort(n, n)
    expected = [statistics.median(column.tolist()) for column in rows.T]
    np.testing.assert_allclose(result(CoordinateMedian(), rows), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_geometric_median_is_the_minimiser(seed: int) -> None:
    rows = cohort(seed, n=8, d=4)

    def objective(z: Array) -> float:
        return float(sum(np.linalg.norm(z - row) for row in rows))

    found = minimize(objective, rows.mean(axis=0), method="BFGS", options={"gtol": 1e-9})
    got = result(GeometricMedian(), rows)
    assert objective(got) <= found.fun * (1 + 1e-9)
    np.testing.assert_allclose(got, found.x, atol=1e-4)


def test_one_step_of_weiszfeld_is_the_papers() -> None:
    rows = cohort(1, n=5, d=3)
    away = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
    expected = (rows / away[:, None]).sum(axis=0) / (1 / away).sum()
    np.testing.assert_allclose(result(GeometricMedian(iterations=1), rows), expected, atol=1e-9)


def test_the_geometric_median_of_a_majority_is_the_majority() -> None:
    rows = np.vstack([np.tile([1.0, -2.0, 3.0], (4, 1)), cohort(0, 3, 3) * 100])
    np.testing.assert_allclose(result(GeometricMedian(), rows), [1, -2, 3], atol=1e-3)


@pytest.mark.parametrize("copies", [None, 0, 3])
@pytest.mark.parametrize("f", [1, 3])
def test_foundation_fl_is_the_brute_force(f: int, copies: int | None) -> None:
    rows = cohort(f)
    expected = brute_foundation(rows, f, 6 if copies is None else copies)
    np.testing.assert_allclose(result(FoundationFL(f, copies=copies), rows), expected, atol=1e-12)


def test_foundation_fl_without_copies_is_its_rule() -> None:
    rows = cohort(3)
    np.testing.assert_array_equal(result(FoundationFL(2, "median", copies=0), rows), result(CoordinateMedian(), rows))


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("radius", [0.3, 2.0, 1e6])
def test_centered_clipping_is_the_brute_force_round_by_round(iterations: int, radius: float) -> None:
    rule, state, centre = CenteredClipping(radius, iterations), None, np.zeros(7)
    for round in range(1, 4):
        rows = cohort(round)
        out, state = rule.step(updates_of(rows), Task(FIT, round, {}), state)
        centre = brute_clipping(rows, centre, radius, iterations)
        np.testing.assert_allclose(joined(out.delta), centre, atol=1e-10)


def test_centered_clipping_moves_no_further_than_its_radius() -> None:
    rows = cohort(1)
    honest = result(CenteredClipping(0.5), np.vstack([rows[:-1], np.zeros((1, 7))]))
    rows[-1] *= 1e9
    assert np.linalg.norm(result(CenteredClipping(0.5), rows) - honest) <= 0.5 / 11 + 1e-9


def test_nnm_is_the_brute_force() -> None:
    rows, f = cohort(5), 3
    mixed = NNM(f).mix(Stack.of(updates_of(rows)))
    for row, got in zip(rows, mixed, strict=True):
        nearest = sorted(rows, key=lambda other, row=row: brute_distance(row, other))[: len(rows) - f]
        np.testing.assert_allclose(joined(got.delta), np.mean(nearest, axis=0), atol=1e-12)


# Distances


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(
    ("common", "spread"), [(0.0, 1.0), (1e4, 1e-2), (1.0, 1e-5), (-3e6, 1.0), (0.0, 1e-20), (0.0, 1e15)]
)
def test_distances_are_those_of_a_float64_loop(common: float, spread: float, dtype: str) -> None:
    rows = (common + spread * cohort(0, 6, 3001)).astype(dtype)
    got = squared_distances(Stack.of(updates_of(rows)))
    for i, j in itertools.product(range(6), repeat=2):
        expected = float(np.square(rows[i].astype("f8") - rows[j].astype("f8")).sum())
        assert abs(got[i, j] - expected) <= 1e-6 * expected


@pytest.mark.parametrize("outlier", [1e6, 1e12, 1e30])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_outliers_do_not_take_the_digits_of_the_others(outlier: float, place: int) -> None:
    rows = cohort(2, 7, 500)
    rows[4] = rows[2]  # equal ones
    rows[1] = rows[2] + 1e-9
    rows[place] *= outlier
    got = squared_distances(Stack.of(updates_of(rows)))
    for i, j in itertools.product(range(7), repeat=2):
        expected = float(np.square(rows[i] - rows[j]).sum())
        assert abs(got[i, j] - expected) <= 1e-6 * expected


def test_distances_past_float64_are_inf_and_nothing_else_is() -> None:
    rows = cohort(2, 5, 20)
    rows[0], rows[3] = 1e200, -1e200
    got = squared_distances(Stack.of(updates_of(rows)))
    far = np.zeros((5, 5), bool)
    far[[0, 3]], far[:, [0, 3]] = True, True
    np.fill_diagonal(far, False)
    np.testing.assert_array_equal(np.isinf(got), far)
    assert not np.isnan(got).any()
    for rule in (Krum(1), MultiKrum(1, keep=2), GeometricMedian()):
        assert np.abs(result(rule, rows)).max() < 10.0


def test_distances_go_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfl.server.robust import stack

    rows = cohort(0, 5, 1000)
    whole = [result(rule, rows) for rule in (Krum(1), CoordinateMedian(), FoundationFL(1), GeometricMedian())]
    monkeypatch.setattr(stack, "_ELEMENTS", 35)
    parts = [result(rule, rows) for rule in (Krum(1), CoordinateMedian(), FoundationFL(1), GeometricMedian())]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_a_projection_keeps_distances_to_its_error_and_is_drawn_anew() -> None:
    stack = Stack.of(updates_of(cohort(1, 6, 4000)))
    exact, size = squared_distances(stack), 2000
    drawn = [gram_module.distances_between(stack, size) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()
    off = ~np.eye(6, dtype=bool)
    for each in drawn:
        assert np.abs(each[off] / exact[off] - 1.0).max() < 6 * (2 / size) ** 0.5
    clear = np.vstack([cohort(2, 6, 400), 50 + cohort(3, 1, 400)])
    assert np.abs(result(Krum(1, projection=64), clear)).max() < 10.0


# Laws

RULES: list[Callable[[], Aggregator]] = [
    lambda: Krum(2),
    lambda: MultiKrum(2),
    lambda: Bulyan(2),
    lambda: TrimmedMean(0.2),
    CoordinateMedian,
    GeometricMedian,
    lambda: FoundationFL(2),
    lambda: FoundationFL(2, "median"),
    lambda: PreAggregated(CoordinateMedian(), NNM(2)),
    lambda: PreAggregated(TrimmedMean(0.2), NNM(2)),
]
by_rule = pytest.mark.parametrize("make", RULES, ids=lambda make: repr(make()))
seeds = st.integers(0, 2**32 - 1)


@by_rule
@settings(max_examples=15, deadline=None)
@given(seed=seeds, shift=st.floats(-1e3, 1e3), factor=st.floats(0.01, 100.0))
def test_rules_move_and_stretch_with_their_updates(
    make: Callable[[], Aggregator], seed: int, shift: float, factor: float
) -> None:
    rows = cohort(seed)
    expected = factor * result(make(), rows) + shift
    np.testing.assert_allclose(result(make(), factor * rows + shift), expected, atol=1e-3 * factor)


@by_rule
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_order_of_updates_does_not_matter(make: Callable[[], Aggregator], seed: int) -> None:
    rows = cohort(seed)
    shuffled = rows[np.random.default_rng(seed).permutation(len(rows))]
    np.testing.assert_allclose(result(make(), shuffled), result(make(), rows), atol=1e-5)


@by_rule
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=st.floats(0.0, 1e18), same=st.booleans())
def test_a_minority_does_not_move_the_result_past_the_honest(
    make: Callable[[], Aggregator], seed: int, size: float, same: bool
) -> None:
    source = np.random.default_rng(seed)
    if make() == FoundationFL(2):
        return  # which has no such bound: see below
    honest = source.normal(size=(9, 7))
    lies = size * source.normal(size=(1 if same else 2, 7))
    rows = np.vstack([honest, np.broadcast_to(lies, (2, 7))])[source.permutation(11)]
    middle, spread = honest.mean(axis=0), max(np.linalg.norm(row - honest.mean(axis=0)) for row in honest)
    assert np.linalg.norm(result(make(), rows) - middle) <= 3.0 * spread


def test_foundation_fl_may_copy_a_liar() -> None:
    lies = 1e6 * np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    rows = np.vstack([cohort(0, 9), lies, -lies])
    chosen = int(np.argmax(foundation.extremeness(Stack.of(updates_of(rows)))))
    assert chosen >= 9
    assert np.abs(result(FoundationFL(2), rows)).max() > 1e5
    assert np.abs(result(FoundationFL(2, "median"), rows)).max() < 5.0
    assert np.abs(result(FoundationFL(2, copies=0), rows)).max() < 5.0


def test_the_mean_has_no_such_bound() -> None:
    rows = np.vstack([cohort(0, 9), np.full((2, 7), 1e9)])
    assert np.linalg.norm(result(WeightedMean(), rows)) > 1e8


@given(seed=seeds)
def test_a_trim_of_nothing_is_the_unweighted_mean(seed: int) -> None:
    rows = cohort(seed)
    np.testing.assert_allclose(result(TrimmedMean(0.0), rows), rows.mean(axis=0), atol=1e-12)


@given(seed=seeds, lie=st.floats(-1e30, 1e30))
def test_coordinates_stay_between_honest_values(seed: int, lie: float) -> None:
    honest = cohort(seed, 9)
    rows = np.vstack([honest, np.full((2, 7), lie)])
    for rule in (TrimmedMean(2 / 11), CoordinateMedian(), FoundationFL(2, "median", copies=0)):
        got = result(rule, rows)
        assert (got >= honest.min(axis=0) - 1e-12).all()
        assert (got <= honest.max(axis=0) + 1e-12).all()


@given(seed=seeds, lie=st.floats(0.1, 1e6))
def test_fltrust_bounds_every_update_by_the_root(seed: int, lie: float) -> None:
    rows = cohort(seed)
    rows[-3:] *= -lie
    root = {"a": rows[0][:3].copy(), "b": rows[0][3:].copy()}
    assert np.linalg.norm(result(FLTrust(root), rows)) <= np.linalg.norm(rows[0]) * (1 + 1e-9)


@by_rule
def test_what_a_site_says_of_its_size_does_not_weigh(make: Callable[[], Aggregator]) -> None:
    rows = cohort(4)
    plain, lied = updates_of(rows), updates_of(rows, [1.0] * 9 + [1e9, 1e9])
    one, other = make().aggregate(plain), make().aggregate(lied)
    np.testing.assert_array_equal(joined(one.delta), joined(other.delta))
    assert (other.site, other.weight) == (SERVER, 11.0)


# Names, dtypes, edges


def test_frozen_layers_and_whole_numbers() -> None:
    steps = [3, 3, 3, 9, 3]
    updates = [
        Update(f"s{i}", {"w": np.full(2, i, np.float16), "steps": np.array(step)}, 1.0) for i, step in enumerate(steps)
    ]
    updates[0] = replace(updates[0], delta={"steps": np.array(3)})  # a frozen layer is zero
    updates[1] = replace(updates[1], delta={**updates[1].delta, "more": np.ones(3, np.float32)})
    for rule in (CoordinateMedian(), TrimmedMean(0.2), Krum(1), GeometricMedian(), CenteredClipping(1e9)):
        delta = rule.aggregate(updates).delta
        assert {name: value.dtype for name, value in delta.items()} == {"steps": "f8", "w": "f8", "more": "f4"}
        assert delta["steps"].shape == ()
    np.testing.assert_array_equal(CoordinateMedian().aggregate(updates).delta["steps"], 3.0)
    np.testing.assert_array_equal(CoordinateMedian().aggregate(updates).delta["w"], [2.0, 2.0])
    np.testing.assert_array_equal(CoordinateMedian().aggregate(updates).delta["more"], np.zeros(3))


def test_any_memory_layout() -> None:
    rows = [np.random.default_rng(i).normal(size=(40, 30)).astype("f4") for i in range(7)]
    plain = [Update(f"s{i}", {"w": row}, 1.0) for i, row in enumerate(rows)]
    odd = [Update(f"s{i}", {"w": np.asfortranarray(row)}, 1.0) for i, row in enumerate(rows)]
    for make in RULES:
        if not isinstance(make(), Bulyan):
            np.testing.assert_array_equal(make().aggregate(odd).delta["w"], make().aggregate(plain).delta["w"])


def test_what_centered_clipping_remembers_of_names() -> None:
    rule = CenteredClipping(1e9)
    both = [Update("s", {"v": np.ones(1), "w": np.ones(2)}, 1.0)]
    _, state = rule.step(both, Task(FIT, 1, {}), rule.init({}))
    out, state = rule.step([Update("s", {"w": 3 * np.ones(2)}, 1.0)], Task(FIT, 2, {}), state)
    assert list(out.delta) == ["w"]
    np.testing.assert_allclose(out.delta["w"], 3.0)
    np.testing.assert_allclose(state["v"], 1.0)


def test_shapes_must_agree() -> None:
    with pytest.raises(UpdateError, match=r"b: 'w' must have shape \(2,\), got \(3,\)"):
        Stack.of([Update("a", {"w": np.ones(2)}, 1.0), Update("b", {"w": np.ones(3)}, 1.0)])
    with pytest.raises(UpdateError, match=r"'a' must have shape"):
        FLTrust({"a": np.ones(9), "b": np.ones(4)}).aggregate(updates_of(cohort(0)))


def test_updates_that_point_nowhere_have_no_trust() -> None:
    rows = np.vstack([np.zeros((2, 7)), -np.ones((1, 7))])
    root = {"a": np.ones(3), "b": np.ones(4)}
    for rule in (FLTrust(root), CosineTrust(0.0, root)):
        np.testing.assert_array_equal(result(rule, rows), np.zeros(7))
    huge = np.vstack([np.ones((2, 7)), np.full((1, 7), 1e300)])
    np.testing.assert_allclose(result(FLTrust(root), huge), np.ones(7))
    np.testing.assert_array_equal(result(FLTrust({"a": np.zeros(3), "b": np.zeros(4)}), huge), np.zeros(7))


# Preconditions, before a run and in a round

REFUSED: list[tuple[Aggregator, int, str]] = [
    (Krum(2), 6, r"Krum must have n >= 2f \+ 3 = 7 .* f = 2 that lie, got n = 6. With 6 it can stand 1 at most"),
    (Krum(0), 2, r"2f \+ 3 = 3 .* got n = 2\. It needs three at the very least"),
    (MultiKrum(1, keep=6), 5, "keep must be at most the 5 updates of a round, got 6"),
    (Bulyan(2), 10, r"Bulyan must have n >= 4f \+ 3 = 11 .* got n = 10. With 10 it can stand 1"),
    (TrimmedMean(0.1), 9, r"trim at least one of n = 9 .* floor\(0.1 \* 9\) = 0: .* Set it to 1/9 = 0.111 or more"),
    (TrimmedMean(0.4), 2, "floor.* = 0: it protects from nobody. Let at least 3 sites take part"),
    (FoundationFL(2), 4, r"FoundationFL must have n >= 2f \+ 1 = 5"),
    (PreAggregated(CoordinateMedian(), NNM(2)), 4, r"NNM must have n >= 2f \+ 1 = 5"),
    (PreAggregated(Krum(1), Bucketing(2)), 8, r"Krum must have n >= 2f \+ 3 = 5 .* got n = 4"),
    (NormBound(Krum(1), 1.0), 4, "Krum must have"),
]
ONLY_BEFORE: list[tuple[Aggregator, int, str]] = [
    (TrimmedMean(0.0), 20, "trim at least one of n = 20 updates"),
    (CoordinateMedian(), 2, "the median must have at least 3 updates"),
    (GeometricMedian(), 2, "the geometric median must have at least 3"),
    (CosineTrust(0.1), 5, "must have a root_update .* allow_untrusted_reference=True"),
]


@pytest.mark.parametrize(("rule", "count", "message"), REFUSED + ONLY_BEFORE)
def test_what_a_rule_needs_is_asked_before_a_run(rule: Aggregator, count: int, message: str) -> None:
    recipe = FedAvgRecipe(
        name="few",
        client=clients.MyClient,
        initial_parameters={"w": np.zeros(2)},
        federation=FederationConfig(num_clients=count),
        aggregator=rule,
    )
    with pytest.raises(CompositionError, match=message):
        recipe.build()


@pytest.mark.parametrize(("rule", "count", "message"), [*REFUSED, ONLY_BEFORE[-1]])
def test_a_round_of_too_few_is_an_error_with_the_same_words(rule: Aggregator, count: int, message: str) -> None:
    with pytest.raises(RoundError, match=message):
        rule.aggregate(updates_of(1e-3 * cohort(0, count)))


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (Krum(2), 7),
        (Bulyan(2), 11),
        (TrimmedMean(0.1), 10),
        (TrimmedMean(1 / 49), 49),
        (CoordinateMedian(), 3),
        (GeometricMedian(), 3),
        (FoundationFL(2), 5),
        (FLTrust({}), 1),
        (CenteredClipping(1.0), 1),
        (CosineTrust(allow_untrusted_reference=True), 1),
        (PreAggregated(Krum(1), Bucketing(2)), 9),
        (PreAggregated(CoordinateMedian(), NNM(2)), 5),
    ],
)
def test_enough_is_enough(rule: Aggregator, count: int) -> None:
    rule.require(count)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Krum(-1), "byzantine must be 0 or more"),
        (lambda: MultiKrum(1, keep=0), "keep must be 1 or more"),
        (lambda: Bulyan(1, projection=0), "projection must be at least 1"),
        (lambda: TrimmedMean(0.5), r"ratio must be in \[0, 0.5\)"),
        (lambda: TrimmedMean(float("nan")), "ratio must be"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing must be"),
        (lambda: CenteredClipping(0.0), "radius must be positive"),
        (lambda: CenteredClipping(1.0, 0), "iterations must be"),
        (lambda: FoundationFL(1, "krum"), "rule must be trimmed-mean or median"),  # pyright: ignore
        (lambda: CosineTrust(1.5), "threshold must be a cosine"),
        (lambda: Bucketing(0), "size must be"),
        (lambda: NormBound(Krum(1), 0.0), "max_norm must be positive"),
    ],
)
def test_options_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# Root updates


def test_a_root_update_may_be_a_function_of_what_was_sent() -> None:
    asked: list[tuple[float, int]] = []

    def root(parameters: Parameters, round: int) -> Parameters:
        asked.append((float(parameters["a"][0]), round))
        return {name: np.ones_like(value) for name, value in parameters.items()}

    sent = {"a": np.full(3, 5.0), "b": np.zeros(4), "frozen": np.zeros(2)}
    out, state = FLTrust(root).step(updates_of(np.ones((3, 7))), Task(FIT, 4, arrays.read_only(sent)), None)
    np.testing.assert_allclose(joined(out.delta), 1.0)
    assert asked == [(5.0, 4)]
    assert state is None
    with pytest.raises(ConfigError, match="arrays outside of a run"):
        FLTrust(root).aggregate(updates_of(np.ones((3, 7))))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({"a": np.ones(3)}, "got none of 'b'"),
        ([1.0], "must be a dict of named arrays, got list"),
        ({"a": np.full(3, np.nan), "b": np.ones(4)}, "root_update: 'a' must be finite"),
    ],
)
def test_root_updates_that_do_not_fit(root: object, message: str) -> None:
    with pytest.raises(SflError, match=message):
        FLTrust(root).aggregate(updates_of(cohort(0)))  # pyright: ignore


# Bucketing


def test_groups_hold_every_update_once_and_follow_from_the_updates() -> None:
    rows = cohort(6)
    mixed = Bucketing(3).mix(Stack.of(updates_of(rows)))
    assert len(mixed) == 4
    sizes = sorted(_members(rows, joined(u.delta)) for u in mixed)
    assert sorted(itertools.chain(*sizes)) == list(range(11))
    assert sorted(map(len, sizes)) == [2, 3, 3, 3]
    again = Bucketing(3).mix(Stack.of(updates_of(rows)[::-1]))
    np.testing.assert_allclose([joined(u.delta) for u in mixed], [joined(u.delta) for u in again], atol=1e-12)


def _members(rows: Array, mean: Array) -> list[int]:
    """Which two or three rows have this mean."""
    subsets = [list(s) for size in (2, 3) for s in itertools.combinations(range(len(rows)), size)]
    return next(s for s in subsets if np.allclose(rows[s].mean(axis=0), mean, atol=1e-12))


def test_nobody_knows_the_groups_before_the_last_update_is_in() -> None:
    mates = set()
    for last in range(30):
        rows = np.eye(12)
        rows[11, 11] += 1e-3 * last
        mixed = [joined(u.delta) for u in Bucketing(2).mix(Stack.of(updates_of(rows)))]
        group = next(mean for mean in mixed if mean[0] > 0.0)
        mates.add(int(group[1:].argmax()))
    assert len(mates) > 5


def test_secret_groups_differ() -> None:
    stack = Stack.of(updates_of(cohort(8, 12)))
    drawn = {joined(Bucketing(2, secret=True).mix(stack)[0].delta).tobytes() for _ in range(8)}
    assert len(drawn) > 1


# Norms


def test_norms_are_verified() -> None:
    rows = np.array([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0]])
    updates = [*updates_of(rows), Update("whole", {"a": np.array([30]), "b": np.array([40])}, 1.0)]
    updates += [Update("nan", {"a": np.array([np.nan]), "b": np.ones(1)}, 1.0)]
    report = verify_update_norms(updates, 5.0)
    assert report.norms | {"nan": 0.0} == {"site-01": 5.0, "site-02": 10.0, "site-03": 1.0, "whole": 50.0, "nan": 0.0}
    assert report.rejected == ("site-02", "whole", "nan")
    assert report.updates == (updates[0], updates[2])
    clipped = verify_update_norms(updates, 5.0, clip=True)
    assert (clipped.rejected, clipped.clipped) == (("nan",), ("site-02", "whole"))
    np.testing.assert_allclose([joined(u.delta) for u in clipped.updates], [[3, 4], [3, 4], [1, 0], [3, 4]])
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="max_norm must be positive and finite"):
            verify_update_norms(updates, bad)


def test_a_norm_bound_says_whom_it_clips(caplog: pytest.LogCaptureFixture) -> None:
    updates = updates_of(np.array([[3.0, 4.0], [6.0, 8.0]]))
    np.testing.assert_allclose(joined(NormBound(WeightedMean(), 5.0).aggregate(updates).delta), [3, 4])
    assert "norm above 5, clipped: site-02 (10)" in caplog.text
    np.testing.assert_allclose(joined(NormBound(WeightedMean(), 5.0, clip=False).aggregate(updates).delta), [3, 4])
    assert "left out: site-02 (10)" in caplog.text
    with pytest.raises(RoundError):
        NormBound(WeightedMean(), 1.0, clip=False).aggregate(updates)


def test_wrappers_carry_what_their_rule_remembers() -> None:
    rows = cohort(9)
    bare, task = CenteredClipping(0.5), Task(FIT, 1, {})
    _, expected = bare.step(updates_of(rows), task, None)
    bounded = NormBound(bare, 1e9)
    _, state = bounded.step(updates_of(rows), task, bounded.init({}))
    np.testing.assert_array_equal(joined(state), joined(expected))
    mixed = PreAggregated(bare, Bucketing(1))
    _, state = mixed.step(updates_of(rows), task, mixed.init({}))
    np.testing.assert_allclose(joined(state), joined(expected), atol=1e-12)


def test_names_resolve_on_first_use() -> None:
    from sfl.server import robust

    assert dir(robust) == sorted(robust.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Kram'"):
        robust.Kram  # noqa: B018  # pyright: ignore
