"""One run of federated ESM2, from a resolved configuration to the final model in its folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfl.core.events import Notice, Observer
from sfl.errors import ConfigError
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.dataset import FederatedProteins
from sfl.esm2.model import ModelSource, find_model
from sfl.io.console import console_observer
from sfl.io.run_folder import RunFolder
from sfl.io.tree import write_text
from sfl.recipe import Environment
from sfl.train.devices import count_gpus, plan_workers
from sfl.types import site_names
from sfl.utils.config import Resolved, dump_yaml
from sfl.utils.logging import setup_logging


def run_esm2(resolved: Resolved[ESM2RunConfig], env: Environment, *, resume: Path | None = None) -> int:
    """Run, or go on with the run in ``resume``.

    Args:
        resolved: The configuration and where each value came from.
        env: Where to run.
        resume: Folder of the run to go on with.

    Returns:
        The exit code: 0, also when the privacy budget ended the run.
    """
    config = resolved.config
    setup_logging(config.logging.format, config.logging.verbose, None)
    with console_observer(config.logging.format, config.logging.verbose) as console:
        model = find_model(config.client.model)
        console(Notice(text=model.why))
        pinned = _pinned(config, model, resume)
        folder = RunFolder.existing(resume) if resume else RunFolder.create(Path(str(pinned.logging.out)))
        _write_down(folder, pinned, resolved, console, resume=resume is not None)
        try:
            _train(pinned, model, env, folder, observers=(console,), resume=resume is not None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(str(folder.path)) from None  # says which run can be resumed
        console(Notice(text=f"model:  {folder.model}"))
        console(Notice(text=f"report: {folder.path / 'report.html'}"))
    return 0


def _train(
    config: ESM2RunConfig,
    model: ModelSource,
    env: Environment,
    folder: RunFolder,
    *,
    observers: Sequence[Observer],
    resume: bool,
) -> None:
    from sfl.esm2.server import ESM2Server, esm2_recipe

    device = plan_workers(1, 1, config.client.device, count_gpus(), 1)[0]  # the server's own, for evaluation
    recipe = esm2_recipe(config, model, device=device)
    result = recipe.execute(env, out=folder.path, resume=resume, observers=observers)
    ESM2Server(config=config, model=model, device=device).export(result.parameters, folder.model)


def _pinned(config: ESM2RunConfig, model: ModelSource, resume: Path | None) -> ESM2RunConfig:
    """The configuration with everything that depends on today, this folder or the hub written out."""
    data = config.client.data
    if data and not data.startswith("hf:"):
        data = ",".join(str(Path(part).expanduser().absolute()) for part in data.split(","))
    out = str(resume) if resume else config.logging.out or f"runs/esm2-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(
        config,
        client=replace(config.client, model=model.name, data=data),
        logging=replace(config.logging, out=out),
    )


def _write_down(
    folder: RunFolder, config: ESM2RunConfig, resolved: Resolved[ESM2RunConfig], console: Observer, *, resume: bool
) -> None:
    """The configuration first, so that whatever happens next the run can be resumed; then what the sites hold."""
    from sfl.esm2.client import federated_data

    shared, report = federated_data(config)
    for line in report.warnings():
        console(Notice(text=line, level="warning"))
    described = _described(shared)
    before = folder.read_json("data.json")
    if resume and before is not None and before["digest"] != described["digest"]:
        raise ConfigError(
            f"data must be what the run began with, got other proteins in {config.client.data or 'the sample'!r}. "
            "Put the data back, or start a new run."
        )
    given = dict(resolved.sources)
    if resume:  # what the run began with stays as it was said; only flags of this call are new
        given = {**(folder.read_json("config_sources.json") or {}), **_flags(given)}
    folder.write_json("config_sources.json", given)
    write_text(folder.config, dump_yaml(config, given))
    folder.write_json("data.json", described)


def _flags(sources: Mapping[str, str]) -> dict[str, str]:
    return {name: source for name, source in sources.items() if source.startswith("--")}


def _described(shared: FederatedProteins) -> dict[str, Any]:
    """Sizes for the report, and a digest that says whether a resumed run has the same data."""
    described = shared.describe()
    names = site_names(len(shared.sites))
    sites = [
        {
            "name": name if site["site"].startswith("site-") else f"{name} ({site['site']})",
            "train": site["train"]["records"],
            "heldout": site["held_out"]["records"],
            "residues": site["train"]["residues"],
            "top": [[top["organism"], top["records"]] for top in site["train"]["top_organisms"]],
        }
        for name, site in zip(names, described["sites"], strict=True)
    ]
    digest = hashlib.sha256()
    for site in shared.sites:
        digest.update(json.dumps([[r.sequence for r in site.train], [r.sequence for r in site.held_out]]).encode())
    digest.update(json.dumps([record.sequence for record in shared.held_out]).encode())
    return {
        "sites": sites,
        "global_heldout": described["held_out"]["records"],
        "notes": [f"partition: {described['partition']}", f"duplicates dropped: {described['duplicates_dropped']}"],
        "digest": digest.hexdigest(),
    }
