"""Mechanisms that live over rounds: an adaptive bound, correlated noise, shares of noise, shuffling, turns."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from scipy import stats

import clients
from sfl.core import rng
from sfl.core.events import AggregationFinished
from sfl.core.mechanism import Mechanism
from sfl.core.task import Update
from sfl.env import SimEnv
from sfl.errors import BudgetExhausted, CompositionError, ConfigError, RoundError
from sfl.privacy.accountant import PrivacyAccountant, guarantees, worst_off
from sfl.privacy.adaptive_clip import COUNT, AdaptiveClip, delta_noise_multiplier
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.correlated import BandedMechanism, CorrelatedNoise, coefficients
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.ledger import PrivacyLedger
from sfl.privacy.runner_utils import build_protections, cost
from sfl.privacy.shuffle import ShuffledGaussian, shuffled_delta, shuffled_epsilon
from sfl.recipe import FedAvgRecipe
from sfl.types import FederationConfig
from test_privacy_mechanisms import event, normality

RNG = rng.public(0, 1, "test")


def job(mechanism: Mechanism, size: int = 20_000, **federation: Any) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="private",
        client=clients.Base,
        initial_parameters={"w": np.zeros(size)},
        federation=FederationConfig(**({"num_clients": 4, "num_rounds": 1} | federation)),
        mechanisms=(mechanism,),
    )


# Events of their own ε, and of groups


def test_what_is_private_by_itself_composes_and_what_concerns_others_costs_nothing() -> None:
    pld, prv = (PrivacyAccountant(delta=1e-6, method=method) for method in ("pld", "prv"))
    pure = event(0.0, epsilon=0.5)
    assert pld.epsilon([pure]) == pytest.approx(0.5, abs=1e-3)
    many = [replace(pure, count=20), event(3.0)]
    assert pld.epsilon(many) == pytest.approx(prv.epsilon(many), abs=0.03)
    assert pld.epsilon([replace(pure, count=100)]) < 45.0  # better than the sum, 50
    assert pld.epsilon([replace(pure, delta=1e-7)]) == pytest.approx(0.5, abs=1e-3)
    assert math.isinf(pld.epsilon([replace(pure, delta=1e-5)]))  # more than the whole δ
    a, b = replace(pure, group="a", count=2), replace(pure, group="b", count=3)
    together = pld.epsilon([a, b, event(3.0)])
    assert together == pytest.approx(pld.epsilon([replace(b, group=""), event(3.0)]), abs=1e-9)
    (guarantee,) = guarantees([a, b, event(3.0)], pld)
    assert (guarantee.epsilon, guarantee.events) == (together, 4)
    assert sorted(e.count for e in worst_off([a, b, event(3.0)], pld)) == [1, 3]


def test_earlier_runs_add_the_worst_of_each() -> None:
    budget = PrivacyBudget(delta=1e-6, dataset="d")
    run = [event(3.0, group="turn 1"), event(3.0, group="turn 2"), event(3.0, group="turn 1")]
    (alone,) = budget.spent(run)
    (both,) = budget.spent(run, [run])
    assert alone.epsilon == pytest.approx(PrivacyAccountant(delta=1e-6).epsilon([event(3.0, count=2)]))
    assert both.epsilon == pytest.approx(PrivacyAccountant(delta=1e-6).epsilon([event(3.0, count=4)]))
    assert "with 1 earlier run on data set d: ε = " in budget.statement(run, [run])[-1]
    assert "no earlier private run" in budget.statement(run)[-1]
    assert "not counted" in PrivacyBudget().statement(run)[-1]


def test_runs_of_other_claims_on_the_same_data_count_as_what_all_of_them_claim() -> None:
    """Another mode must not begin a budget anew: its releases are of the same data."""
    budget = PrivacyBudget(delta=1e-6, dataset="d", max_epsilon=5.0)
    server, own = event(2.0), event(3.0, adjacency="replace_one", adversary="server_curious")
    (alone,) = budget.spent([own])
    (both,) = budget.spent([own], [[server]])
    assert (both.adjacency, both.adversary) == ("replace_one", "server_trusted")
    gaussian = 2.0 * math.sqrt(1 / 2.0**2 + 1 / 3.0**2)  # both move by twice the bound
    assert both.epsilon == pytest.approx(PrivacyAccountant(delta=1e-6).epsilon([event(1 / gaussian)]), rel=1e-2)
    assert alone.epsilon < budget.max_epsilon < both.epsilon
    budget.check([own])
    with pytest.raises(BudgetExhausted, match="with earlier runs on the same data"):
        budget.check([own], [[server]])
    assert "neighbours differ by replacing" in budget.statement([own], [[server]])[-1]
    kept = [event(3.0, adjacency="replace_one", adversary="server_curious", epsilon=0.1), server]
    (common,) = budget.spent([server], [kept])  # what holds against the server in one run alone holds in neither
    assert common.epsilon == pytest.approx(PrivacyAccountant(delta=1e-6).epsilon([replace(server, count=2)]))


def test_a_second_run_on_the_same_data_is_stopped_by_what_the_first_has_spent() -> None:
    recipe = replace(
        job(GaussianMechanism(clip_norm=1.0, noise_multiplier=2.0), num_rounds=4),
        budget=PrivacyBudget(max_epsilon=6.0, dataset="cohort-2026"),
    )
    first, second = (recipe.execute(SimEnv(device="cpu")) for _ in range(2))
    assert first.state.round > second.state.round
    assert "with earlier runs on the same data" in second.reason


# Adaptive clipping


def test_the_share_of_the_update_is_the_papers() -> None:
    assert delta_noise_multiplier(1.0, 5.0) == pytest.approx(1.0050378, abs=1e-7)
    assert delta_noise_multiplier(1e200, 1e200) == pytest.approx(1e200 / math.sqrt(0.75))
    for wrong in (0.5, 0.0):
        with pytest.raises(ConfigError, match="a quantile without noise is not private"):
            delta_noise_multiplier(1.0, wrong)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_the_bound_converges_to_the_true_quantile(target: float) -> None:
    mechanism = AdaptiveClip(
        noise_multiplier=1e-3, count_noise=2.0, cohort=200, initial_clip=50.0, target_quantile=target
    )
    norms = np.exp(rng.public(0, 0, "norms").standard_normal(200))
    clip, noise = mechanism.clip(), mechanism.noise()
    state = noise.init({})
    for _ in range(120):
        half = clip.told(noise.tells(state))
        sent = [half.apply(Update("s", {"w": np.asarray([n])}, 1.0), None, RNG)[0].delta for n in norms]
        total = {name: np.asarray(sum(d[name] for d in sent)) for name in sent[0]}
        out, state = noise.apply(Update("server", total, 1.0), state, RNG)
        assert set(out.delta) == {"w"}
    bound = noise.tells(state)["dp_clip"]
    assert float(np.mean(norms <= bound)) == pytest.approx(target, abs=0.06)


def test_an_adaptive_run_moves_its_bound_and_noises_both_sums() -> None:
    mechanism = AdaptiveClip(noise_multiplier=0.5, count_noise=4.0, cohort=4.0, initial_clip=3.0, learning_rate=0.2)
    for workers in (1, 2):
        result = job(mechanism, num_rounds=2).execute(SimEnv(num_threads=workers, device="cpu"))
        first, _ = result.state.mechanisms
        assert isinstance(first, dict)
        assert 3.0 * math.exp(-0.4) <= float(str(first["bound"])) <= 3.0 * math.exp(0.4)
        assert list(result.parameters) == ["w"]
    one = job(mechanism).execute(SimEnv(device="cpu")).parameters["w"]
    sigma = delta_noise_multiplier(0.5, 4.0) * 3.0 / 4.0
    assert normality(one - 3.0 / math.sqrt(20_000), sigma) > 1e-4
    assert normality(one - 3.0 / math.sqrt(20_000), sigma * 1.5) < 1e-12


def test_a_zero_update_is_below_the_bound_and_a_clipped_one_is_not() -> None:
    half = AdaptiveClip(noise_multiplier=1.0, count_noise=2.0, cohort=4.0, per_layer=True).clip()
    zero, _ = half.apply(Update("s", {"w": np.zeros(3)}, 1.0), None, RNG)
    clipped, _ = half.apply(Update("s", {"w": np.ones(3), "v": np.zeros(1)}, 1.0), None, RNG)
    assert (float(zero.delta[COUNT]), float(clipped.delta[COUNT])) == (0.5, -0.5)


# Correlated noise


def factor(bands: int, rounds: int) -> np.ndarray:
    column = np.zeros(rounds)
    column[: min(bands, rounds)] = coefficients(bands)[:rounds]
    return np.array([[column[i - j] if i >= j else 0.0 for j in range(rounds)] for i in range(rounds)])


def test_the_coefficients_are_those_of_the_square_root_of_the_prefix_sums() -> None:
    full = factor(12, 12)
    np.testing.assert_allclose(full @ full, np.tril(np.ones((12, 12))), atol=1e-12)


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_the_noise_of_all_rounds_is_the_inverse_factor_times_white_noise(bands: int) -> None:
    """C times what was added must be white, of σ: by brute force with the dense matrix."""
    rounds, sigma = 9, 0.3
    noise = CorrelatedNoise(sigma, bands)
    state: Any = noise.init({})
    added: list[np.ndarray] = []
    for _ in range(rounds):
        out, state = noise.apply(Update("server", {"w": np.zeros(4_000)}, 1.0), state, RNG)
        added.append(out.delta["w"])
    assert len(state["past"]) == bands - 1
    white = factor(bands, rounds) @ np.stack(added)
    assert normality(white.ravel(), sigma) > 1e-4
    assert normality(white.ravel(), sigma * 1.5) < 1e-12
    assert np.abs(np.corrcoef(white) - np.eye(rounds)).max() < 0.08
    if bands > 1:
        assert np.corrcoef(np.stack(added))[0, 1] < -0.3  # it does cancel


def test_no_pattern_of_turns_passes_the_sensitivity_that_is_charged() -> None:
    """Brute force over every set of rounds that are ``bands`` apart: k turns move C X by √k · ‖c‖ at most."""
    bands, rounds = 3, 10
    matrix, norm = factor(bands, rounds), math.sqrt(sum(c * c for c in coefficients(bands)))
    for turns in (1, 2, 3, 4):
        for rows in combinations(range(rounds), turns):
            if all(b - a >= bands for a, b in pairwise(rows)):
                assert np.linalg.norm(matrix[:, list(rows)].sum(axis=1)) <= norm * math.sqrt(turns) + 1e-12


def test_correlated_noise_hurts_the_model_less_at_the_same_cost() -> None:
    """Error of the prefix sums, in closed form: of A C⁻¹ with σ‖c‖ against A with σ."""
    rounds, prefix = 32, np.tril(np.ones((32, 32)))

    def error(bands: int) -> float:
        norm = math.sqrt(sum(c * c for c in coefficients(bands)))
        return norm * float(np.linalg.norm(prefix @ np.linalg.inv(factor(bands, rounds))))

    assert error(8) < 0.6 * error(1)


def test_turns_are_kept_apart_and_charged_to_those_whose_turn_it_was() -> None:
    mechanism = BandedMechanism(clip_norm=1.0, noise_multiplier=2.0, bands=2)
    recipe = job(mechanism, size=4, num_rounds=5, fraction_fit=0.5, sampling="turns")
    result = recipe.execute(SimEnv(device="cpu"))
    cohorts = [tuple(s.site for s in r.sites if s.stage == "fit") for r in result.rounds[1:]]
    assert cohorts == [("site-1", "site-3"), ("site-2", "site-4")] * 2 + [("site-1", "site-3")]
    with pytest.raises(CompositionError, match="turns must be 2 rounds apart for BandedMechanism, got 1"):
        job(mechanism).build()
    config = PrivacyConfig(dp=True, dp_mechanism="banded-mf", dp_noise=2.0)
    (guarantee,) = cost(config, recipe.federation)
    assert guarantee.events == 3
    three = PrivacyAccountant(delta=1e-5).epsilon([event(2.0, count=3)])
    assert guarantee.epsilon == pytest.approx(three, rel=2e-3)
    assert isinstance(build_protections(config, recipe.federation).mechanisms[0], BandedMechanism)


@pytest.mark.parametrize("change", [{"noise_multiplier": 1.0}, {"clip_norm": 0.1}, {"bands": 1}])
def test_correlated_noise_goes_on_as_it_began(tmp_path: Any, change: dict[str, Any]) -> None:
    """What a turn has cost counts on the noise of the rounds after it."""
    mechanism = BandedMechanism(clip_norm=1.0, noise_multiplier=2.0, bands=2)
    recipe = job(mechanism, size=4, num_rounds=3, fraction_fit=0.5, sampling="turns")
    recipe.execute(SimEnv(device="cpu"), out=tmp_path / "run")
    federation = replace(recipe.federation, num_rounds=4)
    changed = replace(recipe, mechanisms=(replace(mechanism, **change),), federation=federation)
    with pytest.raises(ConfigError, match="must go on as it began"):
        changed.execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
    result = replace(recipe, federation=federation).execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
    assert result.state.round == 4


def test_a_repeated_round_of_correlated_noise_is_charged_to_the_turns_before_it_too(tmp_path: Any) -> None:
    """By brute force over the releases of both attempts: they share a past, so it is seen through two draws."""
    mechanism = BandedMechanism(clip_norm=1.0, noise_multiplier=2.0, bands=2)
    recipe = job(mechanism, size=4, num_rounds=5, fraction_fit=0.5, sampling="turns")
    out = tmp_path / "run"

    def stop(event: Any) -> None:
        if isinstance(event, AggregationFinished) and event.round == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        recipe.execute(SimEnv(device="cpu"), out=out, observers=(stop,))
    recipe.execute(SimEnv(device="cpu"), out=out, resume=True)
    attempts = [1, 2, 3, 3, 4, 5]  # rounds; the attempt before each is its parent, but that of the second 3 is 2
    parents = [None, 0, 1, 1, 3, 4]
    column = coefficients(2)
    matrix = np.eye(6) + np.array([[column[1] * (parents[i] == j) for j in range(6)] for i in range(6)])
    events = PrivacyLedger(out / "ledger.jsonl").events
    for turn in (1, 2):
        moved = matrix @ [float(round % 2 == turn % 2) for round in attempts]
        true = 2.0 * float(np.linalg.norm(column) / np.linalg.norm(moved))
        own = [replace(e, group="") for e in events if e.group in ("", f"turn {turn} of 2")]
        assert PrivacyAccountant(delta=1e-5).epsilon(own) >= PrivacyAccountant(delta=1e-5).epsilon([event(true)])


def test_sites_that_take_turns_must_stay_the_same(tmp_path: Any) -> None:
    mechanism = BandedMechanism(clip_norm=1.0, noise_multiplier=2.0, bands=2)
    recipe = job(mechanism, size=4, num_rounds=2, fraction_fit=0.5, sampling="turns")
    recipe.execute(SimEnv(device="cpu"), out=tmp_path / "run")
    longer = replace(recipe, federation=replace(recipe.federation, num_rounds=3))
    longer.execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
    other = replace(recipe, federation=replace(recipe.federation, num_rounds=4, num_clients=6))
    with pytest.raises(ConfigError, match="sites that take turns must be those that the run began with"):
        other.execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
    slower = replace(recipe, federation=replace(recipe.federation, num_rounds=4, fraction_fit=0.25))
    with pytest.raises(ConfigError, match="as many turns as the run began with, 2, got 4"):
        slower.execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
    for wrong in ({"fraction_fit": 0.1}, {"fraction_fit": 0.5, "min_available_clients": 3}):
        with pytest.raises(ConfigError, match=r"turns|of a turn"):
            FederationConfig(num_clients=4, sampling="turns", **wrong)  # type: ignore[arg-type]


# Shares of noise, and a shuffler


def test_shares_add_up_to_noise_that_holds_against_one_who_knows_its_own() -> None:
    mechanism = GaussianMechanism(clip_norm=3.0, noise_multiplier=2.0, where="distributed", shares=4)
    w = job(mechanism, min_available_clients=4).execute(SimEnv(device="cpu")).parameters["w"]
    known = 3.0 / math.sqrt(20_000)
    assert normality(w - known, 2.0 * 3.0 * math.sqrt(4 / 3) / 4) > 1e-4
    assert normality(w - known, 2.0 * 3.0 * math.sqrt(4 / 3) / 4 * 1.5) < 1e-12
    assert mechanism.event(4, 4).adjacency == "replace_one"
    with pytest.raises(CompositionError, match="min_available_clients must be at least 4"):
        job(mechanism).build()
    with pytest.raises(ConfigError, match="shares must be at least 2"):
        build_protections(PrivacyConfig(dp=True, dp_mode="client"), FederationConfig())


def brute(epsilon: float, local: float, n: int) -> float:
    """The divergence of the dominating pair, outcome by outcome."""
    clone, likely = math.exp(-local), math.exp(local) / (math.exp(local) + 1.0)
    left: dict[tuple[int, int], float] = {}
    right: dict[tuple[int, int], float] = {}
    for c in range(n):
        for a in range(c + 1):
            mass = stats.binom.pmf(c, n - 1, clone) * stats.binom.pmf(a, c, 0.5)
            for one, chance in ((1, likely), (0, 1.0 - likely)):
                for table, key in ((left, (a + one, c - a + 1 - one)), (right, (a + 1 - one, c - a + one))):
                    table[key] = table.get(key, 0.0) + mass * chance
    return sum(max(left[key] - math.exp(epsilon) * right.get(key, 0.0), 0.0) for key in left)


@pytest.mark.parametrize(("epsilon", "local", "n"), [(0.1, 1.0, 10), (0.5, 2.0, 30), (1.5, 2.0, 5), (0.0, 1.0, 7)])
def test_the_shuffled_divergence_equals_brute_force(epsilon: float, local: float, n: int) -> None:
    assert shuffled_delta(epsilon, local, n) == pytest.approx(brute(epsilon, local, n), rel=1e-9)


def test_the_published_shuffled_epsilon_and_its_limits() -> None:
    assert 0.167539 <= shuffled_epsilon(4.0, 100_000, 1e-6) <= 0.172791
    assert shuffled_epsilon(1.0, 1, 1e-6) == pytest.approx(1.0, abs=1e-5)
    assert shuffled_delta(2.0, 1.0, 10) == 0.0
    for call in (lambda: shuffled_delta(-1.0, 1.0, 5), lambda: shuffled_epsilon(1.0, 5, 1.0)):
        with pytest.raises(ConfigError):
            call()


def test_shuffling_gains_with_many_sites_and_is_not_counted_with_few() -> None:
    local = GaussianMechanism(clip_norm=1.0, noise_multiplier=5.0, where="local")
    many = ShuffledGaussian(local=local, shuffled=10_000, delta=5e-6, rounds=1).event(10_000, 10_000)
    few = ShuffledGaussian(local=local, shuffled=4, delta=5e-6, rounds=1).event(4, 4)
    assert few == local.event(4, 4)
    assert "ASSUMED" in many.sampling
    accountant = PrivacyAccountant(delta=1e-5)
    assert accountant.epsilon([many]) < 0.5 * accountant.epsilon([few])
    with pytest.raises(ConfigError, match="shuffled noise must be local"):
        ShuffledGaussian(local=replace(local, where="central"), shuffled=4, delta=1e-6, rounds=1)
    options = PrivacyConfig(dp=True, dp_mode="local", dp_shuffle=True)
    assert isinstance(build_protections(options, FederationConfig()).mechanisms[0], ShuffledGaussian)


# What is refused, and what is mended


def test_noise_of_a_sites_own_on_selected_arrays_alone_is_refused() -> None:
    """The server's noise is on all of them anyway."""
    central = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0)
    recipe = replace(job(central, size=3), transforms=(clients.DropNames("nothing"),))
    assert np.all(recipe.execute(SimEnv(device="cpu")).parameters["w"] != 0.0)
    with pytest.raises(RoundError, match="got 0 of 4"):
        replace(recipe, mechanisms=(replace(central, where="local"),)).execute(SimEnv(device="cpu"))


def test_a_plan_refuses_what_a_run_would() -> None:
    federation = FederationConfig(num_clients=40, fraction_fit=0.3)
    with pytest.raises(CompositionError, match="fraction_fit must be 1 under central noise"):
        cost(PrivacyConfig(dp=True), federation)
    with pytest.raises(CompositionError, match="must come with as many turns as bands"):
        cost(PrivacyConfig(dp=True, dp_mechanism="banded-mf"), federation)
    for options, message in (
        ({"dp_bands": 4}, "dp_bands must come with dp_mechanism=banded-mf"),
        ({"dp_count_noise": 4.0}, "dp_count_noise must come with dp_adaptive_clip"),
        ({"dp_mode": "local", "dp_shuffle": True, "dp_accountant": "prv"}, "dp_accountant must be pld with dp_shuffle"),
    ):
        with pytest.raises(ConfigError, match=message):
            PrivacyConfig(dp=True, **options)  # type: ignore[arg-type]


def test_a_run_does_not_go_on_with_another_kind_of_noise(tmp_path: Any) -> None:
    banded = BandedMechanism(clip_norm=1.0, noise_multiplier=2.0, bands=2)
    recipe = job(banded, size=4, num_rounds=3, fraction_fit=0.5, sampling="turns")
    plain = replace(recipe, mechanisms=(GaussianMechanism(clip_norm=1.0, noise_multiplier=2.0),))
    plain.execute(SimEnv(device="cpu"), out=tmp_path / "run")
    more = replace(recipe, federation=replace(recipe.federation, num_rounds=4))
    with pytest.raises(ConfigError, match="must go on with the mechanisms that it was begun with"):
        more.execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)
