"""Hugging Face's ``Trainer`` and the Client API: ``patch(trainer)``, and its own calls become rounds.

Example of a script::

    import sfl.client.huggingface as flare

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()  # of the model that was received
        trainer.train()  # from it; sent when it ends
"""

from __future__ import annotations

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


def patch(trainer: Any, load_state_dict_strict: bool = True) -> Any:
    """Let a ``transformers.Trainer`` receive before ``evaluate`` or ``train`` and send after ``train``.

    An evaluation before the training is one of the received model, and its figures are sent with the update; asked only
    to evaluate, the evaluation alone answers, and ``train()`` evaluates. One process only: it refuses several ranks.
    The figure ``eval_loss`` is also sent as ``loss``.

    Args:
        trainer: The trainer. Optimizers and schedulers begin anew with each ``train()``, as Hugging Face makes them.
        load_state_dict_strict: Whether received and local names must be the same.

    Returns:
        The trainer.

    Raises:
        ClientApiError: If it is no such trainer, or one of several processes.
    """
    if not all(callable(getattr(trainer, name, None)) for name in ("train", "evaluate", "add_callback")):
        raise ClientApiError(f"patch() must be given a transformers.Trainer, got {type(trainer).__name__}.")
    if trainer.args.world_size > 1:
        raise ClientApiError(f"patch() must be called in a single process, got {trainer.args.world_size} of them.")
    api.ready()
    _Rounds(trainer, strict=load_state_dict_strict)
    return trainer


class _Rounds:
    """Stands in for two methods of one trainer."""

    def __init__(self, trainer: Any, *, strict: bool) -> None:
        self._trainer, self._strict = trainer, strict
        self._train, self._evaluate = trainer.train, trainer.evaluate
        self._metrics: dict[str, float] | None = None
        self._is_training = False
        trainer.train, trainer.evaluate = self.train, self.evaluate

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Of the received model; during a training, as the trainer itself asks, of the model as it is."""
        if self._is_training:
            return self._evaluate(*args, **options)
        self._load()
        figures = self._evaluate(*args, **options)
        self._metrics = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        if "eval_loss" in self._metrics:
            self._metrics["loss"] = self._metrics["eval_loss"]
        if api.is_evaluate():
            self._answer(FLModel(metrics=self._metrics))
        return figures

    def train(self, *args: Any, **options: Any) -> Any:
        """From the received model, whatever ran in between; then send."""
        self._load()
        if api.is_evaluate():
            return self.evaluate()
        self._is_training = True
        try:
            output = self._train(*args, **options)
        finally:
            self._is_training = False
        meta = {STEPS: self._trainer.state.global_step}
        self._answer(FLModel(params=self._trainer.model.state_dict(), metrics=self._metrics, meta=meta))
        return output

    def _load(self) -> None:
        model = api.receive()
        if model is None:
            raise SystemExit(0)  # the job is over, and so is the script
        load_state(self._trainer.model, model.params, strict=self._strict)

    def _answer(self, model: FLModel) -> None:
        self._metrics = None
        api.send(model)
