"""One run of federated ESM2, from a resolved configuration to the final model in its folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfl.core.events import Event, Notice, Observer, RunStarted
from sfl.errors import ConfigError
from sfl.esm2.config import RESUMABLE, ESM2RunConfig
from sfl.esm2.dataset import FederatedProteins
from sfl.esm2.model import ModelSource, find_model
from sfl.esm2.sources import absolute
from sfl.io.console import console_observer
from sfl.io.run_folder import RunFolder
from sfl.io.tree import write_text
from sfl.privacy.runner_utils import calibrated
from sfl.recipe import Environment, Recipe
from sfl.train.devices import count_gpus, plan_workers
from sfl.types import site_names
from sfl.utils.config import Resolved, dump_yaml, to_dict
from sfl.utils.logging import setup_logging

_BEGAN = "config_sources.json"


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
        write_config = _checked(folder, pinned, resolved, console, resume=resume is not None)

        def went_on(event: Event) -> None:
            if resume and isinstance(event, RunStarted):
                write_config()

        try:
            _train(pinned, model, env, folder, observers=(console, went_on), resume=resume is not None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(str(folder.path)) from None  # says which run can be resumed
        console(Notice(text=f"model:  {folder.model}"))
        console(Notice(text=f"report: {folder.path / 'report.html'}"))
    return 0


def begin_esm2(
    resolved: Resolved[ESM2RunConfig], say: Callable[[str], object], *, resume: Path | None = None
) -> tuple[Recipe, Path, Callable[[], None]]:
    """For who does not wait for a run: what is to run, and a folder for it with its configuration.

    Args:
        resolved: The configuration and where each value came from.
        say: Called with what a person should know.
        resume: Folder of the run to go on with.

    Returns:
        The recipe, the run's folder, and what to call once it is submitted: it writes down the flags of this call.
    """
    model = find_model(resolved.config.client.model)
    say(model.why)
    pinned = _pinned(resolved.config, model, resume)
    folder = RunFolder.existing(resume) if resume else RunFolder.create(Path(str(pinned.logging.out)))
    write_config = _checked(folder, pinned, resolved, lambda event: _say_notice(event, say), resume=resume is not None)
    return _recipe(pinned, model)[0], folder.path, write_config


def esm2_job(config: ESM2RunConfig, say: Callable[[str], object]) -> Recipe:
    """The recipe alone, after a look at model and data."""
    from sfl.esm2.client import federated_data

    if config.aggregation.attack is not None:
        raise ConfigError(f"attack must be none in a job for others, got {config.aggregation.attack}. Leave it out.")
    model = find_model(config.client.model)
    say(model.why)
    pinned = _pinned(config, model, None)
    for line in federated_data(pinned)[1].warnings():
        say(line)
    return _recipe(pinned, model)[0]


def _say_notice(event: Event, say: Callable[[str], object]) -> None:
    if isinstance(event, Notice):
        say(event.text)


def _recipe(config: ESM2RunConfig, model: ModelSource) -> tuple[Recipe, str]:
    """The recipe, and the server's own device, for evaluation."""
    from sfl.esm2.server import esm2_recipe

    device = plan_workers(1, 1, config.client.device, count_gpus(), 1)[0]
    return esm2_recipe(config, model, device=device), device


def _train(
    config: ESM2RunConfig,
    model: ModelSource,
    env: Environment,
    folder: RunFolder,
    *,
    observers: Sequence[Observer],
    resume: bool,
) -> None:
    from sfl.esm2.server import ESM2Server

    recipe, device = _recipe(config, model)
    result = recipe.execute(env, out=folder.path, resume=resume, observers=observers)
    ESM2Server(config=config, model=model, device=device).export(result.parameters, folder.model)


def _pinned(config: ESM2RunConfig, model: ModelSource, resume: Path | None) -> ESM2RunConfig:
    """The configuration with everything that depends on today, this folder or the hub written out."""
    out = str(resume) if resume else config.logging.out or f"runs/esm2-{time.strftime('%Y%m%d-%H%M%S')}"
    return replace(
        config,
        client=replace(config.client, model=model.name, data=absolute(config.client.data)),
        privacy=calibrated(config.privacy, config.federation),
        logging=replace(config.logging, out=out),
    )


def _checked(
    folder: RunFolder, config: ESM2RunConfig, resolved: Resolved[ESM2RunConfig], console: Observer, *, resume: bool
) -> Callable[[], None]:
    """Look at options and data, and write them down.

    A new run's configuration is written here, so that whatever happens next it can be resumed. That of a run that goes
    on is written when it does, by what is returned: flags that it refuses must not stay.
    """
    from sfl.esm2.client import federated_data

    fixed = _fixed(config)
    began = (folder.read_json(_BEGAN) or {}) if resume else {}
    _require_as_began(_mapping(began, "options"), fixed, folder)
    federated_data.cache_clear()  # the files may be others than for an earlier run of this process
    shared, report = federated_data(config)
    for line in report.warnings():
        console(Notice(text=line, level="warning"))
    described = _described(shared)
    before = folder.read_json("data.json")
    if resume and before is not None and before.get("digest") != described["digest"]:
        raise ConfigError(
            f"data must be what the run began with, got other proteins in {config.client.data or 'the sample'!r}. "
            "Put the data back, or start a new run."
        )
    given = dict(resolved.sources)
    if resume:  # what the run began with stays as it was said; only flags of this call are new
        given = {**_mapping(began, "sources"), **_flags(given)}

    def write() -> None:
        folder.write_json(_BEGAN, {"sources": given, "options": fixed})
        write_text(folder.config, dump_yaml(config, given))

    if not resume:
        write()
    folder.write_json("data.json", described)
    return write


def _fixed(config: ESM2RunConfig) -> dict[str, Any]:
    """The options that make the run what it is. Where data and model lie may change; what they are is checked."""
    free = {*RESUMABLE, "out", "data", "model"}
    return {
        f"{section}.{name}": value
        for section, options in to_dict(config).items()
        for name, value in options.items()
        if name not in free
    }


def _require_as_began(before: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    changed = [
        f"{name} {now[name]!r} instead of {value!r}"
        for name, value in before.items()
        if name in now and now[name] != value
    ]
    if changed:
        raise ConfigError(
            f"{folder.config} must say what the run began with, got {', '.join(changed)}. "
            "Change it back, or start a new run."
        )


def _mapping(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


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
