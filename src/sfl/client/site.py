"""One site at work: the client's code, the contract check, the chain, and what the site remembers."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.core import arrays, check, rng
from sfl.core.task import EVALUATE, FIT, Reply, Status, Task, Update
from sfl.core.transform import Chain
from sfl.errors import EngineError, UpdateError
from sfl.io.site_store import SiteStore
from sfl.types import Config, Metrics, Parameters, StateTree


@dataclass(frozen=True, kw_only=True)
class SiteProgram:
    """What every site of a job runs. Engines carry it to where the sites are.

    Attributes:
        client: The client class (or a function) called with ``client_id``, ``device`` and ``kwargs``.
        kwargs: Its own arguments.
        chain: The transforms that an update passes before it leaves.
        fixed_weight: The weight of every update; ``None`` weighs by the number of examples.
        share_metrics: Whether the site's own figures may leave beside the update. Where they may not, sites are not
            asked to evaluate either: the figures of an evaluation are no better protected.
    """

    client: Callable[..., BaseFederatedClient]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    chain: Chain = field(default_factory=Chain)
    fixed_weight: float | None = None
    share_metrics: bool = True


class Site:
    """A site of the federation inside this process.

    Args:
        program: What it runs.
        name: Its name.
        client_id: Its index, from 0.
        device: Where its client computes.
        folder: Where it keeps its state; ``None`` keeps it in memory only.
    """

    def __init__(
        self, program: SiteProgram, name: str, client_id: int, *, device: str = "cpu", folder: Path | None = None
    ) -> None:
        self.name = name
        self._program = program
        self._client_id = client_id
        self._device = device
        self._store = SiteStore(folder) if folder is not None else None
        self._client: BaseFederatedClient | None = None
        self._chain_state: Any = None
        self._remembers = False

    def run(self, task: Task) -> Reply:
        """Do the task. Never raises: whatever goes wrong becomes the reply, and no raw update leaves."""
        started = time.perf_counter()
        try:
            update = self._dispatch(task)
        except UpdateError as error:
            self._forget()
            if not self._program.share_metrics:
                return self._withheld(Status.REJECTED, error)
            return Reply(self.name, Status.REJECTED, reason=str(error), seconds=time.perf_counter() - started)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a client's code raises becomes its reply
            self._forget()
            if not self._program.share_metrics:
                return self._withheld(Status.FAILED, error)
            reason = f"{self.name}: {type(error).__name__}: {error}"
            seconds = time.perf_counter() - started
            return Reply(self.name, Status.FAILED, reason=reason, seconds=seconds, details=traceback.format_exc())
        unchanged = not self._program.chain.transforms  # a transform may make what the check has not seen
        seconds = time.perf_counter() - started if self._program.share_metrics else 0.0  # tells the size of the data
        return Reply(self.name, Status.USED, update, seconds=seconds, known_finite=unchanged)

    def _withheld(self, status: Status, error: BaseException) -> Reply:
        """Under a mechanism an error's own words, which may quote data, stay on the site; so does the time it took."""
        reason = f"{self.name}: {type(error).__name__}; its words are withheld, as this job is private"
        return Reply(self.name, status, reason=reason)

    def _dispatch(self, task: Task) -> Update:
        if task.name == EVALUATE and not self._program.share_metrics:
            raise UpdateError(f"{self.name}: a private job must not ask for a site's exact figures, got an evaluation.")
        client = self._ready(task)
        if task.name == FIT:
            return self._fit(client, task)
        if task.name == EVALUATE:
            return self._evaluate(client, task)
        raise EngineError(f"a task must be {FIT!r} or {EVALUATE!r}, got {task.name!r}.")

    def _ready(self, task: Task) -> BaseFederatedClient:
        if self._client is None:
            client = self._program.client(client_id=self._client_id, device=self._device, **self._program.kwargs)
            client.site = self.name
            self._chain_state = self._program.chain.init(task.parameters)
            # An evaluation follows its round's training, so it sees that round's state.
            before = task.round + (task.name == EVALUATE)
            kept = self._store.load(before) if self._store is not None else None
            if kept is not None:
                client.state, self._chain_state = kept["client"], kept["chain"]
                self._remembers = True
            self._client = client
        return self._client

    def _forget(self) -> None:
        """A failed task may have left the client half changed: make it anew from what is on disk, if it is."""
        if self._store is not None:
            self._client = None

    def _fit(self, client: BaseFederatedClient, task: Task) -> Update:
        returned = cast("object", client.compute_update(dict(task.parameters), _config(task)))
        if not (isinstance(returned, tuple) and len(returned) == 3):
            raise UpdateError(
                f"{self.name}: compute_update must return (parameters, num_examples, metrics), "
                f"got {type(returned).__name__}."
            )
        returned, count, metrics = cast("tuple[object, object, object]", returned)
        parameters = _without_scalars(returned)
        check.check_structure(self.name, parameters, task.parameters)
        weight = self._weight(check.check_count(self.name, count))
        clean = check.check_metrics(self.name, metrics)
        updated = dict(parameters)
        del parameters, returned
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused right after
            delta = _delta(self.name, updated, task.parameters, in_place=client.lends_arrays)
        update = Update(self.name, delta, weight, clean if self._program.share_metrics else {})
        if self._program.chain.transforms:
            generator = rng.public(int(task.config.get("seed", 0)), task.round, "transform", self.name)
            update, self._chain_state = self._program.chain.apply(update, self._chain_state, generator)
        self._remember(client, task.round)
        return update

    def _evaluate(self, client: BaseFederatedClient, task: Task) -> Update:
        returned = cast("object", client.evaluate(dict(task.parameters), _config(task)))
        if not (isinstance(returned, tuple) and len(returned) == 3):
            raise UpdateError(
                f"{self.name}: evaluate must return (loss, num_examples, metrics), got {type(returned).__name__}."
            )
        loss, count, metrics = cast("tuple[object, object, object]", returned)
        if not isinstance(loss, int | float | np.number) or not math.isfinite(float(loss)):
            raise UpdateError(f"{self.name}: the loss of evaluate must be a finite number, got {loss!r}.")
        weight = float(check.check_count(self.name, count))
        clean: Metrics = {"loss": float(loss), **check.check_metrics(self.name, metrics)}
        return Update(self.name, {}, weight, clean)

    def _weight(self, count: int) -> float:
        return float(count) if self._program.fixed_weight is None else self._program.fixed_weight

    def _remember(self, client: BaseFederatedClient, round: int) -> None:
        self._remembers = self._remembers or bool(client.state) or _holds_something(self._chain_state)
        if self._store is not None and self._remembers:
            self._store.save(round, {"client": client.state, "chain": self._chain_state})


def _config(task: Task) -> Config:
    return {**task.config, "round": task.round}


def _without_scalars(returned: object) -> Parameters:
    """What a client returned, with numpy's scalars as the arrays of 0 dimensions that they came from."""
    if not isinstance(returned, Mapping):
        return cast("Parameters", returned)  # refused by the check that follows
    return {name: np.asarray(value) if isinstance(value, np.generic) else value for name, value in returned.items()}


def _holds_something(state: StateTree) -> bool:
    """Whether a chain's state is more than empty lists and ``None``."""
    return any(map(_holds_something, state)) if isinstance(state, list) else state is not None


def _delta(site: str, updated: Parameters, base: Parameters, *, in_place: bool) -> Parameters:
    """``updated - base``, all of it finite; each updated array is let go as soon as its difference exists."""
    delta: Parameters = {}
    for name, before in base.items():
        after = updated.pop(name)
        dtype = np.dtype(np.int64) if before.dtype.kind in "iub" else before.dtype  # no narrower one holds them all
        lent = in_place and after.flags.writeable and after.dtype == dtype
        delta[name] = after if lent else np.empty(before.shape, dtype)
        if not arrays.subtract_into(after, before, delta[name]):
            check.check_finite(site, {name: delta[name]})
    return delta
