"""Example-level privacy: every site keeps a ledger of its own, written before it trains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.client.base import BaseFederatedClient
from sfl.core.events import Notice, SiteFinished
from sfl.core.mechanism import DpEvent
from sfl.core.task import EXAMPLE_EPSILON, Status
from sfl.env import SimEnv
from sfl.errors import CompositionError, ConfigError, RoundError
from sfl.io.console import console_observer
from sfl.privacy.accountant import PrivacyAccountant
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.dpsgd import dpsgd_event
from sfl.privacy.filters import ErrorFeedback, TopK
from sfl.privacy.ledger import PrivacyLedger
from sfl.recipe import FedAvgRecipe
from sfl.types import Config, FederationConfig, Parameters


class Private(BaseFederatedClient):
    """Says what it costs; site 1 has half as many examples, and so draws each twice as often."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, watch: str = "", steps: int = 10) -> None:
        super().__init__(client_id=client_id, device=device)
        self.watch, self.steps = watch, steps

    def privacy_event(self, config: Config) -> DpEvent:
        return dpsgd_event(3.0, 0.02 * (1 + self.client_id), self.steps)

    def compute_update(self, parameters: Parameters, config: Config) -> Any:
        if self.watch:
            lines = (Path(self.watch) / "sites" / self.site / "ledger.jsonl").read_text().splitlines()
            assert sum('"round"' in line for line in lines) >= int(config["round"]), "trained before it was charged"
        return {"w": parameters["w"] + 1.0}, 100, {"loss": 0.25}

    def evaluate(self, parameters: Parameters, config: Config) -> Any:
        raise AssertionError("a private site was asked for its exact figures")


class Silent(Private):
    def privacy_event(self, config: Config) -> Any:
        return None


class Careless(Private):
    def privacy_event(self, config: Config) -> DpEvent:
        return replace(super().privacy_event(config), unit="site")


def recipe(client: type = Private, *, rounds: int = 3, **more: Any) -> FedAvgRecipe:
    settings: dict[str, Any] = {
        "name": "private",
        "client": client,
        "initial_parameters": {"w": np.zeros(4)},
        "federation": FederationConfig(num_clients=2, num_rounds=rounds),
        "example_budget": PrivacyBudget(delta=1e-5),
    }
    return FedAvgRecipe(**(settings | more))


def spent(rate: float, steps: int) -> float:
    return PrivacyAccountant(delta=1e-5).epsilon([dpsgd_event(3.0, 2.0 * rate, steps)])


def notices(events: list[Any]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


@pytest.mark.parametrize("workers", [1, 2])
def test_each_site_is_charged_before_it_trains_and_says_what_it_has_spent(tmp_path: Path, workers: int) -> None:
    run, events = tmp_path / "run", list[Any]()
    job = recipe(client_kwargs={"watch": str(run)})
    result = job.execute(SimEnv(num_threads=workers), out=run, observers=(events.append,))
    for site, rate in (("site-1", 0.01), ("site-2", 0.02)):
        ledger = PrivacyLedger(run / "sites" / site / "ledger.jsonl")
        assert [entry.round for entry in ledger.entries] == [1, 2, 3]
        figures = [e.metrics for e in events if isinstance(e, SiteFinished) and e.site == site]
        assert [set(each) for each in figures] == [{EXAMPLE_EPSILON}] * 3, "nothing else may leave"
        for round, each in enumerate(figures, 1):
            assert each[EXAMPLE_EPSILON] == pytest.approx(spent(rate, 10 * round))
    assert result.rounds[-1].fit[EXAMPLE_EPSILON] == pytest.approx(spent(0.02, 30)), "that of the site worst off"
    assert "for each example of a site" in notices(events)
    assert "by its own ledger when its last update came, without earlier runs" in notices(events)
    written = json.loads((run / "privacy.json").read_text())
    assert written["examples"]["sites"]["site-2"] == pytest.approx(spent(0.02, 30))
    assert written["guarantees"] == []
    assert {e.num_examples for e in events if isinstance(e, SiteFinished)} == {1.0}


def test_a_site_trains_no_more_when_its_budget_is_spent_and_others_go_on() -> None:
    events: list[Any] = []
    limit = (spent(0.02, 20) + spent(0.02, 30)) / 2
    assert spent(0.01, 40) < limit
    result = recipe(rounds=4, example_budget=PrivacyBudget(delta=1e-5, max_epsilon=limit)).execute(
        observers=(events.append,)
    )
    used = [(e.round, e.site) for e in events if isinstance(e, SiteFinished) and e.status is Status.USED]
    assert used == [(1, "site-1"), (1, "site-2"), (2, "site-1"), (2, "site-2"), (3, "site-1"), (4, "site-1")]
    assert result.state.round == 4
    assert max(result.state.examples.values()) <= limit


def test_the_run_ends_well_when_too_few_sites_may_train_on(tmp_path: Path) -> None:
    limit = (spent(0.02, 20) + spent(0.02, 30)) / 2
    job = recipe(
        rounds=4,
        federation=FederationConfig(num_clients=2, num_rounds=4, min_available_clients=2),
        example_budget=PrivacyBudget(delta=1e-5, max_epsilon=limit),
    )
    result = job.execute(out=tmp_path / "run")
    assert result.state.round == 2
    assert "its examples' privacy budget is spent" in result.reason
    again = job.execute(out=tmp_path / "run", resume=True)
    assert again.state.round == 2, "a resume does not reset what was spent"


def test_a_resumed_run_and_a_second_one_on_the_same_data_count_on(tmp_path: Path) -> None:
    budget = PrivacyBudget(delta=1e-5, dataset="wards")
    recipe(rounds=2, example_budget=budget).execute(out=tmp_path / "one")
    result = recipe(rounds=3, example_budget=budget).execute(out=tmp_path / "one", resume=True)
    assert result.state.examples["site-1"] == pytest.approx(spent(0.01, 30))
    events: list[Any] = []
    second = recipe(rounds=1, example_budget=budget).execute(out=tmp_path / "two", observers=(events.append,))
    assert "with earlier runs on data set wards" in notices(events)
    assert second.state.examples["site-1"] == pytest.approx(spent(0.01, 40))


@pytest.mark.parametrize("began", [None, PrivacyBudget(delta=1e-5)])
def test_a_run_does_not_go_on_with_another_promise_to_examples(tmp_path: Path, began: PrivacyBudget | None) -> None:
    """What it says at its end would be of some rounds alone."""
    quiet = {"evaluate_every": 0}
    recipe(rounds=1, example_budget=began, **quiet).execute(out=tmp_path / "run")
    other = None if began is not None else PrivacyBudget(delta=1e-5)
    with pytest.raises(ConfigError, match="must go on with the protection that it was begun with"):
        recipe(rounds=2, example_budget=other, **quiet).execute(out=tmp_path / "run", resume=True)
    assert recipe(rounds=2, example_budget=began, **quiet).execute(out=tmp_path / "run", resume=True).state.round == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_edited_site_ledger_is_refused_by_its_site(tmp_path: Path, workers: int) -> None:
    job = recipe(rounds=1)
    job.execute(out=tmp_path / "run")
    path = tmp_path / "run" / "sites" / "site-1" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"count": 10', '"count": 1'))
    with pytest.raises(RoundError, match=r"site-1: .*ledger\.jsonl line 2 must continue the hash chain"):
        recipe(rounds=2, federation=FederationConfig(num_clients=2, num_rounds=2, min_available_clients=2)).execute(
            SimEnv(num_threads=workers), out=tmp_path / "run", resume=True
        )


def test_a_site_whose_ledger_has_forgotten_what_it_spent_is_not_used(tmp_path: Path) -> None:
    first = recipe(rounds=2).execute(out=tmp_path / "run")
    (tmp_path / "run" / "sites" / "site-2" / "ledger.jsonl").write_text("")
    both = FederationConfig(num_clients=2, num_rounds=3, min_available_clients=2)
    with pytest.raises(RoundError, match=r"site-2: its own ledger must go on from the ε = .* that it has told"):
        recipe(federation=both).execute(out=tmp_path / "run", resume=True)
    result = recipe(rounds=3).execute(out=tmp_path / "run", resume=True)
    assert result.state.examples["site-2"] == first.state.examples["site-2"]


@pytest.mark.parametrize("client", [Silent, Careless])
def test_a_client_that_does_not_say_what_it_costs_is_not_trained(client: type) -> None:
    with pytest.raises(RoundError):
        recipe(client).execute()


def test_two_units_stand_side_by_side() -> None:
    events: list[Any] = []
    job = recipe(mechanisms=(GaussianMechanism(clip_norm=1.0, noise_multiplier=4.0),), budget=PrivacyBudget(delta=1e-6))
    job.execute(observers=(events.append,))
    said = notices(events)
    assert "for each site" in said
    assert "for each example of a site" in said


def test_the_rounds_line_says_what_was_spent(capsys: pytest.CaptureFixture[str]) -> None:
    with console_observer("simple", False) as console:
        recipe(rounds=1).execute(observers=(console,))
    assert f"ε {spent(0.02, 10):.3g} for each example so far" in capsys.readouterr().out


def test_what_breaks_the_promise_is_refused() -> None:
    with pytest.raises(CompositionError, match="weighting must be equal"):
        recipe(federation=FederationConfig(weighting="examples")).build()
    with pytest.raises(CompositionError, match="error feedback"):
        recipe(transforms=(ErrorFeedback(TopK(0.1)),)).build()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dpsgd_target_epsilon": 8.0}, "Add --dpsgd"),
        ({"dpsgd": True, "dpsgd_noise": -1.0}, "0 or more"),
        ({"dpsgd": True, "dpsgd_clip": 0.0}, "between 1e-9 and 1e9"),
        ({"dpsgd": True, "dpsgd_max_epsilon": math.inf}, "finite"),
        ({"dpsgd": True, "dpsgd_delta": 1.0}, "at least 1e-30 and below 1"),
        ({"dpsgd": True, "dpsgd_physical_batch": 0}, "at least 1"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrivacyConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"dpsgd_ghost": True, "dpsgd_autoclip": True, "dpsgd_physical_batch": 3}])
def test_esm2_trains_by_dpsgd_within_its_target(tmp_path: Path, more: dict[str, Any]) -> None:
    from sfl.esm2.config import ESM2ClientConfig, ESM2RunConfig
    from sfl.esm2.model import BUNDLED, find_model
    from sfl.esm2.server import esm2_recipe

    config = ESM2RunConfig(
        federation=FederationConfig(num_clients=2, num_rounds=2),
        client=ESM2ClientConfig(local_steps=2, batch_size=8, max_length=32, eval_proteins=2),
        privacy=PrivacyConfig(dpsgd=True, dpsgd_target_epsilon=4.0, freeze_layers="esm.embeddings", **more),
    )
    result = esm2_recipe(config, find_model(BUNDLED)).execute(out=tmp_path / "run")
    epsilons = result.state.examples
    assert all(3.8 < epsilon <= 4.0 for epsilon in epsilons.values())
    ledger = PrivacyLedger(tmp_path / "run" / "sites" / "site-1" / "ledger.jsonl")
    assert [entry.event.count for entry in ledger.entries] == [2, 2]
    before, after = esm2_recipe(config, find_model(BUNDLED))._initial(), result.parameters
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved
    assert not any(name.startswith("esm.embeddings") for name in moved)
