"""DEPLOYMENT.md is run from top to bottom: each command, in order, with a host, a port and paths of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from sfl.engine.ports import free_ports
from sfl.io.checkpoint import Checkpoints
from test_docs import blocks
from test_provisioned import remove_storage

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "DEPLOYMENT.md"
QUICK = {
    "SFL_NUM_ROUNDS": "1", "SFL_LOCAL_STEPS": "1", "SFL_EVAL_PROTEINS": "2", "SFL_WORKERS": "1", "SFL_FORMAT": "simple"
}  # fmt: skip
"""A shorter job than the page's; the commands stay as they are."""


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **QUICK, "PATH": path, "TEST_RUN": str(folder), "HOME": str(folder)}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Whatever the page leaves running is ended; nothing may be."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    yield tmp_path
    deadline = time.monotonic() + 60  # the kits' own scripts look every five seconds whether they shall end
    while (left := running(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in left:
        process.kill()
    remove_storage(tmp_path / "kits" / "lung" / "prod_00" / "fl-server")
    assert left == []


def running(folder: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if belongs(process, folder)]


def belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TEST_RUN") == str(folder)
    except (psutil.Error, OSError):
        return False


def run(text: str, folder: Path) -> str:
    """A block of commands in one shell, which stops at the first that fails."""
    log = folder / "commands.log"
    with log.open("ab") as output:
        output.write(f"$ {text}\n".encode())
        code = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, check=False, timeout=600,
        ).returncode  # fmt: skip
    said = log.read_text()
    assert code == 0, said[-3000:]
    return said


def final(folder: Path, pattern: str) -> dict[str, bytes]:
    (made,) = folder.glob(pattern)
    state = Checkpoints(made / "checkpoints").load_latest(print)
    assert state is not None
    return {name: value.tobytes() for name, value in state.parameters.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_page_runs_and_every_way_gives_the_same_bits(folder: Path) -> None:
    (port,) = free_ports(1)
    save_file({"w": np.zeros(3)}, folder / "start.safetensors")
    (folder / "train.py").write_text((ROOT / "examples" / "client_api" / "train_numpy.py").read_text())
    for block in blocks(PAGE.read_text(encoding="utf-8")):
        text = block.text.replace("fl.example.org", "localhost").replace("8002", str(port))
        if block.language == "yaml":
            (folder / "project.yml").write_text(text)
        elif block.language == "python":
            (folder / "mine.py").write_text(text)
            run("python mine.py", folder)
        elif "startup/start.sh" in text:
            run(text, folder)
            wait_until(folder, lambda said: "site-1, site-2" in said)
        else:
            assert block.language == "bash", f"line {block.line}: a command that the test does not run"
            if "system shutdown" in text:
                wait_until(folder, lambda said: "RUNNING" not in said and "FINISHED:ABORTED" in said)
            run(text, folder)
    assert final(folder, "runs/simulated") == final(folder, "runs/first")
    for way in ("runs/rehearsed", "runs/second", "sum-simulated/server/sfl-runs/*/run"):
        assert final(folder, way) == {"sum": np.array([15.0]).tobytes()}, way
    assert final(folder, "runs/mine")


def wait_until(folder: Path, holds: Callable[[str], bool], within: float = 120.0) -> None:
    """Look with `sfl status`, as the page's reader does."""
    command = ["sfl", "status", "--startup-kit", "kits/lung/prod_00/boss@example.org"]
    deadline = time.monotonic() + within
    while True:
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
        if holds(done.stdout):
            return
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(4.0)
