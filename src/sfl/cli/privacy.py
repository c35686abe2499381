"""Planning differential privacy before anything runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

from sfl.application.config import RunConfig
from sfl.cli.applications import APPLICATIONS, CONFIGS, ConfigFile, JobName, RunFolder, job_of_run, resolve_job
from sfl.cli.options import with_options
from sfl.privacy.config import PrivacyConfig
from sfl.types import FederationConfig
from sfl.utils.bounds import upper

_OTHERS = {"dpsgd", "svt_privacy", "percentile_epsilon"}  # protections beside --dp
_FACTORS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


def _plan(
    *, job: JobName | None = None, config: ConfigFile = None, resume: RunFolder = None, **overrides: object
) -> int:
    """What these options cost, or with a target ε the noise that they need, before anything runs.

    Options are those of a run; --dp is taken as given unless another protection is named.
    """
    given = overrides if resume or _OTHERS & overrides.keys() else {"dp": True, **overrides}
    named = job or (job_of_run(resume) if resume is not None else "esm2")
    options: RunConfig = resolve_job(named, config, resume, given).config
    privacy = options.privacy
    if privacy.dp or privacy.selects_privately:
        _write(privacy, options.federation)
    if privacy.dpsgd:
        _write_examples(named, options)
    return 0


plan = with_options(CONFIGS, _plan)


def _write(options: PrivacyConfig, federation: FederationConfig) -> None:
    from sfl.privacy.budget import statement
    from sfl.privacy.runner_utils import calibrated, cost

    found = calibrated(options, federation)
    sites = f"{federation.num_clients} sites"
    share = {
        "fixed": f"all {sites}",
        "poisson": f"each of {sites} with probability {federation.fraction_fit:g}",
        "turns": f"each of {sites} once in {federation.turns} rounds",
    }[federation.sampling]
    noise = f"noise multiplier {found.dp_noise:.4g} · " if found.dp else ""
    sys.stdout.write(f"{noise}{federation.num_rounds} rounds · {share}\n")
    for guarantee in cost(found, federation):
        for line in statement(guarantee):
            sys.stdout.write(f"  {line}\n")
    if found.dp:
        _table(
            found.dp_noise,
            lambda noise: [g.epsilon for g in cost(replace(found, dp_noise=noise), federation)],
        )


def _write_examples(job: str, options: RunConfig) -> None:
    """For the site with the fewest examples, which are drawn most often."""
    from sfl.privacy.accountant import PrivacyAccountant
    from sfl.privacy.budget import PrivacyBudget, example_statement

    privacy, federation = options.privacy, options.federation
    application = APPLICATIONS[job].load()
    workload = application.workload(options, application.find_model(options.client.model))
    sizes = [len(site.train) for site in workload.data()[0].sites]
    rounds = math.ceil(federation.num_rounds / federation.turns)
    accountant = PrivacyAccountant(delta=privacy.dpsgd_delta, method=privacy.dp_accountant)
    size = min(sizes)
    training = workload.private(size)

    def spent(noise: float) -> list[float]:
        return [accountant.epsilon([replace(training, noise_multiplier=noise).event()] * rounds)]

    sys.stdout.write(
        f"the smallest site, of {size} examples: noise multiplier {training.noise_multiplier:.4g} · {rounds} rounds of "
        f"{training.steps} steps · each example in a step with probability {training.rate:.3g}\n"
    )
    (epsilon,) = spent(training.noise_multiplier)
    for line in example_statement({"site": epsilon}, PrivacyBudget(delta=privacy.dpsgd_delta)):
        sys.stdout.write(f"  {line}\n")
    _table(training.noise_multiplier, spent)


def _table(noise: float, epsilons: Callable[[float], list[float]]) -> None:
    sys.stdout.write("\n  noise      ε\n")
    for factor in _FACTORS if noise > 0.0 else ():
        found = "  ".join(f"{upper(epsilon, 4):>6}" for epsilon in epsilons(noise * factor))
        sys.stdout.write(f"  {noise * factor:<8.4g} {found}{'  ← this plan' if factor == 1.0 else ''}\n")
