"""The server's side of a job on a foreign engine: restore the recipe, run it, write down how it ended."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sfl.client.base import BaseFederatedClient
from sfl.core.events import Event, Observer, RoundStarted, RunStarted
from sfl.engine.base import Engine
from sfl.engine.launch import Launch
from sfl.errors import EngineError
from sfl.io.checkpoint import Checkpoints, save_state
from sfl.io.relay import EventWriter
from sfl.io.run_folder import RunFolder
from sfl.io.tree import load_tree, write_text
from sfl.recipe import Recipe
from sfl.server.job import Job
from sfl.server.session import run_job
from sfl.utils.memory import return_large
from sfl.utils.plain import restore

__all__ = ["serve"]

_LAST_WORDS = 20.0
"""Seconds that all sites together get at the end of a run, for what their clients do then."""


def serve(launch: Launch, engine: Callable[[], Engine]) -> None:
    """Run the job of ``launch`` over an engine, in the engine's own server process.

    Never raises: whatever goes wrong is written to the outcome, which the driver raises again.

    Args:
        launch: The folder in which driver and server meet.
        engine: Connects to the sites; what it raises is part of the outcome.
    """
    return_large()
    try:
        with EventWriter(launch.events) as relay:
            settings = launch.read_settings()
            recipe = restore(load_tree(launch.recipe), allow=launch.allowed())
            if not isinstance(recipe, Recipe):
                raise TypeError(f"{launch.recipe} must hold a recipe, got {type(recipe).__name__}.")
            out = Path(settings["out"]) if settings["out"] else None
            resume = bool(settings["resume"])

            observers: list[Observer] = [relay]
            if most := int(settings.get("most", 0)):
                observers.append(partial(_must_fit, most, out))

            job = recipe.build()
            with engine() as carrier:
                try:
                    result = run_job(job, lambda _job, _sites: carrier, out=out, resume=resume, observers=observers)
                finally:
                    if _outlives(job):
                        carrier.end_sites(_LAST_WORDS)
            save_state(launch.final, result.state)
        outcome = {"error": None, "reason": result.reason}
    except Exception as error:  # noqa: BLE001 - handed to the driver, which raises it again
        outcome = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    write_text(launch.outcome, json.dumps(outcome, indent=1) + "\n")


def _must_fit(most: int, out: Path | None, event: Event) -> None:
    """Refuse a job whose state cannot come home, before a site trains.

    Raises:
        EngineError: If it cannot.
    """
    size = 0
    if isinstance(event, RunStarted):
        size = event.nbytes
    elif isinstance(event, RoundStarted) and out is not None:  # what the algorithm remembers is in the checkpoint, too
        size = sum(path.stat().st_size for path in Checkpoints(RunFolder(out).checkpoints).paths()[-1:])
    if size > most:
        raise EngineError(
            f"a model and what its algorithm remembers must fit into {most / 2**30:g} GiB to come home through a "
            f"SuperLink's log, got {size / 2**30:.3g} GiB. Run it with --backend nvflare-prod, which brings files home."
        )


def _outlives(job: Job) -> bool:
    """Whether a site's client holds something that does not end with its process, such as a script's own process."""
    close = getattr(job.program.client, "close", BaseFederatedClient.close)
    return close is not BaseFederatedClient.close
