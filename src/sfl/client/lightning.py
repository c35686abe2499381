"""PyTorch Lightning and the Client API: ``patch(trainer)``, and the trainer's own calls become rounds.

Example of a script::

    import sfl.client.lightning as flare

    trainer = Trainer(max_epochs=1)
    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(model, data)  # of the model that was received
        trainer.fit(model, data)  # from it; sent when it ends

With several processes (``strategy="ddp"``) each runs this script. Rank 0 talks to the site, and the others are told
what it is told.
"""

from __future__ import annotations

import os
from copy import deepcopy
from importlib import import_module
from typing import Any

from sfl.client import api, together, wire
from sfl.client.api import (
    AnalyticsDataType,
    get_config,
    get_job_id,
    get_site_name,
    init,
    log,
    receive,
    send,
    shutdown,
    system_info,
)
from sfl.client.session import STEPS
from sfl.client.together import get_task_name, is_evaluate, is_running, is_submit_model, is_train
from sfl.errors import ClientApiError
from sfl.types import FLModel, ParamsType

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "patch",
    "receive",
    "send",
    "shutdown",
    "system_info",
]

_PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
_META = "__fl_meta__"
_EACH_RUNS_THE_SCRIPT = "_SubprocessScriptLauncher"


def patch(
    trainer: Any, restore_state: bool = True, load_state_dict_strict: bool = True, update_fit_loop: bool = True
) -> None:
    """Let a Lightning trainer receive before ``validate`` or ``fit`` and send after ``fit``.

    A validation that comes before the fit is one of the received model, and its figures are sent with the update; asked
    only to evaluate, the validation alone answers. A module's ``__fl_meta__`` dict is sent as ``meta``.

    Of several processes each calls it, and this module's functions, as often as the others: ``is_running``,
    ``is_train`` and ``is_evaluate`` say the same on all. They hold the received state bit for bit, and rank 0 sends.
    Those that ``torchrun`` has not started, the trainer starts here.

    Args:
        trainer: A ``Trainer`` of ``lightning`` or ``pytorch_lightning``.
        restore_state: Whether optimizers and schedulers go on from where the round before left them.
        load_state_dict_strict: Whether received and local names must be the same.
        update_fit_loop: Whether ``max_epochs`` and ``max_steps`` count for each round anew.

    Raises:
        ClientApiError: If it is no Lightning trainer; or it has several processes, and they hold a part of the model
            each, do not each run the script, or belong to a script inside its site's process.
    """
    package = _package(trainer)
    _meet(trainer, package)
    callback_class: Any = type("FLCallback", (_Rounds, import_module(f"{package}.callbacks").Callback), {})
    callback = callback_class(trainer, strict=load_state_dict_strict, again=update_fit_loop)
    callback.restores = restore_state
    trainer.callbacks.append(callback)


def _package(trainer: Any) -> str:
    """Where the trainer is from: each of the two packages has base classes of its own."""
    packages = [cls.__module__.partition(".")[0] for cls in type(trainer).__mro__ if cls.__name__ == "Trainer"]
    home = next((_PACKAGES[name] for name in packages if name in _PACKAGES), None)
    if home is None:
        raise ClientApiError(f"patch() must be given a Lightning trainer, got {type(trainer).__name__}.")
    return home


def _meet(trainer: Any, package: str) -> None:
    """Bring all processes together, before their first task: who waits for one must have somebody to tell of it."""
    if trainer.world_size == 1:
        together.alone()
        api.ready(trainer.global_rank)
        return
    strategy, kinds = trainer.strategy, import_module(f"{package}.strategies")
    if not isinstance(strategy, kinds.DDPStrategy) or isinstance(strategy, kinds.DeepSpeedStrategy):
        raise ClientApiError(
            f"patch() must be given a model that every process holds whole, got {type(strategy).__name__}. "
            'Train with strategy="ddp".'
        )
    if type(strategy.launcher).__name__ != _EACH_RUNS_THE_SCRIPT:
        raise ClientApiError(
            'the processes of a trainer must each run the script, got spawned ones. Say strategy="ddp".'
        )
    if wire.VARIABLE not in os.environ:
        raise ClientApiError(
            f"a script inside its site's process must train in one process, got a trainer of {trainer.world_size}. "
            "Say launch_external_process=True, or devices=1."
        )
    api.ready(trainer.global_rank)
    strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    together.join(trainer.global_rank)


class _Rounds:
    """The hooks."""

    restores = True

    def __init__(self, trainer: Any, *, strict: bool, again: bool) -> None:
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
            self._load(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep its figures, or answer with them if nothing else was asked for."""
        if not self._is_explicit(trainer):
            return
        self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._task == "evaluate":
            self._answer(FLModel(metrics=self._metrics))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Train from the received model, whatever ran in between."""
        self._load(pl_module)
        self._first_step = trainer.global_step
        self._is_fitting = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Send the module, and let the next round have as many epochs as this one."""
        self._is_fitting = False
        if self._task != "train":
            return
        meta = {STEPS: trainer.global_step - self._first_step} | dict(getattr(pl_module, _META, {}))
        self._answer(FLModel(params=pl_module.state_dict(), metrics=self._metrics, meta=meta))
        trainer.num_sanity_val_steps = 0
        epochs, steps = self._per_round
        if self._again and epochs is not None and epochs > 0:
            trainer.fit_loop.max_epochs = epochs + trainer.current_epoch
        if self._again and steps > 0:
            trainer.fit_loop.epoch_loop.max_steps = steps + trainer.global_step

    def _is_explicit(self, trainer: Any) -> bool:
        return trainer.state.fn == "validate" and not self._is_fitting and self._metrics is None

    def _load(self, pl_module: Any) -> None:
        together.load(pl_module, strict=self._strict)
        self._task = "evaluate" if is_evaluate() else "train"

    def _answer(self, model: FLModel) -> None:
        self._metrics, self._task = None, ""
        together.answer(model)
