"""One recipe on every engine, as real processes on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from multiprocessing import util
from pathlib import Path

import numpy as np
import psutil
import pytest

import digits_client
import engine_clients as clients
import workflows
from algorithm_clients import Steered
from sfl.core.events import Event, RoundFinished, SiteFinished, SiteLogged
from sfl.core.task import Status
from sfl.engine.guard import MARK
from sfl.env import FlareSimEnv, FlowerEnv, FlowerInFlareEnv, FlowerSimEnv, PocEnv, SimEnv
from sfl.env.remote import RemoteEnv
from sfl.errors import ConfigError, EngineError, MissingExtraError, RoundError
from sfl.esm2.config import ESM2ClientConfig, ESM2RunConfig
from sfl.esm2.model import BUNDLED, find_model
from sfl.esm2.server import esm2_recipe
from sfl.llm.config import LLMClientConfig, LLMRunConfig
from sfl.llm.model import find_model as find_llm
from sfl.llm.server import llm_recipe
from sfl.privacy.filters import ErrorFeedback, TopK
from sfl.privacy.he import CKKS
from sfl.privacy.secagg import SecAgg
from sfl.recipe import (
    FedAvgRecipe,
    FedBuffRecipe,
    Recipe,
    RunResult,
    ScaffoldRecipe,
    SwarmRecipe,
    WorkflowRecipe,
)
from sfl.server.callbacks import EarlyStopping
from sfl.types import FederationConfig

EXAMPLES = Path(__file__).parents[1] / "examples" / "client_api"
Env = Callable[..., RemoteEnv]
pytestmark = pytest.mark.timeout(600)


def remembers(*, fails: tuple[tuple[int, int], ...] = (), rounds: int = 2) -> FedAvgRecipe:
    return ScaffoldRecipe(  # an algorithm that sends more than the model, and whose sites remember
        name="remembers",
        client=clients.Remembers,
        client_kwargs={"fails": fails},
        transforms=(ErrorFeedback(TopK(0.5)),),  # a filter remembers, too, and what it leaves out does not travel
        initial_parameters=clients.many_kinds,
        federation=FederationConfig(num_clients=3, num_rounds=rounds, min_available_clients=1),
    )


def digits() -> FedAvgRecipe:
    return FedAvgRecipe(
        name="digits",
        client=digits_client.Digits,
        initial_parameters=digits_client.small_parameters,
        federation=FederationConfig(num_clients=2, num_rounds=2),
    )


def proteins() -> FedAvgRecipe:
    client = ESM2ClientConfig(local_steps=1, batch_size=2, max_length=32, eval_proteins=2)
    config = ESM2RunConfig(federation=FederationConfig(num_clients=2, num_rounds=1), client=client)
    return esm2_recipe(config, find_model(BUNDLED))


def speeches() -> FedAvgRecipe:
    """Adapters of different ranks, aggregated exactly, in coded messages without feedback."""
    client = LLMClientConfig(
        local_steps=1, batch_size=2, block_size=32, eval_documents=2, lora_aggregation="exact", lora_ranks="8,2"
    )
    federation = FederationConfig(num_clients=2, num_rounds=2, message_dtype="int8", message_error_feedback=False)
    return llm_recipe(LLMRunConfig(federation=federation, client=client), find_llm(BUNDLED))


def script(*, external: bool = False, path: Path = EXAMPLES / "train_numpy.py") -> FedAvgRecipe:
    return FedAvgRecipe(
        name="script",
        min_clients=2,
        num_rounds=2,
        model={"w": np.zeros(3)},
        train_script=str(path),
        launch_external_process=external,
    )


def mixes() -> WorkflowRecipe:
    return WorkflowRecipe(
        name="mixes",
        client=workflows.Steps,
        initial_parameters={"w": np.zeros(2)},
        federation=FederationConfig(num_clients=3, num_rounds=2),
        workflow=workflows.Mixed(),
        callbacks=(EarlyStopping(patience=5),),
    )


def steered(kind: Callable[..., FedAvgRecipe], **options: object) -> FedAvgRecipe:
    return kind(
        name="steered",
        client=Steered,
        initial_parameters={"w": np.ones(3), "n": np.array(0)},
        federation=FederationConfig(num_clients=3, num_rounds=2),
        **options,
    )


def large() -> FedAvgRecipe:
    return FedAvgRecipe(
        name="large",
        client=clients.Remembers,
        initial_parameters=clients.large,
        evaluate_every=0,
        federation=FederationConfig(num_clients=2, num_rounds=1),
    )


def figures(result: RunResult) -> list[object]:
    """All that a run reports, without times."""
    return [
        replace(r, seconds={}, sites=tuple(replace(site, seconds=0.0, details="") for site in r.sites))
        for r in result.rounds
    ]


def assert_same(left: RunResult, right: RunResult) -> None:
    assert list(left.parameters) == list(right.parameters)
    for name, value in left.parameters.items():
        assert (value.dtype, value.shape) == (right.parameters[name].dtype, right.parameters[name].shape)
        assert value.tobytes() == right.parameters[name].tobytes(), name
    assert figures(left) == figures(right)
    assert left.state.callbacks == right.state.callbacks
    assert left.state.best == right.state.best


def marked(test: str) -> list[int]:
    """Processes of engines that this test has started and that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in process.environ() and process.environ().get("TEST_RUN") == test:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """No process and no temporary folder outlives a run, however it ended."""
    util.get_temp_dir()  # a pool's fork server lives as long as this process: not in this test's folder
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: sockets lie in it
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))  # else what is left would be the user's own
    monkeypatch.setenv("TEST_RUN", str(tmp_path))
    yield
    assert marked(str(tmp_path)) == []
    left = [path.name for path in folder.iterdir()]
    shutil.rmtree(folder)
    assert left == []
    assert not (tmp_path / "flower" / "apps").exists()


def hidden() -> FedAvgRecipe:
    """Secure aggregation over several kinds of numbers, with a site that drops out of the second round."""
    federation = FederationConfig(num_clients=4, num_rounds=2, min_available_clients=3)
    return replace(remembers(fails=((1, 2),)), secure=SecAgg(bits=40), evaluate_every=0, federation=federation)


JOBS: dict[str, Callable[[], Recipe]] = {
    "proteins": proteins,
    "speeches": speeches,
    "digits": digits,
    "script": script,
    "mixes": mixes,
    "remembers": lambda: remembers(fails=((1, 2),)),
    "swarm": lambda: steered(SwarmRecipe),
    "fedbuff": lambda: steered(FedBuffRecipe, buffer=3),
    "large": large,
    "hidden": hidden,
}


@cache
def in_process(job: str) -> RunResult:
    return JOBS[job]().execute(SimEnv(device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "env"),
    [
        # every job on some, and every engine has some: all of them on all by benchmarks/parity.py
        ("proteins", FlowerEnv),  # on provisioned sites of FLARE: test_deployment
        ("digits", FlowerSimEnv),
        ("digits", PocEnv),
        ("script", FlowerEnv),
        ("mixes", FlareSimEnv),
        ("remembers", FlowerInFlareEnv),  # on others: the next test
        ("swarm", FlareSimEnv),
        ("fedbuff", FlowerEnv),
        ("speeches", FlareSimEnv),
        ("large", FlareSimEnv),  # what is larger than a message may be travels in pieces
        ("hidden", FlowerEnv),
        ("hidden", FlowerSimEnv),
        ("hidden", FlareSimEnv),
    ],
)
def test_the_same_bits_and_figures_as_in_process(job: str, env: Env) -> None:
    here, there = in_process(job), JOBS[job]().execute(env(device="cpu"))
    if job == "hidden":  # certificates, which no simulated site has, are bytes of a round
        here, there = weightless(here), weightless(there)
    assert_same(here, there)


@pytest.mark.slow
@pytest.mark.parametrize(("env", "holder"), [(FlareSimEnv, "site-2"), (PocEnv, "")])
def test_a_model_that_the_server_cannot_read_is_the_plain_one(env: Env, holder: str) -> None:
    """With keys that simulated sites find in a folder, and with those of kits that were made for the run."""
    federation = FederationConfig(num_clients=3, num_rounds=2, weighting="equal")
    plain = replace(steered(FedAvgRecipe), federation=federation).execute(SimEnv(device="cpu"))
    there = replace(steered(FedAvgRecipe), secure=CKKS(holder=holder)).execute(env(device="cpu"))
    assert there.is_sealed is (not holder)
    for name, value in there.open().items():
        assert np.abs(value - plain.parameters[name]).max() < 1e-6, name


def weightless(result: RunResult) -> RunResult:
    """The same without bytes."""

    def without(round: RoundFinished) -> RoundFinished:
        sites = tuple(replace(site, nbytes=0) for site in round.sites)
        return replace(round, bytes_down=0, bytes_up=0, sites=sites)

    return replace(result, rounds=[without(round) for round in result.rounds])


@pytest.mark.slow
@pytest.mark.parametrize("external", [False, True])
def test_a_training_script_runs_to_its_end(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    ending = f"\nopen({str(tmp_path)!r} + '/ended-' + flare.get_site_name(), 'w').close()\n"
    text = (EXAMPLES / "train_numpy.py").read_text().replace("import sfl.client", "import nvflare.client")
    assert "nvflare" in text  # as a script of FLARE says it
    path.write_text(text + ending)
    assert_same(in_process("script"), script(external=external, path=path).execute(FlareSimEnv()))
    assert [path.name for path in sorted(tmp_path.glob("ended-*"))] == ["ended-site-1", "ended-site-2"]


@pytest.mark.slow
@pytest.mark.parametrize("env", [FlareSimEnv, FlowerEnv])
def test_a_watched_run_has_the_same_bits_and_says_what_sites_log_and_where_they_fail(env: Env, tmp_path: Path) -> None:
    events: list[Event] = []
    there = JOBS["remembers"]().execute(env(device="cpu"), out=tmp_path / "run", observers=[events.append])
    assert_same(in_process("remembers"), there)
    logged = {(e.round, e.site): e.lines for e in events if isinstance(e, SiteLogged)}
    assert logged[2, "site-1"] == ("site-1 trains for the 2. time",)
    (failed,) = (e for e in events if isinstance(e, SiteFinished) and e.status is Status.FAILED)
    assert failed.reason == "site-2: ValueError: no data today at site-2"
    assert "engine_clients.py" in failed.details
    assert any(path.stat().st_size for path in (tmp_path / "run" / "logs").iterdir())
    assert (tmp_path / "run" / "metrics.csv").is_file()


@pytest.mark.slow
def test_a_job_that_fails_raises_here_what_it_raised_there() -> None:
    recipe = remembers(fails=((0, 1), (1, 1), (2, 1)))
    with pytest.raises(RoundError, match="no data today at site-3"):
        recipe.execute(FlareSimEnv())


@pytest.mark.slow
def test_a_run_goes_on_where_another_engine_left_it(tmp_path: Path) -> None:
    whole = remembers(rounds=3).execute(SimEnv(device="cpu"), out=tmp_path / "whole")
    part = remembers(rounds=1)
    part.execute(FlareSimEnv(), out=tmp_path / "part")
    rest = remembers(rounds=3).execute(SimEnv(device="cpu"), out=tmp_path / "part", resume=True)
    for name, value in whole.parameters.items():
        assert value.tobytes() == rest.parameters[name].tobytes(), name


@pytest.mark.slow
def test_a_site_whose_process_dies_with_what_it_remembers_goes_on(tmp_path: Path) -> None:
    recipe = replace(
        remembers(rounds=3),
        client=clients.Dies,
        client_kwargs={"marker": str(tmp_path / "died")},
        federation=FederationConfig(num_clients=3, num_rounds=3, min_available_clients=1, round_timeout=20.0),
    )
    result = recipe.execute(FlareSimEnv())
    ended = {s.site: s.status for s in result.rounds[2].sites if s.stage == "fit"}
    assert (tmp_path / "died").exists()
    assert ended["site-1"] in (Status.FAILED, Status.LATE)
    assert ended["site-2"] is ended["site-3"] is Status.USED
    assert result.state.round == 3


SERVERS = {
    FlowerSimEnv: ("sfl.engine.flower.simulate",),
    FlareSimEnv: ("sfl.engine.nvflare.simulate",),
    FlowerEnv: ("flower-superlin", "flwr-serverapp"),  # as the kernel cuts names
    PocEnv: ("server_train", "fed_server.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("env", SERVERS)
def test_a_server_that_is_killed_is_an_error_and_its_run_goes_on_to_the_same_bits(env: Env, tmp_path: Path) -> None:
    recipe = remembers(rounds=3)
    killed: list[float] = []

    def kill(event: Event) -> None:
        """The server dies with ``kill -9`` after its second round."""
        if isinstance(event, RoundFinished) and event.round == 2:
            for process in psutil.process_iter():
                if str(tempfile.gettempdir()) in temporary(process) and is_server(process, env):
                    process.kill()
                    killed.append(time.monotonic())

    with pytest.raises(EngineError, match="must run to the job's end"):
        recipe.execute(env(), out=tmp_path / "run", observers=[kill])
    assert killed
    assert time.monotonic() - killed[0] < 40
    rest = recipe.execute(env(), out=tmp_path / "run", resume=True)
    whole = recipe.execute(SimEnv(device="cpu"))
    assert rest.state.round == 3
    for name, value in whole.parameters.items():
        assert value.tobytes() == rest.parameters[name].tobytes(), name


def is_server(process: psutil.Process, env: Env) -> bool:
    try:
        words = " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return False
    return any(name in words for name in SERVERS[env]) and "sfl.engine.guard" not in words


def temporary(process: psutil.Process) -> str:
    """A process's temporary folder, which says whose run it is."""
    try:
        return process.environ().get("TMPDIR", "")
    except (psutil.Error, OSError):
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("env", [FlowerSimEnv, FlareSimEnv, FlowerEnv, PocEnv])
def test_nothing_outlives_a_driver_that_is_killed(env: Env, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(
        "import sys, tempfile\n"
        "from dataclasses import replace\n"
        "import engine_clients as clients, test_engines as t, sfl.env\n"
        "if __name__ == '__main__':\n"
        f"    tempfile.tempdir = {tempfile.gettempdir()!r}\n"
        "    r = replace(t.remembers(rounds=1), client=clients.Sleeps)\n"
        f"    r.execute(getattr(sfl.env, {env.__name__!r})(), observers=[lambda e: print(e, flush=True)])\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environ = {**os.environ, "PYTHONPATH": path, "TEST_RUN": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "StageStarted" in line and "fit" in line:
                break
        before = marked(str(tmp_path))
        process.kill()
    assert before, "the engine had no processes: this test shows nothing"
    deadline = time.monotonic() + 20
    while (
        set(marked(str(tmp_path))) & set(before) or [*Path(tempfile.gettempdir()).iterdir()]
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not set(marked(str(tmp_path))) & set(before)
    assert not [*Path(tempfile.gettempdir()).iterdir()]


def test_a_recipe_that_cannot_travel_is_refused_before_anything_starts() -> None:
    recipe = replace(remembers(), derive=lambda metrics: metrics)
    with pytest.raises(ConfigError, match=r"the recipe\.derive must be a class or function of a module"):
        recipe.execute(FlareSimEnv())


def test_an_engine_that_does_not_start_says_where_its_log_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        FlareSimEnv, "command", lambda *_: [sys.executable, "-c", "print('no server'); raise SystemExit(3)"]
    )
    with pytest.raises(EngineError, match=r"exit code 3. Its log is .*engine\.log; it ends with:\nno server"):
        remembers().execute(FlareSimEnv(), out=tmp_path / "run")


@pytest.mark.parametrize(("env", "extra"), [(FlareSimEnv, "nvflare"), (PocEnv, "nvflare"), (FlowerEnv, "flower")])
def test_a_missing_engine_names_the_command_that_installs_it(
    env: Env, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.env.checks.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'sfl\[{extra}\]'"):
        remembers().execute(env())
