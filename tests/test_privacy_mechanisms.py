"""Clip, noise, calibration and accounting, each against an oracle that shares no code with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import clients
from sfl.core import rng
from sfl.core.mechanism import DpEvent
from sfl.core.task import Update
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, MissingExtraError
from sfl.privacy import accountant as accounting
from sfl.privacy import noise as noises
from sfl.privacy.accountant import PrivacyAccountant, compose_auxiliary, guarantees
from sfl.privacy.budget import PrivacyBudget, statement
from sfl.privacy.clip import Clip
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.dp import (
    GaussianMechanism,
    analytic_gaussian_delta,
    calibrate_gaussian_sigma,
    calibrate_noise_multiplier,
)
from sfl.privacy.noise import SLACK, GaussianNoise, add_noise, grid_of, secret
from sfl.privacy.runner_utils import build_protections, calibrated
from sfl.recipe import FedAvgRecipe
from sfl.types import FederationConfig

RNG = rng.public(0, 1, "test")


def update(**arrays: Any) -> Update:
    return Update("site-1", {name: np.asarray(value) for name, value in arrays.items()}, 1.0)


# Noise


def normality(draws: np.ndarray, sigma: float) -> float:
    return float(stats.kstest(draws / sigma, "norm").pvalue)


def test_noise_is_gaussian_of_this_sigma_and_of_no_other() -> None:
    """A test that could not tell two thirds or three halves of σ apart would show nothing."""
    sigma = 0.37
    draws = add_noise({"w": np.zeros(40_000)}, sigma, secret())["w"]
    assert normality(draws, sigma) > 1e-4
    assert normality(draws, sigma * 2 / 3) < 1e-12
    assert normality(draws, sigma * 3 / 2) < 1e-12
    left, right = draws[:-1], draws[1:]
    assert abs(np.corrcoef(left, right)[0, 1]) < 0.03


def test_no_two_draws_are_the_same_whatever_the_seed() -> None:
    noise = GaussianNoise(1.0)
    first, _ = noise.apply(update(w=np.zeros(8)), None, rng.public(0, 1, "x"))
    second, _ = noise.apply(update(w=np.zeros(8)), None, rng.public(0, 1, "x"))
    assert not np.array_equal(first.delta["w"], second.delta["w"])


def test_the_source_is_aes_in_counter_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key and counter give the words that another library's AES-128 gives."""
    key = bytes(range(16))
    monkeypatch.setattr(noises.secrets, "randbits", lambda bits: int.from_bytes(key, "little"))
    words = secret().bit_generator.random_raw(64)
    found = []
    for start in range(40):  # where in its stream the first word lies is the library's own affair
        blocks = b"".join((start + i).to_bytes(16, "little") for i in range(40))
        found.append(Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks))
    streams = [np.frombuffer(stream, "<u8") for stream in found]
    assert any(np.array_equal(stream[: len(words)], words) for stream in streams)


@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
@settings(max_examples=30)
def test_sum_and_noise_lie_on_one_grid(sigma: float, shift: float) -> None:
    grid = grid_of(sigma)
    assert grid * 2.0**39 < sigma < grid * 2.0**42
    noised = add_noise({"w": np.full(64, shift * sigma)}, sigma, secret())["w"]
    assert np.array_equal(np.rint(noised / grid) * grid, noised)


def test_edge_cases_of_noise() -> None:
    values = {
        "half": np.zeros(100, np.float16),
        "single": np.zeros((3, 5), np.float32),
        "whole": np.arange(4),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.array(1.0),
        "turned": np.ones((4, 6)).T,
    }
    noised = add_noise(values, 0.5, secret())
    assert [v.dtype.name for v in noised.values()] == ["float16", "float32", "float64", "float32", "float64", "float64"]
    assert [v.shape for v in noised.values()] == [v.shape for v in values.values()]
    assert all(np.isfinite(v).all() for v in noised.values())
    assert np.isnan(add_noise({"w": np.array([np.nan])}, 1.0, secret())["w"][0])
    same = add_noise(values, 0.0, secret())
    assert all(np.array_equal(same[name], values[name]) for name in values)
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="sigma must be 0, or between"):
            add_noise(values, wrong, secret())


def test_missing_libraries_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(noises, "import_module", missing)
    monkeypatch.setattr(accounting, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'sfl\[privacy\]'"):
        secret()
    with pytest.raises(MissingExtraError, match=r"dp-accounting must be installed.*sfl\[privacy\]"):
        PrivacyAccountant(delta=1e-5).require()


# Clip


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e3), st.booleans())
def test_a_clipped_norm_never_passes_the_bound_and_the_direction_stays(
    values: list[float], bound: float, per_layer: bool
) -> None:
    given_update = update(a=np.array(values), b=np.array(values[:1], np.float32))
    clipped, _ = Clip(bound, per_layer).apply(given_update, None, RNG)
    flat = np.concatenate([np.ravel(v).astype(np.float64) for v in clipped.delta.values()])
    before = np.concatenate([np.ravel(v).astype(np.float64) for v in given_update.delta.values()])
    assert np.linalg.norm(flat) <= bound * (1 + 1e-12)
    if not per_layer and np.linalg.norm(before) <= bound * (1 - 1e-9):
        assert np.array_equal(flat, before)
    elif not per_layer and np.linalg.norm(before) > 0:
        cosine = flat @ before / (np.linalg.norm(flat) * np.linalg.norm(before) + 1e-300)
        assert cosine > 1 - 1e-6
        assert np.linalg.norm(flat) > bound * (1 - 1e-5)


def test_edge_cases_of_clipping() -> None:
    zero, _ = Clip(1.0).apply(update(w=np.zeros(3)), None, RNG)
    assert zero.delta["w"].tolist() == [0.0, 0.0, 0.0]
    empty, _ = Clip(1.0, per_layer=True).apply(Update("s", {}, 1.0), None, RNG)
    assert empty.delta == {}
    half, _ = Clip(0.01).apply(update(w=np.full(1000, 3.0, np.float16)), None, RNG)
    assert np.linalg.norm(half.delta["w"].astype(np.float64)) <= 0.01
    with pytest.raises(ConfigError, match="a clip bound must be positive"):
        Clip(0.0)


# Calibration


@pytest.mark.parametrize(("epsilon", "delta", "sigma"), [(1.0, 1e-5, 3.730632), (8.0, 1e-6, 0.652935)])
def test_published_sigmas(epsilon: float, delta: float, sigma: float) -> None:
    assert calibrate_gaussian_sigma(epsilon, delta) == pytest.approx(sigma, abs=1e-6)


@given(st.floats(0.05, 20.0), st.floats(-9.0, -2.0), st.floats(0.01, 100.0))
@settings(max_examples=25, deadline=None)
def test_calibration_is_tight_against_brute_force(epsilon: float, log_delta: float, sensitivity: float) -> None:
    """δ by numerical integration of max(p − e^ε q, 0), which no formula of ours takes part in."""
    delta = 10.0**log_delta
    sigma = calibrate_gaussian_sigma(epsilon, delta, sensitivity) / sensitivity

    def excess(x: float) -> float:
        return max(stats.norm.pdf(x, 1.0, sigma) - math.exp(epsilon) * stats.norm.pdf(x, 0.0, sigma), 0.0)

    start = epsilon * sigma**2 + 0.5  # below it the integrand is 0
    brute, _ = integrate.quad(excess, start, 1.0 + 40 * sigma, points=[start + sigma], limit=400)
    assert brute == pytest.approx(delta, rel=1e-4)
    assert analytic_gaussian_delta(sigma * 0.999, epsilon) > delta


def test_calibration_refuses_what_is_no_budget() -> None:
    for epsilon, delta, sensitivity in ((0.0, 1e-5, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (1.0, 0.1, 0.0)):
        with pytest.raises(ConfigError, match="must be positive and delta in"):
            calibrate_gaussian_sigma(epsilon, delta, sensitivity)
    with pytest.raises(ConfigError, match="epsilon must be positive and finite"):
        calibrate_noise_multiplier(math.inf, lambda noise: event(noise), delta=1e-5)


# Accounting


def event(noise: float, rate: float = 1.0, count: int = 1, **changes: Any) -> DpEvent:
    plain = DpEvent(
        mechanism="gaussian",
        noise_multiplier=noise,
        sampling_rate=rate,
        unit="site",
        adjacency="add_remove",
        adversary="server_trusted",
        sampling="s",
        count=count,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("what", "epsilon"),
    [
        (event(0.0, epsilon=1000.0, count=3), 3000.0),  # such as a private selection costs that leaves something of it
        (event(1e-9), 5e17),
        (event(1e-9, adjacency="replace_one"), 2e18),
        (event(1e-300), math.inf),
        (event(1e300), 0.0),
    ],
)
def test_an_epsilon_that_is_too_large_to_compute_with_is_still_said(what: DpEvent, epsilon: float) -> None:
    assert PrivacyAccountant(delta=1e-5).epsilon([what]) == pytest.approx(epsilon, rel=1e-3)
    assert math.isinf(PrivacyAccountant(delta=1e-5).epsilon([event(0.0, epsilon=1e4, delta=1e-4)]))


def test_noise_that_prv_cannot_account_is_refused_in_a_sentence() -> None:
    with pytest.raises(CompositionError, match=r"noise must be larger to be accounted by prv, got 1e-07. Use pld."):
        PrivacyAccountant(delta=1e-5, method="prv").epsilon([event(1e-7)])


def test_the_closed_form_is_an_upper_bound_where_both_can_be_had() -> None:
    for each in (event(0.05), event(0.1, count=4), event(0.2, rate=0.1), event(0.3, adjacency="replace_one")):
        counted = {replace(each, count=1): each.count}
        assert accounting._closed_form(counted, 1e-5) >= 0.99 * PrivacyAccountant(delta=1e-5).epsilon([each])


@pytest.mark.parametrize("method", ["pld", "prv"])
@pytest.mark.parametrize(
    ("what", "epsilon"),
    [
        (event(1.1, 256 / 6e4, 3515), 1.1337),
        (event(4.0, 0.01, 10_000), 0.9470),
        (event(1.0, adjacency="replace_one"), 9.997),
    ],
)
def test_published_epsilons(method: Any, what: DpEvent, epsilon: float) -> None:
    found = PrivacyAccountant(delta=1e-5, method=method).epsilon([what])
    assert found == pytest.approx(epsilon, abs=2e-3 if method == "pld" else 0.015)
    assert found >= epsilon - 1e-4


@pytest.mark.slow
@given(st.floats(0.6, 6.0), st.sampled_from([0.05, 0.3]), st.integers(1, 60))
@settings(max_examples=12, deadline=None)
def test_two_libraries_agree(noise: float, rate: float, count: int) -> None:
    pld, prv = (PrivacyAccountant(delta=1e-6, method=m).epsilon([event(noise, rate, count)]) for m in ("pld", "prv"))
    assert pld == pytest.approx(prv, abs=0.025, rel=2e-3)


@given(st.lists(st.floats(0.7, 8.0), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_gaussians_compose_as_one_of_the_root_of_summed_squares(noises: list[float]) -> None:
    together = 1.0 / math.sqrt(sum(z**-2 for z in noises))
    found = PrivacyAccountant(delta=1e-5).epsilon([event(z) for z in noises])
    assert analytic_gaussian_delta(together, found) <= 1e-5 * (1 + 1e-6)  # from above …
    assert analytic_gaussian_delta(together, max(found - 0.02, 0.0)) >= 1e-5 * 0.99  # … and close


def test_what_cannot_be_added_up_is_refused_and_what_is_not_known_has_no_guarantee() -> None:
    accountant = PrivacyAccountant(delta=1e-5)
    with pytest.raises(CompositionError, match="events must be of one unit and adjacency"):
        accountant.epsilon([event(1.0), event(1.0, unit="example")])
    assert accountant.epsilon([]) == 0.0
    assert math.isinf(accountant.epsilon([event(0.0)]))
    assert math.isinf(accountant.epsilon([event(1.0), event(0.0, mechanism="a filter")]))
    assert [g.unit for g in guarantees([event(2.0), event(1.0, unit="example")], accountant)] == ["site", "example"]
    with pytest.raises(CompositionError, match="sampling must be accounted under add_remove with prv"):
        PrivacyAccountant(delta=1e-5, method="prv").epsilon([event(1.0, 0.5, adjacency="replace_one")])
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="delta must be in"):
            PrivacyAccountant(delta=wrong)
    with pytest.raises(ConfigError, match="an accountant must be pld or prv"):
        PrivacyAccountant(delta=0.1, method="gdp")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_the_noise_for_a_target_is_the_smallest_that_keeps_it(target: float) -> None:
    noise = calibrate_noise_multiplier(target, lambda z: event(z, 0.3, 50), delta=1e-5)
    accountant = PrivacyAccountant(delta=1e-5)
    assert accountant.epsilon([event(noise, 0.3, 50)]) <= target
    assert accountant.epsilon([event(noise * 0.99, 0.3, 50)]) > target


# In a run


def job(mechanism: GaussianMechanism, *, budget: PrivacyBudget | None = None, **federation: Any) -> FedAvgRecipe:
    options = {"num_clients": 4, "num_rounds": 1} | federation
    return FedAvgRecipe(
        name="private",
        client=clients.Base,
        initial_parameters={"w": np.zeros(20_000)},
        federation=FederationConfig(**options),
        mechanisms=(mechanism,),
        budget=budget,
    )


@pytest.mark.parametrize(
    ("where", "sigma"),
    [("central", 2.0 * 3.0 / 4), ("local", 2.0 * 3.0 / math.sqrt(4))],
)
def test_the_noise_of_a_round_is_where_and_as_large_as_it_is_said(where: Any, sigma: float) -> None:
    mechanism = GaussianMechanism(clip_norm=3.0, noise_multiplier=2.0, where=where)
    w = job(mechanism, min_available_clients=4).execute(SimEnv(device="cpu")).parameters["w"]
    mean = 3.0 / math.sqrt(20_000)  # what clipping leaves of ones
    assert normality(w - mean, sigma) > 1e-4
    assert normality(w - mean, sigma * 1.5) < 1e-12


@pytest.mark.parametrize("where", ["central", "distributed"])
def test_rounding_in_a_sum_of_many_sites_moves_it_no_further_than_is_booked(where: Any) -> None:
    """One site puts the sum past a power of two, where a float32 is coarser: there it rounds what follows away."""
    ones, last = np.float32([1.0]), np.float32([-0.6 * 2.0**-11])
    values = [*[ones] * 8191, np.float32([2.0**-10]), *[last] * 1800]
    mechanism = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where=where, shares=2 * (where != "central"))
    job = FedAvgRecipe(
        name="sum",
        client=clients.Base,
        initial_parameters={"w": ones},
        federation=FederationConfig(num_clients=10_000, min_available_clients=2),
        mechanisms=(mechanism,),
    ).build()

    def total(values: list[np.ndarray]) -> float:
        aggregate = job.aggregator.aggregate(Update("site", {"w": value}, 1.0) for value in values)
        return float(aggregate.delta["w"][0]) * (1.0 if where == "central" else aggregate.weight)

    assert abs(total([ones, *values]) - total(values)) <= 1.0 + SLACK


def test_a_budget_ends_the_run_before_the_round_that_would_pass_it(tmp_path: Any) -> None:
    mechanism = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0)
    budget = PrivacyBudget(max_epsilon=8.0)
    out = tmp_path / "run"
    result = job(mechanism, budget=budget, num_rounds=9).execute(SimEnv(device="cpu"), out=out)
    accountant = PrivacyAccountant(delta=1e-5)
    done = result.state.round
    z = 1.0 - SLACK
    assert accountant.epsilon([event(z, count=done)]) <= 8.0 < accountant.epsilon([event(z, count=done + 1)])
    assert "past the budget of 8" in result.reason
    assert '"epsilon": ' in (out / "privacy.json").read_text()
    again = job(mechanism, budget=budget, num_rounds=9).execute(SimEnv(device="cpu"), out=out, resume=True)
    assert again.state.round == done  # a resume does not forget what was spent


def test_poisson_cohorts_are_of_any_size_secret_and_divided_by_the_plan() -> None:
    mechanism = GaussianMechanism(clip_norm=1e6, noise_multiplier=0.0, sampling_rate=0.25)
    recipe = job(mechanism, num_rounds=40, num_clients=8, fraction_fit=0.25, sampling="poisson")
    one, two = (recipe.execute(SimEnv(device="cpu")) for _ in range(2))
    sizes = [[sum(s.stage == "fit" for s in r.sites) for r in result.rounds[1:]] for result in (one, two)]
    assert sizes[0] != sizes[1]
    assert min(sizes[0] + sizes[1]) == 0
    assert one.parameters["w"][0] == pytest.approx(sum(sizes[0]) / 2.0)
    with pytest.raises(CompositionError, match="may claim a sampling rate only if sites are drawn by Poisson sampling"):
        job(mechanism).build()
    with pytest.raises(CompositionError, match="fraction_fit must be 1 under central noise with fixed sampling"):
        job(mechanism, fraction_fit=0.25).build()
    local = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="local")
    central = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(CompositionError, match="mechanisms must have those of a site's own noise first"):
        replace(job(local), mechanisms=(central, local)).build()
    both = replace(job(local), mechanisms=(local, central)).build()
    assert len(both.mechanisms) == 2
    with pytest.raises(CompositionError, match="the second would spend budget on what the first has hidden"):
        replace(job(local), mechanisms=(local, local)).build()
    with pytest.raises(CompositionError, match="weighting must be equal under a mechanism"):
        job(central, weighting="examples").build()


def test_whether_a_drawn_site_failed_does_not_show_in_whether_the_run_goes_on() -> None:
    mechanism = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.5)
    recipe = job(mechanism, num_rounds=6, num_clients=2, fraction_fit=0.5, sampling="poisson")
    failing = replace(recipe, client=clients.Faulty, client_kwargs={"mode": "raise"})
    assert failing.execute(SimEnv(device="cpu")).state.round == 6


def test_a_private_run_does_not_go_on_unprotected(tmp_path: Any) -> None:
    mechanism = GaussianMechanism(clip_norm=1.0, noise_multiplier=5.0)
    job(mechanism).execute(SimEnv(device="cpu"), out=tmp_path / "run")
    for other in ((), (replace(mechanism, where="local"),)):
        bare = replace(job(mechanism, num_rounds=2), mechanisms=other)
        with pytest.raises(ConfigError, match="must go on with the protection that it was begun with"):
            bare.execute(SimEnv(device="cpu"), out=tmp_path / "run", resume=True)


# Options


def test_options_become_a_mechanism_and_a_budget() -> None:
    federation = FederationConfig(num_clients=40, num_rounds=50, fraction_fit=0.3, sampling="poisson")
    assert build_protections(PrivacyConfig(), federation).mechanisms == ()
    protections = build_protections(PrivacyConfig(dp=True, dp_target_epsilon=8.0), federation)
    (mechanism,) = protections.mechanisms
    assert mechanism.sampling_rate == 0.3
    assert protections.budget is not None
    assert protections.budget.max_epsilon == 8.0
    assert protections.budget.spent([replace(mechanism.event(12, 40), count=50)])[0].epsilon <= 8.0
    pinned = calibrated(PrivacyConfig(dp=True, dp_target_epsilon=8.0, dp_max_epsilon=4.0), federation)
    assert (pinned.dp_target_epsilon, pinned.dp_max_epsilon) == (None, 4.0)
    local = build_protections(PrivacyConfig(dp=True, dp_mode="local"), FederationConfig())
    assert local.mechanisms[0].event(2, 2).adversary == "server_curious"
    with pytest.raises(CompositionError, match="sees who takes part"):
        build_protections(PrivacyConfig(dp=True, dp_mode="local"), federation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp_noise": -1.0}, "dp_noise must be finite"),
        ({"dp_clip": 0.0}, "dp_clip must be between 1e-9 and 1e9"),
        ({"dp_delta": 1.0}, "dp_delta must be at least 1e-30 and below 1"),
        ({"dp_mode": "both"}, "dp_mode must be server, client or local"),
        ({"dp_accountant": "gdp"}, "dp_accountant must be pld or prv"),
        ({"dataset_id": "a" * 61, "dpsgd": True}, "dataset_id must be at most 60 letters"),
        ({"dp": True, "dp_target_epsilon": 0.0}, "dp_target_epsilon must be positive"),
        ({"dp_max_epsilon": 1.0}, "must come with dp"),
        ({"dp_noise": 4.0}, "dp_noise must come with dp"),
        ({"dp_mode": "local", "dp_delta": 1e-6, "dp_clip": 0.1}, "dp_clip, dp_delta, dp_mode must come with dp"),
        ({"dpsgd_noise": 4.0}, "dpsgd_noise must come with dpsgd"),
        ({"svt_epsilon": 0.5}, "svt_epsilon must come with svt_privacy"),
        ({"dp": True, "dp_target_quantile": 0.9}, "dp_target_quantile must come with dp_adaptive_clip"),
        ({"dp_mechanism": "laplace"}, "dp_mechanism must be gaussian or banded-mf"),
        ({"dp_bands": 0}, "dp_bands must be at least 1"),
        ({"dp_target_quantile": 1.0}, "dp_target_quantile must be in"),
        ({"dp_adaptive_clip": True}, "dp_adaptive_clip must come with dp, got none"),
        ({"dp": True, "dp_shuffle": True}, "dp_shuffle must come with dp_mode=local"),
        ({"dp": True, "dp_adaptive_clip": True, "dp_mode": "client"}, "dp_adaptive_clip must come with dp_mode=server"),
        ({"dp": True, "dp_adaptive_clip": True, "dp_mechanism": "banded-mf"}, "a fixed clip bound"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrivacyConfig(**options)


def test_a_mechanism_that_cannot_be_is_refused() -> None:
    for wrong, message in (
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite"),
        ({"sampling_rate": 0.0}, "sampling_rate must be in"),
        ({"where": "local", "sampling_rate": 0.5}, "sampling_rate must be 1 for local noise"),
        ({"clip_norm": -1.0}, "a clip bound must be positive"),
        ({"clip_norm": 1e-320}, "sigma must be 0, or between 1e-250 and 1e250"),
        ({"clip_norm": 1e308, "noise_multiplier": 10.0}, "sigma must be 0, or between 1e-250 and 1e250"),
    ):
        with pytest.raises(ConfigError, match=message):
            GaussianMechanism(**({"clip_norm": 1.0, "noise_multiplier": 1.0} | wrong))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_epsilon must be positive"):
        PrivacyBudget(max_epsilon=0.0)


def test_the_statement_says_what_the_figure_depends_on_and_when_it_means_nothing() -> None:
    budget = PrivacyBudget()
    (strong,) = budget.spent([event(5.0, count=2)])
    head, hidden, holds = statement(strong)
    assert head.startswith("privacy: ε = ")
    assert head.endswith("at δ = 1e-05 for each site")
    assert "adding or removing one site" in hidden
    assert "the server itself is trusted" in holds
    assert "2 noisy releases" in holds
    (weak,) = budget.spent([event(0.1, count=3)])
    assert round(weak.epsilon) == 223
    assert "too large to mean much" in statement(weak)[0]
    (none,) = budget.spent([event(0.0)])
    assert "no formal guarantee" in statement(none)[0]
    assert budget.report([event(0.0)])["guarantees"][0]["epsilon"] is None


def test_auxiliary_costs_are_composed_and_not_added() -> None:
    accountant = PrivacyAccountant(delta=1e-5)
    event = GaussianMechanism(clip_norm=1.0, noise_multiplier=4.0).event(10, 10)
    pure = [(0.1, 0.0)] * 20
    both = compose_auxiliary([event], pure, accountant)
    alone = accountant.epsilon([event])
    assert alone < both < alone + 2.0
    assert compose_auxiliary([event], [], accountant) == alone
    assert compose_auxiliary([event], [(0.0, 0.0)], accountant) == alone
    with pytest.raises(ConfigError, match="at least one event"):
        compose_auxiliary([], pure, accountant)
    for bad in ((-0.1, 0.0), (math.inf, 0.0), (0.1, 1.0)):
        with pytest.raises(ConfigError, match="auxiliary cost"):
            compose_auxiliary([event], [bad], accountant)
