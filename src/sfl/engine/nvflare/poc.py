"""A whole provisioned federation on this machine, for one job: ``python -m sfl.engine.nvflare.poc FOLDER``.

Server and sites are processes of their own with certificates of their own, as in production; they talk over loopback,
on a port that is free, in folders that are the run's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sfl.engine.launch import Launch
from sfl.engine.nvflare.decided import end_children
from sfl.engine.nvflare.federation import ADMIN, on_this_machine
from sfl.engine.nvflare.job import write_job
from sfl.engine.nvflare.participants import start
from sfl.engine.nvflare.provision import provision
from sfl.engine.nvflare.submit import submit
from sfl.engine.ports import free_ports


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
    try:
        start(kits, names, port, lambda name: logs / f"flare-{name}.log")
        return submit(launch, kits / ADMIN, job, shares_disk=True)
    finally:
        end_children()


if __name__ == "__main__":
    sys.exit(run(Launch(Path(sys.argv[1]))))
