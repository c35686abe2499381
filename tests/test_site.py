"""One site: what its client is handed, what it remembers, what leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients
from sfl.client.inference import BaseInferenceClient
from sfl.client.site import Site, SiteHome, SiteProgram
from sfl.core.task import END, EVALUATE, FIT, Status, Task, Update
from sfl.core.transform import chain
from sfl.types import ClientUpdate, Config, Metrics, Parameters

W = {"w": np.zeros(2)}


def site(client: Any, folder: Path | None = None, *, transforms: Any = (), **program: Any) -> Site:
    return Site(
        SiteProgram(client=client, chain=chain(*transforms), **program), "site-2", 1, home=SiteHome(folder=folder)
    )


def used(site: Site, round: int, name: str = FIT) -> Update:
    reply = site.run(Task(name, round, W, {"seed": 3}))
    assert reply.update is not None, reply.reason
    return reply.update


class Asks(clients.Base):
    """Keeps what it was handed."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        self.state["config"] = dict(config)
        return super().compute_update(parameters, config)


def test_a_client_is_told_who_it_is_and_which_round() -> None:
    made: list[Asks] = []

    def make(**identity: Any) -> Asks:
        made.append(Asks(**identity))
        return made[-1]

    subject = Site(SiteProgram(client=make), "site-07", 6, device="cuda:3")
    used(subject, 4)
    used(subject, 5)
    (client,) = made
    assert (client.client_id, client.device, client.site) == (6, "cuda:3", "site-07")
    assert client.state["config"] == {"seed": 3, "round": 5}


def test_an_unknown_task_fails() -> None:
    reply = site(clients.Base).run(Task("dance", 1, W))
    assert (reply.status, reply.update) == (Status.FAILED, None)
    assert "Base.run_task must be defined to do 'dance'" in reply.reason


def test_an_unexpected_keyword_names_the_class() -> None:
    with pytest.raises(TypeError, match="Base got unexpected arguments: momentum"):
        clients.Base(momentum=0.9)


def test_weight_and_metrics_stay_when_the_recipe_says_so() -> None:
    private = used(site(clients.Wanderer, fixed_weight=1.0, share_metrics=False), 1)
    assert (private.weight, private.metrics) == (1.0, {})
    public = used(site(clients.Wanderer), 1)
    assert public.weight == 4.0
    assert set(public.metrics) == {"loss", "seen"}


def test_a_failed_task_does_not_touch_what_the_site_remembers(tmp_path: Path) -> None:
    class Stumbles(clients.Wanderer):
        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            updated = super().compute_update(parameters, config)
            if config["round"] == 2:
                raise OSError("disk")
            return updated

    subject = site(Stumbles, tmp_path)
    assert used(subject, 1).metrics["seen"] == 1.0
    assert subject.run(Task(FIT, 2, W, {"seed": 3})).status is Status.FAILED
    assert used(subject, 3).metrics["seen"] == 2.0


def test_a_new_process_finds_what_the_site_remembered_before_the_round(tmp_path: Path) -> None:
    first = site(clients.Wanderer, tmp_path, transforms=[clients.ErrorFeedback()])
    deltas = [used(first, number).delta["w"] for number in (1, 2, 3)]
    again = site(clients.Wanderer, tmp_path, transforms=[clients.ErrorFeedback()])
    np.testing.assert_array_equal(used(again, 3).delta["w"], deltas[2])
    np.testing.assert_array_equal(used(again, 4).delta["w"], used(first, 4).delta["w"])


def test_an_evaluation_sees_the_state_after_its_rounds_training(tmp_path: Path) -> None:
    first = site(clients.Wanderer, tmp_path)
    used(first, 1)
    loss = used(first, 1, EVALUATE).metrics["loss"]
    assert used(site(clients.Wanderer, tmp_path), 1, EVALUATE).metrics["loss"] == loss == 1.0
    assert used(site(clients.Wanderer, tmp_path), 0, EVALUATE).metrics["loss"] == 0.0


def test_a_chain_whose_state_is_one_bare_array_is_remembered(tmp_path: Path) -> None:
    subject = site(clients.Base, tmp_path, transforms=[clients.BareState()])
    assert [used(subject, n).metrics["rounds"] for n in (1, 2)] == [1.0, 2.0]
    assert used(site(clients.Base, tmp_path, transforms=[clients.BareState()]), 3).metrics["rounds"] == 3.0


def test_a_state_that_is_emptied_stays_empty(tmp_path: Path) -> None:
    class Forgets(clients.Base):
        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            self.state = {"n": 1} if config["round"] == 1 else {}
            return super().compute_update(parameters, config)[0], 1, {"n": float(len(self.state))}

        def evaluate(self, parameters: Parameters, config: Config) -> Any:
            return float(len(self.state)), 1, {}

    first = site(Forgets, tmp_path)
    used(first, 1)
    used(first, 2)
    assert used(site(Forgets, tmp_path), 2, EVALUATE).metrics["loss"] == 0.0


def test_a_site_without_state_writes_nothing(tmp_path: Path) -> None:
    subject = site(clients.Base, tmp_path / "site", transforms=[clients.DropNames("w"), chain(clients.DropNames("w"))])
    used(subject, 1)
    assert not (tmp_path / "site").exists()


def test_a_state_that_cannot_be_kept_says_what_it_holds(tmp_path: Path) -> None:
    class Odd(clients.Base):
        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            self.state = {"model": object()}
            return super().compute_update(parameters, config)

    reply = site(Odd, tmp_path).run(Task(FIT, 1, W))
    assert reply.status is Status.FAILED
    assert "must be made of arrays, numbers, strings, dicts and lists, got object" in reply.reason


@pytest.mark.parametrize("returned", [None, 0.5, (0.5, 1), ("low", 1, {}), (float("inf"), 1, {}), (0.5, 0, {})])
def test_an_evaluation_that_breaks_the_contract_is_rejected(returned: Any) -> None:
    class Bad(clients.Base):
        def evaluate(self, parameters: Parameters, config: Config) -> Any:
            return returned

    reply = site(Bad).run(Task(EVALUATE, 1, W))
    assert reply.status is Status.REJECTED
    assert reply.reason.startswith("site-2: ")


def test_an_inference_client_reports_and_changes_nothing() -> None:
    class Counts(BaseInferenceClient):
        def infer(self, parameters: Parameters, config: Config) -> tuple[int, Metrics]:
            return 40, {"positives": 12.0, "loss": 0.25}

    subject = site(Counts)
    trained = used(subject, 1)
    assert (trained.weight, trained.metrics["positives"]) == (40.0, 12.0)
    assert (trained.delta["w"] == 0.0).all()
    assert used(subject, 1, EVALUATE).metrics == {"loss": 0.25, "positives": 12.0}


def test_an_interrupt_is_not_the_sites_to_handle() -> None:
    class Interrupted(clients.Base):
        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site(Interrupted).run(Task(FIT, 1, W))


def test_a_private_site_keeps_the_words_of_its_errors_its_time_and_its_figures() -> None:
    class Telling(clients.Base):
        def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
            raise ValueError("patient record 4711")

    site = Site(SiteProgram(client=Telling, share_metrics=False), "site-1", 0)
    failed = site.run(Task(FIT, 1, {"w": np.zeros(2)}))
    assert failed.status is Status.FAILED
    assert "why is withheld" in failed.reason
    assert "4711" not in failed.reason + failed.details
    assert failed.seconds == 0.0
    asked = site.run(Task(EVALUATE, 1, {"w": np.zeros(2)}))
    assert asked.status is Status.FAILED  # nor whether it broke the contract
    assert asked.update is None


def test_the_end_of_a_run_closes_the_client_and_makes_none() -> None:
    closed: list[str] = []

    class Closes(clients.MyClient):
        def close(self) -> None:
            closed.append(self.site)

    site = Site(SiteProgram(client=Closes), "site-1", 0)
    assert site.run(Task(END, 0, {})).status is Status.USED
    assert closed == []  # it never worked: there is nothing to close
    site.run(Task(FIT, 1, {"w": np.ones(2)}))
    site.run(Task(END, 0, {}))
    assert closed == ["site-1"]
