"""The same jobs with SFL, through its public API alone. Laid out as `plain`: get ready, then the loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import numpy as np

import work
from sfl.client.base import BaseFederatedClient
from sfl.env import SimEnv
from sfl.recipe import FedAvgRecipe
from sfl.train.module import copy_parameters, lend_parameters, load_parameters, resident
from sfl.types import FederationConfig

Loop = Callable[[], dict[str, np.ndarray]]


class Classifier(BaseFederatedClient):
    """Trains the worker's one resident module on its shard."""

    lends_arrays: ClassVar[bool] = True

    def __init__(self, job: work.Job, **identity) -> None:
        super().__init__(**identity)
        self.job = job
        self.shard = resident((job, "shards"), job.shards)[self.client_id]

    def compute_update(self, parameters, config):
        module = resident(self.job, self.job.module)
        load_parameters(module, parameters)
        self.job.train(module, self.shard, work.local_seed(config["round"], self.client_id))
        return lend_parameters(module), len(self.shard), {}

    def evaluate(self, parameters, config):
        module = resident(self.job, self.job.module)
        load_parameters(module, parameters)
        loss, accuracy = self.job.evaluate(module, self.shard)
        return loss, len(self.shard.held_labels), {"accuracy": accuracy}


class LargeClient(BaseFederatedClient):
    """One pass over a resident model."""

    lends_arrays: ClassVar[bool] = True

    def __init__(self, width: int, **identity) -> None:
        super().__init__(**identity)
        self.width = width

    def compute_update(self, parameters, config):
        module = resident_large(self.width)
        load_parameters(module, parameters)
        module.work(self.client_id)
        return lend_parameters(module), work.large_weight(self.client_id), {}

    def evaluate(self, parameters, config):
        raise NotImplementedError


def resident_large(width: int) -> work.Large:
    return resident(("large", width), lambda: work.Large(width))


class LargeNumpyClient(BaseFederatedClient):
    """Returns new arrays and keeps none."""

    def compute_update(self, parameters, config):
        step = np.float32(work.STEP * (self.client_id + 1))
        return {name: value + step for name, value in parameters.items()}, work.large_weight(self.client_id), {}

    def evaluate(self, parameters, config):
        raise NotImplementedError


def classifier(job: work.Job, workers: int = 1) -> Loop:
    resident((job, "shards"), job.shards)
    work.optimizer_is_imported()
    recipe = FedAvgRecipe(
        name="classifier",
        client=Classifier,
        client_kwargs={"job": job},
        initial_parameters=lambda: copy_parameters(resident(job, job.module)),
        federation=FederationConfig(num_clients=job.sites, num_rounds=job.rounds, workers=workers),
    )
    return lambda: recipe.execute(SimEnv(device="cpu")).parameters


def large(width: int = work.LARGE_WIDTH, workers: int = 1) -> Loop:
    recipe = FedAvgRecipe(
        name="large",
        client=LargeClient,
        client_kwargs={"width": width},
        initial_parameters=lambda: copy_parameters(resident_large(width)),
        federation=FederationConfig(num_clients=work.LARGE_SITES, num_rounds=work.LARGE_ROUNDS, workers=workers),
        evaluate_every=0,
    )
    return lambda: recipe.execute(SimEnv(device="cpu")).parameters


def large_numpy(width: int = work.LARGE_WIDTH) -> Loop:
    recipe = FedAvgRecipe(
        name="large-numpy",
        client=LargeNumpyClient,
        initial_parameters=lambda: work.large_arrays(width),
        federation=FederationConfig(num_clients=work.LARGE_SITES, num_rounds=work.LARGE_ROUNDS),
        evaluate_every=0,
    )
    return lambda: recipe.execute(SimEnv(device="cpu")).parameters


def esm2(folder: Path, workers: int = 1) -> Loop:
    """``sfl run esm2`` without its folder: the recipe of the application."""
    from sfl.esm2.config import ESM2ClientConfig, ESM2RunConfig
    from sfl.esm2.model import find_model
    from sfl.esm2.server import esm2_recipe
    from sfl.esm2.workload import ESM2Workload

    files = work.ESM2Files(folder)
    config = ESM2RunConfig(
        federation=FederationConfig(
            num_clients=work.ESM2_SITES, num_rounds=work.ESM2_ROUNDS, seed=work.SEED, workers=workers
        ),
        client=ESM2ClientConfig(
            batch_size=work.ESM2_BATCH,
            local_steps=work.ESM2_STEPS,
            data=str(files.proteins),
            max_length=work.ESM2_LENGTH,
            eval_proteins=work.ESM2_EVAL,
        ),
    )
    model = find_model(str(files.model))
    ESM2Workload(config=config, model=model).data()
    import_module("transformers").EsmForMaskedLM  # noqa: B018 - loaded on first use; the plain loop has it before, too
    work.optimizer_is_imported()
    recipe = esm2_recipe(config, model, device="cpu")
    return lambda: recipe.execute(SimEnv(device="cpu")).parameters


JOBS: dict[str, Callable[[Path], Loop]] = {
    "tiny": lambda _: classifier(work.TINY),
    "digits": lambda _: classifier(work.DIGITS),
    "digits-2": lambda _: classifier(work.DIGITS, workers=2),
    "large": lambda _: large(),
    "large-2": lambda _: large(workers=2),
    "large-empty": lambda _: large(width=1),
    "large-numpy": lambda _: large_numpy(),
    "large-numpy-empty": lambda _: large_numpy(width=1),
    "esm2": esm2,
    "esm2-2": partial(esm2, workers=2),
}
