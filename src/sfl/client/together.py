"""A training script that may be several processes: what rank 0 is told of its tasks, all of them are told.

The helpers for trainers use it. Under ``torchrun`` every process runs the script; rank 0 talks to the site.
"""

from __future__ import annotations

from typing import Any

from sfl.client import api
from sfl.client.session import EVALUATE, TRAIN, Session
from sfl.train.interop import load_state
from sfl.train.ranks import Ranks
from sfl.types import FLModel

__all__ = [
    "alone",
    "answer",
    "are_several",
    "get_task_name",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "join",
    "load",
]

_OVER, _TRAIN, _EVALUATE = range(3)


class _Together:
    """One of several processes. What it is told is a collective call: all make it, or none."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.task = ranks, _OVER

    def next_task(self, ctx: Session | None) -> int:
        """The current task, or the next if there is none."""
        task = _OVER
        if self.ranks.number == 0 and api.is_running(ctx):
            task = _EVALUATE if api.is_evaluate(ctx) else _TRAIN
        self.task = self.ranks.told(task)
        return self.task


_together: list[_Together] = []
"""Of this process, if it is one of several: then it runs no other script."""


def alone() -> None:
    """This process is the whole script."""
    _together.clear()


def join(number: int) -> None:
    """This process is one of several, whose group is there; each says so.

    Args:
        number: Its rank.
    """
    _together[:] = [_Together(Ranks(number))]


def are_several() -> bool:
    """Whether this process is one of several."""
    return bool(_together)


def is_running(ctx: Session | None = None) -> bool:
    """Whether there is a task to work on, said on every rank. Between two tasks it waits for the next."""
    return _together[0].next_task(ctx) != _OVER if _together else api.is_running(ctx)


def is_train(ctx: Session | None = None) -> bool:
    """Whether the current task is to train, said on every rank."""
    return _together[0].task == _TRAIN if _together else api.is_train(ctx)


def is_evaluate(ctx: Session | None = None) -> bool:
    """Whether the current task is to evaluate the model that was received, said on every rank."""
    return _together[0].task == _EVALUATE if _together else api.is_evaluate(ctx)


def is_submit_model(ctx: Session | None = None) -> bool:
    """Whether the current task is to send the site's best model: no job of SFL asks for it, so never."""
    return False if _together else api.is_submit_model(ctx)


def get_task_name(ctx: Session | None = None) -> str:
    """``"train"`` or ``"validate"``, said on every rank."""
    return ("", TRAIN, EVALUATE)[_together[0].task] if _together else api.get_task_name(ctx)


def load(module: Any, *, strict: bool) -> None:
    """Give a torch module the received state, bit for bit on every rank; wait for a task if there is none.

    Args:
        module: The same module on every rank.
        strict: Whether received and local names must be the same.

    Raises:
        SystemExit: If the job is over, and so is the script.
    """
    if not is_running():
        raise SystemExit(0)
    model = api.receive() if _talks() else None
    if model is not None:
        load_state(module, model.params, strict=strict)
    if _together:
        _together[0].ranks.share_state(module)


def answer(model: FLModel) -> None:
    """Send what rank 0 says; every rank calls it, and has no task then."""
    if _talks():
        api.send(model)
    if _together:
        _together[0].task = _OVER


def _talks() -> bool:
    return not _together or _together[0].ranks.number == 0
