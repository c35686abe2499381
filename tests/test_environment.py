"""Facts about the machine: JSON, useful, and never a secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sfl.io import environment as module
from sfl.io.environment import environment


def test_it_is_json_and_names_what_matters() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert {"started", "python", "platform", "machine", "cpus", "packages", "git", "command", "variables"} == set(facts)
    assert facts["packages"]["numpy"]
    assert facts["started"].endswith("+00:00")


def test_only_listed_variables_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SFL_NUM_ROUNDS", "9")
    monkeypatch.setenv("SFL_HUB_TOKEN", "hunter2")
    monkeypatch.setenv("SFL_api_key", "hunter2")
    monkeypatch.setenv("SFL_PROXY", "https://me:hunter2@proxy/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("MY_OWN", "hunter2")
    facts = environment()
    assert "hunter2" not in json.dumps(facts)
    assert facts["variables"]["OMP_NUM_THREADS"] == "1"
    assert facts["variables"]["SFL_NUM_ROUNDS"] == "9"
    assert facts["variables"]["SFL_HUB_TOKEN"] == facts["variables"]["SFL_api_key"] == "***"
    assert facts["variables"]["SFL_PROXY"] == "https://***@proxy/x"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["sfl", "--hub.token", "x", "run"], ["sfl", "--hub.token", "***", "run"]),
        (["sfl", "--api-key=x"], ["sfl", "--api-key=***"]),
        (["sfl", "--token", "--verbose"], ["sfl", "--token", "--verbose"]),
        (["sfl", "--tokenizer", "path", "--partition", "key:genus"], None),
        (["sfl", "--data=https://a:b@host/f"], ["sfl", "--data=https://***@host/f"]),
    ],
)
def test_the_command_line_is_masked(monkeypatch: pytest.MonkeyPatch, given: list[str], kept: list[str] | None) -> None:
    monkeypatch.setattr("sys.argv", given)
    assert environment()["command"] == (given if kept is None else kept)


def test_git_says_commit_and_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    (tmp_path / "untracked").write_text("1")
    clean = environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert environment()["git"] == {"commit": clean["commit"], "dirty": True}


@pytest.mark.parametrize("error", [FileNotFoundError("no git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_it_is_no_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module.subprocess, "run", fail)
    assert environment()["git"] is None
