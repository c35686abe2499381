"""Training scripts of the tests, and short ways to run them as sites."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np

from sfl.client.script import ScriptClient
from sfl.client.site import Site, SiteHome, SiteProgram
from sfl.core.task import EVALUATE, FIT, Reply, Task
from sfl.env import SimEnv
from sfl.recipe import FedAvgRecipe, RunResult
from sfl.types import FederationConfig

W = {"w": np.zeros(2)}
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "client_api"

OPEN: list[Site] = []
"""Sites that a test has made; it closes them when it ends."""

LOOP = """
import sfl.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    params = {"w": model.params["w"] + 1}
    flare.send(flare.FLModel(params=params, metrics={"loss": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": 2}))
"""


def write(folder: Path, text: str, name: str = "train.py") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text), encoding="utf-8")
    return str(path)


def recipe(script: str, *, rounds: int = 2, sites: int = 2, **options: Any) -> FedAvgRecipe:
    options = {"name": "job", "model": W, "min_clients": sites, "num_rounds": rounds} | options
    return FedAvgRecipe(train_script=script, **options)


def run(script: str, *, workers: int = 1, **options: Any) -> RunResult:
    return recipe(script, **options).execute(SimEnv(device="cpu", num_threads=workers))


def lenient(sites: int) -> FederationConfig:
    """A federation of which one site is enough."""
    return FederationConfig(num_clients=sites, min_available_clients=1)


def site(script: str, name: str = "site-1", index: int = 0, folder: Path | None = None, **options: Any) -> Site:
    fields = {"path": script, "rounds": 3, "job": "job"} | options
    made = Site(SiteProgram(client=ScriptClient, kwargs={"script": fields}), name, index, home=SiteHome(folder=folder))
    OPEN.append(made)
    return made


def fit(subject: Site, round: int = 1, parameters: Any = None) -> Reply:
    return subject.run(Task(FIT, round, W if parameters is None else parameters, {"seed": 3}))


def evaluate(subject: Site, round: int = 1, parameters: Any = None) -> Reply:
    return subject.run(Task(EVALUATE, round, W if parameters is None else parameters, {"seed": 3}))


def bits(result: RunResult) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in result.parameters.items()}


def said(result: RunResult) -> list[str]:
    """The reasons of every site that was not used."""
    return [entry.reason for round in result.rounds for entry in round.sites if entry.reason]
