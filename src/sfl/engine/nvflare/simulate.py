"""The process of one FLARE simulation: ``python -m sfl.engine.nvflare.simulate FOLDER [--flower]``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nvflare.private.fed.app.simulator import simulator_runner

from sfl.engine import flower
from sfl.engine.flower.app_folder import write_app
from sfl.engine.flower.knock import names_in
from sfl.engine.launch import Launch
from sfl.engine.nvflare.controller import keep_ports
from sfl.engine.nvflare.decided import end_once_decided
from sfl.engine.nvflare.job import write_flower_job, write_job
from sfl.engine.nvflare.policy import allow_components

_MOST_PROCESSES = 16
"""Up to so many sites keep a process each. More take turns, and FLARE starts one anew for every task: 2 s each."""

_PAUSE = 0.2  # seconds that Flower's processes sleep between two looks for work: all share this machine
_WAIT = 400.0  # seconds for the nodes to connect: FLARE starts them one after the other, on a machine that may be busy


def simulate(launch: Launch, *, through_flower: bool = False) -> int:
    """Run the job of ``launch`` in FLARE's simulator.

    Args:
        launch: The run.
        through_flower: Whether FLARE carries Flower, which carries the job, instead of the job itself.

    Returns:
        The simulator's exit code.
    """
    if not through_flower:
        launch.add_settings(keeper=os.getpid())
    settings = launch.read_settings()
    names = list(settings["names"])
    what = f"NVIDIA FLARE simulator, {settings['workers']} workers"
    place = launch.folder / "flare-job"
    if through_flower:
        what = f"Flower in {what}"
        launch.add_settings(wait=_WAIT)
        job = write_flower_job(place, "sfl", write_app(launch.folder / "app", launch.folder, what), names)
    else:
        job = write_job(place, "sfl", launch.folder, names, what)
    least = len(names) if through_flower else int(settings["workers"])  # a Flower node runs as long as the job
    workspace = launch.folder / "flare"
    allow_components(workspace / "local")
    keep_ports()
    runner = simulator_runner.SimulatorRunner(
        job_folder=str(job),
        workspace=str(workspace),
        clients=",".join(names),
        threads=min(len(names), max(least, _MOST_PROCESSES)),
    )
    with _flower_beside(launch.folder / "flower") if through_flower else nullcontext():
        end_once_decided(launch)
        return int(runner.run() or 0)


@contextmanager
def _flower_beside(folder: Path) -> Generator[None]:
    """FLARE starts SuperLink and SuperNodes; what those start by name are forks of one more process of ours."""
    home = folder / "home"
    home.mkdir(parents=True)
    hooks = Path(flower.__file__).parent / "hooks"  # what FLARE starts waits too long
    sys.path.insert(0, str(hooks))  # of which FLARE makes its clients' PYTHONPATH
    os.environ["FLWR_HOME"] = str(home)  # else apps stay in the user's own
    for variable, place in (("PYTHONPATH", hooks), ("PATH", names_in(folder))):
        os.environ[variable] = os.pathsep.join([str(place), *filter(None, [os.environ.get(variable)])])
    with subprocess.Popen([sys.executable, "-m", "sfl.engine.flower.commands", str(folder), str(_PAUSE)]) as commands:
        try:
            yield
        finally:
            commands.terminate()


if __name__ == "__main__":
    sys.exit(simulate(Launch(Path(sys.argv[1])), through_flower="--flower" in sys.argv[2:]))
