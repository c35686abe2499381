"""Which device each worker computes on, and with how many threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sfl.errors import ConfigError

_GPU_NODES = ("nvidia[0-9]*", "kfd", "dxg")  # CUDA, ROCm, WSL


def count_gpus() -> int:
    """Number of CUDA devices torch sees; 0 where torch is not installed.

    Where the system shows no GPU at all, torch is not even imported: a job without torch stays without.
    """
    if sys.platform == "linux" and not any(next(Path("/dev").glob(pattern), None) for pattern in _GPU_NODES):
        return 0
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def plan_workers(workers: int, clients: int, device: str, gpus: int, cores: int) -> list[str]:
    """One device for each worker.

    Args:
        workers: Wanted number; 0 means one per GPU, or one per core where there is none.
        clients: Number of sites; more workers than sites would idle.
        device: auto, cpu, mps, cuda, cuda:N.
        gpus: Number of GPUs there are.
        cores: Number of cores there are.

    Returns:
        A device for each worker: the GPUs in turn, one worker each, so never more workers than GPUs.

    Raises:
        ConfigError: If a GPU is asked for that is not there.

    Example:
        >>> plan_workers(0, 8, "auto", gpus=2, cores=16)
        ['cuda:0', 'cuda:1']
        >>> plan_workers(0, 3, "cpu", gpus=2, cores=2)
        ['cpu', 'cpu']
    """
    devices = _devices(device, gpus)
    if devices == ["cpu"]:
        return ["cpu"] * min(workers or cores, clients)
    return devices[: min(workers or len(devices), clients, len(devices))]


def devices_of_workers(workers: int, clients: int, device: str) -> list[str]:
    """``plan_workers`` for the GPUs and cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return plan_workers(workers, clients, device, count_gpus(), cores)


def _devices(device: str, gpus: int) -> list[str]:
    if device in ("cpu", "mps"):
        return [device]
    if device == "auto":
        return [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}.")
    if gpus == 0 or (index and int(index) >= gpus):
        raise ConfigError(f"device must be one that is there, got {device!r} with {gpus} GPUs. Use --device cpu.")
    return [device] if index else [f"cuda:{number}" for number in range(gpus)]


@contextmanager
def thread_environment(threads: int) -> Generator[None]:
    """Environment for processes started inside: so many threads, and none that spins while it waits."""
    wanted = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def limit_threads(threads: int) -> None:
    """Let torch compute with so many threads, if it is loaded: the number decides the last bits of a sum."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
