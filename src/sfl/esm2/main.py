"""The application ``esm2``, as the command line runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfl.application.job import Application
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.model import find_model
from sfl.recipe import Recipe
from sfl.train.pretrained import Pretrained

if TYPE_CHECKING:
    from sfl.application.workload import Workload

__all__ = ["APPLICATION"]


def _workload(config: ESM2RunConfig, model: Pretrained) -> Workload[Any, Any]:
    from sfl.esm2.workload import ESM2Workload

    return ESM2Workload(config=config, model=model)


def _recipe(config: ESM2RunConfig, model: Pretrained, *, device: str = "cpu") -> Recipe:
    from sfl.esm2.server import esm2_recipe

    return esm2_recipe(config, model, device=device)


APPLICATION = Application(name="esm2", find_model=find_model, workload=_workload, recipe=_recipe)
