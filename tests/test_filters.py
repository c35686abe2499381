"""Filters: against brute force and textbook versions; what they cost, what they leave out, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import digits_client
from sfl.core import rng
from sfl.core.events import Notice, SiteFinished
from sfl.core.task import Update
from sfl.core.transform import chain
from sfl.errors import CompositionError, ConfigError
from sfl.privacy.clip import Clip
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.filters import (
    ErrorFeedback,
    ExcludeLayers,
    PercentileFilter,
    PrivateTopK,
    RandomK,
    SparseVector,
    TopK,
    chosen_layers,
    parse_layers,
)
from sfl.privacy.filters.svt import above_threshold, budget_shares
from sfl.privacy.filters.values import Clamp
from sfl.privacy.noise import GaussianNoise
from sfl.privacy.runner_utils import build_protections, cost
from sfl.recipe import FedAvgRecipe
from sfl.types import FederationConfig, Parameters

VECTORS = hnp.arrays(
    np.float64, st.integers(1, 40), elements=st.sampled_from([0.0, 1.0, -1.0, 2.0]) | st.floats(-9, 9, width=32)
)


def apply(transform: Any, delta: Parameters, state: Any = None, round: int = 1) -> tuple[Parameters, Any]:
    state = transform.init(delta) if state is None else state
    update, state = transform.apply(Update("site-1", delta, 1.0), state, rng.public(0, round, "t", "site-1"))
    return update.delta, state


def brute_top(vector: np.ndarray, count: int) -> np.ndarray:
    """The largest ones by sorting, the first of equal ones."""
    order = sorted(range(vector.size), key=lambda i: (-abs(vector[i]), i))
    out = np.zeros_like(vector)
    for index in order[:count]:
        out[index] = vector[index]
    return out


# Compression


@given(VECTORS, st.floats(0.01, 1.0))
def test_top_k_is_brute_force(vector: np.ndarray, ratio: float) -> None:
    sent, _ = apply(TopK(ratio), {"a": vector[:3], "b": vector[3:]})
    expected = brute_top(vector, min(vector.size, max(1, round(ratio * vector.size))))
    np.testing.assert_array_equal(np.concatenate([sent["a"], sent["b"]]), expected)


@given(st.lists(hnp.arrays(np.float64, 12, elements=st.integers(-8, 8).map(float)), min_size=1, max_size=6))
def test_error_feedback_is_its_algorithm(updates: list[np.ndarray]) -> None:
    transform, state, memory = ErrorFeedback(TopK(0.25)), None, np.zeros(12)
    for round, vector in enumerate(updates, 1):
        sent, state = apply(transform, {"w": vector.astype("f4")}, state, round)
        expected = brute_top(vector + memory, 3)
        memory = vector + memory - expected
        np.testing.assert_array_equal(sent["w"], expected.astype("f4"))
        np.testing.assert_array_equal(state["w"], memory)


def test_all_that_was_sent_and_what_is_remembered_are_all_updates() -> None:
    source = np.random.default_rng(0)
    for compressor in (TopK(0.1), RandomK(0.1, unbiased=False)):
        transform, state, total = ErrorFeedback(compressor), None, np.zeros((20, 5))
        given_ = [source.normal(size=(20, 5)) for _ in range(30)]
        for round, value in enumerate(given_, 1):
            sent, state = apply(transform, {"w": value}, state, round)
            total += sent["w"]
        np.testing.assert_allclose(total + state["w"], sum(given_), atol=1e-12)


def test_feedback_remembers_what_a_narrow_dtype_could_not_send() -> None:
    value = np.array([1.0, 2**-14], "f2")
    sent, state = apply(ErrorFeedback(TopK(1.0)), {"w": value}, {"w": np.array([2.0**-20, 0.0])})
    assert sent["w"].dtype == np.float16
    np.testing.assert_array_equal(sent["w"] + state["w"], value.astype("f8") + np.array([2.0**-20, 0.0]))


def test_random_k_is_unbiased_and_ignores_the_data() -> None:
    delta = {"w": np.arange(1.0, 11.0)}
    draws = [apply(RandomK(0.3), delta, round=round)[0]["w"] for round in range(1, 4001)]
    np.testing.assert_allclose(np.mean(draws, axis=0), delta["w"], rtol=0.12)
    assert all(np.count_nonzero(draw) == 3 for draw in draws)
    other = apply(RandomK(0.3), {"w": np.ones(10)})[0]["w"]
    np.testing.assert_array_equal(other != 0, draws[0] != 0)


def test_random_k_under_feedback_must_not_be_scaled() -> None:
    with pytest.raises(ConfigError, match="unbiased=False"):
        ErrorFeedback(RandomK(0.1))


def test_a_clip_before_error_feedback_is_refused() -> None:
    with pytest.raises(CompositionError, match="Swap Clip and ErrorFeedback"):
        chain(Clip(1.0), ErrorFeedback(TopK(0.1)))
    chain(ErrorFeedback(TopK(0.1)), Clip(1.0), GaussianNoise(1.0), TopK(0.5))


# Percentile


@given(VECTORS, st.floats(0, 99))
def test_the_percentile_filter_keeps_what_is_above(vector: np.ndarray, percentile: float) -> None:
    sent, _ = apply(PercentileFilter(percentile, gamma=1.5), {"w": vector})
    cut = np.percentile(np.abs(vector), percentile)
    expected = np.clip(np.where(np.abs(vector) >= cut, vector, 0.0), -1.5, 1.5)
    np.testing.assert_array_equal(sent["w"], expected)


def test_a_fixed_k_does_not_depend_on_sizes() -> None:
    equal, _ = apply(PercentileFilter(90.0, fixed_k=True), {"w": np.ones(50)})
    assert np.count_nonzero(equal["w"]) == 5
    loose, _ = apply(PercentileFilter(90.0), {"w": np.ones(50)})
    assert np.count_nonzero(loose["w"]) == 50


# Layers


NAMES = ["esm.embeddings.word", "esm.layer.0.weight", "esm.layer.0.bias", "esm.layer.1.weight", "head.bias"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,1", NAMES[:2]),
        ("-1", NAMES[4:]),
        ("esm.layer.0", NAMES[1:3]),
        ("head.bias", NAMES[4:]),
        ("*.bias, 0", [NAMES[0], NAMES[2], NAMES[4]]),
        ("esm.layer.?.weight", [NAMES[1], NAMES[3]]),
    ],
)
def test_layers_by_position_name_and_pattern(text: str, expected: list[str]) -> None:
    assert chosen_layers(parse_layers(text), NAMES) == expected


def test_a_layer_that_is_none_of_the_models() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'esm.layer.1'"):
        chosen_layers(["esm.layr.1"], NAMES)
    with pytest.raises(ConfigError, match="from 0 to 4"):
        chosen_layers([5], NAMES)
    with pytest.raises(ConfigError, match="means all"):
        ExcludeLayers(("*",)).sends({"a": np.zeros(1)})
    with pytest.raises(ConfigError, match="at least one"):
        ExcludeLayers(())


def test_positions_of_both_kinds_are_those_of_the_whole_model() -> None:
    protections = build_protections(PrivacyConfig(exclude_layers="0", freeze_layers="1,2"), FederationConfig())
    model = {name: np.zeros(1) for name in NAMES}
    assert list(chain(*protections.transforms).sends(model)) == NAMES[3:]


# Private selections


def textbook_svt(
    queries: list[float], threshold: float, sensitivity: float, shares: tuple[float, float], count: int, draw: Any
) -> list[int]:
    """Lyu, Su and Li 2017, Algorithm 7, line by line, in float64."""
    first, second = shares
    noise = draw(sensitivity / first)
    found: list[int] = []
    for index, query in enumerate(queries):
        if query + draw(2 * count * sensitivity / second) >= threshold + noise:
            found.append(index)
            if len(found) >= count:
                break
    return found


def test_the_search_is_the_textbooks() -> None:
    class Same:
        """Deals the same noise to both, in the order of the algorithm."""

        def __init__(self, seed: int) -> None:
            self.source = np.random.default_rng(seed)

        def laplace(self, loc: float, scale: float, size: int | None = None) -> Any:
            unit = self.source.laplace(size=size)
            return loc + scale * unit

    for seed in range(200):
        queries = np.random.default_rng(seed + 1000).uniform(0, 2, size=30)
        mine = above_threshold(
            queries,
            threshold=1.0,
            sensitivity=0.05,
            epsilon=3.0,
            count=4,
            generator=Same(seed),  # type: ignore[arg-type]
        )
        dealer = Same(seed)
        theirs = textbook_svt(list(queries), 1.0, 0.05, budget_shares(3.0, 4), 4, partial(dealer.laplace, 0.0))
        assert mine.tolist() == theirs


def test_the_budget_is_split_as_the_paper_says() -> None:
    first, second = budget_shares(1.0, 4)
    assert first + second == pytest.approx(1.0)
    assert second / first == pytest.approx(8 ** (2 / 3))


def observed(mechanism: Any, delta: Parameters, tries: int) -> np.ndarray:
    transform = chain(mechanism.clip(), mechanism.noise())
    return np.array([apply(transform, delta, round=1)[0]["w"] for _ in range(tries)])


def bound(left: np.ndarray, right: np.ndarray, epsilon: float) -> float:
    """How far the share of an event under one data set is past e^ε times that under the other, in standard errors."""
    p, q = left.mean(), right.mean()
    error = math.sqrt(p * (1 - p) / left.size + math.exp(2 * epsilon) * q * (1 - q) / right.size)
    return float((p - math.exp(epsilon) * q) / max(error, 1e-12))


@pytest.mark.parametrize(
    "mechanism",
    [
        PrivateTopK(epsilon=1.5, share=0.25, gamma=1.0),
        SparseVector(epsilon=1.5, count=1, threshold=0.5, gamma=1.0),
    ],
    ids=["top-k", "svt"],
)
def test_neighbours_cannot_be_told_apart_beyond_epsilon(mechanism: Any) -> None:
    """And a selection of that kind without noise is told apart by the same events, so they can fail."""
    near, far = {"w": np.array([1.0, 0.0, 0.0, 0.0])}, {"w": np.array([0.0, 0.0, 0.0, 1.0])}
    here, there = observed(mechanism, near, 4000), observed(mechanism, far, 4000)
    for event in (lambda x: x[:, 0] != 0, lambda x: x[:, 0] > 0.5, lambda x: x[:, 3] == 0, lambda x: x[:, 0] > x[:, 3]):
        assert bound(event(here), event(there), mechanism.epsilon) < 4.0
        assert bound(event(there), event(here), mechanism.epsilon) < 4.0
    plain_here, plain_there = (np.array([apply(TopK(0.25), d)[0]["w"]] * 4000) for d in (near, far))
    assert bound(plain_here[:, 0] != 0, plain_there[:, 0] != 0, mechanism.epsilon) > 4.0


@pytest.mark.parametrize(("dtype", "gamma"), [(np.int64, 1.5), (np.int64, 0.6), (np.float32, 0.1), (np.float16, 0.1)])
def test_no_clamped_coordinate_is_past_gamma_whatever_it_is_rounded_to(dtype: Any, gamma: float) -> None:
    clamped, _ = apply(Clamp(gamma), {"w": np.array([-9, -1, 0, 1, 9], dtype), "none": np.zeros((), dtype)})
    assert float(np.abs(clamped["w"].astype(np.float64)).max()) <= gamma
    assert clamped["w"].dtype == dtype
    assert clamped["none"].shape == ()
    assert float(clamped["w"][4]) == pytest.approx(math.floor(gamma) if dtype == np.int64 else gamma, rel=1e-3)


def test_released_values_have_the_noise_that_was_paid_for() -> None:
    """Its scale, by a test that rejects two thirds and three halves of it."""
    mechanism = PrivateTopK(epsilon=3.0, share=1.0, gamma=0.5)
    values = observed(mechanism, {"w": np.full(2000, 0.25)}, 1).ravel() - 0.25
    scale = 2 * 0.5 * 2000 / 2.0
    measured = float(np.mean(np.abs(values)))  # the mean of |Lap(b)| is b, its standard error b / √n
    assert abs(measured / scale - 1.0) < 5 / math.sqrt(2000)
    for wrong in (2 / 3, 3 / 2):
        assert abs(measured / (wrong * scale) - 1.0) > 5 / math.sqrt(2000)


def test_gumbel_choice_is_the_exponential_mechanism() -> None:
    """k = 1: the odds of each coordinate are exp(ε |δ| / 6γ), an ε of a third."""
    mechanism = PrivateTopK(epsilon=6.0, share=0.25, gamma=1.0)
    sizes = np.array([0.0, 0.5, 0.75, 1.0])
    chosen = np.argmax(observed(mechanism, {"w": sizes}, 8000) != 0, axis=1)
    expected = np.exp(6.0 / 3.0 * sizes / 2.0)
    np.testing.assert_allclose(np.bincount(chosen, minlength=4) / 8000, expected / expected.sum(), atol=0.03)


def test_what_selections_cost() -> None:
    config = PrivacyConfig(percentile_privacy=99.0, percentile_epsilon=0.5, dp=True, dp_noise=4.0)
    found = {g.adversary: g for g in cost(config, FederationConfig(num_clients=8, num_rounds=4))}
    assert found["server_curious"].epsilon == pytest.approx(2.0, abs=0.01)
    assert found["server_trusted"].epsilon == pytest.approx(2.08, abs=0.1)
    assert found["server_curious"].adjacency == "replace_one"


# What is refused, and what a run says


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"percentile_epsilon": 1.0}, "Add --percentile-privacy"),
        ({"percentile_privacy": 100.0}, r"in \[0, 100\)"),
        ({"compress": 0.0}, r"in \(0, 1\]"),
        ({"compress_topk": True}, "Add --compress"),
        ({"compress": 0.1, "compress_topk": True, "compress_random": True}, "got both"),
        ({"svt_privacy": True, "percentile_privacy": 10.0}, "Leave one out"),
        ({"svt_privacy": True, "compress": 0.1, "compress_error_feedback": True}, "paid for again"),
        ({"dp_max_epsilon": 1.0}, "Add --dp"),
        ({"svt_epsilon": 0.0}, "between 1e-9 and 1e9"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrivacyConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dp_mode": "local", "compress": 0.1, "compress_error_feedback": True}, "error feedback"),
        ({"dp_mode": "local", "compress": 0.1, "compress_random": True}, "RandomK"),
        ({"dp_mode": "client", "compress": 0.1}, "dp_mode=client"),
    ],
)
def test_noise_on_chosen_coordinates_alone_is_refused(options: dict[str, Any], said: str) -> None:
    federation = FederationConfig(num_clients=4, min_available_clients=3)
    with pytest.raises(CompositionError, match=said):
        build_protections(PrivacyConfig(dp=True, **options), federation)


def test_two_ways_to_hide_the_same_are_refused() -> None:
    config = PrivacyConfig(dp=True, dp_mode="local", svt_privacy=True)
    with pytest.raises(CompositionError, match="one mechanism must protect a site"):
        cost(config, FederationConfig(num_clients=4))


def run(options: PrivacyConfig, out: Path | None = None, **more: Any) -> tuple[Any, list[Any]]:
    federation = more.pop("federation", FederationConfig(num_clients=3, num_rounds=2))
    recipe = FedAvgRecipe(
        name="digits",
        client=digits_client.Digits,
        initial_parameters=digits_client.small_parameters,
        federation=federation,
    )
    protections = build_protections(options, recipe.federation)
    recipe = replace(
        recipe,
        transforms=protections.transforms,
        released=protections.released,
        mechanisms=protections.mechanisms,
        budget=protections.budget,
        **more,
    )
    events: list[Any] = []
    return recipe.execute(out=out, observers=(events.append,)), events


def notices(events: list[Any]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


def test_a_filter_is_said_to_promise_nothing(tmp_path: Path) -> None:
    result, events = run(PrivacyConfig(percentile_privacy=90.0, compress=0.05), tmp_path / "run")
    said = notices(events)
    assert "percentile filter (90 %): adds no formal guarantee" in said
    assert "compression (largest 0.05): saves bytes, adds no formal guarantee" in said
    written = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert len(written["unproven"]) == 2
    assert written["guarantees"] == []
    assert result.rounds[-1].fit["compress_sent_share"] == pytest.approx(0.05, abs=0.002)


def test_what_is_left_out_does_not_travel_and_is_not_counted() -> None:
    _, plain = run(PrivacyConfig())
    _, thin = run(PrivacyConfig(compress=0.01))
    whole, less = (
        [e.nbytes for e in events if isinstance(e, SiteFinished) and e.stage == "fit"] for events in (plain, thin)
    )
    assert sum(less) < 0.03 * sum(whole)


def test_a_private_selection_spends_says_so_and_stops_at_its_budget() -> None:
    result, events = run(PrivacyConfig(svt_privacy=True, svt_epsilon=1.0, svt_threshold=9.0, dp_max_epsilon=1.5))
    said = notices(events)
    assert result.state.round == 1
    assert "past the budget of 1.5" in result.reason
    assert "ε = 1" in said
    assert "it holds against the server, too" in said
    assert "svt_acceptance_rate" in result.rounds[-1].fit
    assert ("Lower --svt-threshold" in said) == (result.rounds[-1].fit["svt_acceptance_rate"] < 0.1)


def test_excluded_layers_keep_what_the_model_has() -> None:
    result, _ = run(PrivacyConfig(exclude_layers="0"))
    first = next(iter(result.parameters))
    before = digits_client.small_parameters()
    np.testing.assert_array_equal(result.parameters[first], before[first])
    assert any((result.parameters[name] != before[name]).any() for name in before if name != first)


@pytest.mark.parametrize("mode", ["local", "client"])
def test_whole_numbers_are_noised_on_their_site_and_come_back_as_whole_numbers(mode: Any) -> None:
    options = PrivacyConfig(dp=True, dp_mode=mode, dp_clip=50.0, dp_noise=0.1)
    result, _ = run(options, federation=FederationConfig(num_clients=3, num_rounds=2, min_available_clients=3))
    assert result.state.round == 2
    assert result.parameters["norm.num_batches_tracked"].dtype == np.int64


def test_under_noise_on_the_sum_nothing_of_a_single_update_is_told() -> None:
    result, events = run(PrivacyConfig(dp=True, dp_noise=4.0, compress=0.01, percentile_privacy=50.0))
    fits = [event for event in events if isinstance(event, SiteFinished) and event.stage == "fit"]
    assert all(event.metrics == {} for event in fits)
    assert len({event.nbytes for event in fits}) == 1
    assert result.rounds[-1].fit == {}
    alone, _ = run(PrivacyConfig(svt_privacy=True))
    assert "svt_acceptance_rate" in alone.rounds[-1].fit, "what is private by itself may be told"
