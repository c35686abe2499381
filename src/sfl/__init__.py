"""SFL: federated learning whose privacy claim is part of the result.

Importing this package is cheap: it pulls in no torch, transformers or engine. Names resolve on first use.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfl.env import SimEnv
    from sfl.recipe import FedAvgRecipe, Recipe, RunResult
    from sfl.types import ClientConfig, FederationConfig, LoggingConfig

__version__ = "0.1.0"

logging.getLogger("sfl").addHandler(logging.NullHandler())  # a library says nothing until it is asked to

_HOMES = {
    "ClientConfig": "sfl.types",
    "FedAvgRecipe": "sfl.recipe",
    "FederationConfig": "sfl.types",
    "LoggingConfig": "sfl.types",
    "Recipe": "sfl.recipe",
    "RunResult": "sfl.recipe",
    "SimEnv": "sfl.env",
}

__all__ = [
    "ClientConfig",
    "FedAvgRecipe",
    "FederationConfig",
    "LoggingConfig",
    "Recipe",
    "RunResult",
    "SimEnv",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
