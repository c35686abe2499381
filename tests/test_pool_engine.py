"""Workers: the bits of one process, whatever dies, sleeps, or is too large; and nothing is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import psutil
import pytest

import clients
from sfl.client.site import SiteProgram
from sfl.core.task import EVALUATE, FIT, Reply, Status, Task
from sfl.core.transform import chain
from sfl.engine.local import LocalEngine
from sfl.engine.pool import PoolEngine
from sfl.env import SimEnv
from sfl.errors import ConfigError
from sfl.recipe import FedAvgRecipe, RunResult
from sfl.types import FederationConfig, Parameters, site_names

W = {"w": np.zeros(2)}
NAMES = ["site-1", "site-2", "site-3", "site-4"]


def run(client: Any, sites: int, workers: int, *, rounds: int = 3, start: Parameters | None = None, **options: Any):
    timeout = options.pop("round_timeout", 0.0)
    recipe = FedAvgRecipe(
        name="test",
        client=client,
        initial_parameters=start or W,
        federation=FederationConfig(
            num_clients=sites, num_rounds=rounds, workers=workers, fraction_fit=0.9, round_timeout=timeout
        ),
        **options,
    )
    recorder = clients.Recorder()
    return recipe.execute(SimEnv(device="cpu"), observers=(recorder,)), recorder


def bits(result: RunResult) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: (v.dtype.str, v.shape, v.tobytes()) for k, v in result.parameters.items()}


def figures(result: RunResult) -> list[Any]:
    return [(r.round, r.fit, r.evaluation, [(s.site, s.status, s.metrics) for s in r.sites]) for r in result.rounds]


@pytest.fixture(scope="module")
def one_process() -> RunResult:
    transforms = (clients.ErrorFeedback(),)
    return run(clients.Wanderer, 5, 1, rounds=4, start=clients.many_dtypes(), transforms=transforms)[0]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_give_the_bits_of_one_process(workers: int, one_process: RunResult) -> None:
    transforms = (clients.ErrorFeedback(),)
    result, recorder = run(clients.Wanderer, 5, workers, rounds=4, start=clients.many_dtypes(), transforms=transforms)
    assert bits(result) == bits(one_process)
    assert figures(result) == figures(one_process)
    assert f"{workers} workers" in recorder.events[0].engine


def test_transforms_that_drop_or_widen_arrive_as_they_are() -> None:
    start = {"w": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}
    one, two = (
        run(clients.Wanderer, 3, n, start=start, transforms=(clients.DropNames("w"), clients.Widen()))[0]
        for n in (1, 2)
    )
    assert bits(one) == bits(two)
    assert (two.parameters["b"] == 0.0).all()
    assert (two.parameters["w"] != 0.0).all()


def test_large_deltas_and_parameters_that_change_shape_between_tasks() -> None:
    with pool(clients.Base) as engine:
        for size in (1_500_000, 10, 0, 2_000_000):
            replies = engine.exchange(Task(FIT, 1, {"w": np.arange(float(size))}), NAMES)
            sums = [(float(r.update.delta["w"].sum()), r.nbytes) for r in replies if r.update]
            assert sums == [(float(size), 8 * size)] * 4


def test_many_sites_on_a_worker_do_not_fill_its_pipe() -> None:
    names = [f"site-{number:04d}" for number in range(1200)]
    config = {"padding": "x" * 2000}
    with PoolEngine(SiteProgram(client=clients.Base), names, devices=["cpu", "cpu"]) as engine:
        for task in (FIT, EVALUATE):
            replies = [r.status for r in engine.exchange(Task(task, 1, W, config), names)]
            assert replies == [Status.USED] * 1200


# Dying, sleeping, hoarding


def pool(client: Any, workers: int = 2, names: list[str] = NAMES, **options: Any) -> PoolEngine:
    chained = chain(*options.pop("transforms", ()))
    program = SiteProgram(client=client, chain=chained, kwargs=options)
    return PoolEngine(program, names, devices=["cpu"] * workers)


def statuses(engine: PoolEngine, round: int, timeout: float | None = None) -> list[tuple[Status, str]]:
    return [(r.status, r.reason) for r in engine.exchange(Task(FIT, round, W), engine.clients(), timeout)]


@pytest.mark.parametrize(("mode", "code"), [("os._exit", 3), ("sigkill", -9)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_fails_its_site_alone(mode: str, code: int, workers: int) -> None:
    with pool(clients.Die, workers, mode=mode, round=2) as engine:
        assert statuses(engine, 1) == [(Status.USED, "")] * 4
        second = statuses(engine, 2)
        assert [status for status, _ in second] == [Status.USED, Status.FAILED, Status.USED, Status.USED]
        assert second[1][1].startswith(f"site-2: its worker process died (exit code {code})")
        assert statuses(engine, 3) == [(Status.USED, "")] * 4


def test_a_worker_that_dies_between_two_rounds_is_replaced() -> None:
    with pool(clients.Base) as engine:
        statuses(engine, 1)
        for worker in multiprocessing.active_children():
            if worker.name == "sfl-worker":
                os.kill(worker.pid or 0, signal.SIGKILL)
                worker.join(5)
        assert statuses(engine, 2) == [(Status.USED, "")] * 4


def test_a_run_goes_on_without_the_dead() -> None:
    result, recorder = run(clients.Die, 3, 2, client_kwargs={"mode": "sigkill", "round": 2})
    assert [recorder.statuses(n) for n in (1, 2, 3)] == [
        [Status.USED] * 3,
        [Status.USED, Status.FAILED, Status.USED],
        [Status.USED] * 3,
    ]
    np.testing.assert_allclose(result.parameters["w"], 3.0)


def test_a_client_that_cannot_be_built_fails_each_site_by_name() -> None:
    with pool(clients.Base, unknown=1) as engine:
        assert all(
            s is Status.FAILED and "unexpected arguments: unknown" in reason for s, reason in statuses(engine, 1)
        )


def test_a_sleeping_site_is_late_and_its_stale_reply_is_not_used() -> None:
    with pool(clients.Die, mode="sleep", round=1) as engine:
        statuses(engine, 0)  # the workers are up: from here on only the sleeper is slow
        first = statuses(engine, 1, timeout=2.5)
        assert [status for status, _ in first] == [Status.USED, Status.LATE, Status.USED, Status.LATE]
        assert "no reply within 2.5 s" in first[1][1]
        deltas = [r.update.delta["w"].tolist() for r in engine.exchange(Task(FIT, 2, W), NAMES, 30.0) if r.update]
        assert deltas == [[1.0, 1.0]] * 4


def test_a_late_site_reads_the_parameters_it_was_sent_to_the_end() -> None:
    with pool(clients.SlowReader) as engine:
        statuses(engine, 0)
        (first,) = engine.exchange(Task(FIT, 1, {"w": np.full(2, 5.0)}), ["site-1"], 2.0)
        assert first.status is Status.LATE
        second = engine.exchange(Task(FIT, 2, {"w": np.full(2, 8.0)}), ["site-1"], 30.0)
        assert [r.update.metrics for r in second if r.update] == [{"read": 5.0}]


@pytest.mark.slow
def test_a_site_that_is_late_for_rounds_blocks_nobody_else() -> None:
    many = {f"layer.{number:01000d}": np.zeros(1) for number in range(400)}  # its layout alone would fill a pipe
    began = time.monotonic()
    with pool(clients.Die, mode="doze", round=1) as engine:
        statuses(engine, 0)
        for number in (1, 2):
            replies = engine.exchange(Task(FIT, number, {**W, **many}), NAMES, 3.0)
            assert [r.status for r in replies] == [Status.USED, Status.LATE] * 2
    assert time.monotonic() - began < 90.0  # the sleeper's own time


def test_an_exchange_that_is_abandoned_leaves_the_next_one_whole() -> None:
    with pool(clients.Base) as engine:
        for number in range(1, 4):
            replies = engine.exchange(Task(FIT, number, {"w": np.full(2, 7.0)}), NAMES)
            assert next(replies).status is Status.USED
            replies.close()
        assert statuses(engine, 4, timeout=60.0) == [(Status.USED, "")] * 4


def test_a_local_exchange_that_is_abandoned_leaves_nothing_to_the_next() -> None:
    engine = LocalEngine(SiteProgram(client=clients.Base), NAMES)
    replies = engine.exchange(Task(FIT, 1, {"w": np.full(2, 7.0)}), NAMES)
    next(replies)
    replies.close()
    assert [r.site for r in engine.exchange(Task(FIT, 2, W), ["site-4"])] == ["site-4"]


def test_global_parameters_cannot_be_written_by_a_worker() -> None:
    with pool(clients.Faulty, mode="write") as engine:
        ends = statuses(engine, 1)
        assert "read-only" in ends[1][1]
        assert [status for status, _ in ends] == [Status.USED, Status.FAILED, Status.USED, Status.USED]


# What cannot be handed over


def test_a_client_that_cannot_be_pickled_is_a_clear_error() -> None:
    class Local(clients.Base):
        pass

    with pytest.raises(ConfigError, match=r"fit to hand to a worker process.*workers=1"):
        pool(Local)
    with pytest.raises(ConfigError, match="fit to hand to a worker process"):
        pool(clients.MyClient, lock=threading.Lock())
    assert not workers_left()


@pytest.mark.parametrize(
    ("argv", "works"),
    [(["-"], False), (["-c", "SCRIPT"], False), (["package"], False), (["script.py"], True), (["-m", "script"], True)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_client_of_an_interactive_session_is_a_clear_error(argv: list[str], works: bool, tmp_path: Path) -> None:
    text = (
        "import sys\nimport sfl.engine.pool as pool\nfrom sfl.client.site import SiteProgram\n"
        "class Mine: ...\n"
        "if __name__ == '__main__':\n    print(pool._context(SiteProgram(client=Mine)).get_start_method())\n"
    )
    (tmp_path / "package").mkdir()
    for name in ("script.py", "package/__main__.py"):
        (tmp_path / name).write_text(text)
    command = [sys.executable, *(text if word == "SCRIPT" else word for word in argv)]
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True, check=False)
    if works:
        assert done.stdout == "forkserver\n", done.stderr
    else:
        assert "got one that is defined in an interactive session" in done.stderr


AHEAD = """
import os
import sys
import numpy as np
import clients
from sfl.env import SimEnv
from sfl.recipe import FedAvgRecipe

class Mine(clients.Base):
    worker_imports = ("takes_long", "a_module_that_is_not_there")

    def __init__(self, client_id=0, device="cpu", *, large=b""):
        super().__init__(client_id=client_id, device=device)

    def compute_update(self, parameters, config):
        import takes_long
        return parameters, 1, {"imported": takes_long.PROCESS, "here": os.getpid()}

if __name__ == "__main__":
    kwargs = {"large": bytes(int(sys.argv[1]))}
    recipe = FedAvgRecipe(name="t", client=Mine, client_kwargs=kwargs, initial_parameters={"w": np.zeros(2)})
    result = recipe.execute(SimEnv(num_threads=2))
    for site in result.rounds[1].sites:
        if site.stage == "fit":
            print(int(site.metrics["imported"]), int(site.metrics["here"]), os.getpid())
"""


def ahead(folder: Path, module: str, size: int = 0) -> subprocess.CompletedProcess[str]:
    """What comes of a run whose workers import this module ahead."""
    (folder / "takes_long.py").write_text(module)
    (folder / "script.py").write_text(AHEAD)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "script.py", str(size)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_what_every_site_imports_is_imported_once_before_the_workers_fork(tmp_path: Path) -> None:
    done = ahead(tmp_path, "import os\nPROCESS = os.getpid()\n")
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    assert len(seen) == 2
    assert len({imported for imported, _, _ in seen}) == 1
    assert len({process for line in seen for process in line}) == 4  # the server that forks, two workers, the driver


@pytest.mark.parametrize("size", [0, 1 << 20], ids=["", "more than a pipe holds"])
def test_a_module_that_fails_as_it_is_imported_ahead_is_said(size: int, tmp_path: Path) -> None:
    done = ahead(tmp_path, "raise OSError('no such device')\n", size)
    assert done.returncode == 1
    assert "OSError: no such device" in done.stderr
    assert "EngineError: the process from which workers fork must live, and it has ended" in done.stderr


@pytest.mark.parametrize("name", ["sfl.esm2.client.ESM2Client", "sfl.llm.client.LLMClient"])
def test_what_applications_import_ahead_is_there(name: str) -> None:
    client = resolve_name(name)
    assert client.worker_imports
    assert all(find_spec(module) for module in client.worker_imports)


def test_what_is_no_tuple_of_modules_is_no_workers_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("torch", (1,), None):
        monkeypatch.setattr(clients.MyClient, "worker_imports", wrong)
        with pytest.raises(ConfigError, match="worker_imports must be a tuple of names of modules, got"):
            pool(clients.MyClient)


# Nothing is left


def workers_left() -> list[Any]:
    return [process for process in multiprocessing.active_children() if process.name == "sfl-worker"]


def test_close_ends_every_process_and_may_be_called_twice() -> None:
    engine = pool(clients.MyClient, 3)
    pids = [process.pid for process in workers_left()]
    assert len(pids) == 3
    statuses(engine, 1)
    engine.close()
    engine.close()
    assert not workers_left()
    assert not any(is_running(pid) for pid in pids)


def test_close_does_not_wait_for_a_site_at_work() -> None:
    engine = pool(clients.Die, mode="doze")
    began = time.monotonic()
    statuses(engine, 1, timeout=0.1)
    engine.close()
    assert time.monotonic() - began < 90.0  # the sleeper's own time
    assert not workers_left()


def test_an_interrupt_in_the_middle_leaves_no_process() -> None:
    def interrupt(event: object) -> None:
        if type(event).__name__ == "SiteFinished":
            raise KeyboardInterrupt

    recipe = FedAvgRecipe(
        name="t", client=clients.Die, client_kwargs={"mode": "sleep"}, initial_parameters=W, evaluate_every=0
    )
    with pytest.raises(KeyboardInterrupt):
        recipe.execute(SimEnv(num_threads=2, device="cpu"), observers=(interrupt,))
    assert not workers_left()


def is_running(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


PARENT = """
import sys, time
import numpy as np
import clients
from sfl.client.site import SiteProgram
from sfl.core.task import FIT, Task
from sfl.engine.pool import PoolEngine

if __name__ == "__main__":
    program = SiteProgram(client=clients.Die, kwargs={"mode": "doze", "round": 2})
    engine = PoolEngine(program, ["site-1", "site-2"], devices=["cpu", "cpu"])
    task = Task(FIT, 1, {"w": np.zeros(1000)})
    assert [r.status for r in engine.exchange(task, engine.clients())] == ["used", "used"]
    engine.send(Task(FIT, 2, {"w": np.zeros(1000)}), engine.clients())
    import multiprocessing
    pids = [process.pid for process in multiprocessing.active_children()]
    if sys.argv[1:]:
        engine.close()
    print(*pids, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("when", [[], ["closed"]], ids=["at work", "after its run"])
def test_a_parent_killed_outright_leaves_no_worker_and_no_file(when: list[str], tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: a socket lies in it
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, str(script), *when], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert list(temporary.iterdir())
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while (any(map(is_running, pids)) or [*temporary.iterdir()]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, pids))
    temporary.rmdir()
    assert (set(shared.iterdir()) if shared.is_dir() else set()) - before == set()


def test_site_order_is_by_name_and_padded() -> None:
    with PoolEngine(SiteProgram(client=clients.Base), site_names(12), devices=["cpu"]) as engine:
        assert engine.clients() == list(site_names(12)) == sorted(site_names(12))
        assert [r.site for r in engine.exchange(Task(FIT, 1, W), ["site-12", "site-02"])] == ["site-12", "site-02"]
        assert engine.describe() == "in-process, 1 workers on cpu"


def test_what_a_reply_lends_stays_until_the_next_is_drawn() -> None:
    with pool(clients.MyClient) as engine:
        seen: list[float] = []
        for reply in engine.exchange(Task(FIT, 1, {"w": np.zeros(200_000)}), NAMES):
            assert isinstance(reply, Reply)
            time.sleep(0.05)
            delta = reply.update.delta["w"] if reply.update else np.zeros(1)
            assert not delta.flags.writeable
            assert (delta == delta[0]).all()
            seen.append(float(delta[0]))
        np.testing.assert_allclose(seen, [0.1, 0.2, 0.3, 0.4])


def test_a_round_that_waits_for_so_many_does_not_wait_for_the_first_in_line() -> None:
    names = ["site-1", "site-2", "site-3"]
    program = SiteProgram(client=clients.SlowFirst)
    with PoolEngine(program, names, devices=["cpu", "cpu"]) as engine:
        statuses = [reply.status for reply in engine.exchange(Task(FIT, 1, W), names, enough=1)]
    assert statuses[0] is Status.LATE
    assert Status.USED in statuses
