"""What privacy costs in accuracy: digits and ESM2 over ε, for sites and for examples, plain and correlated noise.

``python benchmarks/privacy_utility.py [digits] [esm2]``; each writes its own rows into
``results/privacy_utility.json``, from which the table is written and the curves are drawn.
"""

from __future__ import annotations

import atexit
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from sfl.client.base import BaseFederatedClient
from sfl.core.mechanism import DpEvent
from sfl.esm2.config import ESM2ClientConfig, ESM2RunConfig
from sfl.esm2.model import BUNDLED, find_model
from sfl.esm2.server import esm2_recipe
from sfl.privacy import noise
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.dpsgd import calibrate_dpsgd, dpsgd_event, poisson_batches
from sfl.privacy.runner_utils import build_protections
from sfl.recipe import FedAvgRecipe
from sfl.train.dpsgd import ExampleLosses, PrivateTrainer
from sfl.train.module import copy_parameters, load_parameters
from sfl.train.trainer import BatchLoss
from sfl.types import ClientUpdate, Config, Evaluation, FederationConfig, Parameters

RESULTS = Path(__file__).parent / "results"
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
SEEDS = (0, 1, 2)
SITES, ROUNDS, TURNS = 400, 40, 8
DELTA_SITES, DELTA_EXAMPLES = 1e-3, 1e-4


# Digits


@lru_cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16.0, labels[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        return nn.Linear(64, 10)


def accuracy(parameters: Parameters) -> dict[str, float]:
    _, _, images, labels = digits()
    scores = images @ parameters["weight"].T + parameters["bias"]
    return {"accuracy": float((scores.argmax(1) == labels).mean())}


class Site(BaseFederatedClient):
    """A few digits, full-batch gradient descent of softmax regression."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, sites: int) -> None:
        super().__init__(client_id=client_id, device=device)
        images, labels, _, _ = digits()
        self.x, self.y = images[client_id::sites], np.eye(10, dtype=np.float32)[labels[client_id::sites]]

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        weight, bias = parameters["weight"].copy(), parameters["bias"].copy()
        for _ in range(5):
            scores = self.x @ weight.T + bias
            odds = np.exp(scores - scores.max(1, keepdims=True))
            error = (odds / odds.sum(1, keepdims=True) - self.y) / len(self.y)
            weight -= 0.5 * error.T @ self.x
            bias -= 0.5 * error.sum(0)
        return {"weight": weight, "bias": bias}, len(self.y), {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return None, 1, {}


class PrivateSite(Site):
    """Seven hundred digits, DP-SGD of the same model: ε is that of each digit."""

    def __init__(self, client_id: int = 0, device: str = "cpu", *, sites: int, epsilon: float, rounds: int) -> None:
        super().__init__(client_id=client_id, device=device, sites=sites)
        self.rate, self.steps = 64 / len(self.x), 10
        self.noise = 0.0
        if math.isfinite(epsilon):
            self.noise = calibrate_dpsgd(
                epsilon, delta=DELTA_EXAMPLES, sampling_rate=self.rate, steps=self.steps * rounds
            )
        self.trainer = PrivateTrainer(
            losses=losses, size=lambda batch: len(batch[0]), learning_rate=0.02, noise_multiplier=self.noise,
            expected_batch_size=64.0,
        )  # fmt: skip
        self.module = network()

    def privacy_event(self, config: Config) -> DpEvent:
        return dpsgd_event(self.noise, self.rate, self.steps)

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        load_parameters(self.module, parameters)
        x, y = torch.from_numpy(self.x), torch.from_numpy(self.y.argmax(1))
        samples = poisson_batches(len(x), self.rate, self.steps, 1 << 16, noise.secret())
        batches = ([(x[indices], y[indices]) for indices in sample] for sample in samples)
        self.trainer.fit(self.module, batches, int(config["round"]))
        return copy_parameters(self.module), len(x), {}


def losses(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> ExampleLosses:
    each = nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    return ExampleLosses(each, BatchLoss(each.sum(), len(each), torch.zeros((), dtype=torch.int64)))


@dataclass(frozen=True)
class Kind:
    """A row of the table: the federation and the options that make it."""

    unit: str
    name: str
    federation: FederationConfig
    options: dict[str, Any]


KINDS = (
    Kind("site", "Gaussian, all sites", FederationConfig(num_clients=SITES, num_rounds=ROUNDS), {}),
    Kind(
        "site",
        "Gaussian, Poisson 1/8",
        FederationConfig(num_clients=SITES, num_rounds=ROUNDS, fraction_fit=1 / TURNS, sampling="poisson"),
        {},
    ),
    Kind(
        "site",
        "Gaussian, turns of 8",
        FederationConfig(num_clients=SITES, num_rounds=ROUNDS, fraction_fit=1 / TURNS, sampling="turns"),
        {},
    ),
    Kind(
        "site",
        "banded-mf, turns of 8",
        FederationConfig(num_clients=SITES, num_rounds=ROUNDS, fraction_fit=1 / TURNS, sampling="turns"),
        {"dp_mechanism": "banded-mf"},
    ),
)


def site_run(kind: Kind, epsilon: float, seed: int) -> float:
    federation = replace(kind.federation, seed=seed)
    recipe = FedAvgRecipe(
        name="digits", client=Site, client_kwargs={"sites": SITES}, federation=federation, central=accuracy,
        initial_parameters=copy_parameters(network()), evaluate_every="end",
    )  # fmt: skip
    if math.isfinite(epsilon):
        options = PrivacyConfig(dp=True, dp_clip=0.5, dp_delta=DELTA_SITES, dp_target_epsilon=epsilon, **kind.options)
        protections = build_protections(options, federation)
        recipe = replace(recipe, mechanisms=protections.mechanisms, budget=protections.budget)
    return recipe.execute().rounds[-1].central["accuracy"]


def example_run(epsilon: float, seed: int) -> float:
    rounds = 10
    budget = build_protections(PrivacyConfig(dpsgd=True, dpsgd_delta=DELTA_EXAMPLES), FederationConfig()).example_budget
    recipe = FedAvgRecipe(
        name="digits", client=PrivateSite, client_kwargs={"sites": 2, "epsilon": epsilon, "rounds": rounds},
        federation=FederationConfig(num_clients=2, num_rounds=rounds, seed=seed), central=accuracy,
        initial_parameters=copy_parameters(network()), evaluate_every="end", example_budget=budget,
    )  # fmt: skip
    return recipe.execute().rounds[-1].central["accuracy"]


def digits_rows() -> list[dict[str, Any]]:
    rows = [row("digits", kind.unit, kind.name, lambda e, s, k=kind: site_run(k, e, s)) for kind in KINDS]
    return [*rows, row("digits", "example", "DP-SGD, 2 sites", example_run)]


def row(task: str, unit: str, name: str, run: Callable[[float, int], float]) -> dict[str, Any]:
    found: dict[str, Any] = {"task": task, "unit": unit, "name": name, "values": []}
    for epsilon in EPSILONS:
        values = [run(epsilon, seed) for seed in SEEDS]
        found["values"].append([None if math.isinf(epsilon) else epsilon, statistics.median(values)])
        print(task, unit, name, epsilon, [round(value, 4) for value in values], flush=True)
    return found


# ESM2


FROZEN = "esm*,lm_head.dense*,lm_head.layer_norm*"
"""All but the bias of the scores: noise on a sum of sites grows with the coordinates that are trained."""


@lru_cache
def fresh_model() -> str:
    """Folder of a model of the bundled one's architecture with random weights: there is something to learn."""
    from transformers import AutoTokenizer, EsmForMaskedLM

    folder = Path(tempfile.mkdtemp(prefix="sfl-fresh-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    bundled = find_model(BUNDLED).location
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(7)
        EsmForMaskedLM(EsmForMaskedLM.from_pretrained(bundled).config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
    return str(folder)


def esm2_run(kind: Esm2Kind, epsilon: float) -> float:
    """Perplexity on the global held-out proteins after the run."""
    privacy = kind.privacy(epsilon) if math.isfinite(epsilon) else PrivacyConfig(freeze_layers=kind.freeze)
    model = fresh_model() if kind.fresh else BUNDLED
    client = ESM2ClientConfig(
        local_steps=kind.steps, learning_rate=kind.rate, batch_size=8, max_length=64, eval_proteins=64, model=model
    )
    config = ESM2RunConfig(federation=kind.federation, client=client, privacy=privacy)
    recipe = replace(esm2_recipe(config, find_model(model)), evaluate_every="end")
    return recipe.execute().rounds[-1].central["perplexity"]


@dataclass(frozen=True)
class Esm2Kind:
    unit: str
    name: str
    federation: FederationConfig
    privacy: Callable[[float], PrivacyConfig]
    steps: int
    rate: float
    fresh: bool = True
    freeze: str = ""


def examples(epsilon: float) -> PrivacyConfig:
    return PrivacyConfig(dpsgd=True, dpsgd_target_epsilon=epsilon, dpsgd_delta=1e-4)


def of_sites(mechanism: Any) -> Callable[[float], PrivacyConfig]:
    return lambda epsilon: PrivacyConfig(
        dp=True, dp_clip=1.0, dp_delta=1e-2, dp_target_epsilon=epsilon, dp_mechanism=mechanism, freeze_layers=FROZEN
    )


def esm2_kinds() -> list[Esm2Kind]:
    two = FederationConfig(num_clients=2, num_rounds=8)
    everybody = FederationConfig(num_clients=24, num_rounds=8)
    turns = FederationConfig(num_clients=24, num_rounds=8, sampling="turns", fraction_fit=0.25)
    bias: dict[str, Any] = {"steps": 1, "rate": 0.3, "freeze": FROZEN}
    return [
        Esm2Kind("example", "DP-SGD, the demo's model", two, examples, steps=8, rate=1e-3, fresh=False),
        Esm2Kind("example", "DP-SGD, random weights", two, examples, steps=8, rate=4e-3),
        Esm2Kind("site", "Gaussian, all 24 sites", everybody, of_sites("gaussian"), **bias),
        Esm2Kind("site", "Gaussian, turns of 4", turns, of_sites("gaussian"), **bias),
        Esm2Kind("site", "banded-mf, turns of 4", turns, of_sites("banded-mf"), **bias),
    ]


def esm2_rows() -> list[dict[str, Any]]:
    rows = []
    for kind in esm2_kinds():
        values = []
        for epsilon in EPSILONS:
            values.append([None if math.isinf(epsilon) else epsilon, esm2_run(kind, epsilon)])
            print("esm2", kind.unit, kind.name, values[-1], flush=True)
        rows.append({"task": "esm2", "unit": kind.unit, "name": kind.name, "values": values})
    return rows


# Table and curves


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What privacy costs\n",
        "Digits: accuracy of softmax regression on 397 held-out digits, median of three runs; 1,400 digits over",
        f"{SITES} sites ({ROUNDS} rounds, clip 0.5, δ = {DELTA_SITES:g}) or 2 sites (DP-SGD, 100 steps each, "
        f"δ = {DELTA_EXAMPLES:g}).",
        "ESM2: perplexity on 64 held-out proteins (crops of 64), one run; lower is better, counting residues alone",
        "gives about 18.2, knowing nothing 33. DP-SGD: 2 sites, 8 rounds of 8 steps, all weights, δ = 0.0001; the",
        "demo's model is pretrained, so there is little left to learn. Sites: 8 rounds, δ = 0.01, random weights of",
        "which only the bias of the scores is trained (`--freeze-layers`). `python benchmarks/privacy_utility.py`\n",
        "| task | unit | noise | " + " | ".join(f"ε = {e:g}" if math.isfinite(e) else "none" for e in EPSILONS) + " |",
        "|---|---|---|" + "---|" * len(EPSILONS),
    ]
    for each in rows:
        shown = [f"{v:.1%}" if each["task"] == "digits" else f"{v:.2f}" for _, v in each["values"]]
        lines.append(f"| {each['task']} | {each['unit']} | {each['name']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def curves(rows: list[dict[str, Any]]) -> str:
    """Accuracy on digits over ε, as SVG."""
    left, top, width, height = 60, 20, 420, 260
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 330" font-family="sans-serif" font-size="13">',
        '<rect width="760" height="330" fill="white"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + height * (1 - share)
        lines.append(
            f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/><text x="14" y="{y + 4:.0f}">{share:.0%}</text>'
        )
    for epsilon in (1, 2, 4, 8):
        lines.append(
            f'<text x="{left + width * math.log2(epsilon) / 3 - 4:.0f}" y="{top + height + 22}">{epsilon}</text>'
        )
    lines.append(f'<text x="{left + width / 2 - 60:.0f}" y="{top + height + 42}">ε (logarithmic)</text>')
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    for number, (each, colour) in enumerate(zip((r for r in rows if r["task"] == "digits"), colours, strict=False)):
        points = [
            (left + width * math.log2(epsilon) / 3, top + height * (1 - value))
            for epsilon, value in each["values"]
            if epsilon is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        y = top + 14 + 22 * number
        lines.append(f'<circle cx="505" cy="{y - 4}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="516" y="{y}">{each["unit"]}: {each["name"]}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main(tasks: list[str]) -> None:
    torch.set_num_threads(1)
    path = RESULTS / "privacy_utility.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    for task, made in (("digits", digits_rows), ("esm2", esm2_rows)):
        if task in tasks:
            rows = [each for each in rows if each["task"] != task] + made()
            path.write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "privacy_utility.md").write_text(table(rows))
    (RESULTS / "privacy_utility.svg").write_text(curves(rows))


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits", "esm2"])
