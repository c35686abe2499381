"""The sites of one process of a foreign engine: each answers orders, whoever carries them.

An engine may run a site's next task in another process than its last (Flower's simulation and FLARE's do), so what a
site remembers is read from its folder before each task, and never trusted to be in memory.
"""

from __future__ import annotations

import fcntl
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sfl.client.site import Site, SiteHome, SiteProgram
from sfl.core.task import Reply, Status
from sfl.engine.site_logs import site_logs
from sfl.engine.wire import Order
from sfl.errors import SflError
from sfl.train.devices import count_gpus, limit_threads, plan_workers


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """What a process needs to know to be sites of a job.

    Attributes:
        program: Reads what every site runs; called once in a process.
        sites: Where sites keep their state; ``None`` keeps it in this process's memory.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads to compute with.
        turns: Lock files, one for each site that may work at a time on this machine; none for no limit.
        kit: The folder with what a site knows of its federation; ``None`` if sites are simulated.
    """

    program: Callable[[], SiteProgram]
    sites: Path | None = None
    device: str = "auto"
    threads: int = 1
    turns: tuple[Path, ...] = ()
    kit: Callable[[], Path | None] | None = None


class SiteHost:
    """Runs orders for any number of sites, one at a time."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._program: SiteProgram | None = None
        self._sites: dict[str, Site] = {}

    def run(self, site: str, order: Order) -> Reply:
        """Do the order as ``site``. Never raises: whatever goes wrong becomes the reply."""
        try:
            limit_threads(self._settings.threads)
            here = self._site(site, order.client_id)
        except Exception as error:  # noqa: BLE001 - a module of the user's may raise anything as it is imported
            kind = "" if isinstance(error, SflError) else f"{type(error).__name__}: "
            return Reply(site, Status.FAILED, reason=f"{site}: {kind}{error}", details=traceback.format_exc())
        with _turn(self._settings.turns), site_logs() as lines:
            reply = here.run(order.task, order.life)
        return replace(reply, logs=tuple(lines)) if here.shares else reply

    def _site(self, name: str, client_id: int) -> Site:
        if name not in self._sites:
            if self._program is None:
                self._program = self._settings.program()
            device = plan_workers(1, 1, self._settings.device, count_gpus(), 1)[0]
            folder = self._settings.sites / name if self._settings.sites is not None else None
            home = SiteHome(folder=folder, moves=True, kit=self._settings.kit)
            self._sites[name] = Site(self._program, name, client_id, device=device, home=home)
        return self._sites[name]


@contextmanager
def _turn(files: Sequence[Path]) -> Generator[None]:
    """Hold one of the lock files. A process that dies lets go of its own."""
    if not files:
        yield
        return
    with ExitStack() as stack:
        opened = [stack.enter_context(path.open("ab")) for path in files]
        while not any(map(_locked, opened)):
            time.sleep(0.01)
        yield


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
