"""The application ``llm``, as the command line runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfl.application.job import Application
from sfl.llm.config import LLMRunConfig
from sfl.recipe import Recipe
from sfl.train.pretrained import Pretrained

if TYPE_CHECKING:
    from sfl.application.workload import Workload

__all__ = ["APPLICATION"]


def _find_model(name: str | None) -> Pretrained:
    from sfl.llm.model import find_model

    return find_model(name)


def _workload(config: LLMRunConfig, model: Pretrained) -> Workload[Any, Any]:
    from sfl.llm.workload import LLMWorkload

    return LLMWorkload(config=config, model=model)


def _recipe(config: LLMRunConfig, model: Pretrained, *, device: str = "cpu") -> Recipe:
    from sfl.llm.server import llm_recipe

    return llm_recipe(config, model, device=device)


APPLICATION = Application(name="llm", find_model=_find_model, workload=_workload, recipe=_recipe)
