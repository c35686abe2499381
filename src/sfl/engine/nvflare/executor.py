"""FLARE's executor, which passes tasks on to the process of its site."""

from __future__ import annotations

from typing import Any, cast

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from sfl.engine.kit import use_kit
from sfl.engine.nvflare.carried import carried_by_site, given_launch
from sfl.engine.nvflare.messages import pack, unpack
from sfl.engine.site_process import SiteProcess, home_of


class SflExecutor(Executor):
    """Answers every task as the site that FLARE says this process is.

    Args:
        launch: The folder of the run; empty if the job carries it.
    """

    def __init__(self, launch: str) -> None:
        super().__init__()
        self._launch = launch
        self._process: SiteProcess | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do the task; whatever goes wrong in it is part of the reply."""
        site = str(fl_ctx.get_identity_name())
        if self._process is None:
            use_kit(cast("Any", fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)).get_startup_kit_dir())
            launch = given_launch(self._launch) if self._launch else carried_by_site(fl_ctx)
            self._process = SiteProcess(launch, *home_of(launch, site))
        return pack(*self._process.run(site, *unpack(shareable)))
