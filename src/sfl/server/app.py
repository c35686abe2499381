"""The app of the smallest example, the sum of one number per site: an application under a promised name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfl.client.sum_client import SumClient
from sfl.core.events import Observer
from sfl.env import SimEnv
from sfl.io.console import console_observer
from sfl.recipe import SumRecipe
from sfl.types import FederationConfig


def sum_recipe(*, num_clients: int = 2, num_rounds: int = 3, base_secret: float = 7.0) -> SumRecipe:
    """A recipe whose result is the sum of ``base_secret + client_id`` over the sites.

    Example:
        >>> sum_recipe().execute().parameters["sum"].item()
        15.0
    """
    return SumRecipe(
        name="sum",
        client=SumClient,
        client_kwargs={"base_secret": base_secret},
        initial_parameters={"sum": np.zeros(1)},
        federation=FederationConfig(num_clients=num_clients, num_rounds=num_rounds),
        evaluate_every=0,
    )


def run_sum(
    *, num_clients: int = 2, num_rounds: int = 3, base_secret: float = 7.0, observers: Sequence[Observer] = ()
) -> float:
    """Run the sum in-process and show it on the console.

    Returns:
        The sum.
    """
    recipe = sum_recipe(num_clients=num_clients, num_rounds=num_rounds, base_secret=base_secret)
    with console_observer("rich") as console:
        result = recipe.execute(SimEnv(), observers=(console, *observers))
    return float(result.parameters["sum"][0])
