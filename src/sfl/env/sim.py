"""The in-process environment: all sites simulated on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfl.core.events import Observer
from sfl.engine.attacked import AttackedEngine
from sfl.engine.attacker import Attack, check_attack
from sfl.engine.base import Engine
from sfl.engine.clock import VirtualClock
from sfl.engine.local import LocalEngine
from sfl.engine.virtual import VirtualEngine
from sfl.env.checks import check_counts, refuse_provisioned
from sfl.errors import ConfigError
from sfl.recipe import Recipe, RunResult
from sfl.server.job import Job
from sfl.server.session import run_job
from sfl.train.devices import devices_of_workers
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
        clock: How long sites take in simulated time, and when they are there; by default time is as it is.
        attack: Sites that lie, to see what an aggregation rule stands; ``None`` for none.
    """

    num_clients: int | None = None
    num_threads: int | None = None
    device: str = "auto"
    clock: VirtualClock = field(default_factory=VirtualClock)
    attack: Attack | None = None

    def __post_init__(self) -> None:
        check_counts(self.num_clients, self.num_threads)

    def run(self, recipe: Recipe, *, out: Path | None, resume: bool, observers: Sequence[Observer]) -> RunResult:
        """Run a recipe in this process."""
        if resume:
            refuse_provisioned(out)
        job = recipe.build()
        if self.attack is not None:
            check_attack(self.attack, job.program)
        return run_job(job, self.engine, out=out, resume=resume, observers=observers)

    def engine(self, job: Job, sites_folder: Path | None) -> Engine:
        """One process for one worker, a pool of processes for more; in simulated time if there is a clock, and with the
        attack, if there is one.

        Raises:
            ConfigError: If the device is not there, or the attackers are not.
        """
        names = site_names(self.num_clients or job.federation.num_clients)
        honest = self._carrier(job, names, sites_folder)
        if self.clock.is_on:
            honest = VirtualEngine(honest, self.clock.profiles(names, job.federation.seed))
        if self.attack is None:
            return honest
        try:
            return AttackedEngine(honest, self.attack)
        except ConfigError:
            honest.close()
            raise

    def _carrier(self, job: Job, names: Sequence[str], sites_folder: Path | None) -> Engine:
        federation = job.federation
        wanted = federation.workers if self.num_threads is None else self.num_threads
        devices = devices_of_workers(wanted, len(names), self.device)
        if len(devices) == 1:
            return LocalEngine(job.program, names, device=devices[0], threads=federation.threads, folder=sites_folder)
        from sfl.engine.pool import PoolEngine

        return PoolEngine(job.program, names, devices=devices, threads=federation.threads, folder=sites_folder)
