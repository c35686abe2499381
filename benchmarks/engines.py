"""What SFL adds to, or saves on, the bare engines: seconds per round beyond local work.

    python benchmarks/engines.py [--engines nvflare,flower] [--repeats 3]

Three sites whose work is nothing, four rounds of two exchanges (train, evaluate). The bare jobs in `bare/` are written
by hand on each engine with its defaults. Both sides run in turn (A B A B …) on this machine; a figure is the median
over the rounds after the first and over the repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np

from sfl import FedAvgRecipe, FederationConfig
from sfl.client.base import BaseFederatedClient
from sfl.core.events import Event, RoundFinished
from sfl.engine.guard import Guarded
from sfl.env import environment
from sfl.env.remote import child_environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGETS = {"nvflare": 0.25, "flower": 1.0, "nvflare-poc": 1.0, "flower-deploy": 1.0}


class Nothing(BaseFederatedClient):
    """Adds one."""

    def compute_update(self, parameters, config):
        return {name: value + 1.0 for name, value in parameters.items()}, 1, {}

    def evaluate(self, parameters, config):
        return float(parameters["w"].sum()), 1, {}


def ours(engine: str) -> list[float]:
    recipe = FedAvgRecipe(
        name="nothing",
        client=Nothing,
        initial_parameters={"w": np.zeros(5)},
        federation=FederationConfig(num_clients=3, num_rounds=4),
    )
    ends: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, RoundFinished):
            ends.append(sum(event.seconds.values()))

    recipe.execute(environment(engine), observers=[listen])
    return ends[1:]


def bare(engine: str) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="bare-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        report = folder / "report.json"
        command = [sys.executable, str(HERE / "bare" / "run.py"), engine, str(report), str(folder)]
        with Guarded(command, log=folder / "log", env=child_environment(1, folder / "tmp"), folder=folder) as guard:
            while not report.exists():
                if guard.code() is not None and not report.exists():
                    raise RuntimeError(f"the bare {engine} job must write its report, got:\n{guard.tail(30)}")
                time.sleep(0.1)
            time.sleep(0.2)
            return json.loads(report.read_text())


def known() -> dict[str, str]:
    """Rows of engines that were measured before."""
    lines = (RESULTS / "engines.md").read_text(encoding="utf-8").splitlines()
    found = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    return {engine: found[engine] for engine in TARGETS if engine in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(TARGETS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = known()
    for engine in args.engines.split(","):
        sides: dict[str, list[float]] = {"bare": [], "sfl": []}
        for _ in range(args.repeats):
            sides["bare"] += bare(engine)[1:]
            sides["sfl"] += ours(engine)[1:]
        left, right = median(sides["bare"]), median(sides["sfl"])
        ratio = right / left
        ok = "yes" if ratio <= TARGETS[engine] else "NO"
        when = f"{args.repeats}, {datetime.now(UTC):%Y-%m-%d}"
        rows[engine] = f"| {engine} | {left:.2f} | {right:.2f} | {ratio:.2f} | ≤ {TARGETS[engine]:g} | {ok} | {when} |"
        print(rows[engine], flush=True)
    head = [
        "# Seconds per round beyond local work",
        "",
        "Three sites, two exchanges a round; medians over the runs of each side, which take turns. Bare: the same job",
        "by hand on the engine with its defaults (`bare/`).",
        "",
        "| engine | bare | sfl | ratio | target | ok | runs, when |",
        "|---|---|---|---|---|---|---|",
    ]
    (RESULTS / "engines.md").write_text("\n".join([*head, *rows.values()]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
