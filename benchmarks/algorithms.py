"""How algorithms converge where sites differ, in the manner of Figure 4 of the FLARE paper (Roth et al. 2022).

``python benchmarks/algorithms.py [digits] [fashion]`` runs FedAvg, FedProx, FedOpt, SCAFFOLD, Ditto and cyclic transfer
over Dirichlet α and several seeds, and FedAvg against FedBuff in simulated time; results go to
``results/algorithms.{json,md,svg}``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from images import ImageSite, accuracy, initial
from sfl.engine.clock import VirtualClock
from sfl.env import SimEnv
from sfl.recipe import (
    CyclicRecipe,
    DittoRecipe,
    FedAvgRecipe,
    FedBuffRecipe,
    FedOptRecipe,
    FedProxRecipe,
    RunResult,
    ScaffoldRecipe,
)
from sfl.types import FederationConfig

RESULTS = Path(__file__).parent / "results"
ALPHAS = (1.0, 0.5, 0.3, 0.1)
SEEDS = (0, 1, 2)
SITES = 8
EPOCHS = {"digits": 8, "fashion": 4}
ROUNDS = {"digits": 25, "fashion": 15}
RATE = {"digits": 0.05, "fashion": 0.05}
CPU = SimEnv(device="cpu")

Kind = tuple[Callable[..., FedAvgRecipe], dict[str, Any]]
KINDS: dict[str, Kind] = {
    "FedAvg": (FedAvgRecipe, {}),
    "FedProx, μ = 0.1": (FedProxRecipe, {"proximal_mu": 0.1}),
    "FedAvgM, β = 0.6": (FedOptRecipe, {"optimizer": "momentum", "beta1": 0.6, "server_learning_rate": 1.0}),
    "FedAdam, η = 0.01": (FedOptRecipe, {"optimizer": "adam", "server_learning_rate": 0.01}),
    "SCAFFOLD": (ScaffoldRecipe, {}),
    "Ditto, global model": (DittoRecipe, {"personal_lambda": 0.5}),
    "cyclic": (CyclicRecipe, {}),
}


def run(
    task: str, kind: Kind, alpha: float, seed: int, *, env: SimEnv = CPU, rounds: int = 0, **more: Any
) -> RunResult:
    """One run: the accuracy of its global model after each round is among its figures."""
    make, options = kind
    ditto = make is DittoRecipe
    recipe = make(
        name="algorithms",
        client=ImageSite,
        client_kwargs={
            "task": task, "sites": SITES, "alpha": alpha, "seed": seed, "epochs": EPOCHS[task],
            "learning_rate": RATE[task],
        },
        initial_parameters=lambda: initial(task, seed),
        central=lambda parameters: accuracy(task, parameters),
        federation=FederationConfig(num_clients=SITES, num_rounds=rounds or ROUNDS[task], seed=seed, **more),
        evaluate_every=ROUNDS[task] if ditto else 1,
        **options,
    )  # fmt: skip
    return recipe.execute(env)


def curve(result: RunResult) -> list[float]:
    """Accuracy after each round."""
    return [round(entry.central["accuracy"], 4) for entry in result.rounds if entry.central]


def converge(task: str) -> list[dict[str, Any]]:
    """Every algorithm, α and seed."""
    rows = []
    for alpha in ALPHAS:
        for name, kind in KINDS.items():
            results = [run(task, kind, alpha, seed) for seed in SEEDS]
            row = {"task": task, "alpha": alpha, "algorithm": name, "curves": [curve(result) for result in results]}
            if name.startswith("Ditto"):
                own = [result.rounds[-1].evaluation["personal_accuracy"] for result in results]
                row["personal"] = [round(value, 4) for value in own]
                row["global_at_sites"] = [round(result.rounds[-1].evaluation["accuracy"], 4) for result in results]
            rows.append(row)
            final = statistics.mean(done[-1] for done in row["curves"])
            sys.stdout.write(f"{task} α={alpha} {name}: {final:.3f}\n")
            sys.stdout.flush()
    return rows


def race(task: str) -> list[dict[str, Any]]:
    """FedAvg, FedAvg that waits for six of eight, and FedBuff, in simulated time, where sites differ in speed."""
    env = SimEnv(device="cpu", clock=VirtualClock(site_seconds=60.0, site_spread=0.8))
    ways: dict[str, tuple[Kind, int, dict[str, Any]]] = {
        "FedAvg, waits for all": (KINDS["FedAvg"], 20, {}),
        "FedAvg, 6 of 8": (KINDS["FedAvg"], 40, {"wait_for": 6}),
        "FedBuff, K = 2": ((FedBuffRecipe, {"buffer": 2}), 160, {}),
    }
    rows = []
    for name, (kind, rounds, more) in ways.items():
        for seed in SEEDS:
            result = run(task, kind, 0.5, seed, env=env, rounds=rounds, **more)
            path = [(r.fit["simulated_seconds"], r.central["accuracy"]) for r in result.rounds if r.central]
            rows.append({"task": task, "way": name, "seed": seed, "path": [(round(t), round(a, 4)) for t, a in path]})
    return rows


def to_reach(path: list[tuple[float, float]], goal: float) -> float | None:
    """Simulated seconds to an accuracy."""
    return next((time for time, value in path if value >= goal), None)


def rounds_to(path: list[float], goal: float) -> float:
    """Rounds to an accuracy; infinite where it is not reached."""
    return next((number for number, value in enumerate(path) if value >= goal), np.inf)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """What was found, in Markdown."""
    lines = [
        "# How algorithms converge where sites differ",
        "",
        f"Held-out accuracy of the global model after the last round, {SITES} sites, mean and standard deviation of "
        f"{len(SEEDS)} seeds; an MLP of {64} hidden units under plain SGD. Digits: {ROUNDS['digits']} rounds of "
        f"{EPOCHS['digits']} epochs; Fashion-MNIST (12,000 images): {ROUNDS['fashion']} of {EPOCHS['fashion']}. "
        "`python benchmarks/algorithms.py`",
        "",
        "| task | algorithm | " + " | ".join(f"α = {alpha:g}" for alpha in ALPHAS) + " |",
        "|---|---|" + "---|" * len(ALPHAS),
    ]
    for task in ("digits", "fashion"):
        for name in KINDS:
            mine = {r["alpha"]: r for r in found["convergence"] if (r["task"], r["algorithm"]) == (task, name)}
            if mine:
                ends = [[path[-1] for path in mine[alpha]["curves"]] for alpha in ALPHAS]
                cells = [f"{100 * statistics.mean(end):.1f} ± {100 * statistics.stdev(end):.1f}" for end in ends]
                lines.append(f"| {task} | {name} | " + " | ".join(cells) + " |")
    lines += ["", "Rounds to the accuracy that FedAvg ends with (median of seeds; — not reached):", ""]
    lines += ["| task | algorithm | " + " | ".join(f"α = {alpha:g}" for alpha in ALPHAS) + " |"]
    lines += ["|---|---|" + "---|" * len(ALPHAS)]
    for task in ("digits", "fashion"):
        rows = {(r["alpha"], r["algorithm"]): r["curves"] for r in found["convergence"] if r["task"] == task}
        for name in KINDS if rows else ():
            if name.startswith("Ditto"):  # its global model is FedAvg's
                continue
            cells = []
            for alpha in ALPHAS:
                goals = [path[-1] for path in rows[alpha, "FedAvg"]]
                pairs = zip(rows[alpha, name], goals, strict=True)
                middle = statistics.median(rounds_to(path, goal) for path, goal in pairs)
                cells.append("—" if np.isinf(middle) else f"{middle:g}")
            lines.append(f"| {task} | {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *more(found)]) + "\n"


def more(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of personal models, and of simulated time."""
    lines = ["", "Ditto: accuracy on the sites' own images, of the global and of the personal models (means):", ""]
    lines += ["| task | α | global | personal |", "|---|---|---|---|"]
    for row in found["convergence"]:
        if "personal" in row:
            pair = (statistics.mean(row[key]) for key in ("global_at_sites", "personal"))
            cells = " | ".join(f"{100 * value:.1f}" for value in pair)
            lines.append(f"| {row['task']} | {row['alpha']:g} | {cells} |")
    lines += ["", "Simulated minutes to 80 % on digits (α = 0.5), sites' speeds log-normal with σ = 0.8:", ""]
    lines += ["| way | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |", "|---|" + "---|" * len(SEEDS)]
    for way in dict.fromkeys(row["way"] for row in found["race"]):
        reached = [to_reach(row["path"], 0.8) for row in found["race"] if row["way"] == way]
        lines.append(f"| {way} | " + " | ".join("—" if t is None else f"{t / 60:.1f}" for t in reached) + " |")
    return lines


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy over rounds, one panel for each task and α, and over simulated time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sfl"
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in found["convergence"]))
    figure, grid = plt.subplots(len(tasks), len(ALPHAS), figsize=(14, 3.4 * len(tasks)), squeeze=False, sharey="row")
    for axes, task in zip(grid, tasks, strict=True):
        for axis, alpha in zip(axes, ALPHAS, strict=True):
            for row in found["convergence"]:
                if (row["task"], row["alpha"]) != (task, alpha) or row["algorithm"].startswith("Ditto"):
                    continue  # Ditto's global model is FedAvg's
                paths = np.array(row["curves"])
                mean, spread = paths.mean(0), paths.std(0)
                axis.plot(mean, label=row["algorithm"], linewidth=1.4)
                axis.fill_between(range(len(mean)), mean - spread, mean + spread, alpha=0.12)
            axis.set_title(f"{task}, α = {alpha:g}", fontsize=10)
            axis.set_xlabel("round")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("held-out accuracy")
        axes[0].set_ylim(bottom=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(tasks: list[str]) -> None:
    """Run what is named, keep what was found of the rest."""
    path = RESULTS / "algorithms.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    found = {"convergence": [], "race": []} | found
    for task in tasks:
        found["convergence"] = [r for r in found["convergence"] if r["task"] != task] + converge(task)
        if task == "digits":
            found["race"] = race(task)
        path.write_text(json.dumps(found) + "\n")
    (RESULTS / "algorithms.md").write_text(table(found))
    draw(found, RESULTS / "algorithms.svg")


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits", "fashion"])
