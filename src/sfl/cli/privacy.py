"""Planning differential privacy before anything runs."""

from __future__ import annotations

import sys
from dataclasses import replace

from sfl.cli.commands import ConfigFile, RunFolder, resolve_esm2
from sfl.cli.options import with_options
from sfl.esm2.config import ESM2RunConfig
from sfl.privacy.config import PrivacyConfig
from sfl.types import FederationConfig

_FACTORS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


def _plan(*, config: ConfigFile = None, resume: RunFolder = None, **overrides: object) -> int:
    """What these options cost, or with --dp-target-epsilon the noise that they need, before anything runs.

    Options are those of a run; --dp is taken as given.
    """
    given = overrides if resume else {"dp": True, **overrides}
    options = resolve_esm2(config, resume, given).config
    return _write(options.privacy, options.federation)


plan = with_options(ESM2RunConfig, _plan)


def _write(options: PrivacyConfig, federation: FederationConfig) -> int:
    from sfl.privacy.budget import statement
    from sfl.privacy.runner_utils import calibrated, cost

    found = calibrated(options, federation)
    sites = f"{federation.num_clients} sites"
    share = {
        "fixed": f"all {sites}",
        "poisson": f"each of {sites} with probability {federation.fraction_fit:g}",
        "turns": f"each of {sites} once in {federation.turns} rounds",
    }[federation.sampling]
    out = sys.stdout.write
    out(f"noise multiplier {found.dp_noise:.4g} · {federation.num_rounds} rounds · {share}\n")
    for guarantee in cost(found, federation):
        for line in statement(guarantee):
            out(f"  {line}\n")
    out("\n  noise      ε\n")
    for factor in _FACTORS:
        noise = found.dp_noise * factor
        if noise > 0.0:
            for guarantee in cost(replace(found, dp_noise=noise), federation):
                out(f"  {noise:<8.4g} {guarantee.epsilon:>6.4g}{'  ← this plan' if factor == 1.0 else ''}\n")
    return 0
