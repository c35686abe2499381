"""The loop: plan, charge, exchange, aggregate, finish, evaluate, checkpoint. Every engine runs this one."""

from __future__ import annotations

import time
from dataclasses import replace

from sfl.core import arrays, rng
from sfl.core.algorithm import Algorithm, ServerState
from sfl.core.events import Notice, RoundStarted, RunFailed, RunFinished
from sfl.core.mechanism import DpEvent
from sfl.core.task import FIT, Status
from sfl.engine.base import Engine
from sfl.errors import BudgetExhausted
from sfl.server.job import Job
from sfl.server.run import Hooks, Run, said_of_examples
from sfl.server.secure import finished
from sfl.server.workflow import Sites, Workflow

__all__ = ["Hooks", "charges", "federate"]


def federate(job: Job, engine: Engine, *, state: ServerState | None = None, hooks: Hooks | None = None) -> ServerState:
    """Run a job to its last round.

    Args:
        job: From ``Recipe.build()``.
        engine: What carries tasks; it must offer at least ``min_available_clients`` sites.
        state: Where to go on, or ``None`` to begin.
        hooks: Observers, checkpoints and the ledger.

    Returns:
        The last state. It has fewer rounds than planned only if the privacy budget or a callback ended the run.

    Raises:
        CompositionError: If the engine has fewer sites than a round needs, or a private job meets more sites than it
            was planned for.
        RoundError: If a round ends with fewer usable replies than ``min_available_clients``.
    """
    run = Run(job, engine, hooks or Hooks())
    started, reason = time.perf_counter(), ""
    try:
        state = run.begin(state)
        if isinstance(job.algorithm, Workflow):
            with Sites(run) as sites:
                state = job.algorithm.run(sites, state)
        else:
            while state.round < job.federation.num_rounds and not state.stopped and not reason:
                try:
                    state = _round(run, job.algorithm, state)
                except BudgetExhausted as stop:
                    reason = str(stop)
    except Exception as error:
        _tell_failure(run, 0 if state is None else state.round, error)
        raise
    for line in job.statement(run.hooks.ledger, said_of_examples(state)):
        run.emit(Notice(text=line))
    seconds = time.perf_counter() - started
    run.emit(RunFinished(rounds=state.round, seconds=seconds, reason=reason or state.stopped))
    return state


def _round(run: Run, algorithm: Algorithm, state: ServerState) -> ServerState:
    job = run.job
    task, cohort = algorithm.plan(state, run.engine.present(job.federation.planned_sites))
    run.look_at(state)
    run.emit(RoundStarted(round=task.round, cohort=tuple(cohort)))
    told = job.server_chain.tells(state.mechanisms)
    task = replace(task, parameters=arrays.read_only(task.parameters), config={**task.config, **told})
    ledger = run.hooks.ledger
    again = any(entry.round == task.round for entry in ledger.entries)
    ledger.charge(task.round, *charges(job, algorithm, task.round, len(cohort), len(run.clients), again=again))
    task, messages = run.lowered(task, state.messages, remembers=job.federation.message_error_feedback)
    state = replace(state, messages=messages)
    aggregate, fit = run.gather(task, cohort)
    state = run.score_received(state, fit)
    with run.timed("aggregate"):
        generator = rng.public(job.federation.seed, task.round, "server-transform")
        aggregate, mechanisms = job.server_chain.apply(aggregate, state.mechanisms, generator)
        del task
        state = replace(finished(job.program.secure, algorithm, state, aggregate), mechanisms=mechanisms)
        del aggregate
    for text in job.program.chain.remarks(fit):
        run.emit(Notice(text=text, level="warning"))
    used = sum(site.stage == FIT and site.status is Status.USED for site in run.sites)
    run.finished_aggregation(state, used)
    return run.close_round(state, fit, evaluate=job.evaluates(state.round))


def charges(
    job: Job, algorithm: Algorithm, round: int, cohort: int, population: int, *, again: bool = False
) -> list[DpEvent]:
    """What a round costs: the events that the ledger is charged with before its exchange.

    Where noise is correlated over rounds, one that is done ``again`` concerns all sites: the turns before it had
    counted on its noise, too, and now meet two draws of it.
    """
    group, costs = algorithm.group(round), list[DpEvent]()
    for mechanism in job.mechanisms:
        event = mechanism.event(cohort, population)
        if group:
            own = "" if again and mechanism.rounds_apart > 1 else group
            event = replace(event, group=own, sampling=f"{event.sampling}; sites take turns")
        costs.append(event)
    return costs


def _tell_failure(run: Run, rounds: int, error: Exception) -> None:
    """Say that the run has failed. Who listens may be what has failed: the first error is the one that counts."""
    try:
        run.emit(RunFailed(rounds=rounds, error=type(error).__name__, message=str(error)))
    except Exception as second:  # noqa: BLE001 - whatever a listener raises
        error.add_note(f"A listener failed on hearing of it: {type(second).__name__}: {second}")
