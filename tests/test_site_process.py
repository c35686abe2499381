"""The process in which sites live between messages: started once, answers everything, ends with its keeper."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import engine_clients as clients
from sfl.client.site import SiteProgram
from sfl.core.task import Status, Task
from sfl.engine import site_process
from sfl.engine.host import HostSettings, SiteHost
from sfl.engine.launch import Launch
from sfl.engine.nvflare.carried import given_launch
from sfl.engine.site_logs import site_logs
from sfl.engine.site_process import SiteProcess, home_of
from sfl.engine.wire import Order, pack_task, read_answer
from sfl.errors import ConfigError, EngineError
from sfl.io.tree import write_text

NAMES = ["site-1", "site-2", "site-3"]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    made = Launch(tmp_path)
    settings = {"names": NAMES, "sites": "", "devices": ["cpu"], "threads": 1, "workers": 1, "logs": str(tmp_path)}
    write_text(made.settings, json.dumps(settings))
    made.write_program(SiteProgram(client=clients.Remembers))
    return made


def ask(process: SiteProcess, site: str, exchange: int = 1, *, round: int = 1, size: int = 3) -> tuple[Status, str]:
    parameters = {"w": np.ones(size, np.float32)}
    text, arrays = pack_task(exchange, Task("fit", round, parameters), {name: i for i, name in enumerate(NAMES)})
    reply = read_answer(*process.run(site, text, arrays), site, exchange)
    return reply.status, reply.reason


def processes(launch: Launch) -> list[psutil.Process]:
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if str(launch.folder) in " ".join(process.cmdline())]


@pytest.fixture
def keeper() -> int:
    """A process that keeps site processes alive, and its end."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()
    for started in site_process._started:  # each sees within half a second that its keeper is gone
        started.wait(30)


@pytest.mark.slow
def test_those_who_ask_at_once_share_one_process(launch: Launch, keeper: int) -> None:
    sides = [SiteProcess(launch, "0", keeper) for _ in NAMES]
    answers: list[tuple[Status, str]] = []
    asking = [
        threading.Thread(target=lambda s=s, n=n: answers.append(ask(s, n))) for s, n in zip(sides, NAMES, strict=True)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert [status for status, _ in answers] == [Status.USED] * 3
    assert len(processes(launch)) == 1


@pytest.mark.slow
def test_a_process_that_has_died_is_replaced_and_ends_with_its_keeper(launch: Launch, keeper: int) -> None:
    side = SiteProcess(launch, "0", keeper)
    assert ask(side, "site-1")[0] is Status.USED
    (process,) = processes(launch)
    process.kill()  # between two tasks: the next finds another process
    assert ask(side, "site-1", 2)[0] is Status.USED
    left = processes(launch)
    psutil.Process(keeper).kill()
    gone, alive = psutil.wait_procs(left, timeout=10)
    assert (len(gone), alive) == (len(left), [])


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4_000_000], ids=["small", "an answer that takes its time"])
def test_a_task_that_kills_its_process_fails_its_own_site_alone(launch: Launch, keeper: int, size: int) -> None:
    launch.write_program(SiteProgram(client=clients.Dies, kwargs={"marker": str(launch.folder / "died")}))
    sides = {name: SiteProcess(launch, "0", keeper) for name in NAMES}
    answers: dict[str, tuple[Status, str]] = {}
    asking = [
        threading.Thread(target=lambda n=name: answers.update({n: ask(sides[n], n, 2, round=2, size=size)}))
        for name in reversed(NAMES)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert answers["site-1"] == (Status.FAILED, "site-1: its process died; it starts anew with the next task")
    assert answers["site-2"][0] is answers["site-3"][0] is Status.USED


@pytest.mark.slow
def test_what_is_wrong_with_a_task_is_said_and_the_process_lives_on(launch: Launch, keeper: int) -> None:
    side = SiteProcess(launch, "0", keeper)
    answer, _ = side.run("site-1", json.dumps({"format": 9, "exchange": 4}), {})
    assert "must have format 1, got 9. Run one version everywhere" in json.loads(answer)["reason"]
    assert ask(side, "site-1")[0] is Status.USED


def test_a_module_that_cannot_be_imported_fails_its_site_with_its_own_words() -> None:
    def program() -> SiteProgram:
        raise RuntimeError("no license for this module")

    reply = SiteHost(HostSettings(program=program)).run("site-1", Order(1, Task("fit", 1, {}), 0))
    assert (reply.status, reply.reason) == (Status.FAILED, "site-1: RuntimeError: no license for this module")


def test_shared_processes_take_sites_in_turn_and_own_ones_a_site_each(launch: Launch) -> None:
    assert home_of(launch, "site-2") == ("site-2", os.getpid())
    launch.add_settings(keeper=77, workers=2)
    assert [home_of(launch, name) for name in NAMES] == [("0", 77), ("1", 77), ("0", 77)]


def test_devices_are_shared_out_among_processes(launch: Launch) -> None:
    launch.add_settings(devices=["cuda:0", "cuda:1"])
    assert [launch.host(place).device for place in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_launch_that_is_carried_imports_only_what_it_may(launch: Launch) -> None:
    launch.add_settings(allow=["sfl.core.", "sfl.client.site:"])
    with pytest.raises(ConfigError, match="must be one of"):
        launch.read_program()


def test_a_job_of_a_provisioned_federation_may_not_name_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("_SFL_RUN", raising=False)
    with pytest.raises(EngineError, match="must carry its launch"):
        given_launch(str(tmp_path))


def test_a_badly_formatted_log_call_is_no_reason_to_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with site_logs() as lines:
        (keeper,) = (handler for handler in logging.getLogger().handlers if type(handler).__name__ == "_Keeper")
        for value in ("x", 2):
            keeper.emit(logging.LogRecord("mine", logging.INFO, "f.py", 1, "step %d", (value,), None))
    assert lines == ["step 2"]
    assert "Logging error" in capsys.readouterr().err
