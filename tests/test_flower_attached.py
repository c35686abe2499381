"""A SuperLink and two SuperNodes that an operator has started, over TLS and with node keys; jobs submitted to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import engine_clients as clients
import sfl
from scripts import recipe, write
from sfl.core.events import Event, StageStarted
from sfl.engine.flower.deploy import write_connection
from sfl.engine.flower.home import PIECE
from sfl.engine.flower.keys import make_node_keys, make_server_keys
from sfl.engine.guard import Guarded
from sfl.engine.ports import free_ports
from sfl.env import FlowerEnv, SimEnv
from sfl.env.remote import child_environment
from sfl.errors import ConfigError, EngineError
from sfl.io.metrics import read_rounds
from sfl.recipe import FedAvgRecipe
from sfl.types import FederationConfig
from test_engines import remembers

pytestmark = pytest.mark.timeout(600)
BIN = Path(sys.executable).parent
SOURCE = str(Path(sfl.__file__).parents[1])  # and none of the user's own modules
SITES = {"hospital-a": "site='hospital-a'", "hospital-b": "site='hospital-b'"}


@dataclass(frozen=True)
class Federation:
    folder: Path
    address: str
    authority: Path

    def env(self) -> FlowerEnv:
        return FlowerEnv(superlink=self.address, root_certificates=self.authority)

    def flwr(self, *arguments: str) -> str:
        environ = {**os.environ, "FLWR_HOME": str(self.folder / "operator"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments], env=environ, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    keys = make_server_keys(folder / "keys")
    asked = subprocess.run([str(BIN / "flower-supernode"), "--help"], capture_output=True, text=True, check=True).stdout
    is_old = "--clientappio-api-address" in asked  # else one HTTP API takes the place of all
    fleet, control, *runtime = free_ports(3 + len(SITES))
    if not is_old:
        fleet = control = runtime[0]
    made = Federation(folder, f"127.0.0.1:{control}", keys.authority)
    (folder / "operator").mkdir()
    write_connection(folder / "operator", "sfl", made.address, keys.authority)

    def serving(old: str, port: int) -> list[str]:
        return [old, f"127.0.0.1:{port}"] if is_old else ["--host", "127.0.0.1", "--port", str(port)]

    link = [
        "--ssl-ca-certfile", keys.authority, "--ssl-certfile", keys.certificate, "--ssl-keyfile", keys.key,
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        *serving("--serverappio-api-address", runtime[0]),
        *(["--fleet-api-address", f"127.0.0.1:{fleet}", "--control-api-address", made.address] if is_old else []),
    ]  # fmt: skip
    with ExitStack() as stack:

        def start(name: str, command: str, options: list[object]) -> None:
            environ = child_environment(1, folder) | {"FLWR_HOME": str(folder / name), "PYTHONPATH": SOURCE}
            words = [str(BIN / command), *map(str, options)]
            guard = Guarded(words, log=folder / f"{name}.log", env=environ, folder=folder / "none")
            stack.enter_context(guard)

        start("superlink", "flower-superlink", link)
        deadline = time.monotonic() + 60
        while '"success": true' not in made.flwr("ls", "sfl", "--format", "json"):
            assert time.monotonic() < deadline, (folder / "superlink.log").read_text()[-2000:]
        for number, (site, config) in enumerate(SITES.items()):
            private, public = make_node_keys(folder / "keys", site)
            made.flwr("supernode", "register", str(public), "sfl")
            node = [
                "--root-certificates", keys.authority, "--superlink", f"127.0.0.1:{fleet}",
                "--auth-supernode-private-key", private, "--node-config", config.replace("'", '"'),
                *serving("--clientappio-api-address", runtime[1 + number]),
            ]  # fmt: skip
            start(site, "flower-supernode", node)
        yield made


def job(rounds: int) -> FedAvgRecipe:
    federation = FederationConfig(num_clients=2, num_rounds=rounds, min_available_clients=2)
    recipe = replace(remembers(), initial_parameters=clients.middling, federation=federation)
    return replace(recipe, evaluate_every=0)  # each message costs its site a process


@pytest.mark.slow
def test_a_large_model_has_the_bits_of_the_simulation_comes_home_whole_and_goes_on(
    federation: Federation, tmp_path: Path
) -> None:
    out, events = tmp_path / "run", list[Event]()
    job(1).execute(federation.env(), out=out, observers=[events.append])
    assert next(event.cohort for event in events if isinstance(event, StageStarted)) == tuple(SITES)
    assert {"metrics.csv", "report.html", "checkpoints", "environment.json"} <= {path.name for path in out.iterdir()}
    with pytest.raises(ConfigError, match="backend must be flower-deploy to go on"):
        job(2).execute(SimEnv(), out=out, resume=True)
    rest = job(2).execute(federation.env(), out=out, resume=True)
    whole = job(2).execute(SimEnv(device="cpu"))
    assert rest.state.round == 2
    assert rest.parameters["large"].nbytes > 8 * PIECE
    for name, value in whole.parameters.items():
        assert value.tobytes() == rest.parameters[name].tobytes(), name
    assert len(list((out / "checkpoints").iterdir())) == 3
    assert "sfl-part" not in (federation.folder / "superlink.log").read_text()
    left = [path.name for place in SITES for path in (federation.folder / place / "sfl-runs").glob("*/launch-*")]
    assert left == []  # what the sites remember stays with them, and nothing else


@pytest.mark.slow
def test_a_superlink_that_another_authority_vouches_for_is_turned_away(federation: Federation, tmp_path: Path) -> None:
    foreign = make_server_keys(tmp_path / "keys").authority
    with pytest.raises(
        EngineError, match=r"the SuperLink must take the app(.|\n)*Check its address, root_certificates"
    ):
        job(1).execute(FlowerEnv(superlink=federation.address, root_certificates=foreign))


SCRIPT = """
import sys
from pathlib import Path
import sfl.client as flare
from steps import step

flare.init()
Path(sys.argv[1], flare.get_site_name()).touch()
while flare.is_running():
    model = flare.receive()
    metrics = {"travelled": float(Path(__file__).parent.name == "train-script"), "args": float(len(sys.argv))}
    flare.send(flare.FLModel(params={"w": step(model.params["w"], flare.get_site_name())}, metrics=metrics))
"""
STEPS = "def step(w, site):\n    return w * 0.7 + {'1': 0.1, 'a': 0.1, '2': 0.3, 'b': 0.3}[site[-1]]\n"


@pytest.mark.slow
def test_a_training_script_travels_with_what_lies_beside_it(federation: Federation, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    ran.mkdir()
    write(tmp_path, STEPS, "steps.py")
    subject = recipe(
        write(tmp_path, SCRIPT),
        rounds=1,
        model={"w": np.linspace(0.0, 1.0, 5)},
        train_args=[str(ran)],
        evaluate_every=0,
    )
    there = subject.execute(federation.env())
    assert {path.name for path in ran.iterdir()} == set(SITES)
    assert there.rounds[-1].fit == {"travelled": 1.0, "args": 2.0}
    here = subject.execute(SimEnv(device="cpu"))
    assert here.rounds[-1].fit["travelled"] == 0.0
    assert here.parameters["w"].tobytes() == there.parameters["w"].tobytes()


def newest(federation: Federation) -> str:
    return str(json.loads(federation.flwr("ls", "sfl", "--format", "json"))["runs"][0]["status"])


def test_what_names_no_superlink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="superlink must be an address as host:port, got"):
        FlowerEnv(superlink="fl.example.org")
    with pytest.raises(ConfigError, match="root_certificates must be a file"):
        FlowerEnv(superlink="fl.example.org:9093", root_certificates=tmp_path)
    with pytest.raises(ConfigError, match="superlink must be given with root_certificates and sites"):
        FlowerEnv(sites=("a",))


OWN_APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "speeches"
version = "1.0.0"
description = "Fine-tunes a language model on speeches."
license = "MIT"
dependencies = ["flwr>=1.34"]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "sfl.llm.server_app:app"
clientapp = "sfl.llm.client_app:app"

[tool.flwr.app.config]
num-rounds = 1
model = "bundled"
local-steps = 1
eval-documents = 2
out = "{out}"
"""


@pytest.mark.slow
def test_a_flower_app_of_ones_own_names_the_application(federation: Federation, tmp_path: Path) -> None:
    app, out = tmp_path / "app", tmp_path / "run"
    app.mkdir()
    (app / "pyproject.toml").write_text(OWN_APP.format(out=out))
    run = json.loads(federation.flwr("run", str(app), "sfl", "--format", "json"))["run-id"]
    deadline = time.monotonic() + 240
    while not (status := status_of(federation, str(run))).startswith("finished"):
        assert time.monotonic() < deadline, status
        time.sleep(4.0)
    assert status == "finished:completed", federation.flwr("log", str(run), "sfl", "--show")
    assert (out / "model" / "adapter_model.safetensors").is_file()
    assert "What the model says" in (out / "report.html").read_text()
    trained = [row for row in read_rounds(out / "metrics.jsonl")[-1].sites if row.stage == "fit"]
    assert [(row.site, row.status.value) for row in trained] == [(site, "used") for site in SITES]
    left = [path.name for place in SITES for path in (federation.folder / place / "sfl-runs").glob("flower-*/launch-*")]
    assert left == []


def status_of(federation: Federation, run: str) -> str:
    listed = json.loads(federation.flwr("ls", "sfl", "--run-id", run, "--format", "json"))
    return str(listed["runs"][0]["status"])


@pytest.mark.slow  # the last of these: what hangs at a site keeps its node from other runs until Flower ends it
def test_a_driver_that_is_killed_stops_its_run(federation: Federation, tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(
        "from dataclasses import replace\n"
        "import engine_clients as clients, test_flower_attached as t\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    f = t.Federation(Path({str(federation.folder)!r}), {federation.address!r}, "
        f"Path({str(federation.authority)!r}))\n"
        "    r = replace(t.job(1), client=clients.Sleeps)\n"
        f"    r.execute(f.env(), out=Path({str(tmp_path / 'run')!r}), observers=[lambda e: print(e, flush=True)])\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environ = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "StageStarted" in line and "fit" in line:
                    break
        finally:
            process.kill()
    deadline = time.monotonic() + 30
    while (status := newest(federation)) != "finished:stopped" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status == "finished:stopped", (tmp_path / "run" / "logs" / "engine.log").read_text()[-3000:]
