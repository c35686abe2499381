"""The values that travel: frozen, picklable, with defaults of their own; and the halves of a mechanism."""

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest

from sfl.core import events
from sfl.core.algorithm import Algorithm, ServerState
from sfl.core.mechanism import DpEvent, Mechanism
from sfl.core.task import FIT, Reply, Status, Task, Update
from sfl.core.transform import Transform, chain
from sfl.errors import CompositionError
from sfl.types import Parameters

VALUES: list[Any] = [
    events.RunStarted(
        job="j",
        clients=("site-1",),
        rounds=3,
        done=0,
        num_parameters=7,
        nbytes=28,
        engine="in-process, 1 worker on cpu",
    ),
    events.StageStarted(round=1, stage="fit", cohort=("site-1",)),
    events.SiteFinished(round=1, stage="fit", site="site-1", status=Status.USED),
    events.RoundFinished(
        round=1, fit={}, evaluation={}, central={}, sites=(), seconds={"fit": 1.0}, bytes_down=1, bytes_up=1
    ),
    events.Notice(text="said"),
    events.RunFinished(rounds=3, seconds=1.0),
    ServerState(0, {}),
    Task("fit", 1, {}),
    Update("site-1", {}, 1.0),
    Reply("site-1", Status.LATE),
    DpEvent(
        mechanism="gaussian",
        noise_multiplier=1.0,
        sampling_rate=1.0,
        unit="site",
        adjacency="add_remove",
        adversary="server_trusted",
        sampling="every site, every round",
    ),
]
each = pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)


@each
def test_values_are_frozen(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@each
def test_values_cross_processes(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


@each
def test_a_default_is_never_shared(value: Any) -> None:
    required = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for field in dataclasses.fields(value):
        if field.default_factory is not dataclasses.MISSING:
            kept = {name: v for name, v in required.items() if name != field.name}
            assert getattr(type(value)(**kept), field.name) is not getattr(type(value)(**kept), field.name)


def test_a_status_is_its_word() -> None:
    assert [str(status) for status in Status] == ["used", "failed", "late", "rejected"]
    assert f"{Status.LATE}" == "late"


class Half(Transform):
    def init(self, parameters: Parameters) -> None:
        return None

    def apply(self, update: Update, state: None, rng: np.random.Generator) -> tuple[Update, None]:
        return update, state


class ClipHalf(Half):
    raises_norm, clips = False, True


class NoiseHalf(Half):
    adds_noise = True


class Both(Mechanism):
    @property
    def placement(self) -> Literal["local", "central"]:
        return "local"

    def clip(self) -> Transform:
        return ClipHalf()

    def noise(self) -> Transform:
        return NoiseHalf()

    def event(self, cohort: int, population: int) -> DpEvent:
        return dataclasses.replace(VALUES[-1], sampling_rate=cohort / population)


def test_the_halves_of_a_mechanism_compose_in_one_order_only() -> None:
    mechanism = Both()
    chain(mechanism.clip(), mechanism.noise())
    with pytest.raises(CompositionError, match="NoiseHalf must come after a clip"):
        chain(mechanism.noise(), mechanism.clip())
    assert mechanism.event(2, 8).sampling_rate == 0.25
    assert mechanism.event(2, 8).count == 1
    assert (mechanism.on_sum, mechanism.rounds_apart, mechanism.least_sites) == (False, 1, 0)


@pytest.mark.parametrize("abstract", [Mechanism, Algorithm, Transform])
def test_what_is_abstract_cannot_be_made(abstract: type) -> None:
    with pytest.raises(TypeError, match="abstract"):
        abstract()


def test_an_algorithm_claims_nothing_of_its_sampling_unless_it_says_so() -> None:
    """A mechanism may book amplification only for what the algorithm really draws."""

    class Everybody(Algorithm):
        def init(self, parameters: Parameters) -> ServerState:
            return ServerState(0, parameters)

        def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
            return Task(FIT, state.round + 1, state.parameters), list(clients)

        def finish(self, state: ServerState, aggregate: Update) -> ServerState:
            return state

    everybody, state = Everybody(), ServerState(0, {})
    assert everybody.sampling_rate == 1.0
    assert everybody.rounds_apart == 1
    assert everybody.group(3) == ""
    assert everybody.joined(state, ["a"]) is state
