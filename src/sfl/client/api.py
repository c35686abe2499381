"""The Client API: the few calls that make an ordinary training script a federated one.

Example of a script::

    import sfl.client as flare

    flare.init()
    while flare.is_running():
        model = flare.receive()
        ...  # train from model.params
        flare.send(flare.FLModel(params=..., metrics={"loss": loss}, meta={"NUM_STEPS_CURRENT_ROUND": steps}))

Every function also takes ``ctx``, what ``init`` returned; without it the call means the site whose script makes it.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Any

from sfl.client.session import EVALUATE, TRAIN, Session, current, effective_rank, enter, logger, no_init
from sfl.types import FLModel


class AnalyticsDataType(StrEnum):
    """What kind of value ``log`` is given."""

    SCALARS = "SCALARS"
    SCALAR = "SCALAR"
    IMAGE = "IMAGE"
    TEXT = "TEXT"
    PARAMETER = "PARAMETER"
    PARAMETERS = "PARAMETERS"
    METRIC = "METRIC"
    METRICS = "METRICS"
    MODEL = "MODEL"
    TAG = "TAG"
    TAGS = "TAGS"


def init(rank: str | int | None = None, config_file: str | None = None) -> Session:
    """Begin to use the Client API. Call it once.

    Args:
        rank: Global rank of this process in distributed training; by default ``RANK`` of the environment, or 0. Only
            rank 0 exchanges models: on others ``is_running`` is false and ``receive`` gives ``None``.
        config_file: Taken for compatibility; a script needs no file.

    Returns:
        What may be handed to the other functions as ``ctx``.

    Raises:
        ClientApiError: If no site runs this script.
    """
    number = effective_rank(rank)
    session = current()
    if session is None:
        if "_SFL_CLIENT" not in os.environ:
            raise no_init("any function")
        from sfl.client.child import connect

        session = connect(number)
        enter(session)
    session.init(number)
    return session


def ready(rank: str | int | None = None) -> Session:
    """The session, after ``init`` unless the script has called it already. For the helpers that call it themselves."""
    session = current()
    return session if session is not None and session.is_initialized else init(rank)


def receive(timeout: float | None = None, ctx: Session | None = None) -> FLModel | None:
    """The model of the current task; waits for one if there is none.

    Args:
        timeout: Taken for compatibility. A site that is not being worked on waits as long as it must.
        ctx: What ``init`` returned.

    Returns:
        The model, the same one until it is answered; ``None`` when the job is over.

    Raises:
        ClientApiError: Before ``init``.
    """
    return _session("receive", ctx).receive()


def send(model: Any, clear_cache: bool = True, ctx: Session | None = None) -> None:
    """Answer the received model, once.

    Args:
        model: An ``FLModel``, or any object with its attributes. Its arrays are copied.
        clear_cache: Taken for compatibility; both models stay the script's.
        ctx: What ``init`` returned.

    Raises:
        ClientApiError: Before ``init`` or ``receive``, a second time, or if the model is not what can be sent.
    """
    _session("send", ctx).send(model)


def is_running(ctx: Session | None = None) -> bool:
    """Whether there is a task to work on. Between two tasks it waits for the next; false when the job is over."""
    return _session("is_running", ctx).is_running()


def is_train(ctx: Session | None = None) -> bool:
    """Whether the current task is to train."""
    return _session("is_train", ctx).task_name("is_train") == TRAIN


def is_evaluate(ctx: Session | None = None) -> bool:
    """Whether the current task is to evaluate the model that was received; only metrics of the answer are used."""
    return _session("is_evaluate", ctx).task_name("is_evaluate") == EVALUATE


def is_submit_model(ctx: Session | None = None) -> bool:
    """Whether the current task is to send the site's best model: no job of SFL asks for it, so never."""
    return _session("is_submit_model", ctx).task_name("is_submit_model") == "submit_model"


def get_task_name(ctx: Session | None = None) -> str:
    """``"train"`` or ``"validate"``."""
    return _session("get_task_name", ctx).task_name("get_task_name")


def get_site_name(ctx: Session | None = None) -> str:
    """The site's name, such as ``"site-1"``."""
    return _session("get_site_name", ctx).site.name


def get_job_id(ctx: Session | None = None) -> str:
    """The job's name."""
    return _session("get_job_id", ctx).site.job


def system_info(ctx: Session | None = None) -> dict[str, str]:
    """``site_name``, ``job_id`` and the ``device`` that the site is to compute on."""
    site = _session("system_info", ctx).site
    return {"site_name": site.name, "job_id": site.job, "device": site.device}


def get_config(ctx: Session | None = None) -> dict[str, Any]:
    """The names of the tasks and how parameters travel, under the keys that FLARE uses."""
    site = _session("get_config", ctx).site
    exchange = {"exchange_format": site.params_format, "train_task_name": TRAIN, "eval_task_name": EVALUATE}
    return {"TASK_EXCHANGE": exchange, "SITE_NAME": site.name, "JOB_ID": site.job}


def log(
    key: str, value: Any, data_type: Any = AnalyticsDataType.SCALAR, ctx: Session | None = None, **kwargs: Any
) -> bool:
    """Say a figure on the site's log (logger ``sfl.site``, level INFO).

    Args:
        key: Its name.
        value: The figure.
        data_type: What kind of value it is; taken for compatibility.
        ctx: What ``init`` returned.
        **kwargs: Said beside it, such as ``global_step``.

    Returns:
        Whether it was said: not on ranks other than 0.
    """
    session = _session("log", ctx)
    if session.is_talking:
        said = "".join(f" {name}={item}" for name, item in kwargs.items())
        logger.info("%s: %s=%s%s", session.site.name, key, value, said)
    return session.is_talking


def clear(ctx: Session | None = None) -> None:
    """Forget the current task without an answer: the site then fails it when the script asks for the next."""
    _session("clear", ctx).clear()


def shutdown(ctx: Session | None = None) -> None:
    """Take no further task: ``is_running`` is false from now on."""
    session = _session("shutdown", ctx)
    session.clear()
    session.is_stopped = True


def _session(called: str, ctx: Session | None) -> Session:
    session = ctx if ctx is not None else current()
    if session is None:
        raise no_init(called)
    return session
