"""`sfl poc`, `submit`, `status`, `abort`, `download`, `export`: what they refuse, and what they say. No engine runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import LOOP, write
from sfl.cli import main
from sfl.cli.jobs import as_json, as_table
from sfl.engine.nvflare.admin import FederationState, JobLine, await_sites, connect
from sfl.engine.nvflare.standing import Standing
from sfl.env import ProdEnv
from sfl.errors import EngineError
from sfl.recipe import Recipe

KIT = "poc/kits/admin@sfl.poc"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prepared(capsys: pytest.CaptureFixture[str]) -> Standing:
    assert main(["poc", "prepare", "--num-clients", "2"]) == 0
    assert capsys.readouterr().out == "prepared a server and 2 sites in poc: site-1, site-2\n"
    return Standing(Path("poc"))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ("poc start", 2, "workspace must be a folder that was prepared, got 'poc'. Prepare it: sfl poc prepare"),
        ("poc status --workspace x", 2, "must be a folder that was prepared, got 'x'"),
        ("poc stop", 2, "must be a folder that was prepared"),
        ("poc clean", 2, "must be a folder that was prepared"),
        ("poc submit sum", 2, "must be a folder that was prepared"),
        ("poc submit esm2", 2, "must be a folder that was prepared"),
        ("poc submit esm2 --startup-kit x", 2, "startup_kit must be left out"),
        ("poc prepare --num-clients 0", 2, "num_clients must be at least 1, got 0."),
        ("poc prepare --workspace .", 2, "workspace must be a new or empty folder, got ."),
        ("submit esm2", 2, "startup_kit must be the folder of an admin's kit, got none. Give --startup-kit."),
        ("submit sum", 2, "startup_kit must be the folder of an admin's kit, got none."),
        ("submit sum --startup-kit x", 2, "startup_kit must be the kit of an admin, got 'x'."),
        ("submit esm2 --backend sim", 2, "backend must be nvflare-prod to submit, got 'sim'. Leave it out."),
        ("submit esm2 --resume gone", 2, "--resume must name the folder of a run, with its config.yaml, got 'gone'."),
        ("submit esm2 --resume gone --local-steps 3", 2, "What changes at --resume must be one of num_rounds"),
        ("submit esm2 --num-round 3", 2, "Did you mean --num-rounds?"),
        ("status --startup-kit x", 2, "startup_kit must be the kit of an admin, got 'x'."),
        ("status", 2, "--startup-kit"),
        ("abort job --startup-kit x", 2, "startup_kit must be the kit of an admin"),
        ("abort --startup-kit x", 2, "--job"),
        ("download job --startup-kit x", 2, "startup_kit must be the kit of an admin"),
        ("export", 2, "--output"),
        ("export --output job --job sum --local-steps 3", 2, "--local-steps must come with the job esm2"),
        ("export --output job --train-args x", 2, "a script's options must come with --train-script"),
        (
            "export --output job --train-script no.py --model-class a.B",
            2,
            "a training script and what it imports must be Python",
        ),
        ("export --output . --job sum", 2, "output must be a new or empty folder, got .."),
        ("export --output job --job sum --sites a,a", 2, "sites must be 2 different names, as num_clients, got a, a."),
    ],
)
def test_what_is_refused_in_one_line(
    argv: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").touch()
    assert main(argv.split()) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.parametrize(
    "argv",
    [
        "poc prepare", "poc start", f"submit sum --startup-kit {KIT}", f"status --startup-kit {KIT}",
        "export --output job --job sum",
    ],
)  # fmt: skip
def test_without_flare_they_name_the_command_that_installs_it(
    argv: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sfl.env.checks.find_spec", lambda _: None)
    monkeypatch.setattr("sfl.env.production.check_kit", lambda _: None)
    assert main(argv.split()) == 1
    assert "pip install 'sfl[nvflare]'" in capsys.readouterr().err


def test_what_prepare_makes_is_this_users_alone_and_listens_on_loopback(prepared: Standing) -> None:
    assert sorted(path.name for path in prepared.folder.iterdir()) == ["kits", "logs", "poc.json"]
    assert {path.name for path in prepared.kits.iterdir()} == {"admin@sfl.poc", "server", "site-1", "site-2"}
    assert not list(prepared.folder.rglob("*state*"))  # nor the authority's key
    assert not any(path.stat().st_mode & 0o077 for path in prepared.folder.rglob("*.key"))
    config = json.loads((prepared.kits / "server" / "startup" / "fed_server.json").read_text())
    port = json.loads((prepared.folder / "poc.json").read_text())["port"]
    assert config["servers"][0]["service"]["target"] == f"localhost:{port}"


def test_what_is_prepared_but_does_not_run(prepared: Standing, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["poc", "status"]) == 1
    assert "the federation in poc must run, got one that does not. Start it: sfl poc start" in capsys.readouterr().err
    assert main(["poc", "prepare"]) == 2
    assert "remove what was prepared there: sfl poc clean" in capsys.readouterr().err
    assert main(["poc", "stop"]) == 0
    assert main(["poc", "clean"]) == 0
    assert capsys.readouterr().out == "nothing runs in poc\nremoved poc\n"
    assert not prepared.folder.exists()


def test_a_port_that_is_taken_is_named(prepared: Standing, capsys: pytest.CaptureFixture[str]) -> None:
    port = json.loads((prepared.folder / "poc.json").read_text())["port"]
    with socket.create_server(("127.0.0.1", port)):
        assert main(["poc", "start"]) == 1
    assert f"port {port} of poc must be free, got one that somebody listens on" in capsys.readouterr().err
    assert not prepared.is_running


@pytest.mark.slow
def test_a_participant_that_does_not_start_is_named_with_its_last_lines(
    prepared: Standing, capsys: pytest.CaptureFixture[str]
) -> None:
    (prepared.kits / "server" / "startup" / "server.key").write_text("broken")
    assert main(["poc", "start"]) == 1
    said = capsys.readouterr().err
    assert "the server must listen: server has ended. Its log is poc/logs/server.log; it ends with:" in said
    assert not prepared.is_running


def test_a_server_that_is_down_is_one_line(
    prepared: Standing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["submit", "sum", "--startup-kit", str(prepared.admin_kit), "--out", "runs/x"]
    monkeypatch.setattr("sfl.engine.nvflare.admin.CONNECT", 0.5)
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "must open a session with its server" in said.err
    assert said.out == ""
    assert said.err.count("\n") == 1


def test_no_session_reads_what_lies_below_the_current_folder(
    prepared: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = import_module("nvflare.fuel.utils.config_service").ConfigService
    monkeypatch.setattr(service, "_config_path", [])
    write(Path("deep/down"), '{"max_message_size": 1}', "comm_config.json")
    with pytest.raises(EngineError, match="must open a session with its server"):
        connect(prepared.admin_kit.absolute(), 0.5)
    assert service.load_configuration("comm_config.json") is None


class Connecting:
    """A session of a federation whose sites connect one by one, one with each look."""

    def __init__(self) -> None:
        self.there: list[SimpleNamespace] = []

    def get_connected_client_list(self) -> list[SimpleNamespace]:
        if len(self.there) < 3:
            self.there.insert(0, SimpleNamespace(name=f"site-{len(self.there) + 1}"))
        return self.there


@pytest.mark.parametrize(
    ("names", "planned", "seconds", "expected"),
    [
        ((), 2, 9.0, ["site-1", "site-2"]),
        (("site-3", "site-1"), 2, 9.0, ["site-3", "site-1"]),
        ((), 4, 0.05, "num_clients=4, got 3: site-1, site-2, site-3. Start the missing ones"),
        (("site-1", "site-9"), 2, 0.05, "num_clients=2, got 1: site-1"),
        (("site-1",), 2, 9e9, "num_clients=2, got 1: site-1"),
        ((), 0, 9e9, "num_clients=0, got 1: site-1"),
    ],
)
def test_a_job_waits_for_sites_that_are_still_connecting(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], planned: int, seconds: float, expected: list[str] | str
) -> None:
    monkeypatch.setattr("sfl.engine.nvflare.admin._LOOK", 0.01)
    session: Any = Connecting()
    if isinstance(expected, str):
        with pytest.raises(EngineError, match=expected):
            await_sites(session, names, planned, seconds)
    else:
        assert await_sites(session, names, planned, seconds) == expected


STATE = FederationState(
    server="up",
    sites=("site-1",),
    jobs=(JobLine(id="1", name="sum", status="RUNNING"), JobLine(id="22", name="x", status="FINISHED:COMPLETED")),
)


def test_a_federation_is_shown_as_a_table_and_as_json() -> None:
    assert as_table(STATE).splitlines()[:2] == ["server  up", "sites   site-1"]
    assert as_table(STATE).splitlines()[4] == "22   x     FINISHED:COMPLETED"
    assert "jobs    none" in as_table(FederationState(server="up", sites=(), jobs=()))
    assert "none is connected" in as_table(FederationState(server="up", sites=(), jobs=()))
    assert json.loads(as_json(STATE))["jobs"][0]["status"] == "RUNNING"
    assert [job.has_ended for job in STATE.jobs] == [False, True]


def test_export_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(tmp_path, LOOP)
    net = "import torch\nclass Net(torch.nn.Linear):\n    pass\n"
    write(tmp_path, net, "net_of_export.py")
    argv = f"export --output job --train-script {script} --train-args --epochs=2 --num-clients 3 --sites c,a,b"
    sys.path.insert(0, str(tmp_path))
    try:
        assert main([*argv.split(), "--model-class", "net_of_export.Net", "--launch-external-process"]) == 1
        assert "model must name a torch module that can be made" in capsys.readouterr().err
    finally:
        sys.path.remove(str(tmp_path))
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(2)}, "start.safetensors")
    assert main([*argv.split(), "--initial-ckpt", "start.safetensors", "--num-rounds", "4"]) == 0
    assert "nvflare simulator job -w job-workspace -c a,b,c -t 3" in capsys.readouterr().out
    meta = json.loads(Path("job/meta.json").read_text())
    assert meta["deploy_map"] == {"server_app": ["server"], "site_app": ["a", "b", "c"]}
    program = json.loads(Path("job/site_app/config/sfl/program.json").read_text())
    said = program["object"][1]["kwargs"]["dict"]["script"]["dict"]
    assert (said["path"], said["args"], said["rounds"]) == ("train.py", ["--epochs=2"], 4)
    assert {path.name for path in Path("job/site_app/custom/train-script").iterdir()} == {"train.py"}


@pytest.mark.parametrize("code", [True, False])
def test_a_job_of_ours_is_exported_with_custom_code_or_without(code: bool) -> None:
    flag = "--custom-code" if code else "--no-custom-code"
    assert main(["export", "--output", "job", "--job", "sum", "--num-clients", "2", flag]) == 0
    assert Path("job/site_app/custom").is_dir() is code
    assert Path("job/server_app/custom").is_dir() is code


def test_their_help_loads_nothing_heavy() -> None:
    for argv in (["poc", "--help"], ["submit", "esm2", "--help"], ["status", "--help"], ["export", "--help"]):
        code = f"import sys; from sfl.cli import main; main({argv!r}); sys.stderr.write(' '.join(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        assert done.stdout
        assert {"torch", "transformers", "flwr", "nvflare", "ray"}.isdisjoint(done.stderr.split())


def test_a_run_is_submitted_again_from_its_folder_and_a_try_that_fails_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[int, Path, bool]] = []
    refusals: list[str] = []

    def submit(_: ProdEnv, recipe: Recipe, *, out: Path, resume: bool = False) -> str:
        if refusals:
            raise EngineError(refusals.pop())
        taken.append((recipe.build().federation.num_rounds, out, resume))
        return "a-job"

    monkeypatch.setattr(ProdEnv, "submit", submit)
    begin = "submit esm2 --out runs/one --num-clients 2 --num-rounds 2 --startup-kit kit --local-steps 1"
    assert main(begin.split()) == 0
    config = tmp_path / "runs" / "one" / "config.yaml"
    before = config.read_text()
    refusals.append("it is under way")
    assert main(["submit", "esm2", "--resume", "runs/one", "--num-rounds", "5"]) == 1
    assert config.read_text() == before
    assert main(["submit", "esm2", "--resume", "runs/one", "--num-rounds", "5"]) == 0
    assert taken == [(2, Path("runs/one"), False), (5, Path("runs/one"), True)]
    assert "num_rounds: 5" in config.read_text()
    said = capsys.readouterr()
    assert said.out == "a-job\na-job\n"
    assert "sfl download a-job --wait --startup-kit kit --out runs/one" in said.err
