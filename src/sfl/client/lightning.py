"""PyTorch Lightning and the Client API: ``patch(trainer)``, and the trainer's own calls become rounds.

Example of a script::

    import sfl.client.lightning as flare

    trainer = Trainer(max_epochs=1)
    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(model, data)  # of the model that was received
        trainer.fit(model, data)  # from it; sent when it ends
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from typing import Any

from sfl.client import api
from sfl.client.api import (
    AnalyticsDataType,
    get_config,
    get_job_id,
    get_site_name,
    init,
    is_evaluate,
    is_running,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
)
from sfl.client.session import STEPS
from sfl.errors import ClientApiError
from sfl.train.interop import load_state
from sfl.types import FLModel, ParamsType

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "get_config",
    "get_job_id",
    "get_site_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_train",
    "log",
    "patch",
    "receive",
    "send",
    "shutdown",
    "system_info",
]

_PACKAGES = {"lightning": "lightning.pytorch.callbacks", "pytorch_lightning": "pytorch_lightning.callbacks"}
_META = "__fl_meta__"


def patch(
    trainer: Any, restore_state: bool = True, load_state_dict_strict: bool = True, update_fit_loop: bool = True
) -> None:
    """Let a Lightning trainer receive before ``validate`` or ``fit`` and send after ``fit``.

    A validation that comes before the fit is one of the received model, and its figures are sent with the update; asked
    only to evaluate, the validation alone answers. A module's ``__fl_meta__`` dict is sent as ``meta``.

    Args:
        trainer: A ``Trainer`` of ``lightning`` or ``pytorch_lightning``.
        restore_state: Whether optimizers and schedulers go on from where the round before left them.
        load_state_dict_strict: Whether received and local names must be the same.
        update_fit_loop: Whether ``max_epochs`` and ``max_steps`` count for each round anew.

    Raises:
        ClientApiError: If it is no Lightning trainer.
    """
    callback = _callback_class(trainer)(trainer, strict=load_state_dict_strict, again=update_fit_loop)
    callback.restores = restore_state
    trainer.callbacks.append(callback)


def _callback_class(trainer: Any) -> Any:
    """A callback of the package that the trainer is from: each of the two has a base class of its own."""
    packages = [cls.__module__.partition(".")[0] for cls in type(trainer).__mro__ if cls.__name__ == "Trainer"]
    home = next((_PACKAGES[name] for name in packages if name in _PACKAGES), None)
    if home is None:
        raise ClientApiError(f"patch() must be given a Lightning trainer, got {type(trainer).__name__}.")
    return type("FLCallback", (_Rounds, import_module(home).Callback), {})


class _Rounds:
    """The hooks. Only rank 0 talks to the site; the others are told through the trainer's strategy."""

    restores = True

    def __init__(self, trainer: Any, *, strict: bool, again: bool) -> None:
        api.ready(trainer.global_rank)
        self._strict, self._again = strict, again
        self._per_round = (trainer.max_epochs, trainer.max_steps)
        self._task = ""
        self._is_fitting = False
        self._metrics: dict[str, float] | None = None
        self._first_step = 0
        self._kept: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers and schedulers as the round before left them."""
        if not self._kept:
            return
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": self._kept["optimizers"]})
        if trainer.scaler is not None and self._kept["scaler"] is not None:
            trainer.scaler.load_state_dict(self._kept["scaler"])
        for config, state in zip(trainer.lr_scheduler_configs, self._kept["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep them for the next round."""
        if self.restores:
            self._kept = {
                "optimizers": [deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
                "scaler": deepcopy(trainer.scaler.state_dict()) if trainer.scaler is not None else None,
                "schedulers": [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            }

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """An explicit validation is one of the received model."""
        if self._is_explicit(trainer):
            self._load(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep its figures, or answer with them if nothing else was asked for."""
        if not self._is_explicit(trainer):
            return
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._task == "evaluate":
            self._answer(trainer, FLModel(metrics=self._metrics))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Train from the received model, whatever ran in between."""
        self._load(trainer, pl_module)
        self._first_step = trainer.global_step
        self._is_fitting = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Send the module, and let the next round have as many epochs as this one."""
        self._is_fitting = False
        if self._task != "train":
            return
        meta = {STEPS: trainer.global_step - self._first_step} | dict(getattr(pl_module, _META, {}))
        self._answer(trainer, FLModel(params=pl_module.state_dict(), metrics=self._metrics, meta=meta))
        trainer.num_sanity_val_steps = 0
        epochs, steps = self._per_round
        if self._again and epochs is not None and epochs > 0:
            trainer.fit_loop.max_epochs = epochs + trainer.current_epoch
        if self._again and steps > 0:
            trainer.fit_loop.epoch_loop.max_steps = steps + trainer.global_step

    def _is_explicit(self, trainer: Any) -> bool:
        return trainer.state.fn == "validate" and not self._is_fitting and self._metrics is None

    def _load(self, trainer: Any, pl_module: Any) -> None:
        model = api.receive() if trainer.global_rank == 0 else None
        task = "" if model is None else "evaluate" if api.is_evaluate() else "train"
        if trainer.world_size > 1:
            model, task = trainer.strategy.broadcast((model, task), src=0)
        if model is None:
            raise SystemExit(0)  # the job is over, and so is the script
        self._task = task
        load_state(pl_module, model.params, strict=self._strict)

    def _answer(self, trainer: Any, model: FLModel) -> None:
        self._metrics, self._task = None, ""
        if trainer.global_rank == 0:
            api.send(model)
