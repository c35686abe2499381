"""Auditing the protections of a run that lies in a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter as Flag

from sfl.application.config import RunConfig
from sfl.cli.applications import APPLICATIONS, job_of_run, resolve_job
from sfl.errors import ConfigError
from sfl.types import FederationConfig, Parameters
from sfl.utils.bounds import upper

if TYPE_CHECKING:
    from sfl.application.workload import Workload
    from sfl.core.mechanism import DpEvent
    from sfl.privacy.audit import NormCheck
    from sfl.recipe import Recipe

Simulated = Literal["sim", "flower", "flower-deploy", "nvflare", "nvflare-poc", "flower-in-nvflare"]
Run = Annotated[Path, Flag(help="Folder of the run, with its config.yaml; audit.json is written into it.")]
Canaries = Annotated[int, Flag(help="Sites with a coin each, in place of the run's. More show a larger ε.")]
Confidence = Annotated[float, Flag(help="Probability with which the measured bound is below the true ε.")]
Rounds = Annotated[int | None, Flag(help="Rounds to audit; by default as many as the run has.")]
Engine = Annotated[Simulated, Flag(help="What carries the audit. Engines need a process or more for each canary.")]


def audit(
    run: Run,
    /,
    *,
    canaries: Canaries = 500,
    confidence: Confidence = 0.95,
    rounds: Rounds = None,
    backend: Engine = "sim",
) -> int:
    """Measure a lower bound on ε with canaries in place of the run's sites, beside what the ledger says.

    Nothing is trained: the run's own clip, sampling, sum and noise are what is audited, and of DP-SGD a step of its own
    trainer. Of data only the norms of some of the first site's records are looked at. The exit code is 1 if the
    measurement contradicts the claim.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"RUN must be the folder of a run, with its config.yaml, got {str(run)!r}.")
    config: RunConfig = resolve_job(job_of_run(run), None, run, {}).config
    if not (config.privacy.dp or config.privacy.dpsgd):
        raise ConfigError(
            f"RUN must be a run with --dp or --dpsgd to be audited, got {run}, which claims nothing that can be."
        )
    found: dict[str, Any] = {}
    if config.privacy.dp:
        found |= _audit_sites(config, run, canaries=canaries, confidence=confidence, rounds=rounds, backend=backend)
    if config.privacy.dpsgd:
        found["examples"] = _audit_examples(config, run, canaries=canaries, confidence=confidence)
    from sfl.io.run_folder import RunFolder

    RunFolder(run).write_json("audit.json", found)
    sys.stdout.write(f"written to {run / 'audit.json'}\n")
    return int(any(bool(each.get("contradicted")) for each in (found, found.get("examples", {}))))


def _audit_examples(config: RunConfig, run: Path, *, canaries: int, confidence: float) -> dict[str, Any]:
    """A step of the first site's training, on canaries; and what its own records add to a step's sum before its noise,
    on the run's newest model.
    """
    from sfl.privacy.audit import PrivacyAuditor
    from sfl.train.audited import StepPipeline

    workload = _workload(config, run)
    examples = workload.examples(workload.data()[0].sites[0].train)
    training = workload.private(len(examples))

    def norms() -> NormCheck:
        from sfl.train.module import load_parameters

        module, newest = workload.module("cpu"), _newest(run)
        if newest is not None:
            load_parameters(module, newest)
        with workload.frozen(module):
            return training.example_norms(module, examples)

    pipeline = StepPipeline(
        trainer=training.trainer(), canaries=canaries, delta=config.privacy.dpsgd_delta, checked=norms
    )
    report = PrivacyAuditor(canaries=canaries, confidence=confidence).run_pipeline_audit(pipeline)
    sys.stdout.write("of examples, one step of the first site's training without the help of sampling:\n")
    for line in report.statement():
        sys.stdout.write(f"  {line}\n")
    return report.to_dict()


def _audit_sites(
    config: RunConfig, run: Path, *, canaries: int, confidence: float, rounds: int | None, backend: Simulated
) -> dict[str, Any]:
    """Canaries through the run's pipeline."""
    from sfl.audit import audit_recipe
    from sfl.env import environment

    recipe = _recipe(config, run, canaries, rounds)
    events = _charged(recipe, run)
    report = audit_recipe(recipe, environment(backend, device="cpu"), canaries=canaries, confidence=confidence)
    spent = _spent(recipe, events, "server_trusted" if report.sees == "models" else "server_curious")
    for line in report.statement():
        sys.stdout.write(f"{line}\n")
    if spent:
        sys.stdout.write(
            f"the run's own ledger: ε ≤ {upper(spent['epsilon'])}, over {spent['events']} noisy releases\n"
        )
    return {**report.to_dict(), "backend": backend, "run": spent}


def _recipe(config: RunConfig, run: Path, canaries: int, rounds: int | None) -> Recipe:
    """The run's recipe, for so many sites, from its newest model on."""
    application = APPLICATIONS[job_of_run(run)].load()
    federation = _federation(config, canaries, rounds)
    recipe = application.recipe(config.shared_by(federation), application.find_model(config.client.model))
    newest = _newest(run)
    return recipe if newest is None else replace(recipe, initial_parameters=newest)


def _workload(config: RunConfig, run: Path) -> Workload[Any, Any]:
    application = APPLICATIONS[job_of_run(run)].load()
    return application.workload(config, application.find_model(config.client.model))


def _newest(run: Path) -> Parameters | None:
    """The run's newest model; ``None`` if it has not come to one."""
    from sfl.io.checkpoint import Checkpoints
    from sfl.io.run_folder import RunFolder

    state = Checkpoints(RunFolder(run).checkpoints).load_latest(lambda _: None)
    return None if state is None else state.parameters


def _federation(config: RunConfig, canaries: int, rounds: int | None) -> FederationConfig:
    """The run's, with a site for each canary. Where absence shows nothing (server), one for each turn stands by."""
    before = config.federation
    shared = config.privacy.dp_mode == "client"
    sites = canaries + (before.turns if config.privacy.dp_mode == "server" else 0)
    return replace(
        before,
        num_clients=sites,
        num_rounds=before.num_rounds if rounds is None else rounds,
        min_available_clients=sites // before.turns if shared else 1,
        workers=1,
        backend="sim",
        startup_kit=None,
        superlink=None,
        root_certificates=None,
        round_timeout=0.0,
    )


def _charged(recipe: Recipe, run: Path) -> list[DpEvent]:
    """What the run's own ledger was charged with; nothing if it has none.

    Raises:
        ConfigError: If it is not what the configuration would charge: then one of them says nothing of the run.
    """
    from sfl.io.run_folder import RunFolder
    from sfl.privacy.ledger import PrivacyLedger
    from sfl.privacy.shuffle import ShuffledGaussian

    path = RunFolder(run).ledger
    events = PrivacyLedger(path).events if path.is_file() else []
    own = [m.local if isinstance(m, ShuffledGaussian) else m for m in recipe.mechanisms]
    known = {_cost(mechanism.event(1, 1)) for mechanism in own}
    foreign = [event for event in events if event.delta == 0.0 and _cost(event) not in known]  # shuffled ones have a δ
    if foreign:
        raise ConfigError(
            f"{path} must hold what config.yaml charges, (noise multiplier, sampling rate, ε) in {sorted(known)}, got "
            f"{_cost(foreign[0])}. One of them was changed: put it back."
        )
    return events


def _cost(event: DpEvent) -> tuple[float, float, float]:
    return event.noise_multiplier, event.sampling_rate, event.epsilon


def _spent(recipe: Recipe, events: list[DpEvent], adversary: str) -> dict[str, Any]:
    """What the run's own ledger says against this adversary; empty if it has none."""
    from sfl.privacy.budget import PrivacyBudget

    found = [g for g in (recipe.budget or PrivacyBudget()).spent(events) if g.adversary == adversary]
    return {"epsilon": found[0].epsilon, "events": found[0].events} if found else {}
