"""What aggregation rules stand: attack x rule x heterogeneity on digits, 20 sites of which 4 lie.

``python benchmarks/robustness.py [matrix] [cost]``: each writes its own part of ``results/robustness.json``, from which
the tables are written and the heat map is drawn. A run that ends with an error (too few usable updates for the rule) is
shown as ``stops``. ``cost`` times every rule on 50 updates of a million numbers, on one core.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from sfl.client.base import BaseFederatedClient
from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.core.task import Update
from sfl.env import SimEnv
from sfl.errors import RoundError
from sfl.recipe import FedAvgRecipe
from sfl.server.attacks import Attack
from sfl.server.robust import (
    NNM,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    CosineTrust,
    FLTrust,
    FoundationFL,
    GeometricMedian,
    Krum,
    MultiKrum,
    PreAggregated,
    TrimmedMean,
)
from sfl.server.robust.gram import distances_between, squared_distances
from sfl.server.robust.stack import Stack
from sfl.train.partition import parse_partition, partition_indices
from sfl.types import ClientUpdate, Config, Evaluation, FederationConfig, Parameters

RESULTS = Path(__file__).parent / "results"
SITES, LIARS, ROUNDS, STEPS, RATE = 20, 4, 40, 5, 0.5
ROOT = 100  # digits of the server's own
ALPHAS = (1.0, 0.1)
SEEDS = (0, 1, 2)


# Data and sites


@lru_cache
def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """1,300 to share out, 100 of the server's own, 397 to evaluate on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16.0, labels[order]
    cuts = {"sites": slice(0, 1300), "root": slice(1300, 1400), "test": slice(1400, None)}
    return {name: (images[cut], labels[cut]) for name, cut in cuts.items()}


@lru_cache
def shared_out(alpha: float, seed: int) -> list[np.ndarray]:
    labels = digits()["sites"][1]
    spec = parse_partition(f"dirichlet:{alpha:g}")
    return partition_indices(
        spec, len(labels), num_clients=SITES, seed=seed, values=[str(label) for label in labels], min_size=5
    )


def trained(parameters: Parameters, x: np.ndarray, y: np.ndarray) -> Parameters:
    """Full-batch gradient steps of softmax regression."""
    weight, bias, wanted = parameters["weight"].copy(), parameters["bias"].copy(), np.eye(10, dtype=np.float32)[y]
    for _ in range(STEPS):
        scores = x @ weight.T + bias
        odds = np.exp(scores - scores.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - wanted) / len(y)
        weight -= RATE * error.T @ x
        bias -= RATE * error.sum(0)
    return {"weight": weight, "bias": bias}


class Site(BaseFederatedClient):
    """Its share of the digits; it exchanges label l for 9 - l where it is told to."""

    flips_labels = True

    def __init__(self, client_id: int = 0, device: str = "cpu", *, alpha: float, seed: int) -> None:
        super().__init__(client_id=client_id, device=device)
        mine = shared_out(alpha, seed)[client_id]
        images, labels = digits()["sites"]
        self.x, self.y = images[mine], labels[mine]

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        labels = 9 - self.y if config.get("flip_labels") else self.y
        return trained(parameters, self.x, labels), len(labels), {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return None, 1, {}


def root_update(parameters: Parameters, _: int) -> Parameters:
    after = trained(parameters, *digits()["root"])
    return {name: after[name] - value for name, value in parameters.items()}


def accuracy(parameters: Parameters) -> dict[str, float]:
    images, labels = digits()["test"]
    with np.errstate(all="ignore"):  # what an attack has made of the model
        scores = images @ parameters["weight"].T + parameters["bias"]
    return {"accuracy": float((scores.argmax(1) == labels).mean())}


def root_alone() -> float:
    """Accuracy of the server's own digits without any site, after as many steps."""
    parameters: Parameters = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
    for _ in range(ROUNDS):
        parameters = trained(parameters, *digits()["root"])
    return accuracy(parameters)["accuracy"]


# The matrix

RULES: dict[str, Aggregator] = {
    "mean": WeightedMean(),
    "krum": Krum(LIARS),
    "multi-krum": MultiKrum(LIARS),
    "bulyan": Bulyan(LIARS),
    "trimmed mean": TrimmedMean(LIARS / SITES),
    "median": CoordinateMedian(),
    "geometric median": GeometricMedian(),
    "centered clipping": CenteredClipping(1.0, 3),
    "foundation-fl-ndss": FoundationFL(LIARS),
    "foundation-fl (cosine)": CosineTrust(0.0, root_update),
    "fltrust": FLTrust(root_update),
    "nnm + trimmed mean": PreAggregated(TrimmedMean(LIARS / SITES), NNM(LIARS)),
    "nnm + krum": PreAggregated(Krum(LIARS), NNM(LIARS)),
    "bucketing + geometric median": PreAggregated(GeometricMedian(), Bucketing(2)),
}
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign-flip": Attack("sign-flip", LIARS),
    "sign-flip x10": Attack("sign-flip", LIARS, 10.0),
    "label-flip": Attack("label-flip", LIARS),
    "gaussian x10": Attack("gaussian", LIARS, 100.0),
    "nan": Attack("nan", LIARS),
    "alie": Attack("alie", LIARS),
    "ipm": Attack("ipm", LIARS),
    "mimic": Attack("mimic", LIARS),
    "min-max": Attack("min-max", LIARS),
    "min-sum": Attack("min-sum", LIARS),
    "num-examples": Attack("num-examples", LIARS),
    "replay": Attack("replay", LIARS),
}


@dataclass(frozen=True)
class Cell:
    """One place of the matrix, over all seeds; ``accuracy`` is ``None`` where a run stops."""

    alpha: float
    rule: str
    attack: str
    accuracy: float | None


def run(rule: str, attack: str, alpha: float, seed: int) -> float | None:
    recipe = FedAvgRecipe(
        name="robustness", client=Site, client_kwargs={"alpha": alpha, "seed": seed}, aggregator=RULES[rule],
        initial_parameters={"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)},
        federation=FederationConfig(num_clients=SITES, num_rounds=ROUNDS, seed=seed), central=accuracy,
        evaluate_every="end",
    )  # fmt: skip
    try:
        return recipe.execute(SimEnv(attack=ATTACKS[attack], device="cpu")).rounds[-1].central["accuracy"]
    except RoundError:
        return None


def matrix(seeds: tuple[int, ...]) -> list[Cell]:
    cells: list[Cell] = []
    for alpha in ALPHAS:
        for rule in RULES:
            for attack in ATTACKS:
                found = [run(rule, attack, alpha, seed) for seed in seeds]
                whole = [value for value in found if value is not None]
                cells.append(Cell(alpha, rule, attack, statistics.median(whole) if len(whole) == len(found) else None))
            shown = " ".join("stops" if c.accuracy is None else f"{c.accuracy:.3f}" for c in cells[-len(ATTACKS) :])
            print(f"{alpha:g} {rule:30} {shown}", flush=True)
    return cells


# Tables and heat map


def kept(cells: list[Cell]) -> dict[tuple[float, str, str], float | None]:
    """Share of the accuracy of the mean without an attack, at the same heterogeneity."""
    clean = {c.alpha: c.accuracy or 1.0 for c in cells if (c.rule, c.attack) == ("mean", "none")}
    return {(c.alpha, c.rule, c.attack): None if c.accuracy is None else c.accuracy / clean[c.alpha] for c in cells}


def tables(cells: list[Cell], seeds: int) -> str:
    lines = [
        "# What aggregation rules stand\n",
        f"Softmax regression on 397 held-out digits after {ROUNDS} rounds of {STEPS} full-batch steps; 1,300 digits on "
        f"{SITES} sites, of which {LIARS} lie;",
        f"median of {seeds} runs. The root update is that of {ROOT} digits of the server's own, which alone reach "
        f"{root_alone():.1%}. In brackets: the share",
        "of the accuracy of the mean without an attack that is kept. `stops`: the rule refuses a round of so few "
        "usable updates.",
        "`python benchmarks/robustness.py`\n",
    ]
    shares = kept(cells)
    for alpha in ALPHAS:
        lines += [
            f"## Dirichlet {alpha:g}\n",
            "| rule | " + " | ".join(ATTACKS) + " |",
            "|---|" + "---|" * len(ATTACKS),
        ]
        for rule in RULES:
            row = {c.attack: c.accuracy for c in cells if (c.alpha, c.rule) == (alpha, rule)}
            said = []
            for attack in ATTACKS:
                value, share = row[attack], shares[alpha, rule, attack]
                said.append("stops" if value is None or share is None else f"{value:.1%} ({share:.0%})")
            lines.append(f"| {rule} | {' | '.join(said)} |")
        lines.append("")
    return "\n".join(lines)


def colour(share: float | None) -> str:
    """From orange (nothing is kept) over white to blue (all is); grey where a run stops."""
    if share is None:
        return "#bbbbbb"
    low, middle, high = (213, 94, 0), (250, 245, 235), (86, 160, 210)
    at = min(max(share, 0.0), 1.0)
    ends, part = ((low, middle), at / 0.7) if at < 0.7 else ((middle, high), (at - 0.7) / 0.3)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*ends, strict=True))


def heat_map(cells: list[Cell]) -> str:
    """Both matrices, one over the other, as SVG: no library that is at hand writes one without a browser."""
    wide, tall, left, head = 52, 22, 190, 100
    height = head + tall * len(RULES)
    size = (left + wide * len(ATTACKS) + 20, height * len(ALPHAS) + 20)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    shares = kept(cells)
    for number, alpha in enumerate(ALPHAS):
        top = number * height + head
        title = f"Dirichlet {alpha:g}: share of the clean accuracy kept, %"
        lines.append(f'<text x="10" y="{top - 62}" font-size="14">{title}</text>')
        for column, attack in enumerate(ATTACKS):
            x = left + wide * (column + 0.4)
            lines.append(f'<text x="{x:.0f}" y="{top - 6}" transform="rotate(-35 {x:.0f} {top - 6})">{attack}</text>')
        for row, rule in enumerate(RULES):
            y = top + tall * row
            lines.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{rule}</text>')
            for column, attack in enumerate(ATTACKS):
                share, x = shares[alpha, rule, attack], left + wide * column
                said = "stops" if share is None else f"{100 * share:.0f}"
                lines.append(
                    f'<rect x="{x}" y="{y}" width="{wide - 2}" height="{tall - 2}" fill="{colour(share)}"/>'
                    f'<text x="{x + wide / 2 - 1:.0f}" y="{y + 15}" text-anchor="middle">{said}</text>'
                )
    return "\n".join([*lines, "</svg>"]) + "\n"


# Cost

COUNT, LENGTH = 50, 1_000_000
COSTED: dict[str, Aggregator] = {
    "mean": WeightedMean(),
    "krum": Krum(10),
    "multi-krum": MultiKrum(10),
    "bulyan": Bulyan(10),
    "trimmed mean": TrimmedMean(0.2),
    "median": CoordinateMedian(),
    "geometric median": GeometricMedian(),
    "centered clipping": CenteredClipping(100.0, 3),
    "foundation-fl-ndss": FoundationFL(10),
    "krum, projection 1,000": Krum(10, projection=1000),
    "nnm + krum": PreAggregated(Krum(10), NNM(10)),
    "bucketing + median": PreAggregated(CoordinateMedian(), Bucketing(2)),
}


def cohort(common: float, spread: float) -> list[Update]:
    source = np.random.default_rng(0)
    rows = ((common + spread * source.standard_normal(LENGTH)).astype(np.float32) for _ in range(COUNT))
    return [Update(f"site-{number:02d}", {"w": row}, 1.0) for number, row in enumerate(rows)]


def best_of(work: Callable[[], object], times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def error(updates: list[Update], found: np.ndarray) -> float:
    """The largest relative error of the distances, against differences in float64 one pair at a time."""
    wide = [update.delta["w"].astype(np.float64) for update in updates]
    pairs = [(i, j) for i in range(0, COUNT, 5) for j in range(COUNT) if i != j]
    return max(abs(found[i, j] / float(np.square(wide[i] - wide[j]).sum()) - 1.0) for i, j in pairs)


def costs() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, common, spread in (("distances", 0.0, 1.0), ("distances near a common 1,000", 1e3, 1e-2)):
        stack = Stack.of(cohort(common, spread))
        seconds = best_of(lambda stack=stack: squared_distances(stack))
        found[name] = [seconds, error(list(stack.updates), squared_distances(stack))]
    updates = cohort(0.0, 1.0)
    exact = squared_distances(Stack.of(updates))
    drawn = distances_between(Stack.of(updates), 1000)
    off = ~np.eye(COUNT, dtype=bool)
    seconds = best_of(lambda: distances_between(Stack.of(updates), 1000), 3)
    found["distances, projection 1,000"] = [seconds, float(np.abs(drawn[off] / exact[off] - 1.0).max())]
    for name, rule in COSTED.items():
        found[name] = [best_of(lambda rule=rule: rule.aggregate(updates), 3), None]
        print(name, found[name], flush=True)
    return found


def cost_table(found: dict[str, Any]) -> str:
    lines = [
        "\n## Cost\n",
        f"CPU-seconds on one core for {COUNT} float32 updates of {LENGTH:,} numbers, the best of several; error: the "
        "largest relative one of a squared distance, against float64 one pair at a time.\n",
        "| what | CPU-seconds | error |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {s:.2f} | {'' if e is None else f'{e:.1g}'} |" for name, (s, e) in found.items()]
    return "\n".join(lines) + "\n"


def main(parts: list[str]) -> None:
    path = RESULTS / "robustness.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "matrix" in parts:
        started = time.process_time()
        cells = [[c.alpha, c.rule, c.attack, c.accuracy] for c in matrix(SEEDS)]
        found |= {"seeds": len(SEEDS), "cpu_seconds": round(time.process_time() - started), "cells": cells}
    if "cost" in parts:
        found["cost"] = costs()
    path.write_text(json.dumps(found, indent=1) + "\n")
    cells = [Cell(*cell) for cell in found["cells"]]
    (RESULTS / "robustness.md").write_text(tables(cells, found["seeds"]) + cost_table(found["cost"]))
    (RESULTS / "robustness.svg").write_text(heat_map(cells))


if __name__ == "__main__":
    main(sys.argv[1:] or ["matrix", "cost"])
