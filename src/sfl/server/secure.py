"""A round whose updates are summed under protection: the loop's side of ``core.secure``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sfl.core import arrays, check
from sfl.core.aggregator import Aggregator, Sum, WeightedMean
from sfl.core.algorithm import Algorithm, ServerState
from sfl.core.events import Notice
from sfl.core.mechanism import Mechanism
from sfl.core.quantise import FLOAT32
from sfl.core.secure import SecureSum, Step, Total
from sfl.core.task import FIT, SERVER, Reply, Status, Task, Update
from sfl.errors import CompositionError, ProtocolError, RoundError, UpdateError
from sfl.server.strategy import FedAvg
from sfl.types import FederationConfig, Metrics, Parameters

if TYPE_CHECKING:
    from sfl.server.run import Run
    from sfl.server.workflow import Workflow

__all__ = ["averages", "check_secure", "check_whole_numbers", "finished", "gathered"]


def gathered(run: Run, secure: SecureSum, task: Task, cohort: Sequence[str]) -> tuple[Update, Metrics]:
    """One round's aggregate and figures: what ``Run.gather`` gives, of a sum that nobody here can take apart.

    Raises:
        RoundError: If too few sites stay.
    """
    started, before = time.perf_counter(), sum(run.seconds.values())
    aggregator = run.job.aggregator
    model = replace(task, parameters=run.job.model_like(task.parameters))
    expected = like(run.job.program.sends(model), wide=isinstance(aggregator, WeightedMean | Sum) and aggregator.wide)
    del model
    total, said = summed(run, secure, task, cohort, expected)
    run.seconds["aggregate"] += time.perf_counter() - started - (sum(run.seconds.values()) - before)
    run.check_enough(task, len(total.sites))
    aggregate = aggregator.of_mean(total.mean)
    if aggregate is None:
        raise CompositionError(f"{type(aggregator).__name__} must be one of sums under a secure sum.")
    figures = {} if run.job.mechanisms else total.figures
    for text in secure.remarks(figures):
        run.emit(Notice(text=text, level="warning"))
    return run.as_the_round_has_it(aggregate, task, len(total.sites)), run.job.derive({**said, **figures})


def summed(
    run: Run, secure: SecureSum, task: Task, cohort: Sequence[str], expected: Parameters
) -> tuple[Total, Metrics]:
    """One round: its steps over the engine, the sum, and what sites have said that may be said.

    Args:
        run: The run.
        secure: The protocol.
        task: To train.
        cohort: The planned sites.
        expected: What updates may hold, as arrays like what is made of their sum.

    Raises:
        RoundError: If too few sites stay for their sum to be opened.
    """
    said: dict[str, float] = {}
    summing = secure.summing(task, cohort, expected, run.secure)
    del task
    step = next(summing)
    while True:
        try:
            step = summing.send(_answers(run, step, said))
        except StopIteration as end:
            return end.value, said
        except RoundError as error:
            raise RoundError(run.with_reasons(str(error))) from error


def like(expected: Parameters, *, wide: bool) -> Parameters:
    """Arrays of these shapes that take no memory; of float64 where sums must be."""
    return {
        name: np.broadcast_to(
            np.zeros((), np.float64 if wide and value.dtype.kind == "f" else value.dtype), value.shape
        )
        for name, value in expected.items()
    }


def _answers(run: Run, step: Step, said: dict[str, float]) -> Iterator[Update]:
    """What arrives in one step; every site that was asked is recorded."""
    cohort, first = list(step.tasks), next(iter(step.tasks.values()))
    run.announce_task(first, cohort, sum(arrays.nbytes(task.travels) for task in step.tasks.values()))
    name, number = first.name, first.round
    replies = run.engine.exchange_each(step.tasks, run.job.federation.round_timeout or None)
    del first
    while True:
        started = time.perf_counter()
        try:
            reply = next(replies, None)
        finally:
            run.seconds[name] += time.perf_counter() - started
        if reply is None:
            return
        reply = _screened(run, reply, step)
        run.record(Task(name, number, {}), reply)
        if reply.update is not None:
            if name == FIT:
                said |= {key: max(value, said.get(key, 0.0)) for key, value in reply.update.metrics.items()}
            yield reply.update
        del reply  # what it holds is let go before the next arrives


def _screened(run: Run, reply: Reply, step: Step) -> Reply:
    """Nothing that breaks the protocol reaches the sum, whoever sent it."""
    update = reply.update
    if reply.status is not Status.USED:
        return replace(reply, update=None)
    try:
        if update is None or update.site != reply.site:
            got = "none" if update is None else f"that of {update.site!r}"
            raise UpdateError(f"{reply.site}: a used reply must hold the site's own answer, got {got}.")
        check.check_arrays(update)
        step.check(update)
    except UpdateError as error:
        return Reply(reply.site, Status.REJECTED, reason=str(error))
    except ProtocolError as error:
        return Reply(reply.site, Status.REJECTED, reason=f"{reply.site}: {error}")
    return run.counted_on(reply, step.tasks[reply.site])


def check_secure(
    secure: SecureSum,
    aggregator: Aggregator,
    algorithm: Algorithm | Workflow,
    mechanisms: Sequence[Mechanism],
    federation: FederationConfig,
) -> None:
    """Refuse what a secure sum cannot serve, before anything runs.

    Raises:
        CompositionError: Naming what does not fit, why, and what to change.
    """
    if not isinstance(algorithm, Algorithm):
        raise CompositionError(
            f"secure sums must come with rounds whose updates are summed, got {type(algorithm).__name__}: there "
            "an update goes on by itself, to a site or into a buffer. Use fedavg, fedprox, fedopt, scaffold or ditto."
        )
    if aggregator.of_mean(Update(SERVER, {}, 1.0)) is None:
        raise CompositionError(
            f"secure sums must come with an aggregator of sums, got {type(aggregator).__name__}: it looks at "
            "single updates, which nobody sees here. Use the mean, or leave secure aggregation out."
        )
    if federation.wait_for:
        raise CompositionError(
            f"wait_for must be 0 under secure aggregation, got {federation.wait_for}: a site that is left behind after "
            "it has masked costs the others a step. Set round_timeout instead."
        )
    if federation.sampling == "poisson":
        raise CompositionError(
            "sampling must be fixed, weighted or by turns under secure aggregation, got poisson: a round may draw one "
            "site alone, whose sum would be its update."
        )
    shared_out = [m for m in mechanisms if m.on_sum and m.placement == "local" and not m.grid]
    if shared_out:
        raise CompositionError(
            f"noise that is shared out among sites must be of whole numbers under secure aggregation, got "
            f"{type(shared_out[0]).__name__}: rounding each share by itself, the sum has no noise that is known. Use "
            "SkellamMechanism."
        )
    secure.require(federation.planned_sites)
    if federation.weighting == "examples" and secure.heaviest <= 1.0:
        raise CompositionError(
            f"max_weight of {type(secure).__name__} must be the largest number of examples that a site counts with, "
            "under weighting=examples, got 1. Set it, or leave the weighting out: then all sites count the same."
        )
    if secure.seals:
        _check_sealed(aggregator, algorithm, mechanisms, federation)


def _check_sealed(
    aggregator: Aggregator, algorithm: Algorithm, mechanisms: Sequence[Mechanism], federation: FederationConfig
) -> None:
    """Refuse what a server cannot do with a model that is closed to it.

    Raises:
        CompositionError: Naming it, and what to use.
    """
    other = "Use secagg, or homomorphic encryption with he_holder: then the server has the global model."
    if not averages(algorithm):
        raise CompositionError(
            "homomorphic encryption without a holder must come with fedavg, fedprox or ditto at a server learning rate "
            f"of 1, got {type(algorithm).__name__}: the server cannot compute with a model that it cannot read. {other}"
        )
    if type(aggregator) is not WeightedMean:
        raise CompositionError(
            f"homomorphic encryption without a holder must come with the mean, got {type(aggregator).__name__}. {other}"
        )
    central = [mechanism for mechanism in mechanisms if mechanism.placement == "central"]
    if central:
        raise CompositionError(
            "noise must be the sites' own where the server cannot read what it would noise, got "
            f"{type(central[0]).__name__} on the server. Use dp_mode=local. {other}"
        )
    if federation.message_dtype != FLOAT32:
        raise CompositionError(
            f"message_dtype must be float32 where messages are ciphertexts, got {federation.message_dtype}. {other}"
        )


def finished(secure: SecureSum | None, algorithm: Algorithm, state: ServerState, aggregate: Update) -> ServerState:
    """The state after a round: sealed arrays take the place of what they are of, all others are the algorithm's."""
    sealed = secure.sealed(aggregate.delta) if secure is not None else {}
    if secure is None or not sealed:
        return algorithm.finish(state, aggregate)
    plain = {name: value for name, value in aggregate.delta.items() if name not in sealed}
    bare = secure.bare(state.parameters, sealed)
    state = algorithm.finish(replace(state, parameters=bare), replace(aggregate, delta=plain))
    return replace(state, parameters={**sealed, **state.parameters})


def averages(algorithm: Algorithm | Workflow) -> bool:
    """Whether the next model is the mean of the sites' models."""
    return type(algorithm) is FedAvg and algorithm.server_learning_rate == 1.0


def check_whole_numbers(mechanisms: Sequence[Mechanism], secure: SecureSum | None) -> None:
    """Noise of whole numbers that sites share out protects nothing where a server sees each site's.

    Raises:
        CompositionError: If there is such noise, and no secure sum.
    """
    alone = [m for m in mechanisms if m.grid]
    if alone and secure is None:
        raise CompositionError(
            f"{type(alone[0]).__name__} must come with secure aggregation, got none: each site's share of the noise is "
            "too small by itself. Set secure=SecAgg(), or use GaussianMechanism."
        )
