"""Measure fresh child processes: CPU time, wall time and peak memory of each, from ``wait4``.

This module imports nothing heavy on purpose: on Linux a child's peak starts at its parent's size when it was forked.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

HERE = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Usage:
    """What one process took, with the processes that it waited for.

    Attributes:
        cpu: User and system seconds.
        wall: Seconds from start to end.
        peak: Most resident memory of one process, in bytes.
    """

    cpu: float
    wall: float
    peak: float


def measure(command: Sequence[str]) -> Usage:
    """Run a command to its end.

    Raises:
        RuntimeError: If it fails; with what it wrote to stderr.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **ONE_THREAD}
    )
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} must succeed, got exit code {process.returncode}:\n{errors.decode()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(usage.ru_utime + usage.ru_stime, wall, float(usage.ru_maxrss * unit))


def child(*arguments: object) -> Usage:
    """Measure ``child.py`` with these arguments."""
    return measure([sys.executable, str(HERE / "child.py"), *map(str, arguments)])


def alternate(sides: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """A B A B …, so that whatever else the machine does falls on all alike."""
    results: dict[K, list[T]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            results[name].append(run())
    return results


def middle(runs: Sequence[T], figure: Callable[[T], float]) -> float:
    """The median of one figure."""
    return median(figure(run) for run in runs)
