"""Simulated time: when replies arrive, who is late, who is there, and that a resume goes on at the same time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from algorithm_clients import Steered
from sfl.client.site import SiteProgram
from sfl.core.task import EVALUATE, FIT, SIMULATED_SECONDS, Status, Task
from sfl.engine.clock import SiteProfile, VirtualClock
from sfl.engine.local import LocalEngine
from sfl.engine.virtual import VirtualEngine
from sfl.env import SimEnv
from sfl.errors import ConfigError
from sfl.esm2.config import ESM2RunConfig
from sfl.recipe import FedAvgRecipe, FedBuffRecipe
from sfl.types import FederationConfig

W = {"w": np.zeros(2)}
NAMES = ["a", "b", "c"]


def engine(*seconds: float, **options: Any) -> VirtualEngine:
    profiles = {name: SiteProfile(seconds=s, **options) for name, s in zip(NAMES, seconds, strict=True)}
    return VirtualEngine(LocalEngine(SiteProgram(client=clients.Base), NAMES), profiles)


def arrivals(found: VirtualEngine, timeout: float | None = None, **options: Any) -> list[tuple[str, float]]:
    return [(reply.site, found.simulated_seconds() or 0.0) for reply in found.replies(timeout, **options)]


def test_replies_arrive_in_the_order_of_simulated_time() -> None:
    found = engine(3.0, 1.0, 2.0)
    found.send(Task(FIT, 1, W), NAMES)
    assert arrivals(found) == [("b", 1.0), ("c", 2.0), ("a", 3.0)]


def test_a_site_does_one_task_after_the_other() -> None:
    found = engine(3.0, 1.0, 2.0)
    first, second = found.send(Task(FIT, 1, W), ["a", "b"]), found.send(Task(FIT, 2, W), ["b", "c"])
    assert arrivals(found, ticket=second) == [("b", 2.0), ("c", 2.0)]
    assert arrivals(found, ticket=first) == [("b", 2.0), ("a", 3.0)]


def test_what_travels_takes_its_time_and_an_evaluation_takes_none() -> None:
    found = engine(1.0, 1.0, 1.0, bandwidth=32.0)  # 16 bytes each way
    found.send(Task(FIT, 1, W), ["a"])
    assert arrivals(found) == [("a", 2.0)]
    found.send(Task(EVALUATE, 1, W), ["b"])
    assert arrivals(found) == [("b", 2.0)]


def test_who_is_late_is_free_for_the_next_round() -> None:
    found = engine(3.0, 1.0, 2.0)
    replies = list(found.exchange(Task(FIT, 1, W), NAMES, 2.5))
    assert [reply.status for reply in replies] == [Status.LATE, Status.USED, Status.USED]
    assert replies[0].reason == "no reply within 2.5 s"
    assert found.simulated_seconds() == 2.5
    found.send(Task(FIT, 2, W), ["a"])
    assert arrivals(found) == [("a", 5.5)]


def test_a_round_may_wait_for_so_many_alone() -> None:
    found = engine(3.0, 1.0, 2.0)
    replies = list(found.exchange(Task(FIT, 1, W), NAMES, enough=2))
    assert [(reply.site, reply.status) for reply in replies] == [
        ("a", Status.LATE),
        ("b", Status.USED),
        ("c", Status.USED),
    ]
    assert replies[0].reason == "later than 2 others"
    assert found.simulated_seconds() == 2.0


def test_who_fails_is_not_among_those_that_a_round_waits_for() -> None:
    profiles = {name: SiteProfile(seconds=s) for name, s in zip(NAMES, (1.0, 2.0, 3.0), strict=True)}
    program = SiteProgram(client=clients.Faulty, kwargs={"mode": "raise"})
    with VirtualEngine(LocalEngine(program, NAMES), profiles) as found:
        statuses = [reply.status for reply in found.exchange(Task(FIT, 1, W), NAMES, enough=2)]
    assert statuses.count(Status.LATE) == 0
    assert statuses.count(Status.FAILED) >= 1


def test_a_site_begins_when_it_is_there() -> None:
    found = engine(1.0, 1.0, 1.0, period=10.0, online=0.5, offset=6.0)
    found.send(Task(FIT, 1, W), ["a"])
    assert arrivals(found) == [("a", 5.0)]


def test_who_is_there_is_waited_for() -> None:
    profiles = {
        "a": SiteProfile(seconds=1.0, period=10.0, online=0.3, offset=0.0),  # there in [0, 3), [10, 13)
        "b": SiteProfile(seconds=1.0, period=10.0, online=0.3, offset=8.0),  # [2, 5), [12, 15)
        "c": SiteProfile(seconds=1.0, period=10.0, online=0.3, offset=5.0),  # [5, 8), [15, 18)
    }
    found = VirtualEngine(LocalEngine(SiteProgram(client=clients.Base), NAMES), profiles)
    assert (found.present(1), found.simulated_seconds()) == (["a"], 0.0)
    assert (found.present(2), found.simulated_seconds()) == (["a", "b"], 2.0)
    assert (found.present(3), found.simulated_seconds()) == (["a", "b"], 2.0), "all three never are"


def test_moments_of_presence_are_those_of_a_brute_force() -> None:
    profile = SiteProfile(seconds=1.0, period=7.0, online=0.4, offset=3.0)
    for time in np.arange(0, 30, 0.25):
        later = [t for t in np.arange(time, time + 8, 0.05) if profile.is_online(t)]
        assert profile.next_online(time) == pytest.approx(later[0], abs=0.06)
        assert profile.is_online(profile.next_online(time) + 1e-9)


def test_speeds_are_drawn_by_the_seed_about_the_median() -> None:
    clock = VirtualClock(site_seconds=2.0, site_spread=0.5, site_bandwidth=100.0, site_period=24.0, site_online=0.5)
    names = [f"s{number}" for number in range(2000)]
    drawn = clock.profiles(names, 3)
    assert drawn == clock.profiles(names, 3) != clock.profiles(names, 4)
    logs = np.log([profile.seconds for profile in drawn.values()])
    assert np.median(logs) == pytest.approx(np.log(2.0), abs=0.05)
    assert np.std(logs) == pytest.approx(0.5, abs=0.03)
    assert np.mean([profile.is_online(0.0) for profile in drawn.values()]) == pytest.approx(0.5, abs=0.04)
    assert all(profile.bandwidth == 100.0 for profile in drawn.values())
    assert VirtualClock(site_seconds=1.0).profiles(["a"], 0)["a"].bandwidth == math.inf


@pytest.mark.parametrize(
    "options", [{"site_seconds": -1.0}, {"site_seconds": math.nan}, {"site_online": 0.0}, {"site_spread": 1.0}]
)
def test_clocks_that_are_none_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        VirtualClock(**options)
    with pytest.raises(ConfigError, match="site_seconds must come with backend=sim"):
        ESM2RunConfig(simulation=VirtualClock(site_seconds=1.0), federation=FederationConfig(backend="flower"))


CLOCK = VirtualClock(site_seconds=1.0, site_spread=0.8, site_bandwidth=100.0, site_period=6.0, site_online=0.6)


def recipe(kind: Any, **options: Any) -> FedAvgRecipe:
    federation = FederationConfig(num_clients=6, num_rounds=5, fraction_fit=options.pop("fraction_fit", 1.0), seed=2)
    start = {"w": np.ones(3)}
    return kind(name="t", client=Steered, initial_parameters=start, federation=federation, **options)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fedavg": (FedAvgRecipe, {"fraction_fit": 0.5}),
    "fedbuff": (FedBuffRecipe, {"buffer": 3, "concurrency": 5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_stopped_goes_on_at_the_same_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.server.session.write_report", lambda out: None)
    monkeypatch.setattr("sfl.io.metrics._open_scalars", lambda folder: None)
    kind, options = KINDS[name]
    env = SimEnv(device="cpu", clock=CLOCK)
    recorder = clients.Recorder()
    whole = recipe(kind, **options).execute(env, out=tmp_path / "whole", observers=(recorder,))
    times = [r.fit[SIMULATED_SECONDS] for r in whole.rounds]
    assert times == sorted(times)
    assert len(set(times)) == 6
    for stop_at in range(3, len(recorder.events), 4):
        out = tmp_path / str(stop_at)
        with pytest.raises(InterruptedError):
            recipe(kind, **options).execute(env, out=out, observers=(clients.Recorder(stop_at),))
        again = recipe(kind, **options).execute(env, out=out, resume=True)
        assert again.parameters["w"].tobytes() == whole.parameters["w"].tobytes()
        assert again.rounds == () or again.rounds[-1].fit == whole.rounds[-1].fit


def test_nobody_waits_for_the_slowest_under_fedbuff() -> None:
    slow = VirtualClock(site_seconds=1.0, site_spread=1.5)
    env = SimEnv(device="cpu", clock=slow)
    ended = [
        recipe(kind, **options).execute(env).rounds[-1].fit[SIMULATED_SECONDS]
        for kind, options in ((FedAvgRecipe, {}), (FedBuffRecipe, {"buffer": 3}))
    ]
    slowest = max(p.seconds for p in slow.profiles([f"site-{i}" for i in range(1, 7)], 2).values())
    assert ended[0] == pytest.approx(5 * slowest)
    assert ended[1] < 0.5 * ended[0]


def test_a_round_that_waits_for_so_many_says_who_was_late() -> None:
    env = SimEnv(device="cpu", clock=VirtualClock(site_seconds=1.0, site_spread=1.0))
    made = recipe(FedAvgRecipe)
    made = FedAvgRecipe(
        name="t",
        client=Steered,
        initial_parameters={"w": np.ones(3)},
        federation=FederationConfig(num_clients=6, num_rounds=2, wait_for=4, min_available_clients=3),
    )
    result = made.execute(env)
    late = [site.site for site in result.rounds[1].sites if site.status is Status.LATE]
    seconds = env.clock.profiles([f"site-{i}" for i in range(1, 7)], 0)
    assert late == sorted(sorted(seconds, key=lambda site: seconds[site].seconds)[4:])
    with pytest.raises(ConfigError, match="wait_for must be 0"):
        FederationConfig(num_clients=6, wait_for=2, min_available_clients=3)
