"""Training scripts as processes of their own: the bits of in-process ones, and nothing that outlives its site."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import scripts
from scripts import LOOP, bits, evaluate, fit, run, site, write
from sfl.client import wire
from sfl.client.external import last_words
from sfl.client.session import ScriptSite
from sfl.core.task import Status
from sfl.errors import CheckpointError, EngineError
from test_client_api import ENDING, FLARE, HEAD, UNSEEDED, looping


@pytest.fixture(autouse=True)
def _close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left in the temporary folder, however a site ended."""
    util.get_temp_dir()  # a pool's fork server lives as long as this process: not in this test's folder
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    while scripts.OPEN:
        scripts.OPEN.pop().close()
    left = [path.name for path in folder.iterdir()]
    shutil.rmtree(folder)
    assert left == []


def external(script: str, **options: Any) -> Any:
    return site(script, external=True, **options)


def is_there(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10.0
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_there(pid)


def test_both_modes_give_the_same_bits_and_figures(tmp_path: Path) -> None:
    script = write(tmp_path, UNSEEDED)
    one, two, pool = (
        run(script),
        run(script, launch_external_process=True),
        run(script, launch_external_process=True, workers=2),
    )
    assert scripts.said(two) == []
    assert bits(one) == bits(two) == bits(pool)
    assert [r.fit for r in one.rounds] == [r.fit for r in two.rounds]
    assert one.rounds[-1].evaluation == two.rounds[-1].evaluation != {}


def test_a_script_is_given_its_arguments_folder_and_main(tmp_path: Path) -> None:
    body = """
import sys
assert sys.argv[1:] == ["--rate", "0.5 x"] and __name__ == "__main__"
assert flare.system_info() == {"site_name": "site-1", "job_id": "job", "device": "cpu"}
assert (model.current_round, model.total_rounds) == (0, 3)
import beside
flare.send(flare.FLModel(params=model.params, metrics={"evaluates": float(flare.is_evaluate())}))
"""
    write(tmp_path, "", "beside.py")
    subject = external(write(tmp_path, looping(body)), args=["--rate", "0.5 x"])
    replies = [fit(subject), evaluate(subject)]
    assert [reply.reason for reply in replies] == ["", ""]
    assert [r.update.metrics["evaluates"] for r in replies if r.update] == [0.0, 1.0]


def test_a_script_of_flare_runs_unmodified_and_an_own_sitecustomize_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "import os\nos.environ['OWN_SITE'] = 'yes'", "own/sitecustomize.py")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/own{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    text = (
        FLARE + "\nimport os, sys\nassert os.environ['OWN_SITE'] == 'yes' and not any('hooks' in p for p in sys.path)\n"
    )
    result = run(write(tmp_path, text), launch_external_process=True, sites=1)
    assert scripts.said(result) == []
    assert result.parameters["w"].tolist() == [2.0, 2.0]


def test_what_it_prints_goes_to_the_sites_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sfl.site")
    body = """
import sys
print("to stdout")
print("to stderr", file=sys.stderr)
flare.send(flare.FLModel(params=model.params))
"""
    subject = external(write(tmp_path, looping(body)))
    fit(subject)
    subject.close()
    said = {record.getMessage() for record in caplog.records}
    assert {"site-1: to stdout", "site-1: to stderr"} <= said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (looping("raise ValueError('bad data')"), "got exit code 1: ValueError: bad data"),
        ("import sys\nsys.exit(7)", "got exit code 7"),
        ("x = 1", "must use the Client API"),
        (HEAD + "flare.receive()", "ended without it"),
        (looping("flare.send(flare.FLModel(params=model.params))\n1 / 0"), "ZeroDivisionError"),
        ("import os\nos.kill(os.getpid(), 9)", "got signal SIGKILL"),
    ],
)
def test_a_failing_process_fails_its_site_with_its_last_words(tmp_path: Path, text: str, message: str) -> None:
    subject = external(write(tmp_path, text))
    reply = fit(subject)
    assert reply.status is Status.FAILED
    assert message in reply.reason
    if "Error" in message:
        assert "Its last lines:\nTraceback (most recent call last)" in reply.details


def test_a_process_that_is_killed_in_a_round_starts_anew_with_the_next(tmp_path: Path) -> None:
    body = """
import os, signal
if model.current_round == 1:
    os.kill(os.getpid(), signal.SIGKILL)
flare.send(flare.FLModel(params={"w": model.params["w"] + 1}, metrics={"pid": os.getpid()}))
"""
    subject = external(write(tmp_path, looping(body)))
    replies = [fit(subject, number) for number in (1, 2, 3)]
    assert [reply.status for reply in replies] == [Status.USED, Status.FAILED, Status.USED]
    assert "signal SIGKILL" in replies[1].reason
    pids = [int(reply.update.metrics["pid"]) for reply in replies if reply.update]
    assert pids[0] != pids[1]


def test_a_command_that_is_not_there_is_refused(tmp_path: Path) -> None:
    reply = fit(external(write(tmp_path, LOOP), command="no-such-program -u"))
    assert "command must begin with a program that is there, got 'no-such-program'" in reply.reason


def test_when_the_job_is_over_the_process_ends_by_itself(tmp_path: Path) -> None:
    script = write(tmp_path, ENDING)
    run(script, launch_external_process=True, sites=1)
    assert Path(f"{script}.site-1").read_text() == "None"


STUBBORN = looping(
    """
import os, subprocess, sys, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
apart = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
pids = {"me": os.getpid(), "helper": helper.pid, "apart": apart.pid}
flare.send(flare.FLModel(params=model.params, metrics=pids))
__import__("pathlib").Path(__file__).with_name("pids").write_text(" ".join(map(str, pids.values())))
"""
) + ("__import__('time').sleep(60)\n")


def test_what_does_not_end_is_ended_with_all_that_it_started(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subject = external(write(tmp_path, STUBBORN), close_timeout=0.2)
    reply = fit(subject)
    assert reply.update is not None, reply.reason
    pids = [int(pid) for pid in reply.update.metrics.values()]
    assert all(map(is_there, pids))
    subject.close()
    assert "train.py is still running and is stopped" in caplog.text
    assert all(map(gone, pids))


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path, workers: int) -> None:
    script = write(tmp_path, STUBBORN.replace('"pids"', 'flare.get_site_name() + ".pids"'))
    main = write(
        tmp_path,
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import scripts
        if __name__ == "__main__":
            scripts.run({script!r}, workers={workers}, launch_external_process=True, rounds=1000)
        """,
        "main.py",
    )
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    parent = subprocess.Popen([sys.executable, main], env=environment)
    files = [tmp_path / f"site-{number}.pids" for number in (1, 2)]
    deadline = time.monotonic() + 60.0
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(pids) == 6
    assert all(map(gone, pids))


def test_only_a_process_that_knows_the_token_is_let_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """
import os, json
from sfl.client import wire
from dataclasses import replace
address = wire.Address.from_environment()
for guess in ("0" * 64, "guess"):
    try:
        wire.receive(wire.connect(replace(address, token=guess), "talk"))
    except (EOFError, ConnectionError):
        print("turned away")
second = wire.connect(address, "talk")
flare.send(flare.FLModel(params=model.params))
"""
    caplog.set_level(logging.INFO, "sfl.site")
    subject = external(write(tmp_path, looping(body)))
    assert fit(subject).reason == ""
    subject.close()
    said = [record.getMessage() for record in caplog.records]
    assert "site-1: a process without the token was turned away" in said
    assert "site-1: turned away" in said
    assert "site-1: only one process may exchange models; pass its rank to init()" in said


def test_messages_arrive_bit_for_bit_and_broken_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = socket.socketpair()
    tree = {"a": np.array([np.pi, -0.0]), "n": None, "list": [1, "x", np.arange(3, dtype=np.int64)], "empty": {}}
    with one, two:
        wire.send(one, "task", tree)
        kind, body = wire.receive(two)
        assert kind == "task"
        assert body["a"].tobytes() == tree["a"].tobytes()
        assert body["list"][2].dtype == np.int64
        assert (body["n"], body["list"][:2], body["empty"]) == (None, [1, "x"], {})
        one.sendall(b"\0" * 7 + b"\1" + b"\0" * 8 + b"{")
        with pytest.raises(CheckpointError, match="must be a packed tree"):
            wire.receive(two)
        one.sendall(b"\xff" * 16)
        with pytest.raises(EngineError, match="a frame must have a JSON text below"):
            wire.receive(two)
        one.close()
        with pytest.raises(EOFError):
            wire.receive(two)
    address = wire.Address(port=1, token="t", site=ScriptSite(name="site-1", seed=3))
    monkeypatch.setenv(wire.VARIABLE, address.to_text())
    assert wire.Address.from_environment() == address
    monkeypatch.setenv(wire.VARIABLE, "{}")
    with pytest.raises(EngineError, match="must be what a site wrote"):
        wire.Address.from_environment()


def test_of_several_processes_the_one_whose_error_came_first_is_heard() -> None:
    said = [
        "[rank0]:[W112 a warning",
        "[rank1]: Traceback",
        "[rank0]: Traceback",
        "[rank1]: ValueError: none today",
        "",
    ]
    assert last_words(["[rank0]: ", *said]) == ["", "Traceback"]
    assert last_words([*said, "[rank0]: Error: closed by peer", "===="]) == ["Traceback", "ValueError: none today"]
    assert last_words(["Traceback", "ValueError: none"]) == ["Traceback", "ValueError: none"]
    assert last_words(f"{n}" for n in range(99)) == [f"{n}" for n in range(69, 99)]
    assert last_words([]) == []


TORCHRUN = "torchrun --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"
RANKS = """
import os
import sys
from pathlib import Path
import torch.distributed as dist
import sfl.client as flare

dist.init_process_group("gloo")
rank = dist.get_rank()
if sys.argv[1:]:
    Path(sys.argv[1], str(rank)).write_text(str(os.getpid()))
    dist.barrier()
flare.init(rank=rank)
while True:
    box = [None]
    if rank == 0:
        box = [flare.receive().params if flare.is_running() else None]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        break
    w = box[0]["w"] + rank
    if sys.argv[1:] and rank == 1:
        raise ValueError("no data on rank 1")
    dist.all_reduce(w)
    flare.send(flare.FLModel(params={"w": w}, metrics={"loss": 0.0}))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_several_processes_of_torchrun_train_as_one_site(tmp_path: Path) -> None:
    result = run(
        write(tmp_path, RANKS),
        model={"w": np.ones(2)},
        sites=1,
        server_expected_format="pytorch",
        launch_external_process=True,
        command=TORCHRUN,
    )
    assert scripts.said(result) == []
    assert result.parameters["w"].tolist() == [7.0, 7.0]  # 1 -> (1 + 2) = 3 -> (3 + 4) = 7


@pytest.mark.slow
def test_one_rank_that_fails_ends_them_all_and_the_site_says_so(tmp_path: Path) -> None:
    script = write(tmp_path, RANKS)
    subject = site(script, external=True, command=TORCHRUN, args=(str(tmp_path),), params_format="pytorch")
    reply = fit(subject, parameters={"w": np.ones(2)})
    assert reply.status is Status.FAILED
    assert reply.reason == (
        "site-1: ScriptError: train.py must run without an error, got exit code 1: ValueError: no data on rank 1."
    )
    assert not any(psutil.pid_exists(int((tmp_path / str(rank)).read_text())) for rank in range(2))
