"""Whole runs whose server sees sums alone: the same model, refusals before anything runs, statements that say so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import algorithm_clients
import clients
from sfl.client.site import Site, SiteHome, SiteProgram
from sfl.core.events import Notice, RoundFinished, SiteFinished
from sfl.core.mechanism import DpEvent
from sfl.core.task import FIT, Reply, Status, Task, Update
from sfl.engine.attacker import Attack
from sfl.engine.kit import kit_of_site
from sfl.engine.local import LocalEngine
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.privacy.accountant import PrivacyAccountant
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.filters import FreezeLayers
from sfl.privacy.runner_utils import build_protections
from sfl.privacy.secagg import SecAgg
from sfl.privacy.skellam import STEPS, SkellamMechanism, SkellamNoise
from sfl.recipe import (
    CyclicRecipe,
    DittoRecipe,
    FedAvgRecipe,
    FedBuffRecipe,
    FedOptRecipe,
    FedProxRecipe,
    Recipe,
    RunResult,
    ScaffoldRecipe,
    SwarmRecipe,
)
from sfl.server.federate import Hooks, federate
from sfl.server.robust import CoordinateMedian, Krum
from sfl.types import FederationConfig

RECIPES: tuple[type[FedAvgRecipe], ...] = (FedAvgRecipe, FedProxRecipe, FedOptRecipe, ScaffoldRecipe, DittoRecipe)


def recipe(kind: type[Any] = FedAvgRecipe, secure: SecAgg | None = None, **fields: Any) -> Any:
    federation = {"num_clients": 4, "num_rounds": 2, "weighting": "equal", **fields.pop("federation", {})}
    given = {"client": clients.LeastSquares, "initial_parameters": {"w": np.zeros(3)}, **fields}
    if kind in (FedProxRecipe, ScaffoldRecipe, DittoRecipe):
        given["client"] = algorithm_clients.Steered
    return kind(name="test", secure=secure, federation=FederationConfig(**federation), **given)


def run(job: Recipe, **kwargs: Any) -> RunResult:
    return job.execute(SimEnv(device="cpu"), **kwargs)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_model_is_that_of_plain_sums_within_what_rounding_may_do(kind: type[FedAvgRecipe]) -> None:
    plain, secure = run(recipe(kind)), run(recipe(kind, SecAgg(bits=48, clip=100.0)))
    for name, value in plain.parameters.items():
        assert np.allclose(value, secure.parameters[name], atol=1e-9, rtol=0)


def test_on_workers_it_has_the_same_bits() -> None:
    one = run(recipe(secure=SecAgg()))
    two = recipe(secure=SecAgg()).execute(SimEnv(device="cpu", num_threads=2))
    assert np.array_equal(one.parameters["w"], two.parameters["w"])


def test_all_kinds_of_numbers_are_added_up() -> None:
    fields: dict[str, Any] = {"client": clients.Base, "initial_parameters": clients.many_dtypes}
    plain, secure = run(recipe(**fields)), run(recipe(secure=SecAgg(), **fields))
    for name, value in plain.parameters.items():
        assert value.dtype == secure.parameters[name].dtype
        assert np.allclose(value, secure.parameters[name], atol=1e-6)


def test_weights_count_where_their_bound_is_known() -> None:
    examples: dict[str, Any] = {"federation": {"weighting": "examples"}, "client": algorithm_clients.Steered}
    plain = run(recipe(**examples))
    secure = run(recipe(secure=SecAgg(bits=48, max_weight=64, clip=100.0), **examples))
    assert np.allclose(plain.parameters["w"], secure.parameters["w"], atol=1e-8)
    equal = run(recipe(secure=SecAgg(clip=100.0), client=algorithm_clients.Steered))
    assert not np.allclose(plain.parameters["w"], equal.parameters["w"], atol=1e-3)
    with pytest.raises(CompositionError, match="max_weight of SecAgg"):
        recipe(secure=SecAgg(), **examples).build()


def test_nothing_of_a_single_sites_training_is_told(tmp_path: Path) -> None:
    recorder = clients.Recorder()
    run(recipe(secure=SecAgg()), out=tmp_path / "run", observers=(recorder,))
    sites = [event for event in recorder.events if isinstance(event, SiteFinished)]
    assert {event.stage for event in sites} == {
        "secagg-keys",
        "secagg-shares",
        FIT,
        "secagg-agree",
        "secagg-unmask",
        "evaluate",
    }
    for event in sites:
        if event.stage != "evaluate":
            assert (event.metrics, event.num_examples) == ({}, 1.0)
    rounds = [event for event in recorder.events if isinstance(event, RoundFinished) and event.round]
    assert all(set(event.fit) == {"clipped_values"} for event in rounds)
    assert all(event.bytes_up == sum(site.nbytes for site in event.sites) for event in rounds)


def test_the_run_says_what_the_server_never_saw(tmp_path: Path) -> None:
    recorder = clients.Recorder()
    run(recipe(secure=SecAgg()), out=tmp_path / "run", observers=(recorder,))
    said = [event.text for event in recorder.events if isinstance(event, Notice)]
    assert said.count("secure aggregation: the server never saw a site's update, only sums of at least 3 sites") == 2
    report = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert "no differential privacy" in " ".join(report["statement"])


def test_that_values_were_cut_off_is_said() -> None:
    recorder = clients.Recorder()
    run(recipe(secure=SecAgg(clip=0.01)), observers=(recorder,))
    warned = [event.text for event in recorder.events if isinstance(event, Notice) and event.level == "warning"]
    assert "of the values of updates were cut off at secagg_clip = 0.01" in warned[0]


def test_a_site_that_fails_is_left_out_of_the_sum() -> None:
    class Fails(clients.LeastSquares):
        def compute_update(self, parameters: Any, config: Any) -> Any:
            if self.client_id == 1:
                raise ValueError("no data today")
            return super().compute_update(parameters, config)

    recorder = clients.Recorder()
    secure = run(recipe(client=Fails, secure=SecAgg(bits=48)), observers=(recorder,))
    assert np.allclose(secure.parameters["w"], run(recipe(client=Fails)).parameters["w"], atol=1e-9)
    (failed, _) = (e for e in recorder.events if isinstance(e, SiteFinished) and e.status is Status.FAILED)
    assert failed.reason == "site-2: it failed; why is withheld, as this job is private, and stands in its own log"
    assert (failed.details, failed.seconds) == ("", 0.0)


class Forges(LocalEngine):
    """Answers in the name of others, or with what is no answer."""

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        for reply in super().replies(timeout, ticket=ticket):
            update = reply.update
            if update is not None and "keys" in update.delta and reply.site == "site-1":
                yield replace(reply, update=replace(update, site="site-2"))
            elif update is not None and "keys" in update.delta and reply.site == "site-2":
                yield replace(reply, update=replace(update, delta={"keys": np.array([np.nan])}))
            elif update is not None and "keys" in update.delta and reply.site == "site-3":
                yield replace(reply, update=replace(update, delta={"keys": np.zeros(3, np.uint8)}))
            else:
                yield reply


def test_answers_that_are_none_are_rejected_by_name() -> None:
    job = recipe(secure=SecAgg(), federation={"num_clients": 6, "num_rounds": 1}).build()
    recorder, names = clients.Recorder(), [f"site-{number}" for number in range(1, 7)]
    federate(job, Forges(job.program, names), hooks=Hooks(observers=(recorder,)))
    said = {s.site: s for s in recorder.events if isinstance(s, SiteFinished) and s.stage == "secagg-keys"}
    assert [said[f"site-{n}"].status for n in range(1, 5)] == [Status.REJECTED] * 3 + [Status.USED]
    assert said["site-1"].reason == "site-1: a used reply must hold the site's own answer, got that of 'site-2'."
    assert "must be finite" in said["site-2"].reason
    assert said["site-3"].reason == "site-3: keys of a site must be whole, got 3 bytes."


def test_a_site_without_a_kit_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("_SFL_SITE_KIT", raising=False)
    program = SiteProgram(client=clients.Base, secure=SecAgg())
    site = Site(program, "site-1", 0, home=SiteHome(kit=partial(kit_of_site, required=True)))
    reply = site.run(Task("secagg-keys", 1, {}, {"secagg_run": "r"}))
    assert reply.status is Status.FAILED
    assert reply.reason.startswith("site-1: a site of a deployment must have a kit, with which other sites know it")


def test_too_few_that_stay_end_the_run_in_one_line() -> None:
    class Fails(clients.LeastSquares):
        def compute_update(self, parameters: Any, config: Any) -> Any:
            if self.client_id:
                raise ValueError("no data today")
            return super().compute_update(parameters, config)

    with pytest.raises(RoundError, match=r"round 1 must keep at least 3 sites(.|\n)*site-2: it failed"):
        run(recipe(client=Fails, secure=SecAgg()))


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = run(recipe(secure=SecAgg(), federation={"num_rounds": 3}), out=tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        run(recipe(secure=SecAgg(), federation={"num_rounds": 3}), out=out, observers=(clients.Recorder(14),))
    resumed = run(recipe(secure=SecAgg(), federation={"num_rounds": 3}), out=out, resume=True)
    assert np.array_equal(whole.parameters["w"], resumed.parameters["w"])
    with pytest.raises(ConfigError, match="as it was begun"):
        run(recipe(federation={"num_rounds": 4}), out=out, resume=True)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (lambda: recipe(secure=SecAgg(), aggregator=Krum(byzantine=0)), "got Krum: it looks at single updates"),
        (lambda: recipe(secure=SecAgg(), aggregator=CoordinateMedian()), "got CoordinateMedian"),
        (lambda: recipe(CyclicRecipe, SecAgg()), "whose updates are summed, got Cyclic"),
        (lambda: recipe(SwarmRecipe, SecAgg()), "whose updates are summed"),
        (lambda: recipe(FedBuffRecipe, SecAgg(), buffer=2), "whose updates are summed"),
        (lambda: recipe(secure=SecAgg(), federation={"wait_for": 2}), "wait_for must be 0"),
        (lambda: recipe(secure=SecAgg(), federation={"sampling": "poisson"}), "got poisson"),
        (lambda: recipe(secure=SecAgg(), federation={"num_clients": 1}), "at least 2 sites, got 1"),
        (lambda: recipe(mechanisms=(skellam(),)), "SkellamMechanism must come with secure aggregation"),
        (
            lambda: recipe(secure=SecAgg(), mechanisms=(distributed(),), federation=ENOUGH),
            "must be of whole numbers",
        ),
        (lambda: recipe(secure=SecAgg(bits=16), mechanisms=(skellam(),), federation=ENOUGH), "secagg_bits must hold"),
    ],
)
def test_what_sums_cannot_serve_is_refused_before_it_runs(job: Any, words: str) -> None:
    with pytest.raises(CompositionError, match=words):
        job().build()


ENOUGH: dict[str, Any] = {"min_available_clients": 4, "weighting": None}


def skellam(noise: float = 1.0) -> SkellamMechanism:
    return SkellamMechanism(clip_norm=1.0, noise_multiplier=noise, shares=4)


def distributed() -> GaussianMechanism:
    return GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="distributed", shares=4)


# Differential privacy beside it


def test_the_statement_says_both(tmp_path: Path) -> None:
    job = recipe(secure=SecAgg(), mechanisms=(skellam(8.0),), budget=PrivacyBudget(delta=1e-5), federation=ENOUGH)
    run(job, out=tmp_path / "run")
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())["statement"]
    assert statement[0] == "secure aggregation: the server never saw a site's update, only sums of at least 4 sites"
    assert statement[3].startswith("privacy: ε = ")
    assert "the server sees their sum alone" in " ".join(statement)


def test_options_make_it() -> None:
    federation = FederationConfig(num_clients=5, min_available_clients=4)
    config = PrivacyConfig(secagg=True, secagg_bits=40, dp=True, dp_mode="client", dp_noise=2.0)
    made = build_protections(config, federation)
    assert made.secure == SecAgg(bits=40)
    assert made.mechanisms == (SkellamMechanism(clip_norm=1.0, noise_multiplier=2.0, shares=4),)
    assert build_protections(PrivacyConfig(), federation).secure is None
    for options, words in (
        ({"secagg_bits": 24}, "secagg_bits must come with secagg"),
        ({"secagg": True, "secagg_shares": 6, "secagg_threshold": 2}, "secagg_threshold must be between"),
        ({"secagg": True, "dp": True, "dp_mode": "client", "dp_accountant": "prv"}, "it knows reals alone"),
    ):
        with pytest.raises(ConfigError, match=words):
            PrivacyConfig(**options)


def test_noise_on_the_sum_by_a_trusted_server_stands_beside_it() -> None:
    central = GaussianMechanism(clip_norm=1.0, noise_multiplier=0.0)
    secure = run(recipe(secure=SecAgg(bits=48), mechanisms=(central,), federation={"weighting": None}))
    plain = run(recipe(mechanisms=(central,), federation={"weighting": None}))
    assert np.allclose(secure.parameters["w"], plain.parameters["w"], atol=1e-9)


def draws(sigma: float, size: int = 100_000) -> np.ndarray:
    noise = SkellamNoise(sigma=sigma, grid=2.0**-12, bound=1.0)
    return noise.change(Update("s", {"w": np.zeros(size)}, 1.0)).delta["w"]


def test_the_noise_has_its_spread_and_no_other() -> None:
    found = draws(0.5)
    assert np.array_equal(found, np.rint(found * 2**12) / 2**12)
    allowed = 5 / math.sqrt(2 * found.size)  # five standard errors of a standard deviation
    for claimed, holds in ((0.5, True), (0.5 * 2 / 3, False), (0.5 * 3 / 2, False)):
        assert (abs(float(found.std()) / claimed - 1) < allowed) is holds
    assert abs(found.mean()) < 5 * 0.5 / math.sqrt(found.size)


def test_rounding_never_makes_an_update_longer_than_its_bound() -> None:
    draw = np.random.default_rng(0)
    noise = SkellamNoise(sigma=0.0, grid=2.0**-12, bound=1.0)
    for size in (1, 7, 10_000, 2_000_000):
        for value in (draw.normal(size=size), np.ones(size)):
            delta = {"w": value / np.linalg.norm(value)}
            out = noise.change(Update("s", delta, 1.0)).delta["w"]
            assert np.linalg.norm(out) <= 1.0
            assert np.array_equal(out, np.rint(out * 2**12) / 2**12)


def test_an_update_that_no_rounding_fits_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.privacy.skellam._up_or_down", lambda value, generator: np.ceil(value))
    noise = SkellamNoise(sigma=0.0, grid=0.25, bound=1.0)
    out = noise.change(Update("s", {"w": np.full(100, 0.1)}, 1.0)).delta["w"]
    assert not out.any()


def test_a_sum_of_shares_has_the_noise_that_is_accounted() -> None:
    """Of four shares one is known to who looks; the other three make z times the clip bound."""
    mechanism = skellam(2.0)
    zeros = Update("s", {"w": np.zeros(50_000)}, 1.0)
    shares = [mechanism.noise().change(zeros).delta["w"] for _ in range(3)]
    assert abs(np.sum(shares, axis=0).std() / 2.0 - 1) < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
def test_the_bound_on_skellam_noise_is_one(noise: float) -> None:
    """Rényi divergences of shifted Skellam variables, summed from their probabilities, stay below the theorem's."""
    from scipy.stats import skellam as distribution

    steps = 16
    event = DpEvent(
        mechanism="skellam", noise_multiplier=noise, sampling_rate=1.0, unit="site", adjacency="add_remove",
        adversary="server_curious", sampling="none", steps=steps,
    )  # fmt: skip
    variance = (noise * steps) ** 2
    reach = np.arange(-int(14 * noise * steps) - 40, int(14 * noise * steps) + 41)
    here = distribution.logpmf(reach, variance / 2, variance / 2)
    there = distribution.logpmf(reach - steps, variance / 2, variance / 2)
    inside = np.isfinite(here) & np.isfinite(there)
    delta = float(np.sum(np.maximum(np.exp(here) - np.exp(there + (epsilon := _claimed(event))), 0)[inside]))
    assert delta <= 1e-5
    assert epsilon < 1.6 * PrivacyAccountant(delta=1e-5).epsilon([replace(event, steps=0)])


def _claimed(event: DpEvent) -> float:
    return PrivacyAccountant(delta=1e-5).epsilon([event])


def test_events_that_no_divergence_is_known_of_are_refused() -> None:
    event = skellam().event(4, 4)
    with pytest.raises(CompositionError, match="must be composed with noise without sampling"):
        _claimed_all([event, replace(event, steps=0, sampling_rate=0.5)])
    both = _claimed_all([event, replace(event, steps=0)])
    assert both > _claimed(event)
    assert event.steps == STEPS


def _claimed_all(events: list[DpEvent]) -> float:
    return PrivacyAccountant(delta=1e-5).epsilon(events)


@pytest.mark.parametrize("options", [{"shares": 1}, {"noise_multiplier": -1.0}, {"clip_norm": 0.0}])
def test_mechanisms_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SkellamMechanism(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "shares": 4, **options})  # pyright: ignore[reportArgumentType]


def test_no_attack_lies_where_nobody_sees_an_update() -> None:
    attacked = SimEnv(device="cpu", attack=Attack(name="sign-flip", attackers=1))
    with pytest.raises(CompositionError, match="an attack must be on updates that a server sees"):
        recipe(secure=SecAgg()).execute(attacked)


def test_the_other_protections_stand_beside_it() -> None:
    """Frozen arrays are not masked at all, and what goes down may be coded."""
    fields: dict[str, Any] = {"client": clients.Base, "initial_parameters": clients.many_dtypes}
    frozen = clients.Recorder()
    names = ("f8", "f2", "i8", "u1", "flag", "scalar", "none")
    run(recipe(secure=SecAgg(), transforms=(FreezeLayers(names),), **fields), observers=(frozen,))
    whole = clients.Recorder()
    run(recipe(secure=SecAgg(), federation={"message_dtype": "float16"}, **fields), observers=(whole,))
    assert frozen.site("site-1").nbytes == 20 * 4 + 2 * 8
    assert whole.site("site-1").nbytes > 2 * frozen.site("site-1").nbytes
    assert whole.rounds[1].bytes_down < 4 * 4 * 400
