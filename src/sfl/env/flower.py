"""Environments on Flower."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sfl.engine.launch import Launch
from sfl.env.carry import Cargo, carried_settings
from sfl.env.checks import require
from sfl.env.kept import kept_names, owned_run
from sfl.env.remote import Plan, RemoteEnv
from sfl.errors import ConfigError

__all__ = ["FlowerEnv", "FlowerSimEnv"]


@dataclass(frozen=True, kw_only=True)
class FlowerSimEnv(RemoteEnv):
    """Flower's simulation on Ray: every site is a virtual node of this machine."""

    title: ClassVar[str] = "Flower's simulation on Ray"

    def command(self, launch: Launch) -> list[str]:
        """One process that holds Flower's server and starts Ray."""
        return _command("simulate", launch, "flwr", "ray")


@dataclass(frozen=True, kw_only=True)
class FlowerEnv(RemoteEnv):
    """A deployed Flower federation: one for this job, or one that runs already.

    Without ``superlink``, SuperLink and SuperNodes are processes of this machine, over TLS, that end with the job. With
    it, the job is submitted to that SuperLink, as any Flower app. The app carries the job; of the user's own code, the
    modules that it names, or its training script with what that imports from beside it. What the server makes stays on
    its machine under the run's id, and is brought into ``out`` when the job has ended; a run that was cut off goes on
    from there.

    Attributes:
        superlink: Address of the Control API of a SuperLink that runs, as host:port.
        root_certificates: File of certificates that the SuperLink is checked with; by default those of the system.
        sites: Names of the sites that take part; by default all that are connected.
    """

    title: ClassVar[str] = "the job on its Flower SuperLink and SuperNodes"

    superlink: str | None = None
    root_certificates: Path | None = None
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        host, _, port = (self.superlink or "host:1").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"superlink must be an address as host:port, got {self.superlink!r}.")
        if self.root_certificates is not None and not self.root_certificates.is_file():
            raise ConfigError(f"root_certificates must be a file, got {str(self.root_certificates)!r}.")
        if self.superlink is None and (self.root_certificates is not None or self.sites):
            raise ConfigError("superlink must be given with root_certificates and sites, got none.")

    @property
    def provisions(self) -> bool:
        """Where it starts their nodes, they have."""
        return self.superlink is None

    def command(self, launch: Launch) -> list[str]:
        """One process that starts SuperLink and SuperNodes and submits the job, or submits it alone."""
        if self.superlink is None:
            return _command("deploy", launch, "flwr")
        roots = [str(self.root_certificates.absolute())] if self.root_certificates is not None else []
        return [*_command("attach", launch, "flwr"), self.superlink, *roots]

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What server and sites are told; to those of others, nothing of this machine."""
        if self.superlink is None:
            return super().settings(plan)
        require("flwr")
        return {
            **carried_settings(plan.job, self.device),
            "names": sorted(self.sites) or kept_names(plan.out),
            "resume": plan.resume,
            "run": owned_run(plan, "flower-deploy"),
        }

    def write(self, plan: Plan, logs: Path) -> None:
        """Write what the engine's processes read, or what the job carries."""
        if self.superlink is None:
            super().write(plan, logs)
            return
        cargo = Cargo.of(plan.recipe, plan.job)
        cargo.write(plan.launch, {**self.settings(plan), "logs": str(logs)})

    def check_resumable(self, out: Path | None) -> None:
        """A run of a SuperLink that lives on is kept by itself."""
        if self.superlink is None:
            super().check_resumable(out)

    def collect(self, launch: Launch, out: Path) -> None:
        """Copy what came home into ``out``."""
        if (launch.folder / "home" / "run").is_dir():
            shutil.copytree(launch.folder / "home" / "run", out, dirs_exist_ok=True)


def _command(module: str, launch: Launch, *packages: str) -> list[str]:
    require(*packages)
    return [sys.executable, "-m", f"sfl.engine.flower.{module}", str(launch.folder)]
