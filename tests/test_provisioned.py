"""A provisioned server and two sites as processes, over mutual TLS; jobs submitted with admins' kits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from algorithm_clients import Steered
from sfl.cli import main
from sfl.engine.guard import Guarded
from sfl.engine.nvflare.admin import admin, wait_for
from sfl.engine.nvflare.participants import listens
from sfl.engine.nvflare.provision import service_command
from sfl.engine.ports import free_ports
from sfl.env import ProdEnv, SimEnv
from sfl.env.remote import child_environment
from sfl.errors import ConfigError, EngineError, RoundError, SflError
from sfl.privacy.he import CKKS
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.contexts import CLIENT_CONTEXT, SERVER_CONTEXT
from sfl.recipe import FedAvgRecipe
from sfl.server.app import sum_recipe
from sfl.types import FederationConfig
from test_engine_failures import troubled
from test_engines import assert_same, remembers

pytestmark = pytest.mark.timeout(600)
PROJECT = """
name: lung
server: {{name: fl-server, host: localhost, port: {port}, org: hub}}
sites:
  - {{name: site-1, org: a}}
  - {{name: site-2, org: b}}
admins:
  - {{name: boss@example.org, org: hub, role: project_admin}}
  - {{name: lead@example.org, org: a, role: lead}}
"""


def forbid_code(kit: Path, role: str) -> None:
    """The owner of a kit lets nobody of this role bring code."""
    policy = json.loads((kit / "local" / "authorization.json.default").read_text())
    policy["permissions"][role]["byoc"] = "none"
    (kit / "local" / "authorization.json").write_text(json.dumps(policy))


def remove_storage(server: Path) -> None:
    """What a server keeps outside its kit: its jobs."""
    resources = json.loads((server / "local" / "resources.json").read_text())
    shutil.rmtree(Path(resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"]).parent)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A federation that is up, its participants started as their kits say."""
    folder = tmp_path_factory.mktemp("federation")
    (port,) = free_ports(1)
    (folder / "project.yml").write_text(PROJECT.format(port=port))
    assert main(["provision", str(folder / "project.yml"), "--out", str(folder / "kits")]) == 0
    secrets = [path for path in (folder / "kits").rglob("*") if path.suffix == ".key" or path.name == "cert.json"]
    assert secrets
    assert not any(path.stat().st_mode & 0o077 for path in secrets)
    made = folder / "kits" / "lung" / "prod_00"
    forbid_code(made / "site-2", "lead")
    with ExitStack() as stack:
        for name in ("fl-server", "site-1", "site-2"):
            command = service_command(made / name, sys.executable)
            guard = Guarded(
                command, log=folder / f"{name}.log", env=child_environment(1, folder), folder=folder / "none"
            )
            stack.enter_context(guard)
            while name == "fl-server" and guard.code() is None and not listens(port):  # FLARE's sites wait for 15 s
                time.sleep(0.1)
        yield made
    remove_storage(made / "fl-server")


def job(rounds: int = 2) -> FedAvgRecipe:
    federation = FederationConfig(num_clients=2, num_rounds=rounds, min_available_clients=2)
    return replace(remembers(), federation=federation)


@pytest.mark.slow
def test_a_job_gives_the_bits_of_the_simulation_and_comes_home(kits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    env = ProdEnv(startup_kit=kits / "boss@example.org")
    assert_same(job().execute(SimEnv(device="cpu")), job().execute(env, out=out))
    with pytest.raises(ConfigError, match="backend must be nvflare-prod to go on"):
        job().execute(SimEnv(device="cpu"), out=out, resume=True)
    assert {"metrics.csv", "report.html", "checkpoints", "environment.json"} <= {p.name for p in out.iterdir()}
    run = json.loads((out / "remote.json").read_text())["run"]
    for name in ("site-1", "site-2"):
        assert list((kits / name / "sfl-runs" / run / "sites" / name).iterdir())
        assert not list((kits / name).rglob("recipe.safetensors"))  # the server's part stays with the server


@pytest.mark.slow
def test_a_model_that_the_server_cannot_read_opens_with_a_kits_key(kits: Path) -> None:
    federation = FederationConfig(num_clients=2, num_rounds=2, weighting="equal")
    plain = FedAvgRecipe(
        name="sealed", client=Steered, initial_parameters={"w": np.ones(3), "n": np.array(0)}, federation=federation
    )
    result = replace(plain, secure=CKKS()).execute(ProdEnv(startup_kit=kits / "boss@example.org"))
    assert (result.is_sealed, result.key) == (True, None)  # whose key it is, nobody here knows
    with pytest.raises(ConfigError, match="must be opened with a site's"):
        result.open()
    model = result.open((kits / "site-2" / "startup" / CLIENT_CONTEXT).read_bytes())
    expected = plain.execute(SimEnv(device="cpu")).parameters
    assert all(np.abs(model[name] - value).max() < 1e-8 for name, value in expected.items())
    assert not Cipher.holds_secret((kits / "fl-server" / "startup" / SERVER_CONTEXT).read_bytes())


@pytest.mark.slow
def test_sites_that_die_or_never_answer_end_the_run_with_their_words(kits: Path) -> None:
    with pytest.raises(RoundError) as raised:
        troubled(2, dies=2).execute(ProdEnv(startup_kit=kits / "boss@example.org"))
    assert "round 2 must have at least 1 usable updates, got 0 of 2" in str(raised.value)
    assert "site-1: its process died" in str(raised.value)
    assert "site-2: no reply within 30 s" in str(raised.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ssl_context is deprecated")  # by what FLARE connects with, in its own thread
def test_a_run_goes_on_from_what_the_server_kept_and_a_clone_of_its_job_does_not(kits: Path, tmp_path: Path) -> None:
    env = ProdEnv(startup_kit=kits / "boss@example.org", sites=("site-1", "site-2"))
    job(rounds=1).execute(env, out=tmp_path / "run")
    rest = job(rounds=3).execute(env, out=tmp_path / "run", resume=True)
    whole = job(rounds=3).execute(SimEnv(device="cpu"))
    for name, value in whole.parameters.items():
        assert value.tobytes() == rest.parameters[name].tobytes(), name
    kept = kits / "fl-server" / "sfl-runs" / json.loads((tmp_path / "run" / "remote.json").read_text())["run"]
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    with admin(kits / "boss@example.org") as session:
        last = max(session.list_jobs(), key=lambda entry: entry["submit_time"])
        copy = session.clone_job(last["job_id"])
        assert wait_for(session, copy).status == "FINISHED:EXECUTION_EXCEPTION"
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before
    assert "must be new, got a copy of one that was given before" in (kits.parents[2] / "fl-server.log").read_text()


@pytest.mark.slow
def test_a_kit_of_another_federation_is_turned_away(kits: Path, tmp_path: Path) -> None:
    config = json.loads((kits / "site-1" / "startup" / "fed_client.json").read_text())
    port = config["servers"][0]["service"]["target"].split(":")[1]
    (tmp_path / "project.yml").write_text(PROJECT.format(port=port))
    assert main(["provision", str(tmp_path / "project.yml"), "--out", str(tmp_path / "kits")]) == 0
    foreign = tmp_path / "kits" / "lung" / "prod_00" / "lead@example.org"
    with pytest.raises(EngineError, match="must open a session with its server"):
        job().execute(ProdEnv(startup_kit=foreign))


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


def script_job(folder: Path, **options: Any) -> FedAvgRecipe:
    """A script and a module that lies beside it. Each site leaves a file in ``ran``."""
    (folder / "ran").mkdir()
    (folder / "steps.py").write_text("def step(w, site):\n    return w * 0.7 + len(site) * 0.1 + int(site[-1])\n")
    (folder / "train.py").write_text(SCRIPT)
    return FedAvgRecipe(
        name="script",
        min_clients=2,
        num_rounds=2,
        model={"w": np.linspace(0.0, 1.0, 5)},
        train_script=str(folder / "train.py"),
        train_args=[str(folder / "ran")],
        **options,
    )


@pytest.mark.slow
def test_a_training_script_travels_with_what_lies_beside_it(kits: Path, tmp_path: Path) -> None:
    recipe = script_job(tmp_path, launch_external_process=True)
    here = recipe.execute(SimEnv())
    there = recipe.execute(ProdEnv(startup_kit=kits / "boss@example.org"))
    assert here.parameters["w"].tobytes() == there.parameters["w"].tobytes()
    assert there.rounds[-1].fit == {"travelled": 1.0, "args": 2.0}


@pytest.mark.slow
def test_a_site_that_forbids_the_code_of_an_admins_role_runs_nothing_of_it(kits: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"site-2: .*BYOC not permitted"):
        script_job(tmp_path).execute(ProdEnv(startup_kit=kits / "lead@example.org"))
    assert not list((tmp_path / "ran").iterdir())
    assert_same(sum_recipe().execute(), sum_recipe().execute(ProdEnv(startup_kit=kits / "lead@example.org")))


@pytest.mark.slow
def test_a_job_that_carries_no_code_cannot_name_a_script(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training script is any command: it needs FLARE's right to bring code, which this job does not ask for."""
    monkeypatch.setattr("sfl.env.carry.script_files", lambda _: {})
    with pytest.raises(SflError, match="a described name must be one of"):
        script_job(tmp_path).execute(ProdEnv(startup_kit=kits / "lead@example.org"))
    assert not list((tmp_path / "ran").iterdir())


@pytest.mark.slow
def test_fewer_sites_than_planned_are_refused_by_name(kits: Path) -> None:
    planned = replace(job(), federation=FederationConfig(num_clients=3, num_rounds=1))
    with pytest.raises(EngineError, match=r"as num_clients=3, got 2: site-1, site-2"):
        planned.execute(ProdEnv(startup_kit=kits / "lead@example.org"))


@pytest.mark.slow
def test_the_start_script_of_a_kit_is_what_we_run(kits: Path) -> None:
    shown = subprocess.run(
        ["grep", "-o", "nvflare.private.*", str(kits / "site-1" / "startup" / "sub_start.sh")],
        capture_output=True, text=True, check=True, env=dict(os.environ),
    ).stdout  # fmt: skip
    assert " ".join(service_command(kits / "site-1", sys.executable)[7:]) in " ".join(shown.split())


def test_no_two_authorities_share_a_place_for_jobs_and_one_keeps_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project.yml").write_text(PROJECT.format(port=1))
    for out in ("one", "one", "two"):
        assert main(["provision", str(tmp_path / "project.yml"), "--out", str(tmp_path / out)]) == 0
        assert "in the sites' kits: every site can decrypt, the server cannot" in capsys.readouterr().out
    made = [tmp_path / "one/lung/prod_00", tmp_path / "one/lung/prod_01", tmp_path / "two/lung/prod_00"]
    stores = [json.loads((kits / "fl-server/local/resources.json").read_text())["snapshot_persistor"] for kits in made]
    assert stores[0] == stores[1] != stores[2]


def test_a_holder_is_given_the_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "project.yml"
    file.write_text(PROJECT.format(port=1) + "he_holder: site-2\n")
    assert main(["provision", str(file), "--out", str(tmp_path / "kits")]) == 0
    made = tmp_path / "kits/lung/prod_00"
    contexts = [(made / name / "startup" / CLIENT_CONTEXT).read_bytes() for name in ("site-1", "site-2")]
    assert [Cipher.holds_secret(data) for data in contexts] == [False, True]
    monkeypatch.setitem(sys.modules, "tenseal", None)
    assert main(["provision", str(file), "--out", str(tmp_path / "without")]) == 1
    file.write_text(PROJECT.format(port=1))
    assert main(["provision", str(file), "--out", str(tmp_path / "without")]) == 0
    assert not list((tmp_path / "without").rglob(CLIENT_CONTEXT))


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="startup_kit must be the kit of an admin"):
        job().execute(ProdEnv(startup_kit=tmp_path))
    with pytest.raises(EngineError, match="must be the kit of a server or a site"):
        service_command(tmp_path, sys.executable)
