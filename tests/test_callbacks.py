"""Named moments of a run, on the server and on the sites; what callbacks remember; the best model; early stopping."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from sfl.client.base import BaseFederatedClient
from sfl.client.callbacks import SiteCallback
from sfl.core import events
from sfl.core.task import Reply, Task
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.io.checkpoint import Checkpoints, load_state
from sfl.recipe import FedAvgRecipe
from sfl.server.callbacks import Callback, EarlyStopping, RunView
from sfl.server.selection import Selection, is_better, lower_is_better
from sfl.types import ClientUpdate, Config, Evaluation, FederationConfig, Parameters

CPU = SimEnv(device="cpu")
LOSSES = (5.0, 4.0, 2.0, 3.0, 2.5, 2.25, 6.0, 7.0)


class Scripted(BaseFederatedClient):
    """Counts rounds in ``w``; the loss of the model after round r is the r-th of ``LOSSES``."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        return {"w": parameters["w"] + 1.0}, 1, {"accuracy": float(parameters["w"][0])}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return LOSSES[int(parameters["w"][0])], 1, {}


def recipe(**fields: Any) -> FedAvgRecipe:
    federation = FederationConfig(num_clients=2, num_rounds=fields.pop("rounds", 7))
    made = FedAvgRecipe(name="t", client=Scripted, initial_parameters={"w": np.zeros(1)}, federation=federation)
    return replace(made, **fields)


@dataclass(frozen=True)
class Tells(Callback):
    """Notes every moment, with what it sees."""

    heard: list[tuple[str, int, float]] = field(default_factory=list)

    def note(self, run: RunView, event: events.Event) -> None:
        assert (run.job, run.clients, run.rounds) == ("t", ("site-1", "site-2"), 2)
        self.heard.append((type(event).__name__, run.state.round, float(run.parameters["w"][0])))

    on_run_started = on_round_started = on_stage_started = on_site_finished = on_site_logged = note
    on_aggregation_started = on_aggregation_finished = on_best_model_selected = on_round_finished = note
    on_notice = on_run_finished = on_run_failed = note


def test_every_moment_is_told_in_order_with_the_state_of_then() -> None:
    tells = Tells()
    recipe(callbacks=(tells,), rounds=2).execute(CPU)
    round1 = [
        ("RoundStarted", 0, 0.0),
        ("StageStarted", 0, 0.0),
        ("SiteFinished", 0, 0.0),
        ("AggregationStarted", 0, 0.0),
        ("SiteFinished", 0, 0.0),
        ("AggregationFinished", 1, 1.0),
        ("StageStarted", 1, 1.0),
        ("SiteFinished", 1, 1.0),
        ("SiteFinished", 1, 1.0),
        ("BestModelSelected", 1, 1.0),
        ("RoundFinished", 1, 1.0),
    ]
    assert tells.heard[0] == ("RunStarted", 0, 0.0)
    at = tells.heard.index(round1[0])
    assert tells.heard[at : at + len(round1)] == round1
    assert tells.heard[-1] == ("RunFinished", 2, 2.0)


def test_a_callback_cannot_change_the_parameters_it_sees() -> None:
    class Writes(Callback):
        def on_round_started(self, run: RunView, event: events.RoundStarted) -> None:
            run.parameters["w"][0] = 9.0

    with pytest.raises(ValueError, match="read-only"):
        recipe(callbacks=(Writes(),)).execute(CPU)


def test_a_failure_is_told_once_and_the_first_error_stays() -> None:
    class Fails(Callback):
        def on_run_failed(self, run: RunView, event: events.RunFailed) -> None:
            raise ValueError(f"heard {event.error} after {event.rounds}")

    heard: list[events.Event] = []
    bad = replace(
        recipe(callbacks=(Fails(),)),
        client=clients.Faulty,
        client_kwargs={"mode": "raise", "round": 2},
        federation=FederationConfig(num_clients=2, num_rounds=3, min_available_clients=2),
    )
    with pytest.raises(RoundError) as raised:
        bad.execute(CPU, observers=(heard.append,))
    assert [e.error for e in heard if isinstance(e, events.RunFailed)] == ["RoundError"]
    assert "heard RoundError after 1" in raised.value.__notes__[0]


@dataclass(frozen=True)
class Counts(Callback):
    stop_at: int = 99

    def on_round_finished(self, run: RunView, event: events.RoundFinished) -> None:
        run.memory["seen"] = [*run.memory.get("seen", []), event.round]  # type: ignore[misc]
        if event.round == self.stop_at:
            run.stop("enough")


def test_what_callbacks_remember_is_checkpointed_and_a_stopped_run_stays_stopped(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = recipe(callbacks=(Counts(), Counts(stop_at=3))).execute(CPU, out=out)
    assert (first.state.round, first.reason, first.state.stopped) == (3, "enough", "enough")
    assert first.state.callbacks == [{"seen": [0, 1, 2, 3]}, {"seen": [0, 1, 2, 3]}]
    again = recipe(callbacks=(Counts(), Counts())).execute(CPU, out=out, resume=True)
    assert (again.state.round, again.reason) == (3, "enough")


def test_a_resumed_run_remembers_as_an_uninterrupted_one(tmp_path: Path) -> None:
    recipe(callbacks=(Counts(), EarlyStopping(patience=2)), rounds=3).execute(CPU, out=tmp_path / "run")
    rest = recipe(callbacks=(Counts(), EarlyStopping(patience=2))).execute(CPU, out=tmp_path / "run", resume=True)
    whole = recipe(callbacks=(Counts(), EarlyStopping(patience=2))).execute(CPU)
    assert rest.state.callbacks == whole.state.callbacks
    assert (rest.state.round, rest.reason) == (whole.state.round, whole.reason) == (4, whole.reason)
    assert "loss has not improved on 2 of round 2" in whole.reason


@pytest.mark.parametrize(
    ("stopping", "rounds"),
    [
        (EarlyStopping(patience=1), 3),
        (EarlyStopping(patience=4), 6),
        (EarlyStopping(patience=9), 7),
        (EarlyStopping(patience=2, mode="max"), 3),
        (EarlyStopping(metric="accuracy", patience=1), 7),
        (EarlyStopping(metric="none of it", patience=1), 7),
        (EarlyStopping(patience=2, min_delta=2.5), 3),
    ],
)
def test_early_stopping_waits_for_its_patience(stopping: EarlyStopping, rounds: int) -> None:
    assert recipe(callbacks=(stopping,)).execute(CPU).state.round == rounds


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="patience >= 1"):
        EarlyStopping(patience=0)
    with pytest.raises(CompositionError, match="key_metric_mode must be"):
        recipe(key_metric_mode="best").build()
    with pytest.raises(TypeError, match="Did you mean on_round_finished"):
        type("Wrong", (Callback,), {"on_round_finish": print})
    with pytest.raises(TypeError, match="Did you mean on_task_started"):
        type("Wrong", (SiteCallback,), {"on_task_start": print})


# The best model


def test_the_best_model_is_kept_and_named(tmp_path: Path) -> None:
    result = recipe().execute(CPU, out=tmp_path / "run")
    best = result.best
    assert best is not None
    assert (best.round, best.metric, best.value) == (2, "loss", 2.0)
    assert best.parameters["w"].tolist() == [2.0]
    assert load_state(tmp_path / "run" / "best.safetensors").round == 2


def test_without_a_folder_only_its_figures_are_known() -> None:
    best = recipe().execute(CPU).best
    assert best is not None
    assert best.round == 2
    with pytest.raises(
        ConfigError, match="the best model must lie in the run's folder, got none; it is that of round 2"
    ):
        _ = best.parameters
    last = recipe(rounds=2).execute(CPU).best
    assert last is not None
    assert last.parameters["w"].tolist() == [2.0]


def test_a_figure_that_nobody_reports_selects_nothing() -> None:
    assert recipe(key_metric="f1").execute(CPU).best is None
    assert recipe(evaluate_every=0).execute(CPU).best is None  # training's figures are of no global model


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    recipe(rounds=4).execute(CPU, out=tmp_path / "run")
    rest = recipe().execute(CPU, out=tmp_path / "run", resume=True)
    assert rest.best is not None
    assert (rest.best.round, rest.best.parameters["w"].tolist()) == (2, [2.0])


def test_pruning_spares_the_best(tmp_path: Path) -> None:
    state = recipe().execute(CPU).state
    kept = Checkpoints(tmp_path, keep=2)
    for round in range(1, 6):
        kept.save(replace(state, round=round, best={"round": 2, "metric": "loss", "value": 2.0}))
    assert [load_state(path).round for path in kept.paths()] == [2, 4, 5]


@pytest.mark.parametrize(
    ("name", "lower"),
    [("loss", True), ("val_loss", True), ("val/Perplexity", True), ("accuracy", False), ("glossary", False)],
)
def test_losses_and_errors_are_better_when_lower(name: str, lower: bool) -> None:
    assert lower_is_better(name) is lower


def test_what_is_no_number_is_never_best() -> None:
    nan = float("nan")
    assert not is_better(nan, 1.0, lower=True)
    assert not is_better(nan, nan, lower=True)
    assert is_better(1.0, nan, lower=False)
    assert Selection().better(None, 1, {"loss": nan}) is None
    assert Selection(metric="loss", mode="max").better(None, 1, {"loss": 1.0}) == {
        "round": 1,
        "metric": "loss",
        "value": 1.0,
    }


def test_what_scripts_report_as_they_train_is_of_the_model_they_were_sent_and_the_last_is_scored_too() -> None:
    selection = Selection(received=True)
    best = None
    for round, accuracy in enumerate([0.1, 0.4, 0.3]):  # after round 3, from the evaluation at the end: 0.5
        best = selection.better(best, round, {"accuracy": accuracy}) or best
    assert best == {"round": 1, "metric": "accuracy", "value": 0.4}
    assert selection.better(best, 3, {"accuracy": 0.5}) == {"round": 3, "metric": "accuracy", "value": 0.5}


# On the sites


@dataclass(frozen=True)
class SiteNotes(SiteCallback):
    """Writes what it hears to a file."""

    path: str

    def note(self, **said: Any) -> None:
        with Path(self.path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")

    def on_task_started(self, site: str, task: Task) -> None:
        self.note(moment="started", site=site, task=task.name, round=task.round)

    def on_task_finished(self, site: str, task: Task, reply: Reply) -> None:
        self.note(moment="finished", site=site, status=reply.status.value)

    def on_task_failed(self, site: str, task: Task, error: BaseException) -> None:
        self.note(moment="failed", site=site, error=str(error))

    def on_site_closed(self, site: str) -> None:
        self.note(moment="closed", site=site)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sites_moments_are_told_where_it_works(threads: int, tmp_path: Path) -> None:
    notes = SiteNotes(str(tmp_path / "notes"))
    job = replace(
        recipe(site_callbacks=(notes,), rounds=1, evaluate_every=0),
        client=clients.Faulty,
        client_kwargs={"mode": "raise"},
        federation=FederationConfig(num_clients=3, num_rounds=1, min_available_clients=1),
    )
    job.execute(SimEnv(device="cpu", num_threads=threads))
    heard = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    first = [said["moment"] for said in heard if said["site"] == "site-1"]
    second = [said for said in heard if said["site"] == "site-2"]
    assert first == ["started", "finished", "closed"]
    assert [said["moment"] for said in second][:2] == ["started", "failed"]
    assert second[1]["error"]


def test_a_site_callback_that_raises_fails_its_task() -> None:
    class Refuses(SiteCallback):
        def on_task_started(self, site: str, task: Task) -> None:
            if site == "site-1":
                raise PermissionError("not today")

        def on_task_failed(self, site: str, task: Task, error: BaseException) -> None:
            raise ValueError("nor this")

    result = replace(
        recipe(site_callbacks=(Refuses(),), rounds=1, evaluate_every=0),
        federation=FederationConfig(num_clients=2, num_rounds=1, min_available_clients=1),
    ).execute(CPU)
    failed = result.rounds[1].sites[0]
    assert failed.reason == "site-1: PermissionError: not today"
    assert "in Refuses.on_task_failed: ValueError: nor this" in failed.details
