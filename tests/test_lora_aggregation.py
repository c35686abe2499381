"""LoRA's aggregation against dense products and numpy's SVD in float64, the laws of each way, and their limits."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithm_clients import Steered
from sfl.client.base import BaseFederatedClient
from sfl.core import arrays
from sfl.core.aggregator import WeightedMean
from sfl.core.lora import Pair, frames, pairs, restored, restricted
from sfl.core.task import FIT, SERVER, Task, Update
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, RoundError, UpdateError
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.filters import ErrorFeedback, FreezeLayers, TopK
from sfl.privacy.secagg import SecAgg
from sfl.recipe import DittoRecipe, FedAvgRecipe, FedBuffRecipe, FedOptRecipe, ScaffoldRecipe, SwarmRecipe
from sfl.server.lora import MEAN_ERROR, TRUNCATION, LoraProductMean, lora_aggregator
from sfl.server.robust import Krum, NormBound
from sfl.types import Array, ClientUpdate, Config, Evaluation, FederationConfig, Parameters

A, B, HEAD = "h.0.c_attn.lora_A.default.weight", "h.0.c_attn.lora_B.default.weight", "head.weight"
OUT, IN = 7, 9


def model(rank: int = 3, seed: int = 0, *, begun: bool = True, dtype: str = "f8") -> Parameters:
    """One adapted layer and a head; ``begun`` has trained already."""
    source = np.random.default_rng(seed)
    grown = source.normal(size=(OUT, rank)) if begun else np.zeros((OUT, rank))
    made = {A: source.normal(size=(rank, IN)), B: grown, HEAD: source.normal(size=(2, 5))}
    return {name: np.asarray(value, dtype=dtype) for name, value in made.items()}


def moved(sent: Parameters, count: int, seed: int = 1, scale: float = 1.0) -> list[Update]:
    """Updates of weights 1, 2, 3, …"""
    source = np.random.default_rng(seed)
    return [
        Update(
            f"site-{i + 1}",
            {n: np.asarray(scale * source.normal(size=v.shape), v.dtype) for n, v in sent.items()},
            1.0 + i,
        )
        for i in range(count)
    ]


def round_of(sent: Parameters, updates: list[Update]) -> tuple[Parameters, dict[str, float]]:
    """The global parameters after a round, and its figures."""
    out, _ = LoraProductMean().step(updates, Task(FIT, 1, arrays.read_only(sent)), None)
    after = {name: value + out.delta.get(name, 0.0) for name, value in sent.items()}
    return after, out.metrics


def product(parameters: Parameters, a: str = A, b: str = B) -> Array:
    return np.asarray(parameters[b], np.float64) @ np.asarray(parameters[a], np.float64)


def own(sent: Parameters, update: Update) -> Parameters:
    return {name: value + update.delta.get(name, 0.0) for name, value in sent.items()}


def dense(sent: Parameters, updates: list[Update]) -> Array:
    """The mean of the products, formed."""
    total = sum(update.weight for update in updates)
    return np.asarray(sum(update.weight / total * product(own(sent, update)) for update in updates))


def truncated(matrix: Array, rank: int) -> Array:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def plain_mean(sent: Parameters, updates: list[Update]) -> Parameters:
    mean = WeightedMean().aggregate(updates)
    return {name: value + mean.delta.get(name, 0.0) for name, value in sent.items()}


# Exact aggregation


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000), st.booleans(), st.sampled_from([1e-6, 0.1, 1.0, 1e6])
)
def test_it_is_the_best_approximation_of_the_mean_of_the_products(
    rank: int, sites: int, seed: int, begun: bool, scale: float
) -> None:
    sent = model(rank, seed, begun=begun)
    updates = moved(sent, sites, seed + 1, scale)
    after, figures = round_of(sent, updates)
    wanted = dense(sent, updates)
    best = truncated(wanted, rank)
    np.testing.assert_allclose(product(after), best, atol=1e-11 * np.linalg.norm(wanted))
    assert figures[TRUNCATION] == pytest.approx(np.linalg.norm(wanted - best) / np.linalg.norm(wanted), abs=1e-7)
    biased = product(plain_mean(sent, updates))
    assert figures[MEAN_ERROR] == pytest.approx(np.linalg.norm(biased - wanted) / np.linalg.norm(wanted), abs=1e-7)
    assert figures[TRUNCATION] <= figures[MEAN_ERROR] + 1e-7, (
        "no product of rank r is nearer, plain averaging's neither"
    )
    np.testing.assert_allclose(after[HEAD], plain_mean(sent, updates)[HEAD])


def test_averaging_the_factors_is_biased_by_the_cross_terms() -> None:
    sent = {A: np.array([[0.0, 0.0]]), B: np.array([[0.0], [0.0]])}
    one = Update("site-1", {A: np.array([[1.0, 0.0]]), B: np.array([[1.0], [0.0]])}, 1.0)
    two = Update("site-2", {A: np.array([[0.0, 1.0]]), B: np.array([[0.0], [1.0]])}, 1.0)
    np.testing.assert_array_equal(dense(sent, [one, two]), [[0.5, 0.0], [0.0, 0.5]])
    np.testing.assert_array_equal(product(plain_mean(sent, [one, two])), [[0.25, 0.25], [0.25, 0.25]])
    _, figures = round_of(sent, [one, two])
    assert figures[TRUNCATION] == pytest.approx(0.5**0.5)  # of two equal singular values rank 1 keeps one
    assert figures[MEAN_ERROR] == pytest.approx(0.5 / 0.5**0.5)
    sent = model()
    updates = moved(sent, 3)
    cross = sum(
        u.weight * v.weight / 36 * (u.delta[B] - v.delta[B]) @ (u.delta[A] - v.delta[A])
        for u, v in itertools.product(updates, updates)
    )
    np.testing.assert_allclose(product(plain_mean(sent, updates)) - dense(sent, updates), -cross / 2, atol=1e-12)


def test_averaging_the_factors_loses_what_sites_agree_on_in_other_factors() -> None:
    sent = {A: np.array([[0.0, 0.0]]), B: np.array([[0.0], [0.0]])}
    one = Update("site-1", {A: np.array([[1.0, 0.0]]), B: np.array([[1.0], [0.0]])}, 1.0)
    opposite = [one, Update("site-2", {A: -one.delta[A], B: -one.delta[B]}, 1.0)]
    np.testing.assert_array_equal(product(plain_mean(sent, opposite)), np.zeros((2, 2)))  # the same product, lost
    np.testing.assert_allclose(product(round_of(sent, opposite)[0]), [[1.0, 0.0], [0.0, 0.0]], atol=1e-15)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_one_site_is_that_site(dtype: str) -> None:
    sent = model(dtype=dtype)
    updates = moved(sent, 1)
    after, figures = round_of(sent, updates)
    np.testing.assert_allclose(product(after), product(own(sent, updates[0])), rtol=2e-5 if dtype == "f4" else 1e-11)
    assert figures[TRUNCATION] == 0.0
    assert figures[MEAN_ERROR] == pytest.approx(0.0, abs=1e-12)


def test_sites_may_come_in_any_order_and_weights_in_any_unit() -> None:
    sent = model()
    updates = moved(sent, 4)
    first, _ = round_of(sent, updates)
    for order in itertools.permutations(updates):
        again, _ = round_of(sent, [replace(update, weight=1e-3 * update.weight) for update in order])
        for name, value in first.items():
            np.testing.assert_allclose(again[name], value, rtol=1e-9, atol=1e-10)
    assert all((round_of(sent, updates)[0][name] == value).all() for name, value in first.items())


def test_directions_are_ordered_and_the_frame_keeps_its_norm() -> None:
    sent = model(rank=4)
    for seed in range(3):
        before, (sent, _) = sent, round_of(sent, moved(sent, 3, seed))
        gram = sent[A] @ sent[A].T
        np.testing.assert_allclose(gram, np.square(before[A]).sum() / 4 * np.eye(4), atol=1e-10)
        assert (np.diff(np.linalg.norm(sent[B], axis=0)) <= 0.0).all()
        assert (sent[A][range(4), np.abs(sent[A]).argmax(1)] > 0.0).all()


def test_a_pair_that_nobody_moved_stays_as_it_is() -> None:
    sent = model()
    still = [Update(f"site-{i}", arrays.zeros_like(sent), 1.0) for i in range(3)]
    out, _ = LoraProductMean().step(still, Task(FIT, 1, sent), None)
    assert list(out.delta) == list(sent)
    assert arrays.l2_norm(out.delta) == 0.0
    assert (out.site, out.weight, out.metrics) == (SERVER, 3.0, {})


@pytest.mark.parametrize("rank", [3, 12])  # 12 is more than the layer is wide
@pytest.mark.parametrize("first", ["random", "zero"])
def test_directions_without_use_can_still_be_trained(rank: int, first: str) -> None:
    sent = model(rank, begun=False)
    if first == "zero":
        sent[A][...] = 0.0
    one = moved(sent, 1)[0]
    one.delta[B][...] = one.delta[B][:, :1] * np.arange(1.0, rank + 1)  # a product of rank 1, but for rounding
    after, figures = round_of(sent, [one, replace(one, site="site-2")])
    np.testing.assert_allclose(product(after), product(own(sent, one)), atol=1e-12)
    assert np.count_nonzero(np.linalg.norm(after[B], axis=0)) == 1
    assert np.linalg.matrix_rank(after[A]) == min(rank, IN)
    kept = np.linalg.norm(after[A], axis=1)[: min(rank, IN)]
    np.testing.assert_allclose(kept, kept[0])
    assert figures[TRUNCATION] < 1e-12
    if first == "random" and rank < IN:  # the frame spans what it spanned, but for the direction that is in use
        span = np.concatenate([sent[A], after[A][:1]])
        assert np.linalg.matrix_rank(np.concatenate([span, after[A]])) == np.linalg.matrix_rank(span)


def test_a_product_that_became_zero_leaves_a_frame_to_train_on() -> None:
    sent = model()
    undone = Update("site-1", {A: np.zeros_like(sent[A]), B: -sent[B]}, 1.0)
    after, figures = round_of(sent, [undone])
    assert not after[B].any()
    assert np.linalg.matrix_rank(after[A]) == 3
    assert figures == {}


def test_embeddings_and_convolutions() -> None:
    names = ("wte.lora_embedding_A.default", "wte.lora_embedding_B.default", "c.lora_A.weight", "c.lora_B.weight")
    source = np.random.default_rng(0)
    shapes = ((2, 9), (5, 2), (2, 3, 3, 3), (4, 2, 1, 1))
    sent = dict(zip(names, (source.normal(size=shape) for shape in shapes), strict=True))
    sent[names[0]][...] = 0.0  # as peft begins an embedding: A is the factor that grows
    assert [pair.frame for pair in pairs(sent)] == [names[1], names[2]]
    updates = moved(sent, 3)
    after, _ = round_of(sent, updates)
    tables = sum(u.weight / 6 * product(own(sent, u), *names[:2]) for u in updates)
    np.testing.assert_allclose(product(after, *names[:2]), truncated(np.asarray(tables), 2), atol=1e-12)
    gram = after[names[1]].T @ after[names[1]]
    np.testing.assert_allclose(gram, np.square(sent[names[1]]).sum() / 2 * np.eye(2), atol=1e-12)

    def kernel(factors: Parameters) -> Array:
        return np.einsum("orxy,rikl->oikl", factors[names[3]], factors[names[2]]).reshape(4, 27)

    kernels = np.asarray(sum(u.weight / 6 * kernel(own(sent, u)) for u in updates))
    np.testing.assert_allclose(kernel(after), truncated(kernels, 2), atol=1e-12)


def test_no_product_is_formed() -> None:
    wide, rank = 4000, 4
    sent = {A: np.ones((rank, wide)), B: np.ones((wide, rank))}
    updates = moved(sent, 5)
    tracemalloc.start()
    try:
        LoraProductMean().step(updates, Task(FIT, 1, sent), None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < wide * wide * 8 / 10  # it takes 9.4 MB; a product takes 128


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    sent = model()
    updates = moved(sent, 2)
    updates[1].delta[A][1, 1] = bad
    with pytest.raises(UpdateError, match=r"site-2: 'h\.0\.c_attn\.lora_A"):
        round_of(sent, updates)


def test_it_needs_to_know_what_was_sent() -> None:
    with pytest.raises(RoundError, match="Use step"):
        LoraProductMean().aggregate(moved(model(), 2))
    with pytest.raises(RoundError, match="at least one update"):
        LoraProductMean().step([], Task(FIT, 1, model()), None)
    with pytest.raises(RoundError, match=f"must answer the task that they are aggregated for, got '{A}'"):
        LoraProductMean().step(moved(model(), 2), Task("own", 1, {}), None)


def test_models_that_it_cannot_aggregate() -> None:
    with pytest.raises(ConfigError, match="must have pairs lora_A and lora_B"):
        LoraProductMean().init({A: np.ones((2, 3)), HEAD: np.ones((2, 2))})
    with pytest.raises(ConfigError, match="must have pairs lora_A and lora_B"):
        frames({HEAD: np.ones((2, 2))})
    for shapes in (((2, 3), (4, 3)), ((2,), (4, 2))):
        with pytest.raises(ConfigError, match="must be of one rank, got shapes"):
            LoraProductMean().init({A: np.ones(shapes[0]), B: np.ones(shapes[1])})


# Sites of different ranks


def mixed(sent: Parameters, ranks: tuple[int, ...], *, back: bool) -> list[Update]:
    """What sites of these ranks send: trained where they have something, and zero or what was sent beyond."""
    updates: list[Update] = []
    for place, rank in enumerate(ranks):
        received = restricted(sent, rank)
        step = moved(sent, 1, 50 + place)[0].delta
        trained = {name: value + restricted(step, rank)[name] for name, value in received.items()}
        returned = restored(trained, sent, rank) if back else trained
        updates.append(Update(f"site-{place + 1}", arrays.subtract(returned, sent), 1.0 + place))
    return updates


def test_a_site_of_a_lower_rank_has_the_first_directions() -> None:
    sent = model(rank=4)
    part = restricted(sent, 2)
    assert not part[A][2:].any()
    assert not part[B][:, 2:].any()
    assert (part[A][:2] == sent[A][:2]).all()
    assert (part[B][:, :2] == sent[B][:, :2]).all()
    assert part[HEAD] is sent[HEAD]
    assert restricted(sent, 4)[A] is sent[A]
    assert sent[A][2:].any(), "what was received must not be written to"
    assert all((restored(part, sent, 2)[name] == value).all() for name, value in sent.items())
    for rank in (0, True):
        with pytest.raises(ConfigError, match="rank must be at least 1"):
            restricted(sent, rank)


def test_what_a_site_of_a_lower_rank_gets_is_the_best_of_its_rank() -> None:
    sent = model(rank=4)
    after, _ = round_of(sent, moved(sent, 3))
    for rank in (1, 2, 3):
        np.testing.assert_allclose(product(restricted(after, rank)), truncated(product(after), rank), atol=1e-12)
    biased = plain_mean(sent, moved(sent, 3))
    best = np.linalg.norm(product(biased) - truncated(product(biased), 2))
    assert np.linalg.norm(product(biased) - product(restricted(biased, 2))) > 1.05 * best


@pytest.mark.parametrize("back", [False, True])
def test_ranks_may_differ(back: bool) -> None:
    sent = model(rank=4)
    updates = mixed(sent, (1, 2, 4), back=back)
    after, _ = round_of(sent, updates)
    np.testing.assert_allclose(product(after), truncated(dense(sent, updates), 4), atol=1e-11)
    for update, rank in zip(updates, (1, 2, 4), strict=True):
        beyond = own(sent, update)[A][rank:]
        np.testing.assert_allclose(beyond, sent[A][rank:] if back else np.zeros_like(beyond), atol=1e-15)


def test_padding_with_zeros_shrinks_what_few_sites_have() -> None:
    sent, _ = round_of(model(rank=4), moved(model(rank=4), 3))
    still = [
        {n: v - sent[n] for n, v in restricted(sent, rank).items()} for rank in (2, 4)
    ]  # nobody learns anything, the site of rank 2 pads
    padded = [Update("site-1", still[0], 3.0), Update("site-2", still[1], 1.0)]
    exact, biased = round_of(sent, padded)[0], plain_mean(sent, padded)
    values = [np.linalg.svd(product(p), compute_uv=False)[:4] for p in (sent, exact, biased)]
    np.testing.assert_allclose(values[1] / values[0], [1, 1, 1 / 4, 1 / 4])
    np.testing.assert_allclose(values[2] / values[0], [1, 1, 1 / 16, 1 / 16])  # a quarter of each factor
    kept = [replace(update, delta=arrays.zeros_like(sent)) for update in padded]
    np.testing.assert_array_equal(product(round_of(sent, kept)[0]), product(sent))


# Freezing A


def test_with_a_frozen_the_mean_is_exact() -> None:
    sent = model()
    kept = FreezeLayers(frames(sent)).sends(sent)
    assert list(kept) == [B, HEAD]
    updates = [replace(u, delta={name: u.delta[name] for name in kept}) for u in moved(sent, 3)]
    np.testing.assert_allclose(product(plain_mean(sent, updates)), dense(sent, updates), atol=1e-13)
    after, figures = round_of(sent, updates)  # the exact rule has nothing to do then
    assert (after[A] == sent[A]).all()
    np.testing.assert_array_equal(after[B], plain_mean(sent, updates)[B])
    assert figures == {}


def test_noise_on_b_alone_reaches_the_product_in_proportion() -> None:
    sent = model()
    noise = {name: np.random.default_rng(5).normal(size=sent[name].shape) for name in (A, B)}

    def off(scale: float, *names: str) -> Array:
        return product({n: v + (scale * noise[n] if n in names else 0.0) for n, v in sent.items()}) - product(sent)

    np.testing.assert_allclose(off(8.0, B), 8.0 * off(1.0, B), atol=1e-12)
    both = np.linalg.norm(off(8.0, A, B)) / np.linalg.norm(off(1.0, A, B))
    assert both > 2 * 8.0  # the noises' own product grows with the square
    source, sigma, squares = np.random.default_rng(6), 0.7, list[tuple[float, float]]()
    for _ in range(3000):
        noise = {name: sigma * source.normal(size=sent[name].shape) for name in (A, B)}
        squares.append((np.square(off(1.0, B)).sum(), np.square(off(1.0, A, B)).sum()))
    one, other = OUT * np.square(sent[A]).sum(), IN * np.square(sent[B]).sum()
    expected = sigma**2 * one, sigma**2 * (one + other) + sigma**4 * OUT * IN * 3
    np.testing.assert_allclose(np.mean(squares, axis=0), expected, rtol=0.03)


# Composition


class Adapter(BaseFederatedClient):
    """Moves every array by a site's own step."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        step = moved(parameters, 1, 10 * self.client_id + int(config["round"]), 0.1)[0].delta
        return {name: value + step[name] for name, value in parameters.items()}, 1 + self.client_id, {"loss": 1.0}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return float(np.square(product(parameters)).sum()), 1, {}


def job(**fields: object) -> FedAvgRecipe:
    federation = FederationConfig(num_clients=3, num_rounds=2, min_available_clients=2)
    given = {"aggregator": LoraProductMean(), "federation": federation, **fields}
    return FedAvgRecipe(name="lora", client=Adapter, initial_parameters=model(begun=False), **given)  # pyright: ignore


def test_a_run_says_what_the_rounds_lost() -> None:
    result = job().execute(SimEnv(device="cpu"))
    sent = model(begun=False)
    for round in result.rounds[1:]:
        updates = [Update(f"site-{i}", moved(sent, 1, 10 * i + round.round, 0.1)[0].delta, 1.0 + i) for i in range(3)]
        sent, figures = round_of(sent, updates)
        assert 0.0 < round.fit[TRUNCATION] < 1.0
        assert {name: round.fit[name] for name in figures} == pytest.approx(figures)
        assert round.fit["loss"] == 1.0
    np.testing.assert_allclose(product(result.parameters), product(sent), atol=1e-12)
    plain = job(aggregator=WeightedMean()).execute(SimEnv(device="cpu"))
    assert set(plain.rounds[1].fit) == {"loss"}


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (
            FedOptRecipe,
            {},
            "lora_aggregation=exact must come with fedavg or fedprox at a server .* got FedOptRecipe",
        ),
        (DittoRecipe, {}, "got DittoRecipe"),
        (ScaffoldRecipe, {}, "got ScaffoldRecipe"),
        (SwarmRecipe, {}, "SwarmRecipe must be left its own order"),
        (FedBuffRecipe, {"buffer": 2}, "got FedBuffRecipe"),
        (FedAvgRecipe, {"server_learning_rate": 0.5}, "server learning rate of 1"),
        (FedAvgRecipe, {"aggregator": NormBound(LoraProductMean(), 1.0), "server_learning_rate": 0.5}, "rate of 1"),
        (FedAvgRecipe, {"transforms": (ErrorFeedback(TopK(0.5)),)}, "without error feedback"),
        (FedAvgRecipe, {"federation": FederationConfig(num_clients=3, message_dtype="int8")}, "without error feedback"),
        (FedAvgRecipe, {"secure": SecAgg()}, "got LoraProductMean: it looks at single updates"),
    ],
)
def test_what_would_remember_factors_is_refused(kind: Any, fields: dict[str, Any], words: str) -> None:
    given = {"aggregator": LoraProductMean(), "federation": FederationConfig(num_clients=3), **fields}
    with pytest.raises(CompositionError, match=words):
        kind(name="lora", client=Steered, initial_parameters=model(begun=False), **given).build()


def test_under_noise_on_the_sum_it_is_refused_and_under_a_sites_own_it_works() -> None:
    for where, shares in (("central", 0), ("distributed", 2)):
        mechanism = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where=where, shares=shares)
        with pytest.raises(CompositionError, match="aggregator must be WeightedMean under noise on the sum"):
            job(mechanisms=(mechanism,)).build()
    local = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="local")
    result = job(mechanisms=(local,)).execute(SimEnv(device="cpu"))
    assert all(arrays.is_finite(value) for value in result.parameters.values())
    assert set(result.rounds[1].fit) == {TRUNCATION, MEAN_ERROR}, "sites' own figures stay at home, the server's do not"
    assert LoraProductMean.needs == "individual"  # which secure aggregation cannot give


def test_freezing_in_a_run_keeps_every_frame() -> None:
    sent = model(begun=False)
    result = job(aggregator=lora_aggregator("freeze-a"), transforms=(FreezeLayers(frames(sent)),)).execute(
        SimEnv(device="cpu")
    )
    assert (result.parameters[A] == sent[A]).all()
    assert result.parameters[B].any()


def test_the_builder_refuses_what_does_not_go_together() -> None:
    assert lora_aggregator("mean") == lora_aggregator("freeze-a") == WeightedMean()
    assert lora_aggregator("mean", Krum(1)) == Krum(1)
    assert lora_aggregator("exact") == LoraProductMean()
    assert lora_aggregator("exact", NormBound(WeightedMean(), 2.0)) == NormBound(LoraProductMean(), 2.0)
    with pytest.raises(ConfigError, match="lora_aggregation must be mean, exact or freeze-a, got 'best'"):
        lora_aggregator("best")  # type: ignore[arg-type]
    with pytest.raises(CompositionError, match="must come with aggregation=mean, got Krum"):
        lora_aggregator("exact", NormBound(Krum(1), 2.0))


def test_pairs_are_found_by_name() -> None:
    names = {"a.lora_A.weight": (2, 3), "a.lora_B.weight": (4, 2), "a.lora_B.bias": (4,), "b.lora_A.weight": (2, 3)}
    found = pairs({name: np.ones(shape) for name, shape in names.items()})
    assert found == [Pair("a.lora_A.weight", "a.lora_B.weight", 0, 2)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers 5 for it
def test_pairs_of_peft_begin_as_they_are_taken_to_and_train_on_after_a_round() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    from sfl.train.module import copy_parameters, load_parameters

    shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    module = peft.get_peft_model(base, config)
    sent, ids = copy_parameters(module), torch.arange(16)[None]
    assert len(pairs(sent)) == 2
    for pair in pairs(sent):
        assert not sent[pair.grown].any()
        assert np.linalg.norm(sent[pair.frame]) > 0.1
    updates = []
    for site, rate in enumerate((0.01, 0.02)):
        load_parameters(module, sent)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        for _ in range(3):
            optimizer.zero_grad()
            module(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        updates.append(Update(f"site-{site}", arrays.subtract(copy_parameters(module), sent), 1.0))
    after, figures = round_of(sent, updates)
    assert figures[TRUNCATION] < 0.5
    load_parameters(module, after)
    module.zero_grad()
    module(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            axis = 0 if "lora_A" in name or "lora_embedding_A" in name else 1
            flat = np.moveaxis(np.asarray(parameter.grad), axis, 0) if parameter.grad is not None else np.zeros(1)
            assert np.linalg.norm(flat.reshape(len(flat), -1), axis=1).min() > 0.0, (
                "every direction must get a gradient"
            )
