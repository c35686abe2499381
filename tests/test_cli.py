"""The command line: what it passes on, what it refuses, how it ends, and how little it loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sfl import __version__
from sfl.cli import entry, main
from sfl.errors import ConfigError, RoundError
from sfl.esm2.config import ESM2RunConfig
from sfl.utils.config import Resolved, dump_yaml

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "plotly", "flwr", "nvflare", "ray"}


class Application(ModuleType):
    """Stands in for ``sfl.esm2.main`` and ``sfl.server.app``: keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__("application")
        self.calls: list[dict[str, Any]] = []
        self.outcome: int | BaseException = 0

    @property
    def APPLICATION(self) -> Application:  # noqa: N802 - as in the module
        return self

    def run(self, resolved: Resolved[ESM2RunConfig], env: Any, **kwargs: Any) -> int:
        return self._called(resolved=resolved, **kwargs)

    def run_sum(self, **kwargs: Any) -> float:
        self._called(**kwargs)
        return 15.0

    def _called(self, **kwargs: Any) -> int:
        self.calls.append(kwargs)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    @property
    def config(self) -> ESM2RunConfig:
        return self.calls[-1]["resolved"].config


@pytest.fixture(autouse=True)
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Application]:
    """The application, in an empty folder and without SFL variables."""
    application = Application()
    monkeypatch.setitem(sys.modules, "sfl.esm2.main", application)
    monkeypatch.setitem(sys.modules, "sfl.server.app", application)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return application


def run_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(dump_yaml(ESM2RunConfig()), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ flags


def test_flags_reach_the_application(app: Application) -> None:
    argv = "run esm2 --num-rounds 5 --local-epochs 1 --learning-rate 1e-3 --format json -v --out somewhere"
    assert main([*argv.split(), "--data", ""]) == 0
    config = app.config
    assert (config.federation.num_rounds, config.client.local_epochs, config.client.local_steps) == (5, 1, None)
    assert (config.client.learning_rate, config.client.data) == (1e-3, "")
    assert (config.logging.format, config.logging.verbose, config.logging.out) == ("json", True, "somewhere")
    assert app.calls[0]["resolved"].sources["client.local_epochs"] == "--local-epochs"
    assert app.calls[0]["resume"] is None


def test_a_flag_can_be_taken_back(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_VERBOSE", "1")
    assert main(["run", "esm2", "--no-verbose", "--local-steps", "none", "--local-epochs=2"]) == 0
    assert app.config.logging.verbose is False
    assert app.config.client.local_steps is None


def test_files_of_the_current_folder_are_read_in_order(app: Application, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/default.yaml").write_text("federation: {num_rounds: 7, seed: 7}\n")
    assert main(["run", "esm2"]) == 0
    assert app.config.federation.num_rounds == 7
    (tmp_path / "config/esm2.yaml").write_text("federation: {num_rounds: 8}\n")
    assert main(["run", "esm2"]) == 0
    assert (app.config.federation.num_rounds, app.config.federation.seed) == (8, 7)
    assert app.calls[-1]["resolved"].sources["federation.num_rounds"] == "config/esm2.yaml:1"
    (tmp_path / "mine.yaml").write_text("federation: {num_rounds: 9}\n")
    assert main(["run", "esm2", "--config", "mine.yaml"]) == 0
    assert (app.config.federation.num_rounds, app.config.federation.seed) == (9, 0)


def test_sum(app: Application) -> None:
    assert main(["run", "sum"]) == 0
    assert main(["run", "sum", "--num-clients", "5", "--num-rounds", "2", "--base-secret", "1.5"]) == 0
    assert app.calls == [
        {"num_clients": 2, "num_rounds": 3, "base_secret": 7.0},
        {"num_clients": 5, "num_rounds": 2, "base_secret": 1.5},
    ]


# ----------------------------------------------------------------------------------------------------------- resume


def test_resume_reads_the_run_alone(app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/default.yaml").write_text("federation: {seed: 7}\n")
    monkeypatch.setenv("SFL_SEED", "8")
    argv = ["run", "esm2", "--resume", "run", "--num-rounds", "9", "--workers", "2", "--device", "cpu", "-v"]
    assert main([*argv, "--format", "simple"]) == 0
    assert app.calls[0]["resume"] == Path("run")
    federation = app.config.federation
    assert (federation.seed, federation.num_rounds, federation.workers) == (0, 9, 2)
    assert run.is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "2", "--local-epochs", "1"], "got --seed, --local-epochs. Remove it"),
        (["--config", "x.yaml"], "got --config."),
        (["--resume", "nowhere"], "--resume must name the folder of a run, with its config.yaml, got 'nowhere'."),
    ],
)
def test_what_resume_refuses(
    flags: list[str], message: str, tmp_path: Path, app: Application, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "run")
    resume = [] if "--resume" in flags else ["--resume", "run"]
    assert main(["run", "esm2", *resume, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not app.calls


# ------------------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("run esm2 --num-round 3", "error: Unknown option: --num-round. Did you mean --num-rounds?"),
        ("run esm2 --num-rounds", "--num-rounds"),
        ("run esm2 --num-rounds x", "error: num_rounds must be a whole number, got 'x' (--num-rounds)."),
        ("run esm2 --num-rounds -1", "error: num_rounds must be at least 1, got -1. (num_rounds: --num-rounds)"),
        ("run esm2 --local-steps 1 --local-epochs 1", "local_epochs and local_steps must not be set together"),
        ("run esm2 --config none.yaml", "readable YAML file, got 'none.yaml'"),
        ("run esm2 stray", "stray"),
        ("run esm3", "Did you mean"),
        ("rum", 'Did you mean "run"'),
        ("run sum --num-clients x", "--num-clients"),
        ("config show esm3", "Choose from"),
    ],
)
def test_usage_errors_are_one_line_and_two(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_an_unknown_variable_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_NUM_ROUND", "2")
    assert main(["run", "esm2"]) == 2
    assert "Did you mean 'SFL_NUM_ROUNDS'?" in capsys.readouterr().err


def test_a_failed_run_is_one(app: Application, capsys: pytest.CaptureFixture[str]) -> None:
    app.outcome = RoundError("Usable replies must be at least 2, got 1.\nSee [site-2].")
    assert main(["run", "esm2"]) == 1
    assert capsys.readouterr().err == "error: Usable replies must be at least 2, got 1. See [site-2].\n"
    assert main(["run", "esm2", "-v"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("See [site-2].\n")
    assert main(["run", "sum"]) == 1


def test_a_config_error_of_the_application_is_two(app: Application) -> None:
    app.outcome = ConfigError("partition must be iid, got 'x'.")
    assert main(["run", "esm2"]) == 2


def test_the_application_decides_its_code(app: Application) -> None:
    app.outcome = 1
    assert main(["run", "esm2"]) == 1


def test_what_the_system_refuses_is_one_line(app: Application, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "esm2", "--resume", "x" * 300]) == 1
    assert capsys.readouterr().err.startswith("error: [Errno")
    app.outcome = OSError(28, "No space left on device")
    assert main(["run", "esm2", "-v"]) == 1
    streams = capsys.readouterr()
    assert "Traceback" in streams.err
    assert streams.err.endswith("error: [Errno 28] No space left on device\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    script = "import sys\nfrom sfl.cli import entry\nsys.stdin.read()\nentry()"
    with subprocess.Popen(
        [sys.executable, "-c", script, "config", "show"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_bug_is_not_hidden(app: Application) -> None:
    app.outcome = ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError):
        main(["run", "esm2"])


def test_ctrl_c_says_how_to_go_on(app: Application, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app.outcome = KeyboardInterrupt("runs/esm2-1")
    assert main(["run", "esm2"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; go on with: sfl run esm2 --resume runs/esm2-1\n"
    app.outcome = KeyboardInterrupt("my runs/1")
    assert main(["run", "esm2"]) == 130
    assert capsys.readouterr().err.endswith("--resume 'my runs/1'\n")
    app.outcome = KeyboardInterrupt()
    run_folder(tmp_path / "mine")
    for flags in (["--out", "mine"], ["--resume", "mine"]):
        assert main(["run", "esm2", *flags]) == 130
        assert capsys.readouterr().err == "\ninterrupted; go on with: sfl run esm2 --resume mine\n"
    for argv in (["run", "esm2", "--out", "not-begun"], ["run", "esm2"], ["run", "sum"]):
        assert main(argv) == 130
        assert capsys.readouterr().err == "\ninterrupted\n"


def test_entry_exits_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sfl", "rum"])
    with pytest.raises(SystemExit, match="2"):
        entry()


# --------------------------------------------------------------------------------------------------- what it shows


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_BATCH_SIZE", "4")
    for argv in (["config", "show"], ["config", "show", "esm2"]):
        assert main([*argv, "--local-epochs", "1"]) == 0
        rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        assert rows[0] == ["option", "value", "where from"]
        assert ["client.batch_size", "4", "environment SFL_BATCH_SIZE"] in rows
        assert ["client.local_steps", "none", "unset by --local-epochs"] in rows
        assert ["client.data", "''", "default"] in rows


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["run", "config"]),
        (["--help"], ["run", "config", "--version"]),
        (["run", "--help"], ["esm2", "sum"]),
        (
            ["run", "esm2", "--help"],
            [
                "--num-clients",
                "Number of sites",
                "default: 0.0005",
                "--verbose -v",
                "SFL_<OPTION>",
                "config/default.yaml",
                "rich, simple, json",
            ],
        ),
        (["run", "sum", "--help"], ["--base-secret"]),
        (["config", "show", "--help"], ["--num-clients", "esm2"]),
    ],
)
def test_help(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("argv", [["--help"], ["run", "esm2", "--help"], ["config", "show"]])
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = f"import sys; from sfl.cli import main; main({argv!r}); sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert HEAVY.isdisjoint(done.stderr.split())
    if argv == ["--help"]:
        assert {"numpy", "sfl.types", "yaml"}.isdisjoint(done.stderr.split())


@pytest.mark.parametrize("job", ["esm2", "sum"])
def test_job_files_run_from_anywhere(job: str) -> None:
    command = [sys.executable, str(ROOT / f"jobs/{job}_runner.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"sfl run {job}" in done.stdout


def test_flags_mean_the_same_where_something_has_loaded_pydantic(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("pydantic")  # cyclopts then validates with it, unless it is told not to
    assert main(["run", "esm2", "--num-rounds", "x"]) == 2
    assert "--num-rounds" in capsys.readouterr().err
    assert main(["config", "show", "--num-rounds", "7"]) == 0
    assert "7" in capsys.readouterr().out


def test_a_privacy_plan_finds_noise_for_a_target_and_the_cost_of_noise(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "privacy",
        "plan",
        "--num-rounds",
        "50",
        "--num-clients",
        "40",
        "--fraction-fit",
        "0.3",
        "--sampling",
        "poisson",
    ]
    assert main([*words, "--dp-target-epsilon", "8"]) == 0
    said = capsys.readouterr().out
    assert "noise multiplier 1.51" in said
    assert "ε = 8 at δ = 1e-05 for each site" in said
    assert "each of 40 sites with probability 0.3" in said
    assert main(["privacy", "plan", "--dp-noise", "0.1"]) == 0
    assert "ε = 224 at δ = 1e-05 for each site - too large to mean much" in capsys.readouterr().out
    assert main(["privacy", "plan", "--dp-mode", "local", "--dp-noise", "0"]) == 0
    assert "no formal guarantee" in capsys.readouterr().out
