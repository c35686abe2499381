"""What every test runs under: offline, one thread, reproducible examples."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything can import a library that reads them
os.environ["UV_OFFLINE"] = "1"  # nothing is installed in the middle of a run
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import gc
import itertools
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Torch makes this folder wherever a test first imports its compiler; some tests look at what is left behind.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "sfl-tests-torchinductor")

settings.register_profile("sfl", deadline=None, max_examples=50, derandomize=bool(os.environ.get("CI")))
settings.load_profile("sfl")


TOGETHER = ("test_provisioned.py", "test_flower_attached.py", "test_poc.py")
"""Modules whose tests share a federation that takes long to start: one worker runs each."""

WAITING = ("test_deployment.py", *TOGETHER, "test_engine_failures.py")
"""Modules that wait most of their time, for time-outs and for engines that poll; what takes longest comes first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, and of them those that wait, so that workers end together; in their order otherwise."""

    def turn(item: pytest.Item) -> tuple[bool, int]:
        place = WAITING.index(item.path.name) if item.path.name in WAITING else len(WAITING)
        return item.get_closest_marker("slow") is None, place

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to whichever worker is free, one by one. One worker begins with those that compute, the others with
    those that wait: so the cores have work while tests wait, and what is left at the end is short.
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def waits(scope: str) -> bool:
        return Path(scope.partition("::")[0]).name in WAITING

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = Path(nodeid.partition("::")[0])
            return str(module) if module.name in TOGETHER else nodeid

        def _assign_work_unit(self, node: Any) -> None:
            wanted = node is not self.nodes[-1]
            scope = next((scope for scope in self.workqueue if waits(scope) is wanted), None)
            if scope is not None:
                self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

        def _reschedule(self, node: Any) -> None:
            if self._pending_of(self.assigned_work[node]) < 2:  # what runs, and what comes next: no long test lies idle
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return OneByOne(config, log)


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector need not look through it again during every test."""
    gc.collect()
    gc.freeze()


_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers of tests are none of the user's. Who writes there makes the folder; most tests do not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "caches" / str(next(_NUMBERS))))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Two cores are shared with other workers. Torch is asked only where a test module has imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
