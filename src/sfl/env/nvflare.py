"""Environments on NVIDIA FLARE."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from sfl.engine.launch import Launch
from sfl.env.checks import require
from sfl.env.remote import RemoteEnv

__all__ = ["FlareSimEnv", "FlowerInFlareEnv", "PocEnv"]


@dataclass(frozen=True, kw_only=True)
class FlareSimEnv(RemoteEnv):
    """FLARE's simulator: every site is a client of this machine."""

    title: ClassVar[str] = "NVIDIA FLARE's simulator"

    def command(self, launch: Launch) -> list[str]:
        """One process that holds FLARE's server and starts its clients."""
        return flare_command("simulate", launch)


@dataclass(frozen=True, kw_only=True)
class FlowerInFlareEnv(RemoteEnv):
    """The job's Flower app under FLARE's Flower integration, in FLARE's simulator: Flower's messages, FLARE's wires.

    FLARE looks every ten seconds whether Flower has ended, and brings nothing home then: it is not waited for.
    """

    title: ClassVar[str] = "Flower inside NVIDIA FLARE's simulator"

    shutdown: float = 1.0

    def command(self, launch: Launch) -> list[str]:
        """One process that holds FLARE's server, which starts Flower's."""
        return [*flare_command("simulate", launch, "nvflare", "flwr"), "--flower"]


@dataclass(frozen=True, kw_only=True)
class PocEnv(RemoteEnv):
    """A provisioned FLARE federation for one job: server and sites are processes of this machine, over mutual TLS."""

    title: ClassVar[str] = "a provisioned NVIDIA FLARE federation"

    @property
    def provisions(self) -> bool:
        """They have."""
        return True

    def command(self, launch: Launch) -> list[str]:
        """One process that provisions, starts server and sites, and submits the job."""
        return flare_command("poc", launch)


def flare_command(module: str, launch: Launch, *packages: str) -> list[str]:
    """The command of one of our modules that run FLARE.

    Raises:
        MissingExtraError: If a package that it needs is not installed.
    """
    require(*(packages or ("nvflare",)))
    return [sys.executable, "-m", f"sfl.engine.nvflare.{module}", str(launch.folder)]
