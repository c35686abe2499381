"""Environments: where a recipe runs. ``recipe.execute(SimEnv())`` simulates all sites on this machine.

Changing the environment changes nothing else: one recipe and one seed give the same bits in all of them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sfl.errors import ConfigError

if TYPE_CHECKING:
    from sfl.env.flower import FlowerEnv, FlowerSimEnv
    from sfl.env.nvflare import FlareSimEnv, FlowerInFlareEnv, PocEnv
    from sfl.env.production import ProdEnv
    from sfl.env.sim import SimEnv
    from sfl.recipe import Environment
    from sfl.types import Backend

_HOMES = {
    "FlareSimEnv": "sfl.env.nvflare",
    "FlowerEnv": "sfl.env.flower",
    "FlowerInFlareEnv": "sfl.env.nvflare",
    "FlowerSimEnv": "sfl.env.flower",
    "PocEnv": "sfl.env.nvflare",
    "ProdEnv": "sfl.env.production",
    "SimEnv": "sfl.env.sim",
}
_BACKENDS: dict[str, str] = {
    "sim": "SimEnv",
    "flower": "FlowerSimEnv",
    "flower-deploy": "FlowerEnv",
    "nvflare": "FlareSimEnv",
    "nvflare-poc": "PocEnv",
    "flower-in-nvflare": "FlowerInFlareEnv",
}

__all__ = ["FlareSimEnv", "FlowerEnv", "FlowerInFlareEnv", "FlowerSimEnv", "PocEnv", "ProdEnv", "SimEnv", "environment"]


def environment(
    backend: Backend,
    *,
    device: str = "auto",
    startup_kit: str | None = None,
    superlink: str | None = None,
    root_certificates: str | None = None,
) -> Environment:
    """The environment that ``--backend`` names.

    Args:
        backend: Its name.
        device: Where sites compute: auto, cpu, mps, cuda or cuda:N.
        startup_kit: Folder of an admin's kit, which nvflare-prod needs.
        superlink: Address of a SuperLink that runs already, for flower-deploy.
        root_certificates: File of certificates that the SuperLink is checked with.

    Raises:
        ConfigError: If nvflare-prod is named without a kit, or a SuperLink with another backend than flower-deploy.
    """
    if backend == "flower-deploy":
        roots = Path(root_certificates) if root_certificates is not None else None
        return __getattr__("FlowerEnv")(device=device, superlink=superlink, root_certificates=roots)
    if superlink is not None or root_certificates is not None:
        raise ConfigError(f"backend must be flower-deploy with superlink and root_certificates, got {backend!r}.")
    if backend != "nvflare-prod":
        return __getattr__(_BACKENDS[backend])(device=device)
    if startup_kit is None:
        raise ConfigError("startup_kit must be the folder of an admin's kit for nvflare-prod, got none.")
    return __getattr__("ProdEnv")(device=device, startup_kit=Path(startup_kit))


def __getattr__(name: str) -> type:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfl.env' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
