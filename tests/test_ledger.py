"""The ledger is on disk before anything leaves and cannot be edited unseen; the halves of a mechanism run in place."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from sfl.core.events import StageStarted
from sfl.core.mechanism import DpEvent
from sfl.core.task import FIT, Status
from sfl.core.transform import Chain, Divide
from sfl.engine.local import LocalEngine
from sfl.env import SimEnv
from sfl.errors import BudgetExhausted, CompositionError, ConfigError, LedgerError
from sfl.privacy import ledger as ledger_module
from sfl.privacy.anchor import ledgers_folder
from sfl.privacy.ledger import PrivacyLedger, dataset_ledger
from sfl.recipe import FedAvgRecipe
from sfl.server.federate import Hooks, federate
from sfl.types import FederationConfig

EVENT = clients.TestMechanism("central").event(2, 4)


def filled(path: Path, rounds: int = 4) -> PrivacyLedger:
    ledger = PrivacyLedger(path)
    for number in range(1, rounds + 1):
        ledger.charge(number, replace(EVENT, count=number))
    return ledger


def test_what_was_charged_is_read_back(tmp_path: Path) -> None:
    written = filled(tmp_path / "new" / "ledger.jsonl")
    read = PrivacyLedger(tmp_path / "new" / "ledger.jsonl")
    assert read.events == written.events == [replace(EVENT, count=n) for n in (1, 2, 3, 4)]
    read.charge(5, EVENT)
    assert len(PrivacyLedger(tmp_path / "new" / "ledger.jsonl").events) == 5


def test_without_a_file_it_counts_in_memory() -> None:
    ledger = PrivacyLedger()
    ledger.charge(1, EVENT)
    assert ledger.events == [EVENT]


def edited(lines: list[str]) -> list[str]:
    entry = json.loads(lines[2])
    entry["event"]["noise_multiplier"] = 100.0
    return [*lines[:2], json.dumps(entry) + "\n", *lines[3:]]


DAMAGE: dict[str, Callable[[list[str]], list[str]]] = {
    "edited": edited,
    "reordered": lambda lines: [lines[1], lines[0], *lines[2:]],
    "first line gone": lambda lines: lines[1:],
    "middle line gone": lambda lines: [lines[0], *lines[2:]],
    "line twice": lambda lines: [*lines, lines[-1]],
    "file twice": lambda lines: lines * 2,
    "torn in the line": lambda lines: [*lines[:-1], lines[-1][:40]],
    "torn before its newline": lambda lines: [*lines[:-1], lines[-1][:-1]],
    "blank line": lambda lines: [*lines, "\n"],
    "not an entry": lambda lines: [*lines, "3\n"],
    "unknown field": lambda lines: [lines[0], lines[1].replace('"unit"', '"units"'), *lines[2:]],
    "round changed": lambda lines: [lines[0], lines[1].replace('"round": 1', '"round": 2'), *lines[2:]],
    "no identity": lambda lines: [lines[0].replace('"ledger": "', '"ledger": "..'), *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_ledger_that_was_edited_or_torn_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path)
    path.write_text("".join(DAMAGE[damage](path.read_text().splitlines(keepends=True))))
    with pytest.raises(LedgerError, match=r"edited or torn; .* the run is refused"):
        PrivacyLedger(path)


def test_bytes_that_are_no_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(LedgerError, match="must be a readable ledger"):
        PrivacyLedger(path)
    with pytest.raises(LedgerError, match="must be a readable ledger"):
        PrivacyLedger(tmp_path)


def test_what_cannot_be_written_is_not_spent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ledger = PrivacyLedger(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(LedgerError, match="must be writable before anything is sent"):
        ledger.charge(1, EVENT)
    assert ledger.events == []


def test_a_ledger_must_cover_the_rounds_of_the_checkpoint(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.jsonl", 3)
    ledger.must_cover(0)
    ledger.must_cover(3)
    with pytest.raises(LedgerError, match=r"rounds 1 to 5 spent, got none of \[4, 5\]"):
        PrivacyLedger(tmp_path / "ledger.jsonl").must_cover(5)


def rechained(lines: list[str], change: Callable[[list[Any]], list[Any]]) -> str:
    """The lines after ``change``, under a hash chain that is whole."""
    hashes: list[str] = []
    written: list[str] = []
    for body in change([json.loads(line) for line in lines]):
        body.pop("hash")
        ledger_module._add_line(written, hashes, body)
    return "".join(written)


FORGED: dict[str, Callable[[list[Any]], list[Any]]] = {
    "an older copy": lambda bodies: bodies[:-1],
    "edited and chained anew": lambda bodies: [*bodies[:-1], bodies[-1] | {"round": 9}],
    "the middle left out and chained anew": lambda bodies: bodies[:2] + bodies[3:],
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_ledger_that_was_put_back_or_forged_does_not_fit_what_is_remembered(tmp_path: Path, forged: str) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    path.write_text(rechained(lines, FORGED[forged]))
    with pytest.raises(LedgerError, match="An older copy was put back, or it was edited"):
        PrivacyLedger(path)
    path.write_text(rechained(lines, lambda bodies: bodies))  # nothing else was wrong with it
    assert len(PrivacyLedger(path).events) == 4


def test_a_ledger_that_was_never_seen_on_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "ledger.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    (tmp_path / "another").write_text("")  # nor does it stop a run if nothing can be remembered
    ledger.charge(5, EVENT)
    assert len(PrivacyLedger(tmp_path / "ledger.jsonl").events) == 5


def test_an_unreadable_memory_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger.jsonl")
    (ledgers_folder() / "anchors" / f"{ledger.id}.json").write_text("3")
    with pytest.raises(LedgerError, match="must say what a ledger was, got '3'"):
        PrivacyLedger(tmp_path / "ledger.jsonl")


def test_runs_on_one_data_set_are_counted_together(tmp_path: Path) -> None:
    first = PrivacyLedger(tmp_path / "a.jsonl", dataset=dataset_ledger("trial-7"))
    first.charge(1, EVENT)
    asked: list[tuple[int, list[int]]] = []
    second = PrivacyLedger(
        tmp_path / "b.jsonl",
        budget=lambda events, earlier: asked.append((len(events), [len(run) for run in earlier])),
        dataset=dataset_ledger("trial-7"),
    )
    first.charge(2, EVENT, EVENT)  # at the same time
    second.charge(1, EVENT)
    assert asked == [(1, [3])]
    again = PrivacyLedger(tmp_path / "a.jsonl", dataset=dataset_ledger("trial-7"))
    assert (len(again.events), [len(run) for run in again.earlier()]) == (3, [1])
    (ledgers_folder() / "trial-7.jsonl").unlink()
    with pytest.raises(LedgerError, match="got 0 or others"):  # also by a run that has begun
        again.charge(3, EVENT)
    with pytest.raises(LedgerError, match="must hold the 5 lines that were written to it, got 0 or others"):
        dataset_ledger("trial-7")
    assert dataset_ledger("") is None
    with pytest.raises(ConfigError, match="a data set's name must be of letters"):
        dataset_ledger("../x")


def test_a_run_that_was_resumed_twice_counts_what_both_spend(tmp_path: Path) -> None:
    asked: list[int] = []
    filled(tmp_path / "ledger.jsonl", rounds=1)
    first, second = (
        PrivacyLedger(tmp_path / "ledger.jsonl", budget=lambda events, _: asked.append(len(events))) for _ in range(2)
    )
    first.charge(2, EVENT)
    second.charge(2, EVENT)
    first.charge(3, EVENT)
    assert asked == [2, 3, 4]
    assert [entry.round for entry in PrivacyLedger(tmp_path / "ledger.jsonl").entries] == [1, 2, 2, 3]


# In a run


def recipe(out: Path, placement: Any, rounds: int = 2, sites: int = 2, **options: Any) -> FedAvgRecipe:
    return FedAvgRecipe(
        name="dp",
        client=options.pop("client", clients.LedgerReader),
        client_kwargs=options.pop(
            "client_kwargs", {"ledger": str(out / "ledger.jsonl"), "log": str(out.with_suffix(".log"))}
        ),
        initial_parameters={"w": np.zeros(2)},
        mechanisms=(clients.TestMechanism(placement),),
        federation=FederationConfig(num_clients=sites, num_rounds=rounds),
        evaluate_every=options.pop("evaluate_every", 0),
        **options,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_line_is_on_disk_before_a_site_works(tmp_path: Path, workers: int) -> None:
    out = tmp_path / "run"
    recipe(out, "central", rounds=3).execute(SimEnv(num_threads=workers, device="cpu"), out=out)
    assert sorted(out.with_suffix(".log").read_text().splitlines()) == ["1 1", "1 1", "2 2", "2 2", "3 3", "3 3"]
    assert [event.sampling_rate for event in PrivacyLedger(out / "ledger.jsonl").events] == [1.0, 1.0, 1.0]


def test_local_noise_follows_the_clip_on_every_site(tmp_path: Path) -> None:
    result = recipe(tmp_path / "run", "local", rounds=1).execute(SimEnv(device="cpu"))
    np.testing.assert_allclose(result.parameters["w"], np.array([0.6, 0.8]) + 0.5, rtol=1e-12)
    assert result.state.mechanisms == []


def test_central_noise_is_added_to_the_sum_once(tmp_path: Path) -> None:
    result = recipe(tmp_path / "run", "central").execute(SimEnv(device="cpu"))
    np.testing.assert_allclose(result.parameters["w"], 2 * (2 * np.array([0.6, 0.8]) + 0.5) / 2, rtol=1e-12)
    assert result.state.mechanisms == [{"times": 2}, None]


def test_a_site_that_fails_does_not_change_the_divisor(tmp_path: Path) -> None:
    planned = recipe(
        tmp_path / "run", "central", rounds=1, sites=4, client=clients.Faulty, client_kwargs={"mode": "raise"}
    )
    result = planned.execute(SimEnv(device="cpu"))
    assert [s.status for s in result.rounds[1].sites].count(Status.USED) == 3
    one = np.full(2, np.sqrt(0.5))
    np.testing.assert_allclose(result.parameters["w"], (3 * one + 0.5) / 4, rtol=1e-12)


@pytest.mark.parametrize("placement", ["local", "central"])
def test_weight_is_one_and_no_figure_of_a_site_leaves(tmp_path: Path, placement: str) -> None:
    held_out: list[float] = []

    def central(parameters: Any) -> dict[str, float]:
        held_out.append(float(parameters["w"][0]))
        return {"loss": held_out[-1]}

    result = recipe(tmp_path / "run", placement, evaluate_every=1, central=central).execute(SimEnv(device="cpu"))
    sites = [site for round in result.rounds for site in round.sites]
    assert {site.stage for site in sites} == {FIT}
    assert {(site.num_examples, tuple(site.metrics)) for site in sites} == {(1.0, ())}
    assert all(r.fit == r.evaluation == {} for r in result.rounds)
    assert [r.central["loss"] for r in result.rounds] == held_out
    assert len(held_out) == 3


def test_more_sites_than_were_planned_for_are_refused_under_central_noise(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="num_clients"):
        recipe(tmp_path / "run", "central").execute(SimEnv(num_clients=5, device="cpu"))


def test_an_order_that_breaks_the_sensitivity_is_refused(tmp_path: Path) -> None:
    from sfl.core.aggregator import Sum

    with pytest.raises(CompositionError, match="aggregator must be WeightedMean under noise on the sum, got Sum"):
        recipe(tmp_path / "run", "central", aggregator=Sum()).build()
    built = recipe(tmp_path / "run", "central", transforms=(clients.DropNames("w"),)).build()
    names = [type(t).__name__ for t in built.program.chain.transforms]
    assert names == ["DropNames", "ClipTo"]
    assert [type(t).__name__ for t in built.server_chain.transforms] == ["FixedNoise", "Divide"]
    last = built.server_chain.transforms[-1]
    assert isinstance(last, Divide)
    assert last.divisor == 2
    with pytest.raises(CompositionError, match="Swap"):
        replace(recipe(tmp_path, "local"), mechanisms=(Loud(),)).build()


class Loud(clients.TestMechanism):
    """Its clip half raises again the norm that it has bounded."""

    def __init__(self) -> None:
        super().__init__("local")

    def clip(self) -> Any:
        return Chain((super().clip(), LoudFeedback()))


class LoudFeedback(clients.ErrorFeedback):
    raises_norm = True


def two_rounds(events: Sequence[DpEvent], earlier: Sequence[Sequence[DpEvent]]) -> None:
    if len(events) > 2:
        raise BudgetExhausted(f"epsilon must stay below 2, got 3 after round {len(events)}.")


def test_an_exhausted_budget_ends_the_run_before_anything_is_sent(tmp_path: Path) -> None:
    job = recipe(tmp_path / "run", "central", rounds=5).build()
    recorder = clients.Recorder()
    ledger = PrivacyLedger(tmp_path / "run" / "ledger.jsonl", budget=two_rounds)
    with LocalEngine(job.program, ["site-1", "site-2"]) as engine:
        state = federate(job, engine, hooks=Hooks(observers=(recorder,), ledger=ledger))
    assert state.round == 2
    assert recorder.events[-1].reason == "epsilon must stay below 2, got 3 after round 3."
    assert [e.round for e in recorder.events if isinstance(e, StageStarted)] == [1, 2]
    assert len(PrivacyLedger(tmp_path / "run" / "ledger.jsonl").events) == 2


def test_nothing_is_sent_when_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    job = recipe(tmp_path / "run", "central").build()
    (tmp_path / "file").write_text("")
    ledger = PrivacyLedger(tmp_path / "file" / "ledger.jsonl")
    recorder = clients.Recorder()
    with LocalEngine(job.program, ["site-1", "site-2"]) as engine, pytest.raises(LedgerError):
        federate(job, engine, hooks=Hooks(observers=(recorder,), ledger=ledger))
    assert not (tmp_path / "run.log").exists()
    assert not any(isinstance(e, StageStarted) for e in recorder.events)


@pytest.mark.parametrize("loss", ["deleted", "cut"])
def test_a_resume_without_its_whole_ledger_is_refused(tmp_path: Path, loss: str) -> None:
    out = tmp_path / "run"
    recipe(out, "central", rounds=2).execute(SimEnv(device="cpu"), out=out)
    file = out / "ledger.jsonl"
    if loss == "deleted":
        file.unlink()
    else:
        file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(LedgerError, match=r"must hold (what rounds 1 to 2 spent|the 3 lines that were written to it)"):
        recipe(out, "central", rounds=4).execute(SimEnv(device="cpu"), out=out, resume=True)


def test_a_round_that_is_repeated_is_charged_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop = clients.Recorder(stop_at=6)
    with pytest.raises(InterruptedError):
        recipe(out, "central", rounds=3).execute(SimEnv(device="cpu"), out=out, observers=(stop,))
    done = [entry.round for entry in PrivacyLedger(out / "ledger.jsonl").entries]
    result = recipe(out, "central", rounds=3).execute(SimEnv(device="cpu"), out=out, resume=True)
    rounds = [entry.round for entry in PrivacyLedger(out / "ledger.jsonl").entries]
    assert rounds[: len(done)] == done
    assert len(rounds) == 4
    assert sorted(set(rounds)) == [1, 2, 3]
    np.testing.assert_allclose(result.parameters["w"], 3 * (2 * np.array([0.6, 0.8]) + 0.5) / 2, rtol=1e-12)
