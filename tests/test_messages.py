"""Quantised messages in whole runs: the same bits everywhere, what is counted, what privacy allows, what converges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from safetensors.torch import load_file

import message_clients as clients
from sfl import esm2
from sfl.audit import RecipePipeline
from sfl.client.site import SiteProgram
from sfl.core import arrays, quantise, rng
from sfl.core.codes import CODED
from sfl.core.events import SiteFinished
from sfl.core.task import FIT, Reply, Task, Update
from sfl.core.transform import flat
from sfl.core.unpack import unpacked
from sfl.engine.attacked import AttackedEngine
from sfl.engine.attacker import Attack
from sfl.engine.base import Engine
from sfl.engine.clock import VirtualClock
from sfl.engine.holding import Holding
from sfl.engine.host import HostSettings, SiteHost
from sfl.engine.local import LocalEngine
from sfl.engine.site_process import _answer
from sfl.engine.wire import pack_task, read_answer
from sfl.env import FlareSimEnv, FlowerSimEnv, SimEnv
from sfl.errors import CompositionError, ConfigError, UpdateError
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.dp import GaussianMechanism
from sfl.privacy.filters import ErrorFeedback, Quantise, QuantiseBounded, TopK
from sfl.recipe import (
    CyclicRecipe,
    DittoRecipe,
    FedAvgRecipe,
    FedBuffRecipe,
    FedEvalRecipe,
    FedOptRecipe,
    FedProxRecipe,
    RunResult,
    ScaffoldRecipe,
    SwarmRecipe,
)
from sfl.server.federate import Hooks, federate
from sfl.server.messages import lowered
from sfl.server.robust import CoordinateMedian
from sfl.types import FederationConfig, site_names

FORMS = list(CODED)
every_form = pytest.mark.parametrize("form", FORMS)
PRIVATE = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0)


def recipe(
    form: str, kind: Callable[..., Any] = FedAvgRecipe, *, federation: dict[str, Any] | None = None, **fields: Any
):
    """Two sites that are pulled apart."""
    sizes: dict[str, Any] = {"num_clients": 2, "num_rounds": 2, **(federation or {})}
    made = {"name": "pulled", "client": clients.Pulled, "initial_parameters": clients.model, **fields}
    return kind(federation=FederationConfig(message_dtype=form, **sizes), **made)


class Wire(Engine):
    """Sites behind texts and bytes, as a foreign engine's are, in this process."""

    def __init__(self, program: SiteProgram, names: Sequence[str]) -> None:
        self.host, self.names = SiteHost(HostSettings(program=lambda: program)), list(names)
        self.pending: list[tuple[int, Task, str]] = []
        self.last, self.down = 0, 0

    def clients(self) -> list[str]:
        return sorted(self.names)

    def send(self, task: Task, clients: Sequence[str]) -> int:
        self.last += 1
        self.pending += [(self.last, task, name) for name in clients]
        return self.last

    def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
        while turn := next((entry for entry in self.pending if ticket in (None, entry[0])), None):
            self.pending.remove(turn)
            number, task, site = turn
            text, sent = pack_task(number, task, {name: index for index, name in enumerate(self.names)})
            self.down += arrays.nbytes(sent) * (task.name == FIT)
            answer, delta = _answer(self.host, Holding(), site, text, save(dict(sent)))
            yield replace(read_answer(answer, load(delta), site, number), ticket=number)

    def cancel(self, ticket: int) -> None:
        self.pending = [entry for entry in self.pending if entry[0] != ticket]

    def describe(self) -> str:
        return "wire"


def assert_same(left: RunResult, right: RunResult) -> None:
    """The same bits of everything but times."""
    assert np.array_equal(left.parameters["w"], right.parameters["w"])
    assert all(left.parameters[name].tobytes() == value.tobytes() for name, value in right.parameters.items())
    assert all(
        one.tobytes() == right.state.messages[name].tobytes() for name, one in (left.state.messages or {}).items()
    )
    for one, other in zip(left.rounds, right.rounds, strict=True):
        assert (one.fit, one.evaluation, one.bytes_down, one.bytes_up) == (
            other.fit,
            other.evaluation,
            other.bytes_down,
            other.bytes_up,
        )
        assert [site.nbytes for site in one.sites] == [site.nbytes for site in other.sites]


# The same everywhere

KINDS = {
    "fedavg": (FedAvgRecipe, {}),
    "fedprox": (FedProxRecipe, {"proximal_mu": 0.1}),
    "fedadam": (FedOptRecipe, {"optimizer": "adam", "server_learning_rate": 0.1}),
    "scaffold": (ScaffoldRecipe, {}),
    "ditto": (DittoRecipe, {"personal_lambda": 0.1}),
    "cyclic": (CyclicRecipe, {}),
    "swarm": (SwarmRecipe, {}),
    "fedbuff": (FedBuffRecipe, {"buffer": 1}),
    "cross-site": (FedEvalRecipe, {"cross_site": True}),
    "median": (FedAvgRecipe, {"aggregator": CoordinateMedian()}),
    "top k": (FedAvgRecipe, {"transforms": (ErrorFeedback(TopK(0.1)),)}),
}


@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_algorithm_has_the_same_bits_where_codes_travel_as_bytes(kind: str, form: str) -> None:
    made, fields = KINDS[kind]
    sizes = {"num_clients": 3}
    job = recipe(form, made, federation=sizes, **fields).build()
    near = federate(job, LocalEngine(job.program, site_names(3)))
    far = federate(job, Wire(job.program, site_names(3)))
    plain = recipe("float32", made, federation=sizes, **fields).execute(SimEnv())
    for name, value in near.parameters.items():
        assert value.dtype == plain.parameters[name].dtype
        assert value.tobytes() == far.parameters[name].tobytes()
    assert near.messages is None or all(v.tobytes() == far.messages[n].tobytes() for n, v in near.messages.items())
    if kind != "cross-site":
        error = np.linalg.norm(near.parameters["w"] - plain.parameters["w"])
        moved = np.linalg.norm(plain.parameters["w"])
        assert 0 < error < {"bfloat16": 0.01, "nf4": 0.35}[form] * moved


def test_workers_have_the_bits_of_one_process() -> None:
    made = recipe("int8", ScaffoldRecipe)
    one = made.execute(SimEnv())
    two = replace(made, federation=replace(made.federation, workers=2)).execute(SimEnv())
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("env", [FlowerSimEnv, FlareSimEnv])
def test_foreign_engines_have_the_bits_and_bytes_of_one_process(env: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe("nf4", ScaffoldRecipe, transforms=(TopK(0.2),))
    assert_same(made.execute(env(), out=tmp_path), made.execute(SimEnv()))


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = recipe("int8", federation={"num_rounds": 4}).execute(SimEnv(), out=tmp_path / "whole")
    recipe("int8", federation={"num_rounds": 2}).execute(SimEnv(), out=tmp_path / "parts")
    parts = recipe("int8", federation={"num_rounds": 4}).execute(SimEnv(), out=tmp_path / "parts", resume=True)
    assert parts.parameters["w"].tobytes() == whole.parameters["w"].tobytes()
    assert parts.state.messages["w"].tobytes() == whole.state.messages["w"].tobytes()
    assert np.abs(parts.state.messages["w"]).max() > 0


def test_evaluations_change_nothing() -> None:
    """Sites evaluate the model as it can be sent to them, without what the memory holds; the memory stays as it is."""
    with_them, without = (recipe("int8", evaluate_every=every).execute(SimEnv()) for every in (1, 0))
    assert with_them.parameters["w"].tobytes() == without.parameters["w"].tobytes()
    sent = quantise.unpacked(quantise.packed({"w": with_them.parameters["w"]}, "int8"))["w"]
    losses = [0.5 * np.sum(np.square((sent - clients.optimum(site)).astype(float))) for site in (0, 1)]
    assert with_them.rounds[-1].evaluation["loss"] == pytest.approx((losses[0] + 2 * losses[1]) / 3)


def test_float32_is_as_if_there_were_no_quantisation() -> None:
    made = recipe("float32")
    assert made.build().program.chain.transforms == ()
    result = made.execute(SimEnv())
    assert result.state.messages is None
    assert all("quantise" not in round.seconds for round in result.rounds)


# What is counted


@every_form
def test_the_bytes_of_a_round_are_those_of_the_codes(form: str) -> None:
    model = clients.model()
    job = recipe(form).build()
    wire, seen = Wire(job.program, site_names(2)), []
    federate(job, wire, hooks=Hooks(observers=[seen.append]))
    rounds = [event for event in seen if type(event).__name__ == "RoundFinished"][1:]
    each = quantise.nbytes(model, form)
    assert [(round.bytes_down, round.bytes_up) for round in rounds] == [(2 * each, 2 * each)] * 2
    assert wire.down == 2 * 2 * each
    assert each < arrays.nbytes(model)


def test_zeros_do_not_travel_and_stay_zeros() -> None:
    dense, thin = (
        recipe("int8", transforms=chosen, evaluate_every=0).execute(SimEnv()) for chosen in ((), (TopK(0.1),))
    )
    floats = recipe("float32", transforms=(TopK(0.1),), evaluate_every=0).execute(SimEnv())
    assert thin.rounds[-1].bytes_up < min(0.5 * dense.rounds[-1].bytes_up, floats.rounds[-1].bytes_up)
    sent = thin.rounds[-1].fit["compress_sent_share"]
    assert 0.0 < sent <= floats.rounds[-1].fit["compress_sent_share"] + 1e-9


def test_under_noise_on_the_sum_bytes_tell_nothing_of_an_update() -> None:
    seen: list[Any] = []
    made = recipe("int8", transforms=(TopK(0.01),), mechanisms=(PRIVATE,))
    made.execute(SimEnv(), observers=[seen.append])
    sizes = {event.nbytes for event in seen if isinstance(event, SiteFinished) and event.stage == FIT}
    assert sizes == {quantise.nbytes(clients.model(), "int8")}


def test_simulated_time_counts_the_codes() -> None:
    clock = VirtualClock(site_seconds=1.0, site_bandwidth=1e3)
    times = {}
    for form in ("float32", "int8"):
        made = recipe(form, evaluate_every=0)
        times[form] = made.execute(SimEnv(clock=clock)).rounds[-1].fit["simulated_seconds"]
    model = clients.model()
    saved = arrays.nbytes(model) - quantise.nbytes(model, "int8")
    assert times["float32"] - times["int8"] == pytest.approx(2 * 2 * saved / 1e3)


@pytest.mark.parametrize(("form", "share"), [("bfloat16", 0.50), ("float16", 0.50), ("int8", 0.25), ("nf4", 0.14)])
def test_a_real_model_takes_the_share_that_is_promised(form: str, share: float) -> None:
    stored = load_file(Path(esm2.__file__).parent / "bundled" / "model" / "model.safetensors")
    model = {name: value.float().numpy() for name, value in stored.items()}
    assert arrays.num_parameters(model) > 2e6
    packed = quantise.packed(model, form)
    assert arrays.nbytes(packed) / arrays.nbytes(model) == pytest.approx(share, rel=0.02)
    assert arrays.nbytes(packed) == quantise.nbytes(model, form)
    back = quantise.unpacked(packed)
    error = {"bfloat16": 0.003, "float16": 0.001, "int8": 0.03, "nf4": 0.25}[form]
    for name, value in model.items():
        assert np.linalg.norm(back[name] - value) <= error * np.linalg.norm(value)


# What converges


def distance(form: str, feedback: bool, rounds: int = 60) -> float:
    """From the mean of the two optima, which is the federation's, after equal weights."""
    options = {"num_rounds": rounds, "message_error_feedback": feedback, "weighting": "equal"}
    result = recipe(form, federation=options, evaluate_every=0).execute(SimEnv())
    best = (clients.optimum(0) + clients.optimum(1)) / 2
    return float(np.linalg.norm(result.parameters["w"] - best) / np.linalg.norm(best))


@pytest.mark.parametrize(("form", "near"), [("int8", 0.005), ("nf4", 0.05)])
def test_with_feedback_a_run_converges_and_without_it_stays_farther_away(form: str, near: float) -> None:
    with_feedback, without = distance(form, True), distance(form, False)
    assert with_feedback < near
    assert with_feedback < 0.5 * without


def test_feedback_on_a_site_sends_what_was_left_out() -> None:
    coder = Quantise("nf4")
    state, total, sent = coder.init({}), np.zeros(clients.SHAPE), np.zeros(clients.SHAPE)
    for round in range(20):
        delta = {"w": np.random.default_rng(round).normal(size=clients.SHAPE).astype(np.float32)}
        update, state = coder.apply(Update("site-1", delta, 1.0), state, rng.public(0, round, "t", "site-1"))
        total, sent = total + delta["w"], sent + unpacked(update.delta, delta)["w"]
    np.testing.assert_allclose(sent + state["w"], total, atol=1e-4)
    assert np.abs(total - sent).max() < 1.5, "what is remembered does not grow with the rounds"


# What privacy allows


@every_form
@pytest.mark.parametrize("per_layer", [False, True])
def test_under_central_noise_what_leaves_is_within_the_clip(form: str, per_layer: bool) -> None:
    mechanism = replace(PRIVATE, per_layer=per_layer)
    chain = recipe(form, mechanisms=(mechanism,)).build().program.chain
    assert isinstance(chain.transforms[-1], QuantiseBounded)
    model = {name: value for name, value in clients.model().items() if value.dtype.kind == "f"}
    state = chain.init(model)
    for seed in range(20):
        draw = np.random.default_rng(seed)
        delta = {name: draw.normal(size=v.shape).astype(v.dtype) for name, v in model.items()}
        update, state = chain.apply(Update("site-1", delta, 1.0), state, rng.public(0, seed, "t", "site-1"))
        arrived = unpacked(update.delta, model)
        assert 0.9 < arrays.l2_norm(arrived) <= 1.0
        if per_layer:
            assert max(arrays.l2_norm({n: v}) for n, v in arrived.items()) <= 1.0 / np.sqrt(len(model))


@every_form
def test_nothing_is_remembered_past_a_clip(form: str) -> None:
    """The same update gives the same codes in every round: a memory would carry one round's data into others."""
    chain = recipe(form, mechanisms=(PRIVATE,)).build().program.chain
    delta = {"w": np.random.default_rng(0).normal(size=clients.SHAPE).astype(np.float32)}
    state, sent = chain.init(delta), []
    for round in (1, 2):
        update, state = chain.apply(Update("site-1", delta, 1.0), state, rng.public(0, round, "t", "site-1"))
        sent.append(update.delta["w"])
    np.testing.assert_array_equal(sent[0], sent[1])


@every_form
def test_an_audit_finds_norms_within_the_clip(form: str) -> None:
    made = recipe(form, mechanisms=(PRIVATE,), federation={"num_clients": 4})
    for check in RecipePipeline(recipe=made).norms():
        assert 0.9 < check.largest <= 1.0
        assert check.holds


def last(**fields: Any) -> Any:
    return list(flat(recipe("int8", **fields).build().program.chain.transforms))[-1]


def test_what_rounds_an_update_follows_from_what_protects_it() -> None:
    off = {"message_error_feedback": False}
    assert last() == Quantise("int8")
    assert last(federation=off) == Quantise("int8", feedback=False)
    assert last(mechanisms=(PRIVATE,)) == QuantiseBounded("int8")
    local = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="local")
    assert last(mechanisms=(local,), released=(TopK(0.5),)) == QuantiseBounded("int8")
    assert last(example_budget=PrivacyBudget(max_epsilon=1.0)) == Quantise("int8", feedback=False)
    assert last(kind=SwarmRecipe) == Quantise("int8", thin=False)


def test_a_private_run_goes_on_in_codes() -> None:
    local = GaussianMechanism(clip_norm=1.0, noise_multiplier=0.01, where="local")
    for mechanism in (replace(PRIVATE, noise_multiplier=0.01), local):
        result = recipe("int8", mechanisms=(mechanism,), federation={"num_rounds": 5}).execute(SimEnv())
        assert result.state.round == 5
        assert result.rounds[-1].bytes_up == 2 * quantise.nbytes(clients.model(), "int8")
        best = (clients.optimum(0) + clients.optimum(1)) / 2
        assert np.vdot(result.parameters["w"], best) > 0


def test_shares_of_noise_are_not_rounded() -> None:
    shared = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.0, where="distributed", shares=2)
    made = recipe("int8", mechanisms=(shared,), federation={"min_available_clients": 2})
    with pytest.raises(CompositionError, match="message_dtype must be float32 under noise that is shared out"):
        made.build()
    replace(made, federation=replace(made.federation, message_dtype="float32")).build()


# What may go wrong


def test_codes_of_another_shape_reject_the_reply() -> None:
    class Liar(Wire):
        def replies(self, timeout: float | None = None, *, ticket: int | None = None) -> Iterator[Reply]:
            for reply in super().replies(timeout, ticket=ticket):
                if reply.update is None or reply.site != "site-2" or not reply.update.delta:
                    yield reply
                    continue
                delta = {**reply.update.delta, "w" + quantise.FORM: np.array([4, 10**6, 10**6])}
                yield replace(reply, update=replace(reply.update, delta=delta))

    job = recipe("int8").build()
    seen: list[Any] = []
    federate(job, Liar(job.program, site_names(2)), hooks=Hooks(observers=[seen.append]))
    ends = {event.site: event for event in seen if isinstance(event, SiteFinished) and event.stage == FIT}
    assert ends["site-1"].status == "used"
    assert ends["site-2"].status == "rejected"
    assert "of its shape, got [1000000, 1000000]" in ends["site-2"].reason
    assert ends["site-2"].nbytes == 0


def test_a_task_that_cannot_be_read_is_no_task_that_is_done() -> None:
    job = recipe("int8").build()
    engine = LocalEngine(job.program, site_names(2))
    broken = quantise.packed(clients.model(), "int8") | {"w" + quantise.SCALE: np.zeros(1)}
    (reply, _) = engine.exchange(Task(FIT, 1, broken), site_names(2))
    assert reply.status == "rejected"
    assert "must have a finite scale" in reply.reason


def test_a_model_that_is_not_finite_is_not_sent() -> None:
    for remembers in (False, True):
        with pytest.raises(UpdateError, match="'w' must be finite to travel as int8"):
            lowered(Task(FIT, 1, {"w": np.full(100, np.inf)}), "int8", remembers=remembers)


def test_attackers_lie_about_what_honest_sites_code() -> None:
    job = recipe("int8", federation={"num_clients": 3}, evaluate_every=0).build()
    names = site_names(3)
    honest = federate(job, LocalEngine(job.program, names))
    with AttackedEngine(LocalEngine(job.program, names), Attack("sign-flip", names[2:])) as engine:
        attacked = federate(job, engine)
    assert 0 < np.linalg.norm(attacked.parameters["w"]) < np.linalg.norm(honest.parameters["w"])


@pytest.mark.parametrize("given", ["int4", "float64", ""])
def test_a_dtype_that_is_none(given: str) -> None:
    with pytest.raises(ConfigError, match="message_dtype must be one of float32, bfloat16, float16, int8, nf4"):
        FederationConfig(message_dtype=given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be one of bfloat16, float16, int8, nf4 to be quantised"):
        QuantiseBounded(given)
