"""What a runner can be told about the federated algorithm; imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sfl.errors import ConfigError

__all__ = ["AlgorithmConfig", "AlgorithmName"]

AlgorithmName = Literal[
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadagrad",
    "fedyogi",
    "fedadam",
    "scaffold",
    "ditto",
    "cyclic",
    "swarm",
    "fedbuff",
    "evaluate",
    "cross-site",
]
_OPTIMIZERS = ("fedavgm", "fedadagrad", "fedyogi", "fedadam")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Which federated algorithm runs, and what it is told.

    Attributes:
        algorithm: fedavg; fedprox (a proximal term in the sites' loss); fedavgm, fedadagrad, fedyogi or fedadam (an
            optimizer on the server); scaffold (control variates against drift); ditto (a model of its own at each
            site); cyclic (one model goes round); swarm (another site aggregates in each round); fedbuff (nobody waits
            for the slowest); evaluate (no training); cross-site (each site trains once, then every site's model is
            evaluated on every site).
        server_learning_rate: Step of the server; by default 1, and 0.01 with fedadagrad, fedyogi and fedadam.
        server_beta1: First moment of the server's optimizer.
        server_beta2: Second moment, with fedyogi and fedadam.
        server_tau: How adaptive the server's steps may be at most; smaller is more.
        proximal_mu: Weight of fedprox' term.
        personal_lambda: How strongly ditto holds the sites' own models at the global one.
        buffer_size: Updates that make a round of fedbuff; by default half of the sites.
        concurrency: Sites that train at a time under fedbuff; 0 is all.
        cyclic_order: fixed (by name) or random (another in each round).
        lr_schedule: What becomes of the local learning rate over the rounds: constant, linear, cosine or step.
        lr_warmup: Rounds in which it rises first.
        lr_gamma: Factor of a step.
        lr_every: Rounds between two steps.
        early_stopping: Rounds without a better key_metric that end the run; 0 never does.
        key_metric: The figure that says which model is best; by default accuracy where it is reported, else loss.
    """

    algorithm: AlgorithmName = "fedavg"
    server_learning_rate: float | None = None
    server_beta1: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    proximal_mu: float = 0.01
    personal_lambda: float = 0.1
    buffer_size: int | None = None
    concurrency: int = 0
    cyclic_order: Literal["fixed", "random"] = "fixed"
    lr_schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    lr_warmup: int = 0
    lr_gamma: float = 0.5
    lr_every: int = 10
    early_stopping: int = 0
    key_metric: str | None = None

    def __post_init__(self) -> None:
        rate = self.server_learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0.0):
            raise ConfigError(f"server_learning_rate must be positive and finite, got {rate}.")
        if self.buffer_size is not None and self.buffer_size < 1:
            raise ConfigError(f"buffer_size must be at least 1, got {self.buffer_size}.")
        if self.early_stopping < 0:
            raise ConfigError(f"early_stopping must be 0 (never) or more, got {self.early_stopping}.")

    @property
    def optimizer(self) -> str | None:
        """The server's optimizer: momentum, adagrad, yogi or adam; ``None`` without one."""
        if self.algorithm not in _OPTIMIZERS:
            return None
        return "momentum" if self.algorithm == "fedavgm" else self.algorithm.removeprefix("fed")
