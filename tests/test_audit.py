"""The audit: its statistics against brute force, broken mechanisms that it must catch, sound ones that it must not."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import clients
from sfl.audit import RecipePipeline, audit_recipe
from sfl.cli import main
from sfl.client.canary import Canaries, CanaryClient, CanaryStayedAwayError
from sfl.core.events import Notice
from sfl.core.mechanism import Mechanism
from sfl.core.task import Update
from sfl.core.transform import Stateless
from sfl.env import environment
from sfl.errors import CompositionError, ConfigError
from sfl.privacy.adaptive_clip import AdaptiveClip
from sfl.privacy.audit import (
    AuditReport,
    NormCheck,
    PrivacyAuditor,
    check_norm_bound,
    epsilon_lower_bound,
    lower_bound,
    one_run_p_value,
    strongest_bound,
)
from sfl.privacy.audit.directions import Directions
from sfl.privacy.audit.one_run import choices
from sfl.privacy.audit.scoring import Scoring
from sfl.privacy.budget import statement
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.correlated import BandedMechanism, coefficients
from sfl.privacy.dp import GaussianMechanism, analytic_gaussian_delta
from sfl.privacy.ledger import ledgers_folder
from sfl.privacy.noise import GaussianNoise
from sfl.privacy.runner_utils import build_protections
from sfl.recipe import FedAvgRecipe
from sfl.train.audited import StepPipeline
from sfl.train.dpsgd import PrivateTrainer
from sfl.types import FederationConfig

# Statistics


def test_published_values() -> None:
    """Appendix D of the paper, and its example of section 7."""
    assert round(one_run_p_value(75, 100, 100, math.log(3.0)), 3) == 0.553
    assert round(epsilon_lower_bound(75, 100, 1000, delta=1e-4), 3) == 0.673


@given(st.integers(1, 400), st.floats(0.0, 12.0), st.data())
@settings(max_examples=40)
def test_the_tail_is_the_binomial_one(guesses: int, epsilon: float, data: Any) -> None:
    correct = data.draw(st.integers(0, guesses))
    expected = stats.binom.sf(correct - 1, guesses, 1.0 / (1.0 + math.exp(-epsilon)))
    assert one_run_p_value(correct, guesses, guesses, epsilon) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def worst_epsilon(kernel: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    return max(float(np.log(kernel[a] / kernel[b]).max()) for a, b in pairs)


def worst_delta(kernel: np.ndarray, pairs: list[tuple[int, int]], epsilon: float) -> float:
    return max(float(np.maximum(kernel[a] - math.exp(epsilon) * kernel[b], 0.0).sum()) for a, b in pairs)


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.1, 6.0), st.floats(0.2, 1.0))
@settings(max_examples=60)
def test_no_mechanism_and_no_guess_beat_the_bound(seed: int, guesses: int, sharp: float, share: float) -> None:
    """A mechanism on three coins with twelve outputs, its exact ε and δ, and the guesses that are right most often."""
    draw = np.random.default_rng(seed)
    kernel = np.exp(draw.normal(size=(8, 12)) * sharp)
    kernel /= kernel.sum(axis=1, keepdims=True)
    coins = np.array(list(itertools.product([0, 1], repeat=3)))
    pairs = [(a, b) for a in range(8) for b in range(8) if (coins[a] != coins[b]).sum() == 1]
    posterior = (kernel[:, :, None] * coins[:, None, :]).sum(axis=0) / kernel.sum(axis=0)[:, None]
    likely = np.abs(posterior - 0.5)
    tail = np.zeros(guesses + 1)
    for output in range(12):
        sure = np.argsort(-likely[output])[:guesses]
        right = (coins[:, sure] == (posterior[output, sure] > 0.5)).sum(axis=1)
        for row in range(8):
            tail[: right[row] + 1] += kernel[row, output] / 8.0
    epsilon = worst_epsilon(kernel, pairs) * share
    delta = worst_delta(kernel, pairs, epsilon)
    for correct in range(guesses + 1):
        assert tail[correct] <= one_run_p_value(correct, guesses, 3, epsilon, delta) + 1e-9


def randomised_response(epsilon: float, canaries: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    coins = draw.integers(0, 2, canaries).astype(bool)
    kept = draw.random(canaries) < 1.0 / (1.0 + math.exp(-epsilon))
    return np.where(kept, coins, ~coins) + draw.random(canaries) * 1e-3, coins


def test_the_bound_is_below_the_truth_and_close_to_it_with_many_canaries() -> None:
    draw = np.random.default_rng(0)
    bounds = [lower_bound(*randomised_response(1.0, 300, draw)).epsilon for _ in range(200)]
    assert sum(bound <= 1.0 for bound in bounds) >= 190
    assert np.median(bounds) > 0.4
    many = lower_bound(*randomised_response(1.0, 50_000, draw)).epsilon
    assert 0.93 < many <= 1.0


def test_delta_and_confidence_cost_and_guesses_gain() -> None:
    plain = epsilon_lower_bound(95, 100, 1000)
    assert 0.0 < epsilon_lower_bound(95, 100, 1000, delta=1e-5) < plain
    assert epsilon_lower_bound(95, 100, 1000, confidence=0.99) < plain < epsilon_lower_bound(190, 200, 1000)
    assert epsilon_lower_bound(50, 100, 100) == 0.0
    assert epsilon_lower_bound(100, 100, 10_000, delta=1e-3) == 0.0  # 2mδ = 20
    assert epsilon_lower_bound(0, 0, 10) == 0.0
    assert strongest_bound(1000) > strongest_bound(100) > strongest_bound(1000, heads_only=True) - 3.0
    assert choices(2) == [(1, 1)]
    assert choices(2, heads_only=True) == [(1, 0)]
    blind = lower_bound(np.zeros(100), np.arange(100) % 2 == 0)
    assert blind.epsilon == 0.0


def test_what_is_no_audit_is_refused() -> None:
    for arguments in ((3, 2, 5, 1.0), (1, 6, 5, 1.0), (1, 2, 5, -1.0), (1, 2, 5, 1.0, 2.0)):
        with pytest.raises(ConfigError, match="guesses must be 0 <= correct"):
            one_run_p_value(*arguments)  # type: ignore[arg-type]
    for scores, coins in (([1.0], [True]), ([1.0, 2.0], [True]), ([np.nan, 1.0], [True, False])):
        with pytest.raises(ConfigError, match="scores and coins must be"):
            lower_bound(np.array(scores), np.array(coins))
    with pytest.raises(ConfigError, match="confidence must be in"):
        epsilon_lower_bound(1, 2, 5, confidence=1.0)
    with pytest.raises(ConfigError, match="canaries must be at least 2"):
        PrivacyAuditor(canaries=1)


# Directions and scores


@given(st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=20)
def test_directions_are_orthonormal_and_projections_are_dot_products(count: int, seed: int) -> None:
    base = {"a": np.zeros((3, 4)), "n": np.arange(3), "b": np.zeros(17), "c": np.zeros((), np.float32)}
    directions = Directions.within(base, count, seed)
    rows = [directions.add(base, index, 1.0) for index in range(count)]
    assert all(np.array_equal(row["n"], base["n"]) for row in rows)
    flat = np.array([np.concatenate([np.ravel(row[name]) for name in ("a", "b", "c")]) for row in rows])
    assert np.allclose(flat @ flat.T, np.eye(count), atol=1e-6)
    draw = np.random.default_rng(seed)
    values = {name: draw.normal(size=value.shape) for name, value in base.items()}
    whole = np.concatenate([np.ravel(values[name]) for name in ("a", "b", "c")])
    assert np.allclose(directions.project(values), flat @ whole, atol=1e-6)
    parts = {name: np.zeros(value.shape) for name, value in values.items()}
    directions.copy_into(parts, values, count - 1)
    own = directions.project(parts)
    assert own[-1] == pytest.approx(directions.project(values)[-1])
    assert not own[:-1].any()
    assert directions.along(values, count - 1) == pytest.approx(own[-1])
    with pytest.raises(ConfigError, match=r"between 1 and .* that are floats, 30, got 31"):
        Directions.within(base, 31, 0)


def test_correlated_noise_is_made_white_and_each_canary_looked_for_in_its_turns() -> None:
    bands, turns, rounds, canaries = 3, 4, 11, 6
    column = coefficients(bands)
    factor = np.array([[column[t - s] if 0 <= t - s < bands else 0.0 for s in range(rounds)] for t in range(rounds)])
    takes_part = np.array([[(t - i) % turns == 0 and t >= i % turns for i in range(canaries)] for t in range(rounds)])
    seen = np.random.default_rng(0).normal(size=(rounds, canaries))
    white = factor @ seen
    white /= np.sqrt((white**2).mean(axis=1, keepdims=True))
    expected = (white * (factor @ takes_part.astype(float))).sum(axis=0)
    scoring = Scoring.of(BandedMechanism(clip_norm=1.0, noise_multiplier=1.0, bands=bands), turns)
    assert np.allclose(scoring.scores(seen), expected)
    assert not Scoring().scores(np.zeros((2, 3))).any()


def test_a_score_under_sampling_rises_with_what_is_seen_in_any_round() -> None:
    scoring = Scoring.of(GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.2))
    assert scoring.heads_only
    seen = np.array([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 2.0, 1.0]])
    scores = scoring.scores(seen)
    assert scores[0] < scores[3] < scores[1]
    assert scores[1] == pytest.approx(scores[2])


# Norms


@dataclass(frozen=True)
class FakeTrainer:
    """Stands for DP-SGD's clipped sum of a batch: each example's gradient has this norm after clipping."""

    norm: float

    def clipped_sum(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        unit = batch / np.linalg.norm(batch, axis=1, keepdims=True)
        total = self.norm * unit.sum(axis=0)
        return {"tied": total[:2], "rest": total[2:]}


def test_a_clip_that_is_a_tenth_off_is_caught_on_batches_of_one() -> None:
    examples = np.random.default_rng(0).normal(size=(20, 5))

    def found(norm: float) -> NormCheck:
        trainer = FakeTrainer(norm)
        return check_norm_bound((trainer.clipped_sum(row[None]) for row in examples), 0.5, mechanism="ghost clipping")

    assert found(0.5).holds
    assert found(0.5).checked == 20
    assert "ghost clipping: kept by all 20 clipped values (largest 1 C)" in found(0.5).words
    assert not found(0.55).holds
    assert "broken: a clipped value has 1.1 times the bound C" in found(0.55).words
    assert not found(0.5001).holds


def test_edge_cases_of_the_norm_check() -> None:
    assert check_norm_bound([], 1.0).holds
    assert check_norm_bound([{"w": np.zeros(3)}, {}], 1.0).holds
    for wrong in (np.nan, np.inf):
        assert not check_norm_bound([{"w": np.array([wrong])}, {"w": np.zeros(1)}], 1.0).holds
    for bound in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="a norm's bound must be positive"):
            check_norm_bound([], bound)


# Mechanisms by themselves


@dataclass(frozen=True)
class Unclipped(Stateless):
    raises_norm: ClassVar[bool] = False
    clips: ClassVar[bool] = True

    times: float = 1.0
    inner: Any = None

    def change(self, update: Update) -> Update:
        clipped = self.inner.change(update) if self.inner is not None else update
        return replace(clipped, delta={name: value * self.times for name, value in clipped.delta.items()})


def broken(sound: Any, **methods: Any) -> Mechanism:
    kind = type("Broken", (type(sound),), methods)
    return cast("Mechanism", kind(**{field.name: getattr(sound, field.name) for field in fields(sound)}))


def weaker(sound: Any, share: float) -> Mechanism:
    return broken(sound, noise=lambda _: replace(sound, noise_multiplier=sound.noise_multiplier * share).noise())


SOUND: list[Any] = [
    GaussianMechanism(clip_norm=0.5, noise_multiplier=3.0),
    AdaptiveClip(noise_multiplier=3.0, count_noise=20.0, cohort=200, initial_clip=0.5),
    BandedMechanism(clip_norm=0.5, noise_multiplier=3.0, bands=3),
    GaussianMechanism(clip_norm=0.5, noise_multiplier=6.0, where="local"),
    GaussianMechanism(clip_norm=0.5, noise_multiplier=6.0, where="distributed", shares=300),
]


@pytest.mark.parametrize("sound", SOUND, ids=["central", "adaptive", "banded", "local", "distributed"])
def test_broken_mechanisms_are_caught_and_sound_ones_are_not(sound: Any) -> None:
    auditor = PrivacyAuditor(canaries=300, confidence=0.999)  # a sound one is accused once in a thousand runs, at most
    rounds = 3 * sound.rounds_apart
    kept = auditor.run_audit(sound, rounds=rounds)
    assert not kept.contradicted
    assert kept.can_contradict
    assert 1.5 < kept.epsilon_claimed < 2.6
    silent = PrivacyAuditor(canaries=300).run_audit(weaker(sound, 0.0), rounds=rounds)
    assert silent.statistics_contradict
    assert silent.norms[0].holds


def test_a_tenth_of_the_noise_is_caught() -> None:
    assert PrivacyAuditor(canaries=300).run_audit(weaker(SOUND[0], 0.1), rounds=3).statistics_contradict


def test_a_clip_that_is_missing_or_a_little_off_is_caught() -> None:
    sound = SOUND[0]
    auditor = PrivacyAuditor(canaries=300)
    missing = auditor.run_audit(broken(sound, clip=lambda _: Unclipped()), rounds=3)
    assert missing.statistics_contradict
    assert not missing.norms[0].holds
    off = auditor.run_audit(broken(sound, clip=lambda _: Unclipped(1.1, sound.clip())), rounds=3)
    assert off.contradicted
    assert not off.statistics_contradict
    assert "1.1 times the bound C" in off.verdict


def test_sampling_is_part_of_the_claim() -> None:
    """Noise that would be too little for a site that always takes part is enough for one that is drawn in secret."""
    often = GaussianMechanism(clip_norm=1.0, noise_multiplier=2.5, sampling_rate=0.5)
    kept = PrivacyAuditor(canaries=300, confidence=0.999).run_audit(often, rounds=4)
    assert not kept.contradicted
    assert PrivacyAuditor(canaries=300).run_audit(weaker(often, 0.0), rounds=4).statistics_contradict


def test_a_mechanism_must_say_its_bound() -> None:
    with pytest.raises(ConfigError, match=r"must say its clip bound as clip_norm or initial_clip.*TestMechanism"):
        PrivacyAuditor(canaries=10).run_audit(clients.TestMechanism("central"))


# Reports


def report(**changed: Any) -> AuditReport:
    given = {"epsilon_lower": 1.0, "epsilon_claimed": 2.0, "epsilon_strongest": 4.0, "delta": 1e-5, "confidence": 0.95}
    return AuditReport(**{**given, "canaries": 100, "guesses": 10, "correct": 9, "rounds": 3, **changed})


def test_verdicts_in_words() -> None:
    assert report().verdict == "no contradiction found"
    assert "statistics could not have contradicted" in report(epsilon_claimed=5.0).verdict
    assert "nothing is claimed" in report(epsilon_claimed=math.inf).verdict
    caught = report(epsilon_lower=3.0, norms=(NormCheck(1.1, 1.0, 8, "x"),))
    assert caught.verdict.startswith("the ledger's claim is contradicted: with 95% confidence ε is at least 3, and")
    assert "norm bound of x: broken" in caught.verdict
    assert "each site's own updates in 3 rounds" in "\n".join(report(sees="updates", runs=4).statement())
    for each in (report(), report(epsilon_claimed=math.inf, norms=(NormCheck(math.inf, 1.0, 1),))):
        said = json.loads(json.dumps(each.to_dict(), allow_nan=False))
        assert said["verdict"] == each.verdict
        assert said["contradicted"] is each.contradicted


# Whole runs


def recipe(sites: int = 201, rounds: int = 3, *, federation: dict[str, Any] | None = None, **options: Any) -> Any:
    sizes = FederationConfig(num_clients=sites, num_rounds=rounds, **(federation or {}))
    protections = build_protections(PrivacyConfig(dp=True, **options), sizes)
    return FedAvgRecipe(
        name="private",
        client=clients.Faulty,  # whose code must never run
        client_kwargs={"mode": "raise"},
        initial_parameters={"w": np.ones((40, 20), np.float32)},
        federation=sizes,
        mechanisms=protections.mechanisms,
        budget=protections.budget,
    )


TURNS = {"sampling": "turns", "fraction_fit": 0.25}
KINDS: dict[str, Any] = {
    "central": recipe(dp_noise=3.0, dp_max_epsilon=0.1, dataset_id="real"),
    "per layer": recipe(dp_noise=3.0, per_layer_clip=True),
    "adaptive": recipe(dp_noise=3.0, dp_adaptive_clip=True),
    "poisson": recipe(dp_noise=2.5, federation={"sampling": "poisson", "fraction_fit": 0.5}),
    "turns": recipe(204, 8, federation=TURNS, dp_noise=3.0, dp_mechanism="banded-mf"),
    "client": recipe(200, dp_noise=6.0, dp_mode="client", federation={"min_available_clients": 200}),
    "local": recipe(200, dp_noise=6.0, dp_mode="local"),
    "shuffled": recipe(200, dp_noise=6.0, dp_mode="local", dp_shuffle=True, federation={"min_available_clients": 200}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind_is_audited(kind: str) -> None:
    """Canaries replace clients; no ledger of real data is touched, and no budget ends an audit."""
    found = audit_recipe(KINDS[kind], canaries=200, confidence=0.999)
    assert not found.contradicted
    assert (found.canaries, found.runs) == (200, 1)
    assert found.sees == ("updates" if kind in ("local", "shuffled") else "models")
    assert found.norms[0].holds
    assert found.norms[0].largest > 0.9 * found.norms[0].bound or kind == "per layer"
    assert not (ledgers_folder() / "real.jsonl").exists()


@pytest.mark.parametrize("kind", ["central", "adaptive", "poisson", "turns", "client", "local"])
def test_a_run_without_its_noise_is_caught(kind: str) -> None:
    sound = KINDS[kind]
    silent = replace(sound, mechanisms=(weaker(sound.mechanisms[0], 0.0),))
    found = audit_recipe(silent, canaries=200)
    assert found.statistics_contradict
    assert found.norms[0].holds


def test_a_run_without_its_clip_is_caught_twice() -> None:
    sound = KINDS["central"]
    open_ended = broken(sound.mechanisms[0], clip=lambda _: Unclipped())
    found = audit_recipe(replace(sound, mechanisms=(open_ended,)), canaries=200)
    assert found.statistics_contradict
    assert not found.norms[0].holds


def test_the_claim_is_what_such_a_run_says_at_its_end() -> None:
    for how in ({}, {"sampling": "poisson", "fraction_fit": 0.5}, TURNS):
        real = replace(recipe(8, 5, dp_noise=3.0, federation=how), client=clients.Base, client_kwargs={})
        heard = clients.Recorder()
        real.execute(observers=[heard])
        said = [event.text for event in heard.events if isinstance(event, Notice)]
        assert said[:3] == statement(RecipePipeline(recipe=real).claim)


def test_whole_numbers_of_a_model_are_left_alone() -> None:
    mixed = replace(KINDS["central"], initial_parameters={"n": np.arange(3), "w": np.ones((40, 20), np.float32)})
    assert not audit_recipe(mixed, canaries=200, confidence=0.999).contradicted
    with pytest.raises(ConfigError, match="must send arrays of floats"):
        audit_recipe(replace(mixed, initial_parameters={"n": np.arange(3)}), canaries=200)


def test_few_sites_are_audited_in_many_runs() -> None:
    few = recipe(6, 2, dp_noise=3.0)
    found = audit_recipe(few, canaries=24)
    assert (found.canaries, found.runs) == (25, 5)
    assert audit_recipe(few, canaries=10, sites=11).runs == 1


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(CompositionError, match="must have a mechanism, got none"):
        audit_recipe(replace(KINDS["central"], mechanisms=()))
    sound = KINDS["central"].mechanisms[0]
    other = broken(sound, event=lambda _, c, p: replace(sound.event(c, p), unit="example"))
    with pytest.raises(CompositionError, match="must claim site-level privacy against who sees its models, got none"):
        audit_recipe(replace(KINDS["central"], mechanisms=(other,)), canaries=200)
    with pytest.raises(CompositionError, match=r"sites must be at least 2 to be audited, got 1"):
        audit_recipe(recipe(1, dp_noise=1.0))
    with pytest.raises(CompositionError, match="sites must be the recipe's 201 with AdaptiveClip"):
        audit_recipe(KINDS["adaptive"], sites=50)


def test_what_a_canary_does_with_its_coin() -> None:
    base = {"w": np.zeros(8)}
    plan = Canaries(directions=Directions.within(base, 2, 0), coins="10", length=10.0, bound=0.5, mirrored=False)
    heads, tails, bystander = (CanaryClient(client_id=index, canaries=plan) for index in range(3))
    assert np.linalg.norm(heads.compute_update(base, {})[0]["w"]) == pytest.approx(5.0)
    assert np.linalg.norm(heads.compute_update(base, {"dp_clip": 2.0})[0]["w"]) == pytest.approx(20.0)
    with pytest.raises(CanaryStayedAwayError, match="site-2 takes no part"):
        tails.compute_update(base, {})
    assert not bystander.compute_update(base, {})[0]["w"].any()
    opposite = CanaryClient(client_id=1, canaries=replace(plan, mirrored=True))
    assert plan.directions.project(opposite.compute_update(base, {})[0])[1] == pytest.approx(-5.0)
    assert heads.evaluate(base, {}) == (None, 1, {})


# The command


def test_the_command_refuses_what_is_no_private_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "RUN must be the folder of a run" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "config.yaml").write_text("federation: {num_clients: 3}\n")
    assert main(["audit", str(tmp_path)]) == 2
    assert "RUN must be a run with --dp" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_audits_a_real_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "run"
    tiny = ["--local-steps", "1", "--batch-size", "2", "--max-length", "16", "--eval-proteins", "2", "--workers", "1"]
    assert main(["run", "esm2", "--dp", "--dp-noise", "5", "--num-rounds", "2", *tiny, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["audit", str(out), "--canaries", "100", "--confidence", "0.999"]) == 0
    said = capsys.readouterr().out
    assert "audit: no contradiction found" in said
    found = json.loads((out / "audit.json").read_text())
    assert (found["canaries"], found["rounds"], found["backend"]) == (100, 2, "sim")
    assert found["epsilon_claimed"] == pytest.approx(found["run"]["epsilon"])
    monkeypatch.setattr("sfl.privacy.dp.GaussianNoise", lambda _: GaussianNoise(0.0))
    assert main(["audit", str(out), "--canaries", "100"]) == 1
    assert "the ledger's claim is contradicted" in capsys.readouterr().out
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("dp_noise: 5.0", "dp_noise: 50.0"))
    assert main(["audit", str(out), "--canaries", "100"]) == 2, "it would audit another mechanism than the run's"
    assert "must hold what config.yaml charges" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_an_audit_runs_on_a_foreign_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Even:
        """Half of the coins fall on heads, so that who guesses half of them in can be right about all."""

        def integers(self, low: int, high: int, size: Any = None) -> Any:
            return 7 if size is None else np.resize([0, 1], size)

    monkeypatch.setattr("sfl.privacy.audit.auditor.secret", Even)
    small = recipe(5, 2, dp_noise=3.0)
    silent = replace(small, mechanisms=(GaussianMechanism(clip_norm=1.0, noise_multiplier=0.0),))
    found = audit_recipe(silent, environment("nvflare"), canaries=4)
    assert (found.canaries, found.runs, found.rounds) == (4, 1, 2)
    assert found.correct == found.guesses  # canaries came through: without noise nobody errs
    assert found.verdict == "nothing is claimed, so there is nothing to contradict"


@pytest.mark.slow
@pytest.mark.parametrize(("doubled", "code"), [(False, 0), (True, 1)])
def test_a_run_by_dpsgd_has_its_examples_clips_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubled: bool, code: int
) -> None:
    """And a trainer that takes the norm of a tied weight for that of its uses alone is found out, as is its ε."""
    run = tmp_path / "run"
    words = ["run", "esm2", "--num-rounds", "1", "--local-steps", "1", "--eval-proteins", "2", "--batch-size", "4"]
    assert main([*words, "--max-length", "32", "--dpsgd", "--out", str(run), "--workers", "1"]) == 0
    if doubled:
        from sfl.train import factors

        monkeypatch.setattr(factors, "combinations", lambda uses, count: ())  # no cross terms
    assert main(["audit", str(run)]) == code
    found = json.loads((run / "audit.json").read_text())["examples"]
    (norms,) = found["norms"]
    assert (norms["holds"], norms["checked"]) == (not doubled, 32)
    assert found["unit"] == "example"
    assert 0.0 < found["epsilon_lower"] < found["epsilon_claimed"]


# A step of DP-SGD


class NoNoise(PrivateTrainer[Any]):
    def _noised(self, parameters: Any, total: Any) -> Any:
        return {name: total.pop(name).numpy() for name in parameters}


class QuarterNoise(PrivateTrainer[Any]):
    def _noised(self, parameters: Any, total: Any) -> Any:
        quiet = PrivateTrainer(**{**options(self), "noise_multiplier": self.noise_multiplier / 4.0})
        return quiet._noised(parameters, total)


class NoClip(PrivateTrainer[Any]):
    def _weights(self, norms: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(norms)


def options(trainer: PrivateTrainer[Any]) -> dict[str, Any]:
    return {field.name: getattr(trainer, field.name) for field in fields(trainer)}


def step_audit(kind: Any = PrivateTrainer, noise: float = 2.0, **more: Any) -> AuditReport:
    common: dict[str, Any] = {"losses": lambda *_: None, "size": len, "learning_rate": 0.1, "expected_batch_size": 16.0}
    trainer = kind(noise_multiplier=noise, **common, **more)
    held = StepPipeline(trainer=trainer, canaries=500, delta=1e-5, checked=lambda: NormCheck(1.0, 1.0, 1))
    return PrivacyAuditor(canaries=500).run_pipeline_audit(held)


@pytest.mark.parametrize("more", [{}, {"clipping": "ghost"}, {"autoclip": True}, {"clip_norm": 0.01}])
def test_a_sound_step_of_dpsgd_stays_below_its_claim(more: dict[str, Any]) -> None:
    reports = [step_audit(**more) for _ in range(20)]
    assert not any(report.contradicted for report in reports)
    assert all(report.can_contradict for report in reports)
    assert sum(report.epsilon_lower > 0.0 for report in reports) >= 10, (
        "an audit that always says nothing shows nothing"
    )
    assert analytic_gaussian_delta(2.0, reports[0].epsilon_claimed) == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize("more", [{}, {"clipping": "ghost"}, {"autoclip": True}])
@pytest.mark.parametrize("broken", [NoNoise, NoClip, QuarterNoise])
def test_a_broken_step_of_dpsgd_is_found_out(broken: Any, more: dict[str, Any]) -> None:
    assert sum(step_audit(broken, **more).contradicted for _ in range(20)) >= 19


def test_what_an_audited_step_says_is_of_examples() -> None:
    said = step_audit().statement()
    assert "for each example" in said[1]
    assert "from the noisy sums of steps in 1 round;" in said[2]
