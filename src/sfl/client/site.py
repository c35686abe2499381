"""One site at work: the client's code, the contract check, the chain, and what the site remembers."""

from __future__ import annotations

import logging
import math
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.client.callbacks import SiteCallback
from sfl.client.rule import LocalRule
from sfl.client.spending import Spending
from sfl.core import arrays, check, quantise, rng
from sfl.core.secure import SecureSite, SecureSum
from sfl.core.task import END, EVALUATE, FIT, Reply, Status, Task, Update
from sfl.core.terms import LocalTerms
from sfl.core.transform import Chain, flat
from sfl.errors import BudgetExhausted, ConfigError, LedgerError, MissingExtraError, ProtocolError, UpdateError
from sfl.io.site_store import SecretStore, SiteStore
from sfl.privacy.budget import PrivacyBudget
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
        callbacks: Called around each task.
        example_budget: What each example of a site may lose; ``None`` if the job promises its examples nothing.
        rule: The algorithm's half on the sites.
        secure: What keeps the site's update from the server; ``None`` sends it as it is.
    """

    client: Callable[..., BaseFederatedClient]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    chain: Chain = field(default_factory=Chain)
    fixed_weight: float | None = None
    share_metrics: bool = True
    callbacks: tuple[SiteCallback, ...] = ()
    example_budget: PrivacyBudget | None = None
    rule: LocalRule = field(default_factory=LocalRule)
    secure: SecureSum | None = None

    def sends(self, task: Task) -> Parameters:
        """What an update that answers a task to train may hold, as arrays like it."""
        return self.chain.sends(dict(task.parameters))


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteHome:
    """Where a site lives.

    Attributes:
        folder: Where it keeps its state; ``None`` keeps it in memory only.
        moves: Whether another process may have done the site's last task: then its state is read before each.
        kit: The folder with what it knows of its federation, where others must know who it is; ``None`` if simulated.
    """

    folder: Path | None = None
    moves: bool = False
    kit: Callable[[], Path | None] | None = None


class Site:
    """A site of the federation inside this process.

    Args:
        program: What it runs.
        name: Its name.
        client_id: Its index, from 0.
        device: Where its client computes.
        home: Where it lives.
    """

    def __init__(
        self,
        program: SiteProgram,
        name: str,
        client_id: int,
        *,
        device: str = "cpu",
        home: SiteHome | None = None,
    ) -> None:
        self.name = name
        self._program = program
        self._client_id = client_id
        self._device = device
        self._home = home or SiteHome()
        folder = self._home.folder
        self._store = SiteStore(folder) if folder is not None else None
        self._life = secrets.token_hex(8)
        self._client: BaseFederatedClient | None = None
        self._chain_state: Any = None
        self._remembers = False
        self._secure: SecureSite | None = None
        self._spending = None if program.example_budget is None else Spending(program.example_budget, name, folder)

    @property
    def shares(self) -> bool:
        """Whether figures and words of the site's own training may leave."""
        return self._program.share_metrics and self._program.secure is None

    def run(self, task: Task, life: str = "") -> Reply:
        """Do the task. Never raises: whatever goes wrong becomes the reply, and no raw update leaves.

        Args:
            task: What to do.
            life: Which life of the server sent it; by default this object's own.
        """
        self._life = life or self._life
        started = time.perf_counter()
        try:
            if quantise.is_packed(task.parameters):  # a client knows nothing of how its task has travelled
                task = replace(task, parameters=arrays.read_only(quantise.unpacked(task.parameters)))
            for callback in self._program.callbacks:
                callback.on_task_started(self.name, task)
            reply = self._done(self._dispatch(task), started)
            for callback in self._program.callbacks:
                callback.on_task_finished(self.name, task, reply)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a client's code raises becomes its reply
            self._forget()
            return self._failed(task, error, started)
        return reply

    def _done(self, update: Update, started: float) -> Reply:
        unchanged = not self._program.chain.transforms  # a transform may make what the check has not seen
        seconds = time.perf_counter() - started if self.shares else 0.0  # tells the size of the data
        return Reply(self.name, Status.USED, update, seconds=seconds, known_finite=unchanged)

    def _failed(self, task: Task, error: BaseException, started: float) -> Reply:
        details = traceback.format_exc() if self.shares else ""  # it does not leave otherwise
        for callback in self._program.callbacks:
            try:
                callback.on_task_failed(self.name, task, error)
            except Exception as second:  # noqa: BLE001 - the task's own error is the one that counts; both are said
                details += f"\nand in {type(callback).__name__}.on_task_failed: {type(second).__name__}: {second}"
        is_rejected = isinstance(error, UpdateError)
        status = Status.REJECTED if is_rejected else Status.FAILED
        if isinstance(error, BudgetExhausted | LedgerError | ProtocolError):  # which follow from no data
            return Reply(self.name, Status.FAILED, reason=str(error))
        if not self.shares:
            logging.getLogger(__name__).warning("%s: what follows stays on this site", self.name, exc_info=error)
            return self._withheld()
        seconds = time.perf_counter() - started
        if is_rejected:
            return Reply(self.name, status, reason=str(error), seconds=seconds)
        reason = f"{self.name}: {type(error).__name__}: {error}"
        return Reply(self.name, status, reason=reason, seconds=seconds, details=details)

    def _withheld(self) -> Reply:
        """Under a mechanism an error's own words, which may quote data, stay on the site; so does the time it took."""
        reason = f"{self.name}: it failed; why is withheld, as this job is private, and stands in its own log"
        return Reply(self.name, Status.FAILED, reason=reason)

    def _dispatch(self, task: Task) -> Update:
        if task.name == END:
            self.close()
            if self._secure is not None:
                self._secure.ended()
            return Update(self.name, {}, 1.0)
        if task.name == EVALUATE and not self._program.share_metrics:
            raise UpdateError(f"{self.name}: a private job must not ask for a site's exact figures, got an evaluation.")
        secure = self._secure_half()
        if secure is not None and task.name not in (FIT, EVALUATE):
            return secure.answer(task)
        came, task = task, task if secure is None else secure.opened(task)
        client = self._ready(task)
        if task.name == FIT:
            update = self.fit(client, task)
            return update if secure is None else secure.closed(update, came, self._program.sends(task))
        if task.name == EVALUATE:
            return self._evaluate(client, task)
        if task.name in self._program.rule.tasks:
            answer = self._program.rule.run_task(_Work(self, client), task)
            check.check_arrays(answer)
            self._remember(client, task.round)
            return answer
        return self._other(client, task)

    def _secure_half(self) -> SecureSite | None:
        """The site's half of the secure sum, if there is one.

        Raises:
            ProtocolError: If the site lacks what it takes, which follows from no data and may be told.
        """
        program = self._program
        if self._secure is None and program.secure is not None:
            try:
                kit = self._home.kit() if self._home.kit is not None else None
                identity = None if kit is None else program.secure.identity(self.name, kit)
                self._secure = program.secure.site(self.name, SecretStore(self._home.folder), identity)
            except (ConfigError, MissingExtraError) as error:
                raise ProtocolError(f"{self.name}: {error}") from error
        return self._secure

    def _other(self, client: BaseFederatedClient, task: Task) -> Update:
        """A task of a workflow's own. Its answer is no update, so no protection fits it."""
        if self._program.chain.transforms or self._program.fixed_weight is not None:
            raise UpdateError(f"{self.name}: a protected job must only train and evaluate, got the task {task.name!r}.")
        returned = cast("object", client.run_task(task.name, dict(task.parameters), _config(task)))
        if not (isinstance(returned, tuple) and len(returned) == 3):
            raise UpdateError(
                f"{self.name}: run_task must return (arrays, num_examples, metrics), got {type(returned).__name__}."
            )
        answer, count, metrics = cast("tuple[object, object, object]", returned)
        weight = float(check.check_count(self.name, count))
        update = Update(self.name, _without_scalars(answer), weight, check.check_metrics(self.name, metrics))
        check.check_arrays(update)
        self._remember(client, task.round)
        return update

    def _ready(self, task: Task) -> BaseFederatedClient:
        if self._client is None:
            client = self._program.client(client_id=self._client_id, device=self._device, **self._program.kwargs)
            client.site = self.name
            carried = task.parameters if task.name == FIT else self._program.rule.carried(dict(task.parameters))
            self._chain_state = self._program.chain.init(carried)
            self._recall(client, task)
            self._client = client
        elif self._home.moves:
            self._recall(self._client, task)
        return self._client

    def _recall(self, client: BaseFederatedClient, task: Task) -> None:
        """What the site knew before this task. An evaluation follows its round's training, so it sees that state."""
        before = task.round + (task.name == EVALUATE)
        kept = self._store.load(before, self._life) if self._store is not None else None
        if kept is not None:
            client.state, self._chain_state = kept["client"], kept["chain"]
            self._remembers = True

    def _forget(self) -> None:
        """A failed task may have left the client half changed: make it anew from what is on disk, if it is."""
        if self._store is not None:
            self.close()

    def close(self) -> None:
        """Let the client go, with what it holds outside itself. A later task makes it anew."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
            for callback in self._program.callbacks:
                callback.on_site_closed(self.name)

    def fit(self, client: BaseFederatedClient, task: Task) -> Update:
        """Train: what leaves, after the chain."""
        spent = self._spending.charge(client, _config(task)) if self._spending is not None else {}
        rule, config = self._program.rule, _config(task)
        model = rule.model(task.parameters)
        terms = LocalTerms.of(config, model)
        _require_heeded(client, terms.needs | rule.asks)
        client.terms = rule.before(client, task.parameters, config, terms)
        returned = cast("object", client.compute_update(dict(model), config))
        if not (isinstance(returned, tuple) and len(returned) == 3):
            raise UpdateError(
                f"{self.name}: compute_update must return (parameters, num_examples, metrics), "
                f"got {type(returned).__name__}."
            )
        returned, count, metrics = cast("tuple[object, object, object]", returned)
        parameters = _without_scalars(returned)
        check.check_structure(self.name, parameters, model)
        weight = self._weight(check.check_count(self.name, count))
        clean = check.check_metrics(self.name, metrics)
        updated = dict(parameters)
        del parameters, returned
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused right after
            delta = _delta(self.name, updated, model, in_place=client.lends_arrays)
            delta = rule.after(client, task.parameters, delta)
        client.terms = replace(client.terms, anchor=None)  # a client that stays would keep the model that was sent
        update = Update(self.name, delta, weight, clean if self.shares else {})
        if self._program.chain.transforms:
            generator = rng.public(int(task.config.get("seed", 0)), task.round, "transform", self.name)
            chain = self._program.chain.told(task.config)
            update, self._chain_state = chain.apply(update, self._chain_state, generator)
            _require_noise_on_all(chain, update, task.parameters)
        self._remember(client, task.round)
        if not self.shares:  # nor may a transform put back what must not leave
            update = replace(update, weight=weight, metrics=dict(spent))
        return update

    def _evaluate(self, client: BaseFederatedClient, task: Task) -> Update:
        returned = cast("object", client.evaluate(dict(task.parameters), _config(task)))
        if not (isinstance(returned, tuple) and len(returned) == 3):
            raise UpdateError(
                f"{self.name}: evaluate must return (loss, num_examples, metrics), got {type(returned).__name__}."
            )
        loss, count, metrics = cast("tuple[object, object, object]", returned)
        known: Metrics = {}
        if loss is not None:
            if not isinstance(loss, int | float | np.number) or not math.isfinite(float(loss)):
                raise UpdateError(f"{self.name}: the loss of evaluate must be a finite number, got {loss!r}.")
            known["loss"] = float(loss)
        weight = float(check.check_count(self.name, count))
        clean: Metrics = {**known, **check.check_metrics(self.name, metrics)}
        clean |= check.check_metrics(self.name, self._program.rule.figures(client, _config(task)))
        return Update(self.name, {}, weight, clean)

    def _weight(self, count: int) -> float:
        return float(count) if self._program.fixed_weight is None else self._program.fixed_weight

    def _remember(self, client: BaseFederatedClient, round: int) -> None:
        self._remembers = self._remembers or bool(client.state) or _holds_something(self._chain_state)
        if self._store is not None and self._remembers:
            self._store.save(round, {"client": client.state, "chain": self._chain_state}, self._life)


def _require_heeded(client: BaseFederatedClient, asked: frozenset[str]) -> None:
    """What the algorithm adds to a site's training must have its effect there.

    Raises:
        ConfigError: If the client does not heed it.
    """
    missing = sorted(asked - client.honours)
    if missing:
        raise ConfigError(
            f"a client of this algorithm must heed {', '.join(missing)} of self.terms, got "
            f"{type(client).__name__}.honours = {sorted(client.honours)}. Heed them and name them there."
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """``SiteWork`` of a site."""

    _site: Site
    _client: BaseFederatedClient

    @property
    def site(self) -> str:
        return self._site.name

    @property
    def memory(self) -> dict[str, Any]:
        return self._client.state

    def fit(self, task: Task) -> Update:
        return self._site.fit(self._client, task)


def _config(task: Task) -> Config:
    return {**task.config, "round": task.round}


def _without_scalars(returned: object) -> Parameters:
    """What a client returned, with numpy's scalars as the arrays of 0 dimensions that they came from."""
    if not isinstance(returned, Mapping):
        return cast("Parameters", returned)  # refused by the check that follows
    return {name: np.asarray(value) if isinstance(value, np.generic) else value for name, value in returned.items()}


def _require_noise_on_all(chain: Chain, update: Update, parameters: Parameters) -> None:
    """Under noise of its own a site sends all that it may send: which arrays it left out would tell of its data.

    Raises:
        UpdateError: If it does not.
    """
    if not any(transform.adds_noise for transform in flat(chain.transforms)):
        return
    missing = sorted(set(chain.sends(dict(parameters))) - set(update.delta))
    if missing:
        raise UpdateError(
            f"{update.site}: noise must be on every array, not on selected ones alone, got none on {missing[0]!r}. "
            "Say in the transform's `sends` what it leaves out for every site alike."
        )


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
