"""The recipe that a runner's options ask for."""

from __future__ import annotations

from typing import Any

from sfl.recipe.algorithms import DittoRecipe, FedOptRecipe, FedProxRecipe, ScaffoldRecipe
from sfl.recipe.averaging import FedAvgRecipe
from sfl.recipe.workflow import CyclicRecipe, FedBuffRecipe, FedEvalRecipe, SwarmRecipe
from sfl.server.callbacks import EarlyStopping
from sfl.server.config import AlgorithmConfig
from sfl.server.schedule import Schedule
from sfl.types import FederationConfig

__all__ = ["chosen_recipe"]

_KINDS: dict[str, type[FedAvgRecipe]] = {
    "fedavg": FedAvgRecipe,
    "fedprox": FedProxRecipe,
    "fedavgm": FedOptRecipe,
    "fedadagrad": FedOptRecipe,
    "fedyogi": FedOptRecipe,
    "fedadam": FedOptRecipe,
    "scaffold": ScaffoldRecipe,
    "ditto": DittoRecipe,
    "cyclic": CyclicRecipe,
    "swarm": SwarmRecipe,
    "fedbuff": FedBuffRecipe,
    "evaluate": FedEvalRecipe,
    "cross-site": FedEvalRecipe,
}


def chosen_recipe(config: AlgorithmConfig, federation: FederationConfig, **fields: Any) -> FedAvgRecipe:
    """The recipe of the algorithm that the options name.

    Args:
        config: The options.
        federation: Sites and rounds.
        **fields: The recipe's other fields: client, initial parameters, protections.

    Raises:
        ConfigError: If the options do not fit each other.
    """
    schedule = Schedule(
        kind=config.lr_schedule,
        rounds=federation.num_rounds,
        warmup=config.lr_warmup,
        gamma=config.lr_gamma,
        every=config.lr_every,
    )
    if schedule.changes:
        fields["schedule"] = schedule
    if config.early_stopping:
        metric = config.key_metric or "loss"
        fields["callbacks"] = (
            *fields.get("callbacks", ()),
            EarlyStopping(metric=metric, patience=config.early_stopping),
        )
    return _KINDS[config.algorithm](
        federation=federation, key_metric=config.key_metric, **_own(config, federation), **fields
    )


def _own(config: AlgorithmConfig, federation: FederationConfig) -> dict[str, Any]:
    rate = config.server_learning_rate
    by_default = 1.0 if config.optimizer in (None, "momentum") else 0.01
    own: dict[str, Any] = {"server_learning_rate": by_default if rate is None else rate}
    if config.optimizer is not None:
        own |= {"optimizer": config.optimizer, "beta1": config.server_beta1, "beta2": config.server_beta2}
        return own | {"tau": config.server_tau}
    half = -(-federation.num_clients // 2)
    special: dict[str, dict[str, Any]] = {
        "fedprox": {"proximal_mu": config.proximal_mu},
        "ditto": {"personal_lambda": config.personal_lambda},
        "cross-site": {"cross_site": True},
        "cyclic": {"order": config.cyclic_order},
        "fedbuff": {"buffer": config.buffer_size or half, "concurrency": config.concurrency},
    }
    return own | special.get(config.algorithm, {})
