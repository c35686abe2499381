"""Recipes: a job described once, as frozen configuration, and run in any environment."""

from sfl.recipe.algorithms import DittoRecipe, FedOptRecipe, FedProxRecipe, ScaffoldRecipe
from sfl.recipe.averaging import FedAvgRecipe, SumRecipe
from sfl.recipe.base import Environment, Recipe
from sfl.recipe.choice import chosen_recipe
from sfl.recipe.encrypted import FedAvgRecipeWithHE
from sfl.recipe.workflow import CyclicRecipe, FedBuffRecipe, FedEvalRecipe, SwarmRecipe, WorkflowRecipe
from sfl.server.session import RunResult

__all__ = [
    "CyclicRecipe",
    "DittoRecipe",
    "Environment",
    "FedAvgRecipe",
    "FedAvgRecipeWithHE",
    "FedBuffRecipe",
    "FedEvalRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "Recipe",
    "RunResult",
    "ScaffoldRecipe",
    "SumRecipe",
    "SwarmRecipe",
    "WorkflowRecipe",
    "chosen_recipe",
]
