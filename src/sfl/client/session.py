"""A training script's side of the Client API: what it was handed, what it may do next, what it sends."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import numpy as np

from sfl.core.terms import DRIFT
from sfl.errors import ClientApiError
from sfl.types import Array, FLModel, Parameters, ParamsType

TRAIN = "train"
EVALUATE = "validate"
STEPS = "NUM_STEPS_CURRENT_ROUND"
TRAVELLED = "travelled"
_HALF = ("torch.bfloat16", "torch.float16")

logger = logging.getLogger("sfl.site")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptTask:
    """What a site hands its script.

    Attributes:
        name: ``TRAIN`` or ``EVALUATE``.
        round: The round, from 0.
        rounds: How many there are; ``None`` if that is not known.
        parameters: The global parameters; the script gets copies.
        terms: What the algorithm asks of the script's training, by the names of ``LocalTerms``: numbers, and
            ``drift`` as arrays. The script finds them in ``meta``.
    """

    name: str
    round: int
    rounds: int | None
    parameters: Parameters
    terms: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptResult:
    """What a script sent: arrays of its own, and figures.

    Attributes:
        parameters: The updated parameters, or what to add to those received; ``None`` if it sent none.
        is_diff: Whether they are to be added.
        metrics: Its figures.
        steps: The weight of the update; ``None`` if it did not say.
        travelled: The sum of its steps' learning rates; 0 if it did not say.
    """

    parameters: Parameters | None
    is_diff: bool
    metrics: dict[str, float]
    steps: int | None
    travelled: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScriptSite:
    """Which site a script works for.

    Attributes:
        name: The site's name.
        job: The job's.
        device: Where the site computes.
        params_format: Whether the script is handed arrays (``"numpy"``) or tensors (``"pytorch"``).
        seed: Seed of the generators that the script finds; ``None`` leaves them.
    """

    name: str
    job: str = ""
    device: str = "cpu"
    params_format: str = "numpy"
    seed: int | None = None


class Link(Protocol):
    """How a session reaches its site."""

    def next_task(self) -> ScriptTask | None:
        """Wait for a task; ``None`` when there will be no more."""
        ...

    def send(self, result: ScriptResult) -> None:
        """Hand over what the script made of the task."""
        ...


class Session:
    """One script and its site. The functions of the Client API act on it."""

    def __init__(self, site: ScriptSite, link: Link | None) -> None:
        self.site = site
        self.rank = "0"
        self.is_initialized = False
        self.is_stopped = link is None
        self._link = link
        self._task: ScriptTask | None = None
        self._model: FLModel | None = None
        self._has_received = self._has_sent = False

    def init(self, rank: str) -> None:
        """The script has said its rank; only rank ``"0"`` talks to the site."""
        if self.is_initialized:
            logger.warning("%s: init() was called more than once; later calls change nothing", self.site.name)
            return
        self.rank, self.is_initialized = rank, True

    @property
    def is_talking(self) -> bool:
        """Whether this process is the one that exchanges models."""
        return self.rank == "0"

    def is_running(self) -> bool:
        """Wait for the next task unless one is being worked on; false when there will be none."""
        self._check_ready("is_running")
        return self.is_talking and self._advance()

    def receive(self) -> FLModel | None:
        """The model of the current task, waiting for one if there is none; ``None`` at the end of the job."""
        self._check_ready("receive")
        if not (self.is_talking and self._advance()):
            return None
        self._has_received = True
        return self._model

    def send(self, model: Any) -> None:
        """Hand over a model.

        Raises:
            ClientApiError: If none was received, one was sent already, or it is not what can be sent.
        """
        self._check_ready("send")
        if not self.is_talking:
            return
        if self.is_stopped or self._link is None:
            logger.warning("%s: the job is over; what the script sent is dropped", self.site.name)
            return
        if not self._has_received:
            first = "send() again without a receive()" if self._has_sent else "send() first"
            raise ClientApiError(f"receive() must be called before each send(), got {first}.")
        result = _result(model)
        self.clear()
        self._has_sent = True
        self._link.send(result)

    def clear(self) -> None:
        """Forget the current task."""
        self._task = self._model = None
        self._has_received = False

    def task_name(self, asked: str) -> str:
        """The current task's name.

        Raises:
            ClientApiError: On a rank that does not talk, or between two tasks.
        """
        self._check_ready(asked)
        if not self.is_talking:
            raise ClientApiError(f"{asked}() must be called on rank 0, got rank {self.rank}. Broadcast its answer.")
        return self._task.name if self._task is not None else ""

    def _advance(self) -> bool:
        if self._task is None and not self.is_stopped and self._link is not None:
            self._task = self._link.next_task()
            self.is_stopped = self._task is None
            self._model = None if self._task is None else self._handed(self._task)
        return self._task is not None

    def _handed(self, task: ScriptTask) -> FLModel:
        meta: dict[str, Any] = {"site_name": self.site.name, "job_id": self.site.job, **task.terms}
        if DRIFT in meta:
            meta[DRIFT] = self._as_asked(meta[DRIFT])
        params = self._as_asked(task.parameters)
        return FLModel(params=params, current_round=task.round, total_rounds=task.rounds, meta=meta)

    def _as_asked(self, parameters: Parameters) -> dict[str, Any]:
        """Copies, as arrays or tensors."""
        copied = {name: np.array(value) for name, value in parameters.items()}
        if self.site.params_format != "pytorch":
            return copied
        from sfl.train.interop import to_tensors

        return to_tensors(copied)

    def _check_ready(self, called: str) -> None:
        if not self.is_initialized:
            raise no_init(called)


def no_init(called: str) -> ClientApiError:
    """The error of a function that is called before ``init``."""
    return ClientApiError(
        f"init() must be called before {called}(), got {called}() first. Call flare.init() once, in a script that a "
        "site runs: FedAvgRecipe(train_script=...)."
    )


def _result(model: Any) -> ScriptResult:
    """What can be sent of an ``FLModel``, SFL's own or any object with the same attributes."""
    missing = [name for name in ("params", "params_type", "metrics", "meta") if not hasattr(model, name)]
    if missing:
        raise ClientApiError(f"send() must be called with an FLModel, got {type(model).__name__}.")
    if model.params is None and model.metrics is None:
        raise ClientApiError("a model that is sent must have params or metrics, got neither.")
    kind = getattr(model.params_type, "value", model.params_type)
    meta = model.meta or {}
    steps = meta.get(STEPS)
    return ScriptResult(
        parameters=_arrays(model.params) if model.params is not None else None,
        is_diff=kind == ParamsType.DIFF.value,
        metrics={str(name): _number(f"metrics[{name!r}]", value) for name, value in (model.metrics or {}).items()},
        steps=None if steps is None else int(_number(f"meta[{STEPS!r}]", steps)),
        travelled=_number(f"meta[{TRAVELLED!r}]", meta.get(TRAVELLED, 0.0)),
    )


def _number(what: str, value: Any) -> float:
    try:
        return float(value.detach() if hasattr(value, "detach") else value)  # a loss still has its graph
    except (TypeError, ValueError) as error:
        raise ClientApiError(f"{what} must be a number, got {value!r:.60}.") from error


def _arrays(params: object) -> Parameters:
    if not isinstance(params, Mapping):
        raise ClientApiError(f"params must be a dict of named arrays, got {type(params).__name__}.")
    return {str(name): _array(str(name), value) for name, value in cast("Mapping[Any, Any]", params).items()}


def _array(name: str, value: Any) -> Array:
    """A copy as an array: the script may go on changing its own. Half precision is widened, which keeps every value."""
    if hasattr(value, "detach"):  # a tensor; torch itself is not needed to ask it
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) in _HALF else value).numpy()
    array = np.array(value)
    if array.dtype.kind not in "fiub":
        raise ClientApiError(f"params[{name!r}] must be an array of real numbers, got {type(value).__name__}.")
    return array.astype(np.float32) if array.dtype == np.float16 else array


# Which session a call means. At most one script of a process runs at a time; its helper threads are remembered, so
# that one that still runs while another site's script has its turn is not taken for the other's.

_owners: WeakKeyDictionary[threading.Thread, Session] = WeakKeyDictionary()
_active: list[Session] = []


def current() -> Session | None:
    """The session of the calling thread, or of the script that has its turn."""
    found = _owners.get(threading.current_thread())
    return found if found is not None else _active[-1] if _active else None


def enter(session: Session) -> None:
    """``session`` has its turn in this process."""
    _active.append(session)


def leave(session: Session, before: set[threading.Thread]) -> None:
    """Its turn is over; threads that were not there ``before`` are its own."""
    _active.remove(session)
    for thread in set(threading.enumerate()) - before - set(_owners):
        _owners[thread] = session


def own(session: Session) -> None:
    """The calling thread is the session's."""
    _owners[threading.current_thread()] = session


def effective_rank(rank: object) -> str:
    """The rank as FLARE reads it: what is given, else the environment's ``RANK``, else ``"0"``.

    Raises:
        ClientApiError: If it is neither a string nor an integer.
    """
    if rank is None:
        return os.environ.get("RANK", "0")
    if not isinstance(rank, str | int) or isinstance(rank, bool):
        raise ClientApiError(f"rank must be a string or an integer, got {type(rank).__name__}.")
    return str(rank)
