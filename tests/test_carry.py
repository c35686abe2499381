"""What travels with a job for provisioned sites, and what a site lets it name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from scripts import EXAMPLES, LOOP, recipe, write
from sfl.client.script_code import placed, script_files, unplaced
from sfl.engine.launch import Launch
from sfl.engine.nvflare.carried import carried_by_server, carried_by_site, given_launch
from sfl.engine.nvflare.controller import keep_ports
from sfl.engine.nvflare.job import write_carrying_job
from sfl.engine.owner import KEY as KEY_FILE
from sfl.engine.owner import new_key, run_of
from sfl.engine.ports import own_ports
from sfl.env.carry import Cargo, carried_settings
from sfl.env.production import export_job
from sfl.errors import ConfigError, EngineError
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.model import BUNDLED, find_model
from sfl.esm2.server import esm2_recipe
from sfl.io.tree import load_tree
from sfl.recipe import FedAvgRecipe, Recipe
from sfl.server.app import sum_recipe
from sfl.server.config import AlgorithmConfig, AlgorithmName
from sfl.types import FederationConfig
from sfl.utils.plain import restore
from test_engines import remembers


def cargo(subject: Recipe) -> Cargo:
    return Cargo.of(subject, subject.build())


def test_a_script_brings_what_it_imports_from_beside_it_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "import numpy\nimport pkg.a\ndef late():\n    from alone import x\n")
    write(tmp_path, "from .a import y", "pkg/__init__.py")
    write(tmp_path, "import deep.m, sys, sfl", "pkg/a.py")
    write(tmp_path, "import not_there", "deep/m.py")
    write(tmp_path, "x = 1", "alone.py")
    write(tmp_path, "x = 1", "unused.py")
    write(tmp_path, "an installed package wins over a folder of notes", "torch/notes.txt")
    found = script_files(tmp_path / "train.py")
    assert sorted(found) == [f"train-script/{name}" for name in ("alone.py", "deep", "pkg", "train.py")]
    assert found["train-script/pkg"] == tmp_path / "pkg"


@pytest.mark.parametrize("text", ["def f(:", None])
def test_a_script_that_is_no_python_is_refused_before_anything_starts(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"what it imports must be Python, got .*train\.py"):
        script_files(path)


def test_a_script_job_travels_without_paths_of_this_machine(tmp_path: Path) -> None:
    script = write(tmp_path, LOOP)
    load = cargo(recipe(script, train_args="a b"))
    launch = Launch(tmp_path / "launch")
    launch.folder.mkdir()
    load.write(launch, {"names": []})
    assert str(tmp_path) not in launch.program.read_text()
    assert str(tmp_path).encode() not in launch.recipe.read_bytes()
    program = placed(unplaced(load.program), Path("/job/custom"))
    assert program.kwargs["script"]["path"] == "/job/custom/train-script/train.py"
    assert unplaced(program) == load.program
    assert placed(cargo(sum_recipe()).program, tmp_path) == sum_recipe().build().program


def test_initial_parameters_are_made_where_the_job_is_submitted(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "start.pt")
    script = write(tmp_path, LOOP)
    given = FedAvgRecipe(name="job", min_clients=1, initial_ckpt=str(tmp_path / "start.pt"), train_script=script)
    carried = cargo(given).recipe
    (tmp_path / "start.pt").unlink()
    assert np.array_equal(carried.build().initial()["w"], np.arange(3.0, dtype=np.float32))
    assert carried.build().program.kwargs["script"]["params_format"] == "pytorch"


def test_a_clients_own_module_travels_and_a_job_of_ours_has_no_code() -> None:
    assert list(cargo(remembers()).code) == ["engine_clients.py"]
    assert cargo(sum_recipe()).code == {}


def exported(subject: Recipe, folder: Path) -> Path:
    return export_job(subject, folder, ("site-1", "site-2"))


class Context:
    """A site's FLARE context, as far as it is asked."""

    def __init__(self, workspace: Any, byoc: bool, job: str = "0a") -> None:
        from nvflare.apis.fl_constant import FLContextKey  # noqa: TID251 - stands in for a site of FLARE

        self.props = {FLContextKey.WORKSPACE_OBJECT: workspace, FLContextKey.JOB_META: {"byoc": byoc}}
        self.job = job

    def get_prop(self, key: str) -> Any:
        return self.props.get(key)

    def get_job_id(self) -> str:
        return self.job


def deployed(job: Path, app: str, root: Path) -> Any:
    from nvflare.apis.workspace import Workspace  # noqa: TID251 - stands in for a site of FLARE

    (root / "startup").mkdir(parents=True)
    (root / "local").mkdir()
    workspace = Workspace(str(root), site_name="site-1" if app == "site_app" else "server")
    (job / app).rename(root / "moved")
    target = Path(workspace.get_app_dir("0a"))
    target.parent.mkdir(parents=True)
    (root / "moved").rename(target)
    return workspace


def test_on_a_site_a_script_is_named_only_by_code_that_flare_let_in(tmp_path: Path) -> None:
    """FLARE's own mark on the job counts, and that the code is there: neither alone is enough."""
    job = exported(recipe(write(tmp_path, LOOP)), tmp_path / "job")
    workspace = deployed(job, "site_app", tmp_path / "site")
    launch = carried_by_site(Context(workspace, byoc=True))
    script = launch.read_program().kwargs["script"]["path"]
    assert Path(script).read_text() == (tmp_path / "train.py").read_text()
    assert Path(script).is_relative_to(workspace.get_app_custom_dir("0a"))
    with pytest.raises(ConfigError, match="a described name must be one of"):
        carried_by_site(Context(workspace, byoc=False)).read_program()
    Path(workspace.get_app_custom_dir("0a")).rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="a described name must be one of"):
        carried_by_site(Context(workspace, byoc=True)).read_program()


def test_on_the_server_a_job_without_code_may_not_name_a_model_to_make(tmp_path: Path) -> None:
    job = exported(recipe(write(tmp_path, LOOP)), tmp_path / "job")
    launch = carried_by_server(Context(deployed(job, "server_app", tmp_path / "server"), byoc=False))
    with pytest.raises(ConfigError, match=r"got 'sfl\.train\.model_source:ModelSource'"):
        restore(load_tree(launch.recipe), allow=launch.allowed())


def test_a_job_without_an_owner_is_a_run_of_its_own_and_names_no_other(tmp_path: Path) -> None:
    workspace = deployed(exported(sum_recipe(), tmp_path / "job"), "site_app", tmp_path / "site")
    one, again = (carried_by_site(Context(workspace, byoc=False)).read_settings()["sites"] for _ in range(2))
    assert one == again
    assert Path(one).parent.parent == tmp_path / "site" / "sfl-runs"
    launch = carried_by_site(Context(workspace, byoc=False))
    for run in ("../../elsewhere", run_of(KEY)):
        launch.add_settings(run=run)
        with pytest.raises(EngineError, match="must be signed with the key of that run, got no signature"):
            carried_by_site(Context(workspace, byoc=False))
    with pytest.raises(EngineError, match="must have a workspace"):
        carried_by_site(Context(None, byoc=False))


KEY = new_key()


def owned(folder: Path, key: bytes = KEY, **said: Any) -> Path:
    """A job that its owner has signed."""
    subject, launch = sum_recipe(), Launch(folder / "launch")
    launch.folder.mkdir(parents=True)
    job = subject.build()
    Cargo.of(subject, job).write(launch, carried_settings(job, "cpu") | {"run": run_of(KEY)} | said)
    (launch.folder / KEY_FILE).write_bytes(key)
    return write_carrying_job(folder, "job", launch, ("site-1", "site-2"))


TAKE = {"server_app": carried_by_server, "site_app": carried_by_site}


@pytest.mark.parametrize("algorithm", get_args(AlgorithmName))
def test_what_sfl_brings_itself_needs_no_code_to_be_named(algorithm: AlgorithmName, tmp_path: Path) -> None:
    config = ESM2RunConfig(
        algorithm=AlgorithmConfig(algorithm=algorithm), federation=FederationConfig(num_clients=2, num_rounds=1)
    )
    subject = esm2_recipe(config, find_model(BUNDLED))
    job = export_job(subject, tmp_path / "job", ("site-1", "site-2"), custom_code=False)
    launches = {app: take(Context(deployed(job, app, tmp_path / app), byoc=False)) for app, take in TAKE.items()}
    for launch in launches.values():
        launch.read_program()
    server = launches["server_app"]
    assert restore(load_tree(server.recipe), allow=server.allowed()).name == subject.name


@pytest.mark.parametrize("app", TAKE)
def test_a_run_is_of_who_has_its_key(app: str, tmp_path: Path) -> None:
    job = owned(tmp_path / "1", out="/elsewhere", sites="/elsewhere", keeper=1)
    assert not any(KEY in file.read_bytes() for file in job.rglob("*") if file.is_file())
    workspace = deployed(job, app, tmp_path / "machine")
    launch, again = (TAKE[app](Context(workspace, byoc=False)) for _ in range(2))  # as after a restart
    settings = launch.read_settings()
    assert settings == again.read_settings()
    assert "keeper" not in settings
    made = Path(settings["out" if app == "server_app" else "sites"])
    assert made.parent == tmp_path / "machine" / "sfl-runs" / run_of(KEY)
    with pytest.raises(EngineError, match="must be new, got a copy of one that was given before"):
        redeployed(job, app, workspace, "0b")
    theirs = redeployed(owned(tmp_path / "2", new_key()), app, workspace, "0c")  # who names a run has not its key
    assert theirs.read_settings()["run"] not in ("", run_of(KEY))
    assert redeployed(owned(tmp_path / "3"), app, workspace, "0d").read_settings()["run"] == run_of(KEY)
    with pytest.raises(EngineError, match="must be new, got a copy"):
        TAKE[app](Context(workspace, byoc=False))


def redeployed(job: Path, app: str, workspace: Any, name: str) -> Launch:
    """What a machine takes of another job."""
    source = job / app
    source = source if source.exists() else Path(workspace.get_app_dir("0a"))
    shutil.copytree(source, workspace.get_app_dir(name))
    return TAKE[app](Context(workspace, byoc=False, job=name))


CARRIED = {
    "server_app": ("order.json", "program.json", "recipe.safetensors", "owner.json", "launch.json"),
    "site_app": ("order.json", "program.json", "owner.json", "launch.json"),
}


@pytest.mark.parametrize(("app", "attack"), [(app, name) for app, names in CARRIED.items() for name in names])
def test_a_job_that_was_seen_and_changed_opens_nothing_of_its_run(app: str, attack: str, tmp_path: Path) -> None:
    workspace = deployed(owned(tmp_path), app, tmp_path / "machine")
    carried = Path(workspace.get_app_config_dir("0a")) / "sfl"
    if attack == "launch.json":
        (carried / "owner.json").unlink()
        (carried / "order.json").rename(carried / attack)
    elif attack == "owner.json":
        proof = json.loads((carried / attack).read_text())
        (carried / attack).write_text(json.dumps(proof | {"moment": proof["moment"] + 1}))
    else:
        (carried / attack).write_bytes((carried / attack).read_bytes() + b" ")
    with pytest.raises(EngineError, match="must be signed with the key of"):
        TAKE[app](Context(workspace, byoc=False))
    assert not (tmp_path / "machine" / "sfl-runs").exists()


def test_a_provisioned_process_takes_no_launch_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("_SFL_RUN", raising=False)
    with pytest.raises(EngineError, match="must carry its launch, got the name of a folder"):
        given_launch("/tmp")


def test_an_exported_job_says_nothing_of_this_machine(tmp_path: Path) -> None:
    job = exported(recipe(str(EXAMPLES / "train_numpy.py")), tmp_path / "mine")
    meta = json.loads((job / "meta.json").read_text())
    assert (meta["name"], meta["mandatory_clients"]) == ("mine", ["site-1", "site-2"])
    assert not (job / "site_app" / "config" / "sfl" / "recipe.safetensors").exists()
    texts = b"".join(path.read_bytes() for path in job.rglob("*") if path.is_file() and "custom" not in path.parts)
    for word in (str(tmp_path), str(EXAMPLES), str(Path.home())):
        assert word.encode() not in texts
    with pytest.raises(ConfigError, match="output must be a new or empty folder"):
        exported(sum_recipe(), tmp_path / "mine")
    assert carried_settings(sum_recipe().build(), "cpu")["devices"] == ["cpu"]


def test_a_simulator_gives_each_site_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator_runner = import_module("nvflare.private.fed.app.simulator.simulator_runner")
    monkeypatch.setattr(simulator_runner, "get_open_ports", simulator_runner.get_open_ports)  # put back afterwards
    keep_ports()
    assert simulator_runner.get_open_ports is own_ports
    monkeypatch.delitem(sys.modules, simulator_runner.__name__)
    keep_ports()  # what is no simulator is left alone


def test_the_end_of_a_job_does_not_import_torch() -> None:
    """FLARE's server does, to look for tensors; what it does without our controller is shown, too."""
    code = (
        "import sys\n"
        "from nvflare.apis.impl.wf_comm_server import WFCommServer\n"
        "from sfl.engine.nvflare.controller import SflController\n"
        "controller = SflController('')\n"
        "controller.set_communicator(WFCommServer())\n"
        "exec(sys.argv[1])\n"
        "controller.communicator.finalize_run(None)\n"
        "print('torch' in sys.modules)"
    )
    told = [
        subprocess.run([sys.executable, "-c", code, first], capture_output=True, text=True, check=True).stdout
        for first in ("pass", "controller.stop_controller(None)")
    ]
    assert told == ["True\n", "False\n"]
