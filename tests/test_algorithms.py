"""Every algorithm against its law, a textbook version of it, or a library that shares no code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from algorithm_clients import Deaf, Fails, Large, Steered, Unmeasured, quadratic
from sfl.core import rng
from sfl.core.events import Notice, RoundStarted
from sfl.core.task import Status, Task, Update
from sfl.core.terms import LocalTerms
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.privacy.dp import GaussianMechanism
from sfl.recipe import (
    CyclicRecipe,
    DittoRecipe,
    FedAvgRecipe,
    FedBuffRecipe,
    FedEvalRecipe,
    FedOptRecipe,
    FedProxRecipe,
    RunResult,
    ScaffoldRecipe,
    SwarmRecipe,
)
from sfl.server.algorithms import FedOpt
from sfl.server.schedule import Schedule
from sfl.server.strategy import FedAvg, sample_cohort
from sfl.types import FederationConfig, Parameters

CPU = SimEnv(device="cpu")
START: Parameters = {"w": np.ones(3), "norm.num_batches_tracked": np.array(0)}


def made(
    kind: Callable[..., FedAvgRecipe] = FedAvgRecipe, sites: int = 3, rounds: int = 3, **options: Any
) -> FedAvgRecipe:
    names = {"fraction_fit", "min_available_clients", "seed", "workers", "weighting", "sampling", "site_weights"}
    federation = FederationConfig(
        num_clients=sites, num_rounds=rounds, **{name: options.pop(name) for name in names & options.keys()}
    )
    given = {"client": Steered, "initial_parameters": START} | options
    return kind(name="test", federation=federation, **given)


def run(kind: Callable[..., FedAvgRecipe] = FedAvgRecipe, **options: Any) -> RunResult:
    return made(kind, **options).execute(CPU)


def same(left: Parameters, right: Parameters) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left
    )


def descended(site: int, w: np.ndarray, steps: int = 4, rate: float = 0.1, extra: Any = None) -> np.ndarray:
    """``steps`` of a site's gradient descent, with ``extra(w)`` in the gradient."""
    hessian, optimum = quadratic(site)
    for _ in range(steps):
        w = w - rate * (hessian @ (w - optimum) + (0.0 if extra is None else extra(w)))
    return w


# The same as another algorithm, to the bit


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FedProxRecipe, {"proximal_mu": 0.0}),
        (DittoRecipe, {"personal_lambda": 0.3}),
        (FedOptRecipe, {"optimizer": "momentum", "beta1": 0.0, "server_learning_rate": 1.0}),
        (SwarmRecipe, {}),
        (FedBuffRecipe, {"buffer": 3}),
    ],
)
def test_it_is_fedavg_to_the_bit(kind: Callable[..., FedAvgRecipe], options: dict[str, Any]) -> None:
    assert same(run(kind, **options).parameters, run().parameters)


def test_scaffold_begins_as_fedavg_and_goes_on_otherwise() -> None:
    assert same(run(ScaffoldRecipe, rounds=1).parameters, run(rounds=1).parameters)
    assert not same(run(ScaffoldRecipe, rounds=2).parameters, run(rounds=2).parameters)


@pytest.mark.parametrize("kind", [CyclicRecipe, ScaffoldRecipe, FedProxRecipe, SwarmRecipe])
def test_of_one_site_it_is_local_training(kind: Callable[..., FedAvgRecipe]) -> None:
    options = {"proximal_mu": 0.0} if kind is FedProxRecipe else {}
    got = run(kind, sites=1, rounds=3, **options).parameters
    np.testing.assert_allclose(got["w"], descended(0, np.ones(3), 12), rtol=1e-12)
    assert got["norm.num_batches_tracked"] == 12


# FedProx


def test_fedprox_comes_to_the_minimum_of_its_own_loss() -> None:
    hessian, optimum = quadratic(0)
    got = run(FedProxRecipe, sites=1, rounds=1, proximal_mu=2.0, client_kwargs={"steps": 400}).parameters["w"]
    wanted = np.linalg.solve(hessian + 2.0 * np.eye(3), hessian @ optimum + 2.0 * np.ones(3))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_a_client_that_does_not_heed_the_term_is_refused_before_the_run() -> None:
    with pytest.raises(CompositionError, match=r"must heed proximal of self.terms, got Deaf.honours = \[\]"):
        made(FedProxRecipe, client=Deaf).build()
    made(FedProxRecipe, client=Deaf, proximal_mu=0.0).build()


def test_a_function_that_makes_such_clients_is_found_out_by_the_site() -> None:
    def make(**options: Any) -> Deaf:
        return Deaf(**options)

    with pytest.raises(RoundError, match=r"must heed proximal of self\.terms, got Deaf"):
        run(FedProxRecipe, client=make)


@pytest.mark.parametrize(("kind", "name"), [(FedProxRecipe, "proximal_mu"), (DittoRecipe, "personal_lambda")])
@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
def test_a_weight_that_is_none_is_refused(kind: Callable[..., FedAvgRecipe], name: str, value: float) -> None:
    with pytest.raises(CompositionError, match=f"{name} must be 0 or more, got {value}"):
        made(kind, **{name: value}).build()


# FedOpt


def textbook(optimizer: str, deltas: list[float], beta1: float, beta2: float, tau: float, eta: float) -> list[float]:
    """Reddi et al. 2021, Algorithm 2, of one number, and Hsu et al. 2019."""
    w, m, v, path = 0.0, 0.0, tau**2, []
    for delta in deltas:
        if optimizer == "momentum":
            m = beta1 * m + delta
            w += eta * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            if optimizer == "adagrad":
                v += delta**2
            elif optimizer == "adam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v -= (1 - beta2) * delta**2 * sign
            w += eta * m / (v**0.5 + tau)
        path.append(w)
    return path


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "yogi", "adam"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fedopt_is_the_papers_update(optimizer: Any, dtype: Any) -> None:
    deltas = [0.5, -0.25, 0.0, 1.0, 1e-3, -2.0]
    rule = FedOpt(optimizer=optimizer, beta1=0.8, beta2=0.9, tau=1e-2, server_learning_rate=0.3)
    state = rule.init({"w": np.zeros(1, dtype)})
    got = []
    for delta in deltas:
        state = rule.finish(state, Update("server", {"w": np.array([delta], dtype)}, 1.0))
        got.append(float(state.parameters["w"][0]))
    assert state.parameters["w"].dtype == dtype
    wanted = textbook(optimizer, deltas, 0.8, 0.9, 1e-2, 0.3)
    np.testing.assert_allclose(got, wanted, rtol=1e-6 if dtype == np.float32 else 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "yogi"])
def test_fedopt_is_what_flower_makes_of_the_same_updates(optimizer: Any) -> None:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: TID251
    from flwr.server.strategy import FedAdagrad, FedAvgM, FedYogi  # noqa: TID251

    start = np.linspace(-1, 1, 5)
    options: dict[str, Any] = {"initial_parameters": ndarrays_to_parameters([start])}
    theirs: Any = {
        "momentum": lambda: FedAvgM(server_learning_rate=0.1, server_momentum=0.9, **options),
        "adagrad": lambda: FedAdagrad(eta=0.1, tau=1e-3, **options),
        "yogi": lambda: FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3, **options),
    }[optimizer]()
    theirs.initialize_parameters(None)
    beta1 = 0.0 if optimizer == "adagrad" else 0.9
    rule = FedOpt(optimizer=optimizer, beta1=beta1, beta2=0.99, tau=1e-3, server_learning_rate=0.1)
    ours = rule.init({"w": start.copy()})
    if optimizer != "momentum":  # Flower begins with v = 0 where the paper has τ²
        ours = replace(ours, algorithm={**ours.algorithm, "v": {"w": np.zeros(5)}})
    draw = np.random.default_rng(5)
    for number in range(1, 6):
        delta = draw.normal(size=5)
        sent = ndarrays_to_parameters([np.asarray(ours.parameters["w"] + delta)])
        reply = FitRes(status=Status(Code.OK, ""), parameters=sent, num_examples=1, metrics={})
        parameters, _ = theirs.aggregate_fit(number, [(None, reply)], [])
        ours = rule.finish(ours, Update("server", {"w": delta.copy()}, 1.0))
        np.testing.assert_allclose(ours.parameters["w"], parameters_to_ndarrays(parameters)[0], rtol=1e-9)


def test_a_server_optimizer_leaves_counters_and_statistics_to_the_mean() -> None:
    start = {"w": np.ones(3), "norm.running_mean": np.zeros(3), "norm.num_batches_tracked": np.array(0)}

    class Statistics(Steered):
        def compute_update(self, parameters: Any, config: Any) -> Any:
            updated, count, metrics = super().compute_update(parameters, config)
            return {**updated, "norm.running_mean": np.full(3, float(self.client_id))}, count, metrics

    got = run(FedOptRecipe, client=Statistics, initial_parameters=start, rounds=1).parameters
    assert got["norm.num_batches_tracked"] == 4
    np.testing.assert_allclose(got["norm.running_mean"], np.full(3, (0 * 1 + 1 * 2 + 2 * 3) / 6))


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"beta1": 1.0}, {"beta2": -0.1}, {"tau": 0.0}])
def test_a_server_optimizer_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        made(FedOptRecipe, **options).build()


# SCAFFOLD


def textbook_scaffold(sites: int, cohorts: list[list[int]], steps: int = 4, rate: float = 0.1) -> np.ndarray:
    """Karimireddy et al. 2020, Algorithm 1, option II, with equal weights."""
    x, c = np.ones(3), np.zeros(3)
    own = [np.zeros(3) for _ in range(sites)]
    for cohort in cohorts:
        moved, changed = [], []
        for site in cohort:
            y = descended(site, x, steps, rate, lambda _, drift=c - own[site]: drift)
            after = own[site] - c + (x - y) / (steps * rate)
            moved.append(y - x)
            changed.append(after - own[site])
            own[site] = after
        x = x + np.mean(moved, axis=0)
        c = c + len(cohort) / sites * np.mean(changed, axis=0)
    return x


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scaffold_is_the_papers_algorithm(fraction: float) -> None:
    recipe = made(ScaffoldRecipe, sites=4, rounds=6, fraction_fit=fraction, weighting="equal")
    recorder = clients.Recorder()
    got = recipe.execute(CPU, observers=(recorder,)).parameters
    cohorts = [
        [int(site[-1]) - 1 for site in event.cohort]
        for event in (e for e in recorder.events if isinstance(e, RoundStarted))
    ]
    assert len({tuple(cohort) for cohort in cohorts}) > 1 or fraction == 1.0
    np.testing.assert_allclose(got["w"], textbook_scaffold(4, cohorts), rtol=1e-9)
    assert got["norm.num_batches_tracked"] == 24


def test_scaffold_comes_to_the_optimum_from_which_fedavg_stays_away() -> None:
    hessians, optima = zip(*(quadratic(site) for site in range(4)), strict=True)
    best = np.linalg.solve(sum(hessians), sum(h @ o for h, o in zip(hessians, optima, strict=True)))
    options: dict[str, Any] = {"sites": 4, "rounds": 150, "weighting": "equal", "client_kwargs": {"steps": 10}}
    options["evaluate_every"] = 0
    distance = {
        kind: np.linalg.norm(run(kind, **options).parameters["w"] - best) for kind in (FedAvgRecipe, ScaffoldRecipe)
    }
    assert distance[ScaffoldRecipe] < 1e-6 < 0.05 < distance[FedAvgRecipe]


def test_scaffold_needs_to_know_how_far_a_site_went() -> None:
    with pytest.raises(RoundError, match="travelled must be the sum of the learning rates of its steps"):
        run(ScaffoldRecipe, client=Unmeasured)


def test_a_parameter_may_not_be_called_like_a_control_variate() -> None:
    with pytest.raises(ConfigError, match="must not begin with 'control/'"):
        run(ScaffoldRecipe, initial_parameters={"control/w": np.ones(3), "w": np.ones(3)})


# Ditto


@pytest.mark.parametrize(("weight", "steps"), [(0.0, 4), (0.7, 4)])
def test_a_personal_model_is_what_its_own_loss_makes_of_it(weight: float, steps: int) -> None:
    result = run(DittoRecipe, rounds=2, personal_lambda=weight)
    first, second = np.ones(3), run(rounds=1).parameters["w"]
    for site, outcome in enumerate(result.rounds[-1].sites[3:]):
        own = descended(site, first, steps, extra=lambda v: weight * (v - first))
        own = descended(site, own, steps, extra=lambda v: weight * (v - second))
        hessian, optimum = quadratic(site)
        loss = 0.5 * (own - optimum) @ hessian @ (own - optimum)
        assert outcome.metrics["personal_loss"] == pytest.approx(loss, rel=1e-12)
    assert "personal_loss" not in result.rounds[0].evaluation


def test_personal_models_stay_where_they_are(tmp_path: Path) -> None:
    made(DittoRecipe).execute(CPU, out=tmp_path)
    assert {p.parent.name for p in (tmp_path / "sites").rglob("*.safetensors")} == {"site-1", "site-2", "site-3"}


# Cyclic, swarm


def test_a_model_that_goes_round_is_trained_by_one_after_the_other() -> None:
    w = np.ones(3)
    for _ in range(2):
        for site in range(3):
            w = descended(site, w)
    np.testing.assert_allclose(run(CyclicRecipe, rounds=2).parameters["w"], w, rtol=1e-12)


def test_a_random_order_is_another_in_each_round_and_the_same_in_each_run() -> None:
    runs = [run(CyclicRecipe, sites=4, order="random", seed=seed).parameters for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_who_fails_is_passed_over_by_a_relay_and_a_swarm() -> None:
    for kind in (CyclicRecipe, SwarmRecipe):
        result = run(kind, client=Fails, min_available_clients=2)
        failed = [site for site in result.rounds[2].sites if site.status is Status.FAILED]
        assert [site.reason for site in failed] == ["site-2: ArithmeticError: the disk is full"]
        with pytest.raises(RoundError, match="at least 3 usable updates, got 2 of 3"):
            run(kind, client=Fails, min_available_clients=3)


def test_a_swarm_whose_aggregating_site_is_lost_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfl.client.swarm import SwarmRule

    aggregate = SwarmRule._aggregate

    def faulty(self: SwarmRule, work: Any, task: Task) -> Update:
        if work.site == "site-2":
            raise OSError("no space left")
        return aggregate(self, work, task)

    monkeypatch.setattr(SwarmRule, "_aggregate", faulty)
    result = run(SwarmRecipe)
    assert same(result.parameters, run().parameters)
    monkeypatch.setattr(SwarmRule, "_aggregate", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(RoundError, match=r"able to aggregate, got none:\n.*site-1: OSError: no space"):
        run(SwarmRecipe)


def test_the_server_of_a_swarm_carries_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfl.engine.local import LocalEngine

    seen: list[dict[str, np.ndarray]] = []
    replies = LocalEngine.replies

    def watched(self: LocalEngine, *args: Any, **options: Any) -> Any:
        for reply in replies(self, *args, **options):
            if reply.update is not None and reply.update.delta:
                seen.append({name: np.array(value) for name, value in reply.update.delta.items()})
            yield reply

    monkeypatch.setattr(LocalEngine, "replies", watched)
    run(SwarmRecipe, rounds=1)
    private = [descended(site, np.ones(3)) - 1.0 for site in range(3)]
    sealed = [arrays for arrays in seen if any(name.startswith("sealed/") for name in arrays)]
    assert len(sealed) == 3
    assert all(value.dtype == np.uint8 for arrays in sealed for value in arrays.values())
    wire = b"".join(value.tobytes() for arrays in seen for value in arrays.values())
    assert not any(delta.tobytes() in wire for delta in private)


# FedBuff


def test_late_updates_count_by_how_late_they_are() -> None:
    """In-process sites answer in the order in which they were asked: three at a time, and two make a round."""
    current, queue, asked, ages = np.ones(3), list[Any](), dict.fromkeys(range(3), -1), list[int]()
    for version in range(5):
        deltas, weights = [], []
        while len(deltas) < 2:
            idle = [s for s in range(3) if asked[s] < version and s not in {flying[0] for flying in queue}]
            queue += [(s, current, version) for s in idle]
            asked |= dict.fromkeys(idle, version)
            site, model, began = queue.pop(0)
            ages.append(version - began)
            deltas.append((descended(site, model) - model) / np.sqrt(1 + ages[-1]))
            weights.append(site + 1.0)
        current = current + np.array(weights) @ np.array(deltas) / sum(weights)
    assert set(ages) == {0, 1}
    got = run(FedBuffRecipe, buffer=2, rounds=5, initial_parameters={"w": np.ones(3)}).parameters["w"]
    np.testing.assert_allclose(got, current, rtol=1e-12)


def test_a_buffer_that_nobody_fills_ends_the_run_with_the_reasons() -> None:
    class Broken(Steered):
        def compute_update(self, parameters: Any, config: Any) -> Any:
            raise ArithmeticError("no data")

    with pytest.raises(RoundError, match=r"buffer must be filled(.|\n)*site-1: ArithmeticError: no data"):
        run(FedBuffRecipe, client=Broken)
    with pytest.raises(ConfigError, match="at most the 3 sites"):
        run(FedBuffRecipe, buffer=4)


# Evaluation


def test_an_evaluation_trains_nothing() -> None:
    result = run(FedEvalRecipe, rounds=7)
    assert [r.round for r in result.rounds] == [0, 1]
    assert same(result.parameters, START)
    weights = np.array([1, 2, 3])
    losses = [0.5 * (1 - quadratic(s)[1]) @ quadratic(s)[0] @ (1 - quadratic(s)[1]) for s in range(3)]
    assert result.rounds[-1].evaluation["loss"] == pytest.approx(weights @ losses / 6)


def test_every_sites_model_is_evaluated_on_every_site() -> None:
    matrix = run(FedEvalRecipe, cross_site=True).cross_site
    assert matrix is not None
    assert list(matrix) == ["global", "site-1", "site-2", "site-3"]
    for trained in range(3):
        for judge in range(3):
            hessian, optimum = quadratic(judge)
            away = descended(trained, np.ones(3)) - optimum
            got = matrix[f"site-{trained + 1}"][f"site-{judge + 1}"]["loss"]
            assert got == pytest.approx(0.5 * away @ hessian @ away, rel=1e-12)


# What all of them must survive

KINDS: dict[str, tuple[Callable[..., FedAvgRecipe], dict[str, Any]]] = {
    "fedprox": (FedProxRecipe, {"proximal_mu": 0.3, "fraction_fit": 0.5}),
    "adam": (FedOptRecipe, {"fraction_fit": 0.5}),
    "momentum": (FedOptRecipe, {"optimizer": "momentum"}),
    "scaffold": (ScaffoldRecipe, {"fraction_fit": 0.5}),
    "ditto": (DittoRecipe, {"fraction_fit": 0.5}),
    "cyclic": (CyclicRecipe, {"order": "random"}),
    "swarm": (SwarmRecipe, {}),
    "fedbuff": (FedBuffRecipe, {"buffer": 2, "concurrency": 3}),
    "cross-site": (FedEvalRecipe, {"cross_site": True}),
    "schedule": (FedAvgRecipe, {"schedule": Schedule(kind="cosine", rounds=4, warmup=1)}),
    "weighted": (FedAvgRecipe, {"sampling": "weighted", "site_weights": "site-1=5,site-3=1", "fraction_fit": 0.25}),
}


def left(out: Path) -> tuple[dict[str, bytes], list[Any]]:
    checkpoints = {path.name: path.read_bytes() for path in sorted((out / "checkpoints").iterdir())}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return checkpoints, [(line["round"], line["fit"], line["evaluation"]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_stopped_at_any_event_and_resumed_it_is_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.server.session.write_report", lambda out: None)
    monkeypatch.setattr("sfl.io.metrics._open_scalars", lambda folder: None)
    kind, options = KINDS[name]
    recipe = made(kind, sites=4, rounds=4, **options)
    recorder = clients.Recorder()
    recipe.execute(CPU, out=tmp_path / "whole", observers=(recorder,))
    wanted = left(tmp_path / "whole")
    for stop_at in range(2, len(recorder.events), 3):
        out = tmp_path / str(stop_at)
        with pytest.raises(InterruptedError):
            recipe.execute(CPU, out=out, observers=(clients.Recorder(stop_at),))
        recipe.execute(CPU, out=out, resume=True)
        assert left(out) == wanted, f"stopped at event {stop_at}"


@pytest.mark.parametrize("name", [*KINDS, "yogi", "adagrad"])
def test_a_number_without_axes_is_trained_as_any_other_and_comes_back_with_a_resume(name: str, tmp_path: Path) -> None:
    kind, options = KINDS.get(name, (FedOptRecipe, {"optimizer": name}))
    start = {"w": np.ones(3), "b": np.array(1.0)}
    options = {**options, "sites": 4, "client": Large, "initial_parameters": start}
    whole = made(kind, rounds=3, **options).execute(CPU)
    assert whole.parameters["b"].shape == ()
    assert whole.parameters["b"] == whole.parameters["w"][0]
    made(kind, rounds=1, **options).execute(CPU, out=tmp_path)
    rest = made(kind, rounds=3, **options).execute(CPU, out=tmp_path, resume=True)
    assert same(rest.parameters, whole.parameters)


@pytest.mark.parametrize("name", KINDS)
def test_workers_give_the_same_bits(name: str) -> None:
    kind, options = KINDS[name]
    if name == "fedbuff":  # what comes first is up to the workers, unless everybody is waited for
        options = {"buffer": 4}
    one = made(kind, sites=4, rounds=3, **options).execute(CPU)
    two = made(kind, sites=4, rounds=3, workers=2, **options).execute(CPU)
    assert same(one.parameters, two.parameters)


# Sampling, schedules


def test_sites_of_greater_weight_are_drawn_more_often() -> None:
    names = ["a", "b", "c", "d"]
    draws = [sample_cohort(names, 0.25, 1, rng.public(0, r, "cohort"), [3.0, 1.0, 0.0, 4.0]) for r in range(4000)]
    shares = np.array([sum(draw == [name] for draw in draws) for name in names]) / 4000
    np.testing.assert_allclose(shares, [3 / 8, 1 / 8, 0.0, 4 / 8], atol=0.03)
    assert shares[2] == 0.0
    assert sample_cohort(names, 1.0, 1, rng.public(0, 1, "cohort"), [1.0, 1.0, 0.0, 1.0]) == ["a", "b", "d"]
    assert sample_cohort(names, 1.0, 1, rng.public(0, 1, "cohort"), [0.0] * 4) == []


@pytest.mark.parametrize("given", ["site-1", "site-1=x", "=1", "site-1=-1", "site-1=inf", "site-1=0"])
def test_weights_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="site_weights must be names with positive numbers"):
        FederationConfig(sampling="weighted", site_weights=given)
    with pytest.raises(ConfigError, match="site_weights must be given with sampling=weighted"):
        FederationConfig(site_weights="site-1=1")


def test_a_weight_of_no_site_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must name sites of the federation, got 'site-7'\. "):
        run(sampling="weighted", site_weights="site-1=1,site-7=2")


def test_a_function_that_makes_clients_which_heed_nothing_is_refused_before_they_train() -> None:
    with pytest.raises(RoundError, match="must heed proximal"):
        run(DittoRecipe, client=lambda **options: Deaf(**options))


def test_a_schedule_reaches_the_sites() -> None:
    got = run(rounds=3, sites=1, schedule=Schedule(kind="step", rounds=3, gamma=0.5, every=1)).parameters["w"]
    w = np.ones(3)
    for rate in (0.1, 0.05, 0.025):
        w = descended(0, w, rate=rate)
    np.testing.assert_allclose(got, w, rtol=1e-12)
    with pytest.raises(CompositionError, match="must heed learning_rate"):
        made(client=Deaf, schedule=Schedule(kind="linear", rounds=3)).build()


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1]),
        ({"kind": "linear", "warmup": 2}, [1 / 3, 2 / 3, 1.0, 0.5]),
        ({"kind": "cosine"}, [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5]),
        ({"kind": "step", "every": 2, "gamma": 0.1}, [1, 1, 0.1, 0.1]),
    ],
)
def test_the_factors_of_a_schedule(options: dict[str, Any], factors: list[float]) -> None:
    schedule = Schedule(rounds=4, **options)
    assert [schedule.factor(r) for r in (1, 2, 3, 4)] == pytest.approx(factors)
    assert schedule.factor(9) == pytest.approx(factors[-1])


def test_what_rounds_of_averaging_alone_can_do_is_refused_elsewhere() -> None:
    for kind in (CyclicRecipe, SwarmRecipe, FedBuffRecipe, FedEvalRecipe):
        with pytest.raises(CompositionError, match="must be left its own order of sites and rounds, got fraction_fit"):
            made(kind, fraction_fit=0.5).build()


def test_terms_that_do_nothing_add_nothing() -> None:
    terms = LocalTerms()
    assert terms.needs == frozenset()
    assert terms.named() == {}
    assert FedAvg().asks == frozenset()


def test_the_matrix_is_said_and_left_in_the_runs_folder(tmp_path: Path) -> None:
    recorder = clients.Recorder()
    result = made(FedEvalRecipe, cross_site=True).execute(CPU, out=tmp_path, observers=(recorder,))
    assert json.loads((tmp_path / "cross_site.json").read_text()) == result.cross_site
    said = [event.text for event in recorder.events if isinstance(event, Notice)]
    assert said[0] == "loss of each model (rows) on each site's data (columns)"
    assert said[1].split() == ["site-1", "site-2", "site-3"]
    assert result.cross_site is not None
    assert said[3].split() == ["site-1", *(f"{row['loss']:.4f}" for row in result.cross_site["site-1"].values())]
    assert run().cross_site is None


PLAIN: dict[str, Any] = {"optimizer": "momentum", "beta1": 0.0, "server_learning_rate": 1.0}


@pytest.mark.parametrize(
    ("kind", "options"), [(FedOptRecipe, PLAIN), (ScaffoldRecipe, {}), (DittoRecipe, {}), (FedProxRecipe, {})]
)
def test_a_round_of_averaging_may_be_private(kind: Callable[..., FedAvgRecipe], options: dict[str, Any]) -> None:
    """Clip and noise are on all that leaves, SCAFFOLD's control variates among it."""
    loud = GaussianMechanism(clip_norm=1e-6, noise_multiplier=2.0)
    options = {**options, "mechanisms": (loud,), "initial_parameters": {"w": np.ones(30_000)}, "client": Large}
    state = made(kind, sites=2, rounds=1, **options).execute(CPU).state
    moved = state.parameters["w"] - 1.0
    assert np.std(moved) == pytest.approx(2e-6 / 2, rel=0.05)
    if kind is ScaffoldRecipe:
        assert np.std(state.algorithm["control"]["control/w"]) == pytest.approx(2e-6 / 2, rel=0.05)
