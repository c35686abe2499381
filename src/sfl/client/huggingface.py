"""Hugging Face's ``Trainer`` and the Client API: ``patch(trainer)``, and its own calls become rounds.

Example of a script::

    import sfl.client.huggingface as flare

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()  # of the model that was received
        trainer.train()  # from it; sent when it ends

Under ``torchrun`` every process runs this script. Rank 0 talks to the site, and the others are told what it is told.
"""

from __future__ import annotations

from typing import Any

from sfl.client import api, together
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
from sfl.client.decorators import evaluate, train
from sfl.client.session import STEPS
from sfl.client.together import get_task_name, is_evaluate, is_running, is_submit_model, is_train
from sfl.errors import ClientApiError
from sfl.types import FLModel, ParamsType

__all__ = [
    "AnalyticsDataType",
    "FLModel",
    "ParamsType",
    "evaluate",
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
    "train",
]

_PREPARED = "_is_accelerate_prepared"
_SHARDED = ("is_fsdp_enabled", "is_deepspeed_enabled")


def patch(trainer: Any, load_state_dict_strict: bool = True) -> Any:
    """Let a ``transformers.Trainer`` receive before ``evaluate`` or ``train`` and send after ``train``.

    An evaluation before the training is one of the received model, and its figures are sent with the update; asked only
    to evaluate, the evaluation alone answers, and ``train()`` evaluates. The figure ``eval_loss`` is also sent as
    ``loss``.

    Of several processes each calls it, and this module's functions, as often as the others: ``is_running``,
    ``is_train`` and ``is_evaluate`` say the same on all. They hold the received state bit for bit, and rank 0 sends. If
    one of them fails, ``torchrun`` ends all, and the site has failed the task.

    Args:
        trainer: The trainer. Optimizers and schedulers begin anew with each ``train()``, as Hugging Face makes them.
        load_state_dict_strict: Whether received and local names must be the same.

    Returns:
        The trainer.

    Raises:
        ClientApiError: If it is no such trainer, or several processes hold a part of the model each.
    """
    if not all(callable(getattr(trainer, name, None)) for name in ("train", "evaluate", "add_callback")):
        raise ClientApiError(f"patch() must be given a transformers.Trainer, got {type(trainer).__name__}.")
    if trainer.args.world_size > 1:
        if any(getattr(trainer, name, False) for name in _SHARDED):
            raise ClientApiError("patch() must be given a model that every process holds whole, got a sharded one.")
        api.ready(trainer.args.process_index)
        together.join(trainer.args.process_index)
    else:
        api.ready()
        together.alone()
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
        if is_evaluate():
            self._answer(FLModel(metrics=self._metrics))
        return figures

    def train(self, *args: Any, **options: Any) -> Any:
        """From the received model, whatever ran in between; then send."""
        self._load()
        if is_evaluate():
            return self.evaluate()
        if together.are_several():
            _prepare_anew(self._trainer)
        self._is_training = True
        try:
            output = self._train(*args, **options)
        finally:
            self._is_training = False
        if together.are_several() and self._trainer.model_wrapped is self._trainer.model:
            raise ClientApiError("the ranks of a site must train one model, got one each: nothing wrapped it.")
        meta = {STEPS: self._trainer.state.global_step}
        self._answer(FLModel(params=self._trainer.model.state_dict(), metrics=self._metrics, meta=meta))
        return output

    def _load(self) -> None:
        together.load(self._trainer.model, strict=self._strict)

    def _answer(self, model: FLModel) -> None:
        self._metrics = None
        together.answer(model)


def _prepare_anew(trainer: Any) -> None:
    """Undo what an evaluation did to a model that was never trained.

    Accelerate takes a model that it has prepared to evaluate for one that is prepared to train, and does not wrap it:
    every rank would train one of its own.
    """
    if trainer.model_wrapped is trainer.model and getattr(trainer.model, _PREPARED, False):
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        delattr(trainer.model, _PREPARED)
