"""A launch that a FLARE job carries: unpacked where FLARE deployed it, with folders that outlive the job.

FLARE does not go on with a job whose server has died. Ours does, as another job with the same run id: what the server
has done and what sites remember lies in their workspaces under ``sfl-runs/<run id>``, not in the job's own folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from nvflare.apis.app_validation import AppValidationKey
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace

from sfl.engine.guard import MARK
from sfl.engine.launch import Launch
from sfl.engine.nvflare.job import CARRIED
from sfl.errors import EngineError

_RUN = re.compile(r"[0-9a-f]{32}")
_HOME = "sfl-runs"
RESULT = "run"
_OURS = (
    "sfl.client.ditto:",
    "sfl.client.inference:",
    "sfl.client.rule:",
    "sfl.client.scaffold:",
    "sfl.client.site:",
    "sfl.client.sum_client:",
    "sfl.client.swarm:",
    "sfl.core.",
    "sfl.esm2.",
    "sfl.privacy.",
    "sfl.recipe.",
    "sfl.server.",
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
    launch, home = _unpacked(context)
    launch.add_settings(out=str(home / RESULT), logs=str(home / "logs"))
    return launch


def carried_by_site(context: FLContext) -> Launch:
    """The launch of a site's app; what the site remembers lies in its own workspace."""
    launch, home = _unpacked(context)
    launch.add_settings(sites=str(home / "sites"), logs=str(home / "logs"))
    return launch


def bring_home(launch: Launch) -> None:
    """Copy the run folder beside the outcome, so that it is part of what FLARE hands to the admin."""
    made = Path(launch.read_settings()["out"])
    if made.is_dir():
        shutil.copytree(made, launch.folder / RESULT, dirs_exist_ok=True)


def _unpacked(context: FLContext) -> tuple[Launch, Path]:
    workspace, job = context.get_prop(FLContextKey.WORKSPACE_OBJECT), str(context.get_job_id())
    if not isinstance(workspace, Workspace):
        raise EngineError("a FLARE job must have a workspace, got none.")
    launch = Launch(Path(workspace.get_app_config_dir(job)).absolute() / CARRIED)
    run = str(launch.read_settings()["run"]) or hashlib.md5(job.encode(), usedforsecurity=False).hexdigest()
    if not _RUN.fullmatch(run):
        raise EngineError(f"a run id must be 32 hexadecimal digits, got {run!r}.")
    home = Path(workspace.get_root_dir()).absolute() / _HOME / run
    (home / "logs").mkdir(parents=True, exist_ok=True)
    code = Path(workspace.get_app_custom_dir(job)).absolute()
    if _may_bring_code(context) and code.is_dir():
        launch.add_settings(allow=[""], code=str(code))
    else:
        launch.add_settings(allow=list(_OURS), code="")
    return launch, home


def _may_bring_code(context: FLContext) -> bool:
    """Whether FLARE has found custom code in this job as it was deployed here, and has allowed it."""
    meta = context.get_prop(FLContextKey.JOB_META)
    return isinstance(meta, dict) and meta.get(AppValidationKey.BYOC) is True
