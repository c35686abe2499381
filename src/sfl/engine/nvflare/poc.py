"""A whole provisioned federation on this machine, for one job: ``python -m sfl.engine.nvflare.poc FOLDER``.

Server and sites are processes of their own with certificates of their own, as in production; they talk over loopback,
on a port that is free, in folders that are the run's own.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from sfl.engine.launch import Launch
from sfl.engine.nvflare.decided import end_children
from sfl.engine.nvflare.federation import ADMIN, SERVER, on_this_machine
from sfl.engine.nvflare.job import write_job
from sfl.engine.nvflare.provision import provision, service_command
from sfl.engine.nvflare.submit import submit
from sfl.engine.ports import free_ports

_PATIENCE = 120.0  # seconds within which a site that has ended is started again
_LOOK = 1.0


def run(launch: Launch) -> int:
    """Provision, start everybody, run the job; its exit code. Whoever started this process ends what it started."""
    settings = launch.read_settings()
    names = list(settings["names"])
    (port,) = free_ports(1)
    federation = on_this_machine(names, port)
    kits = provision(federation, launch.folder / "flare", storage=launch.folder / "storage")
    for name in names:
        launch.add_to_kit(name, kits / name / "startup")
    what = f"NVIDIA FLARE POC, {len(names)} sites as processes, mutual TLS"
    job = write_job(launch.folder / "flare-job", "sfl", launch.folder, names, what)
    logs = Path(settings["logs"])
    over = threading.Event()
    with ExitStack() as stack:
        started: dict[str, subprocess.Popen[bytes]] = {}

        def start(name: str) -> None:
            log = stack.enter_context((logs / f"flare-{name}.log").open("ab"))
            command = service_command(kits / name, sys.executable)
            started[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

        for name in (SERVER, *names):
            start(name)
        again = threading.Thread(target=_start_again, args=(names, started, start, over), daemon=True)
        again.start()
        try:
            return submit(launch, kits / ADMIN, job, shares_disk=True)
        finally:
            over.set()
            again.join()
            end_children()


def _start_again(
    names: Sequence[str],
    started: Mapping[str, subprocess.Popen[bytes]],
    start: Callable[[str], object],
    over: threading.Event,
) -> None:
    """Start a site that ends before it may have met its server: FLARE's client gives up after 15 seconds, which may be
    too few where all of them start at once on a busy machine, and the job would wait for it for good.
    """
    deadline = time.monotonic() + _PATIENCE
    while not over.wait(_LOOK) and time.monotonic() < deadline:
        for name in names:
            if started[name].poll() is not None:
                start(name)


if __name__ == "__main__":
    sys.exit(run(Launch(Path(sys.argv[1]))))
