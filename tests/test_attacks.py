"""Attacks against their closed forms and worked examples, and the engine on which sites play them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import clients
from sfl.core import arrays
from sfl.core.aggregator import WeightedMean
from sfl.core.events import Event, RoundFinished, RunStarted
from sfl.core.task import EVALUATE, FIT, Reply, Status, Task, Update
from sfl.engine.base import Engine
from sfl.engine.clock import VirtualClock
from sfl.engine.local import LocalEngine
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError
from sfl.recipe import FedAvgRecipe, RunResult, WorkflowRecipe
from sfl.server.attacks import (
    ATTACKS,
    Attack,
    AttackedEngine,
    alie,
    alie_factor,
    filled,
    gaussian,
    mimic,
    min_max,
    min_sum,
    scaled_mean,
)
from sfl.server.robust import CenteredClipping, CoordinateMedian, Krum, NormBound
from sfl.server.workflow import Workflow
from sfl.types import Array, ClientUpdate, Config, FederationConfig, Parameters

EXAMPLE = [{"w": np.array(row)} for row in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0])]


def vectors(seed: int, n: int = 8, d: int = 6) -> list[Parameters]:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return [{"a": row[:2].copy(), "b": row[2:].reshape(2, 2).copy()} for row in rows]


def flat(delta: Parameters) -> Array:
    return np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in delta.values()])


# What is sent


def test_worked_examples() -> None:
    np.testing.assert_allclose(scaled_mean(EXAMPLE)["w"], [-4, -5, -6])
    np.testing.assert_allclose(alie(EXAMPLE, 1.5)["w"], [8.5, 9.5, 10.5])
    np.testing.assert_allclose(scaled_mean(EXAMPLE, -0.5)["w"], [-2, -2.5, -3])


@pytest.mark.parametrize(("sites", "attackers", "share"), [(50, 24, 24 / 26), (20, 4, 9 / 16), (10, 2, 4 / 8)])
def test_the_factor_of_alie_is_the_papers(sites: int, attackers: int, share: float) -> None:
    from scipy.stats import norm

    assert alie_factor(sites, attackers) == pytest.approx(max(norm.ppf(share), 0.0))
    assert alie_factor(2, 1) == 0.0


def bisect(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@pytest.mark.parametrize("seed", range(5))
def test_min_max_and_min_sum_go_as_far_as_the_paper_lets_them(seed: int) -> None:
    honest = vectors(seed)
    rows = np.stack([flat(v) for v in honest])
    mean, deviation = rows.mean(axis=0), rows.std(axis=0, ddof=1)

    def distances(gamma: float) -> Array:
        return np.square(rows - (mean - gamma * deviation)).sum(axis=1)

    pairs = [[float(np.square(x - y).sum()) for y in rows] for x in rows]
    widest, sums = max(map(max, pairs)), max(map(sum, pairs))
    gamma = bisect(lambda g: distances(g).max() <= widest)
    np.testing.assert_allclose(flat(min_max(honest)), mean - gamma * deviation, atol=1e-9)
    gamma = bisect(lambda g: distances(g).sum() <= sums)
    np.testing.assert_allclose(flat(min_sum(honest)), mean - gamma * deviation, atol=1e-9)


def test_mimic_copies_the_one_that_stands_out() -> None:
    honest = vectors(1)
    honest[5]["b"][1, 1] = 40.0
    assert mimic(honest) == 5


def test_gaussian_noise_has_its_size() -> None:
    honest = [{"w": np.random.default_rng(i).normal(3.0, 2.0, 20000)} for i in range(5)]
    noise = gaussian(honest, 10.0, np.random.default_rng(0))["w"] - np.mean([h["w"] for h in honest], axis=0)
    assert noise.std() == pytest.approx(20.0, rel=0.05)
    assert noise.mean() == pytest.approx(0.0, abs=1.0)


def test_a_single_honest_update_and_equal_ones() -> None:
    for honest in (EXAMPLE[:1], [EXAMPLE[0]] * 3):
        for sent in (alie(honest, 9.0), min_max(honest), min_sum(honest)):
            np.testing.assert_allclose(sent["w"], [1, 2, 3])
        assert mimic(honest) in range(3)
        assert np.isfinite(gaussian(honest, 1.0, np.random.default_rng(0))["w"]).all()


def test_lies_have_the_dtypes_of_updates() -> None:
    honest = [{"f": np.full(2, i, np.float16), "n": np.array(i), "u": np.full(3, i, np.uint8)} for i in (1, 2, 4)]
    honest += [{"f": np.full(2, 5, np.float16), "n": np.array(5), "flag": np.array([True, False])}]
    for sent in (scaled_mean(honest, -100.0), alie(honest, 1e6), min_max(honest), filled(honest[0], np.nan)):
        for name, value in sent.items():
            like = next(v[name] for v in honest if name in v)
            assert (value.dtype, value.shape) == (like.dtype, like.shape)
    assert scaled_mean(honest, -100.0)["u"].tolist() == [0, 0, 0]
    assert scaled_mean(honest, 1.0)["n"] == 3


# The engine


class Fixed(clients.Base):
    """Moves by its own number, and by a hundred times that where labels are exchanged."""

    flips_labels: ClassVar[bool] = True

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        move = float(self.client_id + 1) * int(config["round"]) * (100.0 if config.get("flip_labels") else 1.0)
        return {k: v + np.asarray(move, v.dtype) for k, v in parameters.items()}, self.client_id + 1, {"loss": move}


def recipe(rounds: int = 2, **more: object) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="attacked",
        client=Fixed,
        initial_parameters={"w": np.zeros(3, np.float32)},
        federation=FederationConfig(num_clients=5, num_rounds=rounds, min_available_clients=3),
        **more,  # pyright: ignore
    )


class Spy(WeightedMean):
    """A mean that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", list[dict[str, tuple[float, float]]]())

    def aggregate(self, updates: object) -> Update:
        kept = [replace(u, delta=arrays.copy(u.delta)) for u in updates]  # pyright: ignore
        self.seen.append({u.site: (float(u.delta["w"][0]), u.weight) for u in kept})
        return super().aggregate(kept)


def sent_under(attack: Attack, rounds: int = 2) -> list[dict[str, tuple[float, float]]]:
    spy = Spy()
    recipe(rounds, aggregator=spy).execute(SimEnv(attack=attack, device="cpu"))
    return spy.seen


HONEST = {"site-1": (1.0, 1.0), "site-2": (2.0, 2.0), "site-3": (3.0, 3.0)}


@pytest.mark.parametrize(
    ("attack", "lies"),
    [
        (Attack("sign-flip", 2), [(-2.0, 4.0), (-2.0, 5.0)]),
        (Attack("sign-flip", 2, 3.0), [(-6.0, 4.0), (-6.0, 5.0)]),
        (Attack("ipm", 2), [(-1.0, 4.0), (-1.0, 5.0)]),
        (Attack("alie", 2), [(3.5, 4.0), (3.5, 5.0)]),
        (Attack("min-sum", 2), [(1.0, 4.0), (1.0, 5.0)]),
        (Attack("min-max", 2), [(1.0, 4.0), (1.0, 5.0)]),
        (Attack("num-examples", 2), [(4.0, 4e6), (5.0, 5e6)]),
        (Attack("label-flip", 2), [(400.0, 4.0), (500.0, 5.0)]),
        (Attack("replay", 2), [(4.0, 4.0), (5.0, 5.0)]),
    ],
)
def test_attackers_lie_and_the_honest_do_not(attack: Attack, lies: list[tuple[float, float]]) -> None:
    first = sent_under(attack, 1)[0]
    assert list(first) == [f"site-{i}" for i in range(1, 6)]
    for site, expected in {**HONEST, "site-4": lies[0], "site-5": lies[1]}.items():
        assert first[site] == pytest.approx(expected, rel=1e-6)


def test_replay_sends_the_first_round_again() -> None:
    rounds = sent_under(Attack("replay", 1), 3)
    assert [seen["site-5"][0] for seen in rounds] == pytest.approx([5.0, 5.0, 5.0])
    assert [seen["site-1"][0] for seen in rounds] == pytest.approx([1.0, 2.0, 3.0], rel=1e-5)


def test_mimic_sends_what_an_honest_site_sends() -> None:
    assert sent_under(Attack("mimic", ("site-1", "site-3")))[0]["site-3"][0] in (2.0, 5.0)


def test_noise_differs_between_sites_and_rounds_and_is_reproducible() -> None:
    seen = sent_under(Attack("gaussian", 2, seed=3))
    values = [one[site][0] for one in seen for site in ("site-4", "site-5")]
    assert len(set(values)) == 4
    assert sent_under(Attack("gaussian", 2, seed=3)) == seen
    assert sent_under(Attack("gaussian", 2, seed=4)) != seen


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_what_is_no_number_is_rejected_by_the_server(name: str) -> None:
    result = recipe(1).execute(SimEnv(attack=Attack(name, 2), device="cpu"))
    fits = {s.site: s for s in result.rounds[-1].sites if s.stage == FIT}
    assert [site for site, s in fits.items() if s.status is Status.REJECTED] == ["site-4", "site-5"]
    assert "must be finite" in fits["site-4"].reason
    np.testing.assert_allclose(result.parameters["w"], np.full(3, (1 + 4 + 9) / 6), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("alie", "gaussian", "label-flip") else pytest.mark.slow)
        for n in sorted(ATTACKS)
    ],
)
def test_every_attack_has_the_same_bits_on_a_pool(name: str) -> None:
    def run(workers: int) -> RunResult:
        env = SimEnv(attack=Attack(name, 2), num_threads=workers, device="cpu")
        return recipe(aggregator=CenteredClipping(1.0)).execute(env)

    assert run(1).parameters["w"].tobytes() == run(2).parameters["w"].tobytes()


def test_a_run_says_that_it_is_under_attack(tmp_path: Path) -> None:
    events: list[Event] = []
    recipe(1).execute(
        SimEnv(attack=Attack("sign-flip", 2), device="cpu"), out=tmp_path / "run", observers=[events.append]
    )
    started = next(e for e in events if isinstance(e, RunStarted))
    assert started.engine == "in-process on cpu, UNDER ATTACK: sign-flip by site-4, site-5"
    assert "UNDER ATTACK: sign-flip" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_an_attack_goes_on_after_a_resume(tmp_path: Path) -> None:
    env = SimEnv(attack=Attack("sign-flip", 2), device="cpu")
    job = recipe(4, aggregator=CenteredClipping(0.5))
    straight = job.execute(env).parameters["w"]
    short = replace(job, federation=replace(job.federation, num_rounds=2))
    short.execute(env, out=tmp_path / "run")
    resumed = job.execute(env, out=tmp_path / "run", resume=True).parameters["w"]
    assert resumed.tobytes() == straight.tobytes()


def test_robust_rules_stand_what_the_mean_does_not() -> None:
    def end(aggregator: object) -> float:
        env = SimEnv(attack=Attack("sign-flip", 1, 1e6), device="cpu")
        return float(recipe(1, aggregator=aggregator).execute(env).parameters["w"][0])

    assert end(WeightedMean()) < -1e5
    assert end(CoordinateMedian()) == pytest.approx(2.0)
    assert 1.0 <= end(Krum(1)) <= 4.0


# Who may attack


def test_attacks_that_cannot_be(tmp_path: Path) -> None:
    for attack, message in (
        (Attack("alie", 5), "must leave a site that is honest, got 5 of 5"),
        (Attack("alie", ("site-9",)), r"attackers must be sites, got 'site-9'\. Did you mean"),
    ):
        with pytest.raises(CompositionError, match=message):
            recipe().execute(SimEnv(attack=attack, device="cpu"))
    for make, message in (
        (lambda: Attack("sign-flop", 1), "Did you mean 'sign-flip'"),
        (lambda: Attack("alie", 0), "attackers must be at least 1"),
        (lambda: Attack("alie", 1, float("nan")), "attack_scale must be finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    plain = replace(recipe(), client=clients.Base)
    with pytest.raises(CompositionError, match=r"label-flip must be played by a client with .* Base"):
        plain.execute(SimEnv(attack=Attack("label-flip"), device="cpu"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class OneByOne(Workflow):
    """Sends training to a site by itself."""

    def run(self, sites: object, state: object) -> object:  # pyright: ignore
        sites.send(sites.fit_task(state), "site-3").wait()  # pyright: ignore
        return state


def test_workflows_are_refused_and_not_silently_honest() -> None:
    job = WorkflowRecipe(
        name="w",
        client=Fixed,
        initial_parameters={"w": np.zeros(3)},
        federation=FederationConfig(num_clients=3, num_rounds=1),
        workflow=OneByOne(),
    )
    with pytest.raises(CompositionError, match="must be on an algorithm of whole rounds"):
        job.execute(SimEnv(attack=Attack("alie"), device="cpu"))


class Stub(Engine):
    """Replies as it was told, in order."""

    def __init__(self, replies: list[Reply]) -> None:
        self.answers, self.closed = replies, False

    def clients(self) -> list[str]:
        return [reply.site for reply in self.answers]

    def send(self, task: Task, clients: object) -> int:
        return 1

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        yield from self.answers

    def cancel(self, ticket: int) -> None: ...

    def describe(self) -> str:
        return "stub"

    def close(self) -> None:
        self.closed = True


def used(site: str, value: float) -> Reply:
    return Reply(site, Status.USED, Update(site, {"w": np.full(2, value)}, 1.0), known_finite=True)


TASK = Task(FIT, 1, {"w": np.zeros(2)})


def test_what_is_no_training_and_who_did_not_answer_stay_as_they_are() -> None:
    failed = Reply("c", Status.FAILED, reason="c: broke")
    engine = AttackedEngine(Stub([used("a", 1.0), used("b", 2.0), failed, used("d", 9.0)]), Attack("sign-flip", 2))
    replies = list(engine.exchange(TASK, engine.clients()))
    assert [r.status for r in replies] == ["used", "used", "failed", "used"]
    assert [r.known_finite for r in replies] == [True, True, False, False]
    assert replies[3].update is not None
    assert replies[3].update.delta["w"].tolist() == [-1.5, -1.5]
    honest = list(engine.exchange(replace(TASK, name=EVALUATE), engine.clients()))
    assert honest[3].update is not None
    assert honest[3].update.delta["w"].tolist() == [9.0, 9.0]
    with engine:
        assert engine.send(replace(TASK, name=EVALUATE), ["d"]) == 1
        assert len(list(engine.replies(ticket=1))) == 4
        engine.cancel(1)
    assert engine._inner.closed  # pyright: ignore


def test_attackers_alone_in_a_round_know_their_own_updates() -> None:
    engine = AttackedEngine(Stub([used("a", 1.0), used("b", 2.0), used("c", 4.0)]), Attack("sign-flip", 2))
    lies = [r for r in engine.exchange(TASK, ["b", "c"]) if r.update]
    assert [float(r.update.delta["w"][0]) for r in lies if r.update] == [-3.0, -3.0]
    gone = AttackedEngine(Stub([used("a", 1.0), Reply("b", Status.LATE)]), Attack("sign-flip", 1))
    assert [r.status for r in gone.exchange(TASK, ["a", "b"])] == ["used", "late"]


def test_updates_without_their_zeros_are_read() -> None:
    from sfl.core import sparse

    whole = {"w": np.zeros(100)}
    whole["w"][3] = 8.0
    thin = Update("a", sparse.packed(whole), 1.0)
    assert sparse.is_packed(thin.delta)
    task = Task(FIT, 1, {"w": np.zeros(100)})
    broken = Update("b", {**thin.delta, "w": np.zeros((2, 2))}, 1.0)
    stub = Stub([Reply("a", Status.USED, thin), Reply("b", Status.USED, broken), used("c", 1.0)])
    replies = list(AttackedEngine(stub, Attack("sign-flip", 1)).exchange(task, ["a", "b", "c"]))
    assert [r.status for r in replies] == ["used", "rejected", "used"]
    assert replies[2].update is not None
    np.testing.assert_array_equal(replies[2].update.delta["w"], -whole["w"])


def test_every_engine_can_be_attacked() -> None:
    job = recipe(1).build()
    with AttackedEngine(LocalEngine(job.program, ["x", "y", "z"]), Attack("sign-flip", ("y",))) as engine:
        values = [float(r.update.delta["w"][0]) for r in engine.exchange(TASK, ["x", "y", "z"]) if r.update]
    assert values == [1.0, -2.0, 3.0]


def test_the_rounds_of_a_robust_rule_say_what_became_of_all() -> None:
    result = recipe(1, aggregator=Krum(1)).execute(SimEnv(attack=Attack("sign-flip"), device="cpu"))
    last = result.rounds[-1]
    assert isinstance(last, RoundFinished)
    assert len([s for s in last.sites if s.stage == FIT and s.status is Status.USED]) == 5


def test_a_weight_that_the_job_fixes_is_not_what_a_site_says() -> None:
    plain = replace(recipe(1), federation=FederationConfig(num_clients=5, num_rounds=1, weighting="equal"))
    honest = plain.execute(SimEnv(device="cpu")).parameters
    lied = plain.execute(SimEnv(device="cpu", attack=Attack("num-examples", 1))).parameters
    assert (honest["w"] == lied["w"]).all()


def test_who_is_above_the_bound_is_rejected_by_name() -> None:
    recorder = clients.Recorder()
    bound = NormBound(WeightedMean(), 6.0, clip=False)
    recipe(1, aggregator=bound).execute(SimEnv(device="cpu"), observers=(recorder,))
    said = {site: recorder.site(site) for site in ("site-3", "site-4")}
    assert [site.status for site in said.values()] == [Status.USED, Status.REJECTED]
    assert said["site-4"].reason == "site-4: the norm of an update must be at most 6, got 6.928."


def test_an_attack_goes_on_with_what_it_replays_and_in_simulated_time(tmp_path: Path) -> None:
    env = SimEnv(device="cpu", attack=Attack("replay", 1), clock=VirtualClock(site_seconds=1.0, site_spread=0.5))
    whole = recipe(3).execute(env, out=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        recipe(3).execute(env, out=tmp_path / "cut", observers=(clients.Recorder(stop_at=40),))
    again = recipe(3).execute(env, out=tmp_path / "cut", resume=True)
    assert 0 < len(again.rounds) < 3
    assert again.parameters["w"].tobytes() == whole.parameters["w"].tobytes()
    assert again.rounds[-1].fit == whole.rounds[-1].fit
