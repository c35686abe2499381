"""The loop: what a round computes, whom it samples, and what becomes of sites that break the contract."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from sfl.client.base import BaseFederatedClient
from sfl.client.site import SiteProgram
from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.core.events import StageStarted
from sfl.core.task import EVALUATE, FIT, Reply, Status, Task, Update
from sfl.engine.base import Engine
from sfl.engine.local import LocalEngine
from sfl.env import SimEnv
from sfl.errors import CompositionError, RoundError
from sfl.recipe import FedAvgRecipe, RunResult, SumRecipe
from sfl.server.federate import Hooks, federate
from sfl.server.job import Job
from sfl.server.strategy import FedAvg
from sfl.types import ClientUpdate, Config, Evaluation, FederationConfig, Parameters

CPU = SimEnv(device="cpu")


def run(client: Any, sites: int = 3, rounds: int = 1, **options: Any) -> tuple[RunResult, clients.Recorder]:
    names = {"fraction_fit", "min_available_clients", "seed", "workers", "round_timeout"}
    federation = FederationConfig(
        num_clients=sites, num_rounds=rounds, **{k: options.pop(k) for k in names & options.keys()}
    )
    start = options.pop("start", {"w": np.zeros(2)})
    out = options.pop("out", None)
    recorder = clients.Recorder()
    recipe = FedAvgRecipe(name="test", client=client, initial_parameters=start, federation=federation, **options)
    return recipe.execute(CPU, out=out, observers=(recorder,)), recorder


# The promised example


@pytest.mark.parametrize("workers", [1, 2])
def test_the_promised_example(workers: int) -> None:
    recipe = FedAvgRecipe(
        name="mine",
        client=clients.MyClient,
        client_kwargs={"swallowed": 1, "learning_rate": 99.0},
        initial_parameters={"w": np.zeros(2), "b": np.ones(1)},
        federation=FederationConfig(num_clients=2, num_rounds=3),
    )
    result = recipe.execute(SimEnv(num_clients=2, num_threads=workers, device="cpu"))
    np.testing.assert_allclose(result.parameters["w"], 3 * (0.1 * 10 + 0.2 * 20) / 30 * np.ones(2), rtol=1e-12)
    assert result.rounds[-1].fit == {"loss": 0.5}
    assert result.rounds[-1].evaluation["accuracy"] == 0.25
    assert [r.round for r in result.rounds] == [0, 1, 2, 3]


def test_the_promised_example_defined_in_a_function_runs_in_process() -> None:
    class Mine(BaseFederatedClient):
        def __init__(self, client_id=0, device=None, **kwargs):
            super().__init__(client_id=client_id, device=device or "cpu")

        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            return {k: v + 1 for k, v in parameters.items()}, 1, {}

        def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
            return 0.0, 1, {}

    assert (run(Mine)[0].parameters["w"] == 1.0).all()


# Laws


def test_fedavg_of_one_site_is_that_site() -> None:
    result, _ = run(clients.LeastSquares, sites=1, rounds=4, start={"w": np.zeros(3)}, client_kwargs={"steps": 3})
    site, w = clients.LeastSquares(steps=3), np.zeros(3)
    for _ in range(4):
        w = site.compute_update({"w": w}, {})[0]["w"]
    np.testing.assert_allclose(result.parameters["w"], w, rtol=1e-13)


def test_full_batch_fedsgd_is_centralised_gradient_descent() -> None:
    result, _ = run(clients.LeastSquares, sites=4, rounds=25, start={"w": np.zeros(3)})
    x, y = (np.concatenate(part) for part in zip(*(clients.least_squares_data(i, 8) for i in range(4)), strict=True))
    w = np.zeros(3)
    for _ in range(25):
        w = w - 0.1 * x.T @ (x @ w - y) / len(y)
    np.testing.assert_allclose(result.parameters["w"], w, rtol=1e-12)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_rounds_are_the_weighted_mean_of_a_hand_written_loop(rate: float) -> None:
    result, recorder = run(
        clients.Wanderer, sites=3, rounds=4, seed=5, start={"w": np.arange(3.0)}, server_learning_rate=rate
    )
    sites, w = [clients.Wanderer(client_id=i) for i in range(3)], np.arange(3.0)
    for number in range(1, 5):
        replies = [site.compute_update({"w": w}, {"round": number, "seed": 5}) for site in sites]
        mean = sum(count * (new["w"] - w) for new, count, _ in replies) / sum(count for _, count, _ in replies)
        loss = sum(c * m["loss"] for _, c, m in replies) / sum(c for _, c, _ in replies)
        w = w + rate * mean
        assert recorder.rounds[number].fit["loss"] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(result.parameters["w"], w, rtol=1e-12)


def test_a_narrow_integer_is_averaged_as_a_number_not_modulo_its_range() -> None:
    class Spread(clients.Base):
        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            far = {"u": [3, 7, 250], "i": [-128, 2, 120], "flag": [False, True, True]}
            return {k: np.full_like(v, far[k][self.client_id]) for k, v in parameters.items()}, 1, {}

    start = {"u": np.array([5], np.uint8), "i": np.array([127], np.int8), "flag": np.array([False])}
    result, recorder = run(Spread, start=start)
    assert recorder.statuses() == [Status.USED] * 3
    assert {k: v.tolist() for k, v in result.parameters.items()} == {"u": [87], "i": [-2], "flag": [True]}
    assert {k: v.dtype for k, v in result.parameters.items()} == {k: v.dtype for k, v in start.items()}


def test_a_large_counter_keeps_its_last_bits() -> None:
    result, _ = run(clients.Base, start={"w": np.zeros(1), "count": np.array(2**60 + 1)})
    assert int(result.parameters["count"]) == 2**60 + 2


# Sampling


def cohorts(fraction: float, seed: int = 0, sites: int = 10, **options: Any) -> list[tuple[str, ...]]:
    _, recorder = run(clients.Base, sites, 6, fraction_fit=fraction, seed=seed, evaluate_every=0, **options)
    return [e.cohort for e in recorder.events if isinstance(e, StageStarted)]


def test_sampling_is_reproducible_of_the_right_size_and_varies() -> None:
    first = cohorts(0.3)
    assert first == cohorts(0.3) != cohorts(0.3, seed=1)
    assert all(len(set(cohort)) == 3 and list(cohort) == sorted(cohort) for cohort in first)
    assert len(set(first)) > 1
    assert all(len(cohort) == 10 for cohort in cohorts(1.0))
    assert all(len(cohort) == 1 for cohort in cohorts(0.01))
    assert all(len(cohort) == 4 for cohort in cohorts(0.1, min_available_clients=4))


def test_every_site_is_sampled_about_equally_often() -> None:
    algorithm, names = FedAvg(fraction_fit=0.3), [f"site-{i}" for i in range(10)]
    state = algorithm.init({"w": np.zeros(1)})
    counts = dict.fromkeys(names, 0)
    for number in range(600):
        for site in algorithm.plan(type(state)(number, state.parameters), names)[1]:
            counts[site] += 1
    assert max(abs(count - 180) for count in counts.values()) < 5 * np.sqrt(600 * 0.3 * 0.7)


# Sites that break the contract

REJECTED = {
    "missing": "missing 'w'",
    "extra": "unexpected 'more'",
    "shape": "must have shape (2,), got (1,)",
    "kind": "must have a dtype like float64, got int64",
    "complex": "got complex128",
    "list": "must be a numpy array, got list",
    "not a dict": "must be a dict of named arrays, got list",
    "nan": "must be finite, got NaN",
    "inf": "must be finite, got inf",
    "zero": "num_examples must be a positive integer, got 0",
    "negative": "num_examples must be a positive integer, got -3",
    "float count": "got 1.5",
    "true count": "got True",
    "bare": "must return (parameters, num_examples, metrics), got dict",
    "pair": "must return (parameters, num_examples, metrics), got tuple",
    "none": "got NoneType",
    "metrics": "metric 'loss' must be a number, got str",
    "no metrics": "metrics must be a dict of named numbers, got NoneType",
}
FAILED = {
    "raise": "ValueError: no data",
    "write": "read-only",
    "sys.exit": "SystemExit: 0",
}


@pytest.mark.parametrize("mode", [*REJECTED, *FAILED])
def test_a_site_that_breaks_the_contract_is_named_and_left_out(mode: str, tmp_path: Path) -> None:
    result, recorder = run(clients.Faulty, rounds=2, client_kwargs={"mode": mode}, out=tmp_path / "run")
    bad = recorder.site("site-2")
    assert bad.status == (Status.REJECTED if mode in REJECTED else Status.FAILED)
    assert bad.reason.startswith("site-2: ")
    assert (REJECTED | FAILED)[mode] in bad.reason
    assert (bad.num_examples, bad.metrics, bad.nbytes) == (0.0, {}, 0)
    assert recorder.statuses(1) == [Status.USED, bad.status, Status.USED]
    assert recorder.statuses(2) == [Status.USED] * 3
    assert (result.parameters["w"] == 2.0).all()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (written,) = [s for s in lines[1]["sites"] if s["site"] == "site-2" and s["stage"] == "fit"]
    assert (written["status"], written["reason"]) == (bad.status, bad.reason)


def test_a_difference_past_the_range_is_rejected_without_a_warning() -> None:
    _, recorder = run(clients.Faulty, client_kwargs={"mode": "huge"}, start={"w": np.array([-1.7e308, 1.7e308])})
    assert "must be finite, got inf" in recorder.site("site-2").reason


def test_a_failure_keeps_its_traceback() -> None:
    _, recorder = run(clients.Faulty, client_kwargs={"mode": "raise"})
    assert "in _raise" in recorder.site("site-2").details


def test_an_evaluation_that_is_nan_is_rejected_and_left_out_of_the_mean() -> None:
    result, recorder = run(clients.Faulty, rounds=2, client_kwargs={"mode": "evaluate nan"})
    bad = recorder.site("site-2", 1, EVALUATE)
    assert (bad.status, bad.reason) == (
        Status.REJECTED,
        "site-2: the loss of evaluate must be a finite number, got nan.",
    )
    assert [r.evaluation for r in result.rounds] == [{"loss": 0.5}] * 3


def test_below_the_minimum_the_round_fails_with_every_reason() -> None:
    with pytest.raises(RoundError, match=r"(?s)round 1 must have at least 3 usable updates, got 2 of 3.*\n  site-2: "):
        run(clients.Faulty, client_kwargs={"mode": "nan"}, min_available_clients=3)


def test_when_nobody_is_left_every_reason_is_listed() -> None:
    with pytest.raises(RoundError) as caught:
        run(clients.Base, transforms=(clients.RaiseAt("site-1", "site-2", "site-3"),))
    text = str(caught.value)
    assert "got 0 of 3" in text
    for site in ("site-1", "site-2", "site-3"):
        assert f"\n  {site}: ArithmeticError: the transform broke" in text


def test_a_transform_that_raises_drops_that_reply_alone() -> None:
    result, recorder = run(clients.Base, transforms=(clients.RaiseAt("site-2"),))
    assert recorder.site("site-2").reason == "site-2: ArithmeticError: the transform broke"
    assert recorder.statuses() == [Status.USED, Status.FAILED, Status.USED]
    assert (result.parameters["w"] == 1.0).all()


def test_the_server_looks_again_after_the_transforms() -> None:
    _, recorder = run(clients.Base, transforms=(clients.PoisonAt("site-2"),))
    assert recorder.site("site-2").status is Status.REJECTED
    assert "must be finite, got NaN" in recorder.site("site-2").reason


def test_an_aggregators_own_refusal_keeps_its_words() -> None:
    class Picky(WeightedMean):
        def aggregate(self, updates: Iterable[Update]) -> Update:
            super().aggregate(updates)
            raise RoundError("trimming 2 of each side must leave an update, got 3 in all.")

    with pytest.raises(RoundError, match="trimming 2 of each side"):
        run(clients.Base, aggregator=Picky())


def test_an_aggregator_that_remembers_is_handed_what_it_remembered() -> None:
    first, _ = run(clients.Base, rounds=1, aggregator=clients.Remembers(), start={"f8": np.zeros(2)})
    third, _ = run(clients.Base, rounds=3, aggregator=clients.Remembers(), start={"f8": np.zeros(2)})
    assert first.parameters["f8"].tolist() == [1.0, 1.0]
    assert third.parameters["f8"].tolist() == [4.25, 4.25]  # 1 + 1.5 + 1.75
    assert third.state.aggregator["sent"] == 2 * (0.0 + 1.0 + 2.5)


def test_an_aggregator_says_before_the_run_that_rounds_are_too_small() -> None:
    with pytest.raises(CompositionError, match="rounds of 2 sites, got 1"):
        run(clients.Base, sites=1, aggregator=clients.Remembers(), start={"f8": np.zeros(2)})


# What clients share


def test_a_client_that_works_in_the_mapping_it_was_handed_trains_and_disturbs_nobody() -> None:
    result, recorder = run(clients.Meddler, rounds=2, start={"w": np.zeros(2), "b": np.zeros(1)})
    assert recorder.statuses(2) == [Status.USED] * 3
    assert result.parameters["w"].tolist() == [2.0, 2.0]
    assert [r.evaluation["loss"] for r in result.rounds] == [0.0, 2.0, 4.0]


def test_arrays_that_a_client_keeps_stay_as_they_were() -> None:
    clients.Hoarder.kept.clear()
    run(clients.Hoarder, rounds=3)
    assert len(clients.Hoarder.kept) == 9
    assert all((array == copy).all() for array, copy in clients.Hoarder.kept)


def test_arrays_that_a_client_lends_become_its_delta() -> None:
    clients.Lender.kept.clear()
    result, _ = run(clients.Lender, rounds=3)
    assert any((array != copy).any() for array, copy in clients.Lender.kept)
    assert (result.parameters["w"] == 3.0).all()


def test_the_initial_parameters_stay_the_callers() -> None:
    start = {"w": np.zeros(2)}
    result, _ = run(clients.Lender, rounds=2, start=start)
    result.parameters["w"][:] = 9.0
    assert (start["w"] == 0.0).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_aggregator_of_individuals_may_keep_and_change_what_it_gets(workers: int) -> None:
    class Keeper(Aggregator):
        def aggregate(self, updates: Iterable[Update]) -> Update:
            kept = list(updates)
            self.values = [update.delta["w"].tolist() for update in kept]
            for update in kept:
                update.delta["w"][:] = -100.0
            return Update("server", {"w": np.ones(2)}, 1.0)

    keeper = Keeper()
    result, _ = run(clients.MyClient, sites=4, rounds=1, workers=workers, aggregator=keeper, evaluate_every=0)
    np.testing.assert_allclose(keeper.values, [[0.1 * k] * 2 for k in (1, 2, 3, 4)])
    assert (result.parameters["w"] == 1.0).all()


def test_sum_starts_from_zero_in_every_round() -> None:
    from sfl.client.sum_client import SumClient

    recipe = SumRecipe(
        name="sum",
        client=SumClient,
        initial_parameters={"sum": np.full(1, 50.0)},
        federation=FederationConfig(num_clients=3, num_rounds=3, min_available_clients=2, fraction_fit=0.5),
    )
    assert recipe.execute(CPU).parameters["sum"].tolist() == [24.0]


# An engine that delivers what no site of ours would send


class Hostile(Engine):
    """Three honest sites and whatever ``forged`` holds in place of theirs."""

    def __init__(self, forged: dict[str, Reply]) -> None:
        self.forged = forged

    def clients(self) -> list[str]:
        return ["site-1", "site-2", "site-3"]

    def send(self, task: Task, clients: Sequence[str]) -> int:
        self.sent = list(clients)
        return 1

    def cancel(self, ticket: int) -> None:
        self.sent = []

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        for site in self.sent:
            yield self.forged.get(site) or Reply(site, Status.USED, Update(site, {"w": np.ones(2)}, 1.0))

    def describe(self) -> str:
        return "hostile"


def delivered(reply: Reply) -> tuple[Parameters, clients.Recorder]:
    recorder = clients.Recorder()
    job = Job(
        name="test",
        initial=lambda: {"w": np.zeros(2)},
        algorithm=FedAvg(),
        aggregator=WeightedMean(),
        program=SiteProgram(client=clients.Base),
        federation=FederationConfig(num_clients=3, num_rounds=1),
        evaluate_every=0,
    )
    state = federate(job, Hostile({"site-2": reply}), hooks=Hooks(observers=(recorder,)))
    return state.parameters, recorder


def forged(delta: Any = None, weight: Any = 1.0, **fields: Any) -> Reply:
    update = Update(fields.pop("site", "site-2"), {"w": np.ones(2)} if delta is None else delta, weight)
    return Reply("site-2", Status.USED, Update(update.site, update.delta, update.weight, **fields))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (forged({"w": np.array([np.nan, 0.0])}), "must be finite, got NaN"),
        (forged({"w": np.array([np.inf, 0.0])}), "must be finite, got inf"),
        (forged({"v": np.ones(2)}), "unexpected 'v'"),
        (forged({"w": np.ones(3)}), "must have shape (2,), got (3,)"),
        (forged({"w": np.ones(2, np.int64)}), "must have a dtype like float64"),
        (forged({"w": [1.0, 1.0]}), "must be a numpy array"),
        (forged("w"), "must be a dict"),
        (forged(weight=0.0), "weight must be positive and finite, got 0.0"),
        (forged(weight=-1.0), "weight must be positive and finite"),
        (forged(weight=float("nan")), "weight must be positive and finite, got nan"),
        (forged(weight=float("inf")), "weight must be positive and finite, got inf"),
        (forged(metrics={"loss": "low"}), "metric 'loss' must be a number"),
        (forged(site="site-1"), "must hold the site's own update, got that of 'site-1'"),
        (Reply("site-2", Status.USED), "must hold the site's own update, got none"),
    ],
)
def test_the_server_screens_what_an_engine_delivers(reply: Reply, reason: str) -> None:
    parameters, recorder = delivered(reply)
    assert recorder.statuses() == [Status.USED, Status.REJECTED, Status.USED]
    assert recorder.site("site-2").reason.startswith("site-2: ")
    assert reason in recorder.site("site-2").reason
    assert (parameters["w"] == 1.0).all()


def test_an_update_beside_another_status_is_not_used() -> None:
    huge = Update("site-2", {"w": np.full(2, 1e6)}, 1.0)
    parameters, recorder = delivered(Reply("site-2", Status.LATE, huge, reason="late"))
    assert recorder.site("site-2").status is Status.LATE
    assert (parameters["w"] == 1.0).all()


def test_a_federation_runs_on_an_engine_handed_to_the_loop() -> None:
    job = FedAvgRecipe(name="t", client=clients.Base, initial_parameters={"w": np.zeros(1)}).build()
    state = federate(job, LocalEngine(job.program, ["site-1", "site-2"]))
    assert (state.round, state.parameters["w"].tolist()) == (3, [3.0])


def test_evaluation_happens_where_asked_and_after_the_last_round() -> None:
    _, recorder = run(clients.Base, rounds=5, evaluate_every=2, central=lambda p: {"w": float(p["w"][0])})
    stages = [(e.round, e.stage) for e in recorder.events if isinstance(e, StageStarted)]
    assert [number for number, stage in stages if stage == EVALUATE] == [0, 2, 4, 5]
    assert [number for number, stage in stages if stage == FIT] == [1, 2, 3, 4, 5]
    assert [r.central for r in recorder.rounds] == [{"w": 0.0}, {}, {"w": 2.0}, {}, {"w": 4.0}, {"w": 5.0}]


def test_bytes_of_a_round_are_its_training_exchange() -> None:
    _, recorder = run(clients.Base, rounds=1)
    assert [(r.bytes_down, r.bytes_up) for r in recorder.rounds] == [(0, 0), (48, 48)]
