"""A launch that a FLARE job carries: unpacked where FLARE deployed it, with folders that outlive the job.

FLARE does not go on with a job whose server has died. Ours does, as another job of the same run: what the server has
done and what sites remember lies in their workspaces under ``sfl-runs/<run id>``, not in the job's own folder. Who has
the run's key can submit such a job, see `engine.owner`; a job that is not signed is a run of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidationKey
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace

from sfl.engine.guard import MARK
from sfl.engine.launch import Launch
from sfl.engine.nvflare.job import CARRIED, ORDER
from sfl.engine.owner import PROOF, Order, read_order
from sfl.errors import EngineError
from sfl.io.tree import write_text

_HOME = "sfl-runs"
RESULT = "run"
_TAKEN = ("names", "resume", "workers", "gpus", "devices", "num_clients", "threads", "job")
_OURS = (
    "sfl.application.",
    "sfl.client.callbacks:",
    "sfl.client.ditto:",
    "sfl.client.inference:",
    "sfl.client.rule:",
    "sfl.client.scaffold:",
    "sfl.client.site:",
    "sfl.client.sum_client:",
    "sfl.client.swarm:",
    "sfl.core.",
    "sfl.engine.clock:",
    "sfl.esm2.",
    "sfl.llm.",
    "sfl.privacy.",
    "sfl.recipe.",
    "sfl.server.",
    "sfl.train.pretrained:",
    "sfl.types:",
    "builtins:dict",
)
"""Names that a job without code of its own may use: what SFL itself brings; no training script, which is any command,
and no class that a model is made of by name. A job with custom code has passed FLARE's right for that, on this very
machine; its code may do anything, so its names may, too."""


def given_launch(folder: str) -> Launch:
    """A launch that lies on this machine, for processes that SFL itself has started here.

    Raises:
        EngineError: In a process of a provisioned federation: there a job must carry its launch.
    """
    if MARK not in os.environ:
        raise EngineError("a job on a provisioned federation must carry its launch, got the name of a folder.")
    return Launch(Path(folder))


def carried_by_server(context: FLContext) -> Launch:
    """The launch of the server's app; its run folder lies in the server's workspace."""
    launch, home = _unpacked(context, ("program.json", "recipe.safetensors"))
    launch.add_settings(out=str(home / RESULT), logs=str(home / "logs"))
    return launch


def carried_by_site(context: FLContext) -> Launch:
    """The launch of a site's app; what the site remembers lies in its own workspace."""
    launch, home = _unpacked(context, ("program.json",))
    launch.add_settings(sites=str(home / "sites"), logs=str(home / "logs"), deployed=True)
    return launch


def bring_home(launch: Launch) -> None:
    """Copy the run folder beside the outcome, so that it is part of what FLARE hands to the admin."""
    made = Path(launch.read_settings()["out"])
    if made.is_dir():
        shutil.copytree(made, launch.folder / RESULT, dirs_exist_ok=True)


def _unpacked(context: FLContext, files: Sequence[str]) -> tuple[Launch, Path]:
    workspace, job = context.get_prop(FLContextKey.WORKSPACE_OBJECT), str(context.get_job_id())
    if not isinstance(workspace, Workspace):
        raise EngineError("a FLARE job must have a workspace, got none.")
    launch = Launch(Path(workspace.get_app_config_dir(job)).absolute() / CARRIED)
    given, order = _given(launch, files)
    kept = order.run if order is not None else hashlib.md5(job.encode(), usedforsecurity=False).hexdigest()
    home = Path(workspace.get_root_dir()).absolute() / _HOME / kept
    (home / "logs").mkdir(parents=True, exist_ok=True)
    if order is not None:
        order.take(home / ORDER, job)
    taken = {name: given[name] for name in _TAKEN if name in given}
    rest = {"out": "", "sites": "", "run": order.run if order is not None else ""}
    write_text(launch.settings, json.dumps({**taken, **rest}, indent=1) + "\n")
    code = Path(workspace.get_app_custom_dir(job)).absolute()
    if _may_bring_code(context) and code.is_dir():
        launch.add_settings(allow=[""], code=str(code))
    else:
        launch.add_settings(allow=list(_OURS), code="")
    return launch, home


def _given(launch: Launch, files: Sequence[str]) -> tuple[Mapping[str, Any], Order | None]:
    """What a job says, and the order that it is, if it is signed: then what was signed is never written over."""
    if (launch.folder / PROOF).exists():
        order = read_order(launch.folder, (ORDER, *files))
        return json.loads((launch.folder / ORDER).read_text(encoding="utf-8")), order
    given = launch.read_settings()
    if given.get("run"):
        raise EngineError("a job that names a run must be signed with the key of that run, got no signature.")
    return given, None


def _may_bring_code(context: FLContext) -> bool:
    """Whether FLARE has found custom code in this job as it was deployed here, and has allowed it."""
    meta = context.get_prop(FLContextKey.JOB_META)
    return isinstance(meta, dict) and meta.get(AppValidationKey.BYOC) is True
