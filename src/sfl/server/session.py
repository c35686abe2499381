"""One run of a job, with what it leaves behind: checkpoints, metrics, ledger, report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sfl.core.algorithm import ServerState
from sfl.core.events import Event, Notice, Observer, RoundFinished, RunFinished, SiteFinished
from sfl.core.task import EXAMPLE_EPSILON
from sfl.engine.base import Engine
from sfl.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from sfl.io.checkpoint import Checkpoints, load_state
from sfl.io.environment import environment
from sfl.io.metrics import MetricsWriter, read_metrics
from sfl.io.report import write_report
from sfl.io.run_folder import RunFolder
from sfl.io.site_store import SecretStore
from sfl.privacy.he.opening import opened
from sfl.privacy.he.packing import is_sealed
from sfl.privacy.ledger import Budget, PrivacyLedger, dataset_ledger
from sfl.server.federate import Hooks, federate
from sfl.server.job import Job
from sfl.server.run import said_of_examples
from sfl.types import Metrics, Parameters


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run ended with.

    Attributes:
        state: The last server state.
        rounds: One entry a round (0 holds the evaluation before the first), of this process's part of the run.
        reason: Why it ended before its last planned round; empty if it did not.
        folder: The run's folder, if it has one.
        key: What opens a sealed model, where all sites were this person's; ``None`` if they were not, or sealed none.
    """

    state: ServerState
    rounds: tuple[RoundFinished, ...]
    reason: str = ""
    folder: Path | None = None
    key: bytes | None = field(default=None, repr=False)

    @property
    def parameters(self) -> Parameters:
        """The final global parameters as the server has them: ciphertexts, if sites have sealed them."""
        return self.state.parameters

    @property
    def is_sealed(self) -> bool:
        """Whether sites have sealed the model, so that the server has ciphertexts."""
        return is_sealed(self.parameters)

    def open(self, context: bytes | None = None) -> Parameters:
        """The final global parameters in the clear.

        Args:
            context: What opens them: the content of a site's ``client_context.tenseal``. By default that of sites that
                were simulated, or provisioned for this run.

        Raises:
            ConfigError: If they are sealed, and nothing is there that opens them.
        """
        return opened(self.parameters, context or self.key)

    @property
    def cross_site(self) -> dict[str, dict[str, Metrics]] | None:
        """Every model's figures on every site, by model and site, of a cross-site evaluation; ``None`` of others."""
        kept: Any = self.state.algorithm
        return kept.get("matrix") if isinstance(kept, dict) else None

    @property
    def best(self) -> BestModel | None:
        """The best global model of the run; ``None`` if no figure says which."""
        found = self.state.best
        if not isinstance(found, dict):
            return None
        return BestModel(int(str(found["round"])), str(found["metric"]), float(str(found["value"])), self)


@dataclass(frozen=True, slots=True)
class BestModel:
    """The best global model of a run.

    Attributes:
        round: After how many rounds it was the global model; 0 is the initial one.
        metric: By what.
        value: Its figure.
    """

    round: int
    metric: str
    value: float
    _result: RunResult = field(repr=False)

    @property
    def parameters(self) -> Parameters:
        """Its parameters: from the run's folder, unless it is the final model.

        Raises:
            ConfigError: If the run has left no folder.
        """
        if self.round == self._result.state.round:
            return self._result.parameters
        if self._result.folder is None:
            raise ConfigError(
                f"the best model must lie in the run's folder, got none; it is that of round {self.round}. "
                "Run with out=..."
            )
        return load_state(RunFolder(self._result.folder).best).parameters


EngineFactory = Callable[[Job, Path | None], Engine]


def run_job(
    job: Job, engine: EngineFactory, *, out: Path | None, resume: bool, observers: Sequence[Observer]
) -> RunResult:
    """Run ``job`` on an engine, in a folder or without one.

    Args:
        job: From ``Recipe.build()``.
        engine: Makes the engine, given the folder in which sites keep their state.
        out: The run's folder; ``None`` leaves nothing behind.
        resume: Go on from the folder's newest whole checkpoint.
        observers: Listeners beside the files.
    """
    history = _History()
    with ExitStack() as stack:
        state: ServerState | None = None
        hooks = Hooks(observers=(history, *observers), ledger=_ledger(job, None))
        if out is not None:
            state, hooks = stack.enter_context(_files(out, job, resume=resume, observers=hooks.observers))
        sites = RunFolder(out).sites if out is not None else None
        if sites is None and job.program.secure is not None and job.program.secure.keyed:
            sites = Path(stack.enter_context(TemporaryDirectory(prefix="sfl-sites-")))
        carrier = stack.enter_context(engine(job, sites))
        if out is not None:
            facts = RunFolder(out).read_json("environment.json") or {}
            RunFolder(out).write_json("environment.json", {**facts, "engine": carrier.describe()})
        _check_same_privacy(job, hooks.ledger, state)
        if state is not None and job.mechanisms:
            hooks.ledger.must_cover(state.round)
        history.examples |= said_of_examples(state)
        try:
            state = federate(job, carrier, state=state, hooks=hooks)
        finally:
            if out is not None and job.has_statement:
                RunFolder(out).write_json("privacy.json", job.privacy_report(hooks.ledger, history.examples))
        secure = job.program.secure
        key = secure.key(SecretStore(sites / "any" if sites is not None else None)) if secure is not None else None
    result = RunResult(state, tuple(history.rounds), history.reason, out, key)
    if out is not None and result.cross_site is not None:
        RunFolder(out).write_json("cross_site.json", result.cross_site)
    return result


@contextmanager
def _files(
    out: Path, job: Job, *, resume: bool, observers: Sequence[Observer]
) -> Generator[tuple[ServerState | None, Hooks]]:
    folder = RunFolder(out)
    notices: list[str] = []
    checkpoints = Checkpoints(folder.checkpoints)
    if not resume and (checkpoints.paths() or folder.ledger.exists()):
        raise ConfigError(
            f"out must be the folder of a new run, got {out}, which holds one. Choose another, or resume."
        )
    state = _resumed(folder, checkpoints, notices.append, job.federation.num_rounds) if resume else None
    for text in notices:
        for observer in observers:
            observer(Notice(text=text, level="warning"))
    folder.write_json("environment.json", {"job": job.name, **environment()})
    ledger = _ledger(job, folder.ledger)
    with MetricsWriter(out, resume_after=-1 if state is None else state.round) as writer:
        hooks = Hooks(observers=(*observers, writer), save=partial(_save, folder, checkpoints), ledger=ledger)
        try:
            yield state, hooks
        finally:
            _report(out, observers)


def _check_same_privacy(job: Job, ledger: PrivacyLedger, state: ServerState | None) -> None:
    """A run goes on under the guarantee that it was begun with: what was spent is of that kind.

    Raises:
        ConfigError: If it would not.
    """
    federation = job.federation
    now = [mechanism.event(federation.planned_sites, federation.num_clients) for mechanism in job.mechanisms]
    before = {(event.unit, event.adjacency, event.adversary) for event in ledger.events}
    others = bool(before) and before != {(event.unit, event.adjacency, event.adversary) for event in now}
    if others or (state is not None and (state.examples is None) != (job.program.example_budget is None)):
        raise ConfigError(
            "a private run must go on with the protection that it was begun with, got another or none. "
            "Give the same options, or start a new run."
        )


def _ledger(job: Job, path: Path | None) -> PrivacyLedger:
    limit: Budget | None = job.budget.check if job.budget is not None else None
    return PrivacyLedger(path, budget=limit, dataset=dataset_ledger(job.accounting.dataset))


def _resumed(
    folder: RunFolder, checkpoints: Checkpoints, warn: Callable[[str], None], rounds: int
) -> ServerState | None:
    """The state to go on from, after a look at what the run has left; ``None`` if it did not come to a checkpoint."""
    state = checkpoints.load_latest(warn)
    if state is None:
        jsonl = folder.path / "metrics.jsonl"
        if jsonl.is_file() and any(entry["round"] > 0 for entry in read_metrics(jsonl)):
            raise CheckpointError(
                f"{folder.checkpoints} must hold the checkpoints of the rounds in {jsonl.name}, got none. "
                "Put them back, or start a new run in another folder."
            )
        return None
    if state.round > rounds:
        raise ConfigError(
            f"num_rounds must be at least the {state.round} rounds that {folder.path} has done, got {rounds}. Raise it."
        )
    lost = [name for name in folder.known_sites() if not any(folder.sites.glob(f"{name}/*"))]
    if state.round and lost:
        raise CheckpointError(
            f"{folder.sites} must hold what its sites remember, got nothing of {', '.join(lost[:3])}. "
            "Put it back, or start a new run in another folder."
        )
    return state


def _save(folder: RunFolder, checkpoints: Checkpoints, state: ServerState) -> None:
    """The checkpoint, and beside it which sites have something to remember, so that its loss is noticed."""
    folder.note_sites()
    checkpoints.save(state)
    if isinstance(state.best, dict):
        folder.link_best(checkpoints.path(state.best["round"]))


def _report(out: Path, observers: Sequence[Observer]) -> None:
    """The report of what there is, also of a run that failed."""
    if not (out / "metrics.jsonl").is_file():
        return
    try:
        write_report(out)
    except (MissingExtraError, DataError, CheckpointError) as error:  # of a full disk the run itself has said more
        for observer in observers:
            observer(Notice(text=f"no report.html: {error}", level="warning"))


class _History:
    """Remembers the rounds of a run."""

    def __init__(self) -> None:
        self.rounds: list[RoundFinished] = []
        self.reason = ""
        self.examples: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundFinished):
            self.rounds.append(event)
        elif isinstance(event, SiteFinished) and EXAMPLE_EPSILON in event.metrics:
            self.examples[event.site] = event.metrics[EXAMPLE_EPSILON]
        elif isinstance(event, RunFinished):
            self.reason = event.reason
