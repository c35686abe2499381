"""Recipes of averaging, and of the smallest example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from sfl.core.aggregator import Aggregator, Sum
from sfl.core.algorithm import Algorithm
from sfl.errors import CompositionError
from sfl.recipe.base import Recipe
from sfl.server.schedule import Schedule
from sfl.server.script_job import ScriptJob, sized
from sfl.server.strategy import FedAvg, SumFedAvg
from sfl.server.workflow import Workflow
from sfl.train.model_source import ModelSource

__all__ = ["FedAvgRecipe", "SumRecipe"]


@dataclass(frozen=True, kw_only=True)
class FedAvgRecipe(Recipe):
    """Federated averaging (McMahan et al. 2017), of clients or of a training script.

    Either ``client`` and ``initial_parameters`` are given, or ``train_script`` and ``model`` (or ``initial_ckpt``).

    Example:
        >>> import numpy as np
        >>> FedAvgRecipe(name="digits", min_clients=2, num_rounds=5, model={"w": np.zeros(3)}, train_script="train.py")
        ... # doctest: +ELLIPSIS
        FedAvgRecipe(name='digits', ...)

    Attributes:
        server_learning_rate: Step of the server on the mean delta; 1 is the paper's.
        schedule: What the sites' learning rate is multiplied with, round by round; the client must heed it.
        train_script: A script that uses the Client API; every site runs it.
        train_args: Its arguments, as one line or as a list.
        model: Initial parameters of a script's job: a torch module (its ``state_dict`` is taken), the name of its
            class as ``{"class_path": "pkg.mod.Class", "args": {...}}``, or a dict of arrays.
        initial_ckpt: A safetensors or ``.pt`` file that holds the initial parameters.
        min_clients: Sites that a round needs, and of the federation if it does not name more.
        num_rounds: Rounds; by default the federation's.
        launch_external_process: Whether the script runs as a process of its own.
        command: What runs it then, such as ``torchrun --nproc_per_node=2``.
        server_expected_format: Whether scripts are handed ``"numpy"`` arrays or ``"pytorch"`` tensors; by default
            tensors if the model is a torch module.
        params_transfer_type: What scripts send, as a hint; each model that they send says so itself.
    """

    server_learning_rate: float = 1.0
    schedule: Schedule | None = None
    train_script: str | None = None
    train_args: str | Sequence[str] = ()
    model: Any = None
    initial_ckpt: str | None = None
    min_clients: int | None = None
    num_rounds: int | None = None
    launch_external_process: bool = False
    command: str = "python3 -u"
    server_expected_format: Literal["numpy", "pytorch"] | None = None
    params_transfer_type: Literal["FULL", "DIFF"] = "FULL"

    def __post_init__(self) -> None:
        self._check_form()
        if self.train_script is not None:  # no module stays in a recipe: it must be fit to travel as plain data
            object.__setattr__(self, "model", ModelSource.of(self.model, self.initial_ckpt, self.federation.seed))

    def resolved(self) -> Self:
        """The same job with its size in the federation; one of a training script as one of script clients."""
        federation = sized(self.federation, self.min_clients, self.num_rounds)
        if self.train_script is None:
            return replace(self, federation=federation, min_clients=None, num_rounds=None)
        job = ScriptJob(
            name=self.name,
            path=self.train_script,
            args=self.train_args,
            model=self.model,
            params_format=self.server_expected_format,
            external=self.launch_external_process,
            command=self.command,
        )
        every = "end" if self.evaluate_every is None else self.evaluate_every
        bare: dict[str, Any] = {"train_script": None, "train_args": (), "model": None, "initial_ckpt": None}
        bare |= {"min_clients": None, "num_rounds": None, "evaluate_every": every}
        return replace(self, **bare, **job.fields(federation))

    def _check_form(self) -> None:
        ours = self.client is not None or self.initial_parameters is not None or bool(self.client_kwargs)
        script = self.train_script is not None
        if ours == script:
            got = "both" if ours else "neither"
            raise CompositionError(
                f"a recipe must have either client and initial_parameters or train_script and model, got {got}."
            )
        if not script and (self.model is not None or self.initial_ckpt is not None or self.train_args):
            raise CompositionError("model, initial_ckpt and train_args must come with a train_script, got none.")
        for name, value, known in (
            ("params_transfer_type", self.params_transfer_type, ("FULL", "DIFF")),
            ("server_expected_format", self.server_expected_format, (None, "numpy", "pytorch")),
        ):
            if value not in known:
                raise CompositionError(f"{name} must be one of {known}, got {value!r}.")

    def algorithm(self) -> Algorithm | Workflow:
        """FedAvg over the federation's sampling."""
        return FedAvg(**self._averaging())

    def _averaging(self) -> dict[str, Any]:
        """What this and every algorithm that is built on averaging is told."""
        if not math.isfinite(self.server_learning_rate):
            raise CompositionError(f"server_learning_rate must be finite, got {self.server_learning_rate}.")
        return {
            "fraction_fit": self.federation.fraction_fit,
            "min_clients": self.federation.min_available_clients,
            "server_learning_rate": self.server_learning_rate,
            "seed": self.federation.seed,
            "poisson": self.federation.sampling == "poisson",
            "turns": self.federation.turns,
            "schedule": self.schedule,
            "weights": self.federation.weights,
        }


@dataclass(frozen=True, kw_only=True)
class SumRecipe(Recipe):
    """The sum of what the sites hold: the smallest working example."""

    aggregator: Aggregator = field(default_factory=Sum)

    def algorithm(self) -> Algorithm:
        """SumFedAvg over all sites."""
        return SumFedAvg(seed=self.federation.seed)
