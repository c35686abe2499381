"""Environments: where a recipe runs. ``recipe.execute(SimEnv())`` simulates all sites on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sfl.engine.base import Engine
from sfl.engine.local import LocalEngine
from sfl.errors import ConfigError
from sfl.server.job import Job
from sfl.train.devices import count_gpus, plan_workers
from sfl.types import site_names

__all__ = ["SimEnv"]


@dataclass(frozen=True, kw_only=True)
class SimEnv:
    """All sites on this machine, in-process.

    Attributes:
        num_clients: Number of sites; by default the federation's.
        num_threads: Sites that train side by side, each worker a process of its own; by default the federation's
            ``workers``, 0 means one per GPU or core. The result has the same bits.
        device: auto, cpu, mps, cuda or cuda:N. GPUs are shared out, one worker each.
    """

    num_clients: int | None = None
    num_threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_clients", "num_threads"):
            value = getattr(self, name)
            least = 1 if name == "num_clients" else 0
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")

    def engine(self, job: Job, sites_folder: Path | None) -> Engine:
        """One process for one worker, a pool of processes for more.

        Raises:
            ConfigError: If the device is not there.
        """
        federation = job.federation
        names = site_names(self.num_clients or federation.num_clients)
        wanted = federation.workers if self.num_threads is None else self.num_threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = plan_workers(wanted, len(names), self.device, count_gpus(), cores)
        if len(devices) == 1:
            return LocalEngine(job.program, names, device=devices[0], threads=federation.threads, folder=sites_folder)
        from sfl.engine.pool import PoolEngine

        return PoolEngine(job.program, names, devices=devices, threads=federation.threads, folder=sites_folder)
