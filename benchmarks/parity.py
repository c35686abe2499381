"""Every algorithm on every engine: the same bits and the same figures as in-process, or what differs.

    python benchmarks/parity.py [--engines flower,nvflare] [--algorithms scaffold,ditto]

Five sites, three rounds, engines as real processes of this machine. Compared are the final state bit for bit
(parameters, what algorithm, aggregator and callbacks remember, the best model) and every figure of every round, site by
site. Results go to ``results/parity.{json,md}``; cells that were not run again stay as they were.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.core.aggregator import Aggregator
from sfl.core.rng import public
from sfl.core.secure import SecureSum
from sfl.env import environment
from sfl.errors import SflError
from sfl.io.tree import pack_tree
from sfl.privacy.he import CKKS
from sfl.privacy.secagg import SecAgg
from sfl.recipe import (
    CyclicRecipe,
    DittoRecipe,
    FedAvgRecipe,
    FedBuffRecipe,
    FedEvalRecipe,
    FedOptRecipe,
    FedProxRecipe,
    RunResult,
    ScaffoldRecipe,
    SwarmRecipe,
)
from sfl.server.robust import CenteredClipping, GeometricMedian, MultiKrum, TrimmedMean
from sfl.types import ClientUpdate, Config, Evaluation, FederationConfig, Parameters

RESULTS = Path(__file__).parent / "results"
ENGINES = ("flower", "nvflare", "flower-deploy", "nvflare-poc", "flower-in-nvflare")
SITES, ROUNDS, STEPS, RATE = 5, 3, 4, 0.05
SAME, WITHIN = "same bits", 1e-6

Cell = dict[str, Any]
Make = Callable[[], FedAvgRecipe]


class LeastSquares(BaseFederatedClient):
    """Descends on batches of its own rows, heeds all terms, and keeps statistics and a count as BatchNorm does."""

    honours = frozenset({"proximal", "drift", "learning_rate"})

    def __init__(self, client_id: int = 0, device: str = "cpu") -> None:
        super().__init__(client_id, device)
        draw = public(0, 0, "parity", self.site)
        self.inputs = (draw.normal(size=(40, 4)) + 0.3 * client_id).astype(np.float32)
        self.targets = self.inputs @ np.arange(4, dtype=np.float32) + client_id

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        draw = public(config["seed"], config["round"], "batch", self.site)
        rate = RATE * self.terms.learning_rate_factor
        trained = {name: parameters[name] for name in ("w", "bias")}
        for _ in range(STEPS):
            rows = draw.choice(len(self.inputs), 8, replace=False)
            error = self.inputs[rows] @ trained["w"] + trained["bias"] - self.targets[rows]
            slopes = {"w": self.inputs[rows].T @ error / len(rows), "bias": error.mean()}
            added = self.terms.added(trained)
            for name, value in trained.items():
                trained[name] = (value - rate * (slopes[name] + added[name])).astype(value.dtype)
        self.travelled = STEPS * rate
        kept = {
            "norm.running_mean": (0.9 * parameters["norm.running_mean"] + 0.1 * self.inputs.mean(0)).astype(np.float32),
            "norm.num_batches_tracked": parameters["norm.num_batches_tracked"] + STEPS,
        }
        return {**trained, **kept}, 20 + self.client_id, {"loss": self._loss(trained)}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return self._loss(parameters), len(self.inputs), {"bias": float(parameters["bias"])}

    def _loss(self, parameters: Parameters) -> float:
        error = self.inputs @ parameters["w"] + parameters["bias"] - self.targets
        return float(np.mean(error * error, dtype=np.float64))


def initial() -> Parameters:
    """Single and double precision, statistics and a whole number."""
    return {
        "w": np.zeros(4, np.float32),
        "bias": np.zeros((), np.float64),
        "norm.running_mean": np.zeros(4, np.float32),
        "norm.num_batches_tracked": np.array(0),
    }


def made(kind: Callable[..., FedAvgRecipe], **options: Any) -> Make:
    """What makes the recipe of one row."""
    federation = FederationConfig(num_clients=SITES, num_rounds=ROUNDS)
    job = {"name": "parity", "client": LeastSquares, "initial_parameters": initial, "federation": federation}
    return lambda: kind(**job, **options)


def robust(aggregator: Aggregator) -> Make:
    """FedAvg with a rule in place of the mean."""
    return made(FedAvgRecipe, aggregator=aggregator)


def speeches(**options: Any) -> Make:
    """Fine-tuning of the bundled language model, a play a site; ``options`` are of its clients and its messages."""

    def make() -> FedAvgRecipe:
        from sfl.llm.config import LLMClientConfig, LLMRunConfig
        from sfl.llm.model import BUNDLED, find_model
        from sfl.llm.server import llm_recipe

        chosen = dict(options)
        dtype = chosen.pop("message_dtype", "float32")
        shared = FederationConfig(num_clients=SITES, num_rounds=2, partition="key:work", message_dtype=dtype)
        client = LLMClientConfig(local_steps=2, batch_size=2, block_size=32, eval_documents=4, **chosen)
        return llm_recipe(LLMRunConfig(federation=shared, client=client), find_model(BUNDLED))

    return make


ALGORITHMS: dict[str, Make] = {
    "fedavg": made(FedAvgRecipe),
    "fedprox": made(FedProxRecipe, proximal_mu=0.5),
    "fedadam": made(FedOptRecipe, optimizer="adam", server_learning_rate=0.1),
    "scaffold": made(ScaffoldRecipe),
    "ditto": made(DittoRecipe, personal_lambda=0.5),
    "cyclic": made(CyclicRecipe, order="random"),
    "swarm": made(SwarmRecipe),
    "fedbuff": made(FedBuffRecipe, buffer=SITES),  # all sites in the buffer: who answers first changes nothing
    "evaluate": made(FedEvalRecipe),
    "cross-site": made(FedEvalRecipe, cross_site=True),
    "multi-krum": robust(MultiKrum(byzantine=1)),
    "trimmed-mean": robust(TrimmedMean(ratio=0.2)),
    "geometric-median": robust(GeometricMedian()),
    "centered-clipping": robust(CenteredClipping(radius=0.5)),
    "fedavg secagg": made(FedAvgRecipe, secure=SecAgg()),
    "scaffold secagg": made(ScaffoldRecipe, secure=SecAgg(bits=40)),
    "fedavg he": made(FedAvgRecipe, secure=CKKS()),
    "ditto he some-layers": made(DittoRecipe, personal_lambda=0.5, secure=CKKS(layers="w|bias")),
    "fedadam he holder": made(FedOptRecipe, optimizer="adam", server_learning_rate=0.1, secure=CKKS(holder="site-2")),
    "llm lora": speeches(),
    "llm lora exact": speeches(lora_aggregation="exact", lora_ranks="8,8,4,4,2"),
    "llm prompt": speeches(peft="prompt"),
    "llm whole int8": speeches(peft="none", message_dtype="int8"),
}


def state_of(result: RunResult) -> dict[str, tuple[bytes, bytes]]:
    """The final state, part by part, as bytes; not the engine's own."""
    names = [field.name for field in fields(result.state) if field.name != "engine"]
    return {name: pack_tree(getattr(result.state, name)) for name in names}


def figures_of(result: RunResult, *, nbytes: bool = True) -> list[object]:
    """All that a run reports, without times, and without bytes if they are not the same for all."""
    bare = {} if nbytes else {"nbytes": 0}
    whole = {} if nbytes else {"bytes_up": 0, "bytes_down": 0}
    return [
        replace(entry, seconds={}, sites=tuple(replace(site, seconds=0.0, **bare) for site in entry.sites), **whole)
        for entry in result.rounds
    ]


def verdict(there: RunResult, here: RunResult, secure: SecureSum | None = None) -> str:
    """What differs between a run on an engine and the one in-process.

    Under secure sums the keys of a run are its own: compared are the parameters, and figures without bytes. Ciphertexts
    are random, so that their sums are the same within an error.
    """
    if isinstance(secure, CKKS):
        theirs, ours = there.open(), here.open()
        error = max(float(np.abs(theirs[name] - value).max()) for name, value in ours.items())
        return f"within {WITHIN:g}" if error <= WITHIN else f"differs by {error:.2g}"
    if secure is not None:
        wrong = ["parameters"] if pack_tree(there.parameters) != pack_tree(here.parameters) else []
        wrong += ["figures"] if figures_of(there, nbytes=False) != figures_of(here, nbytes=False) else []
        return f"differs: {', '.join(wrong)}" if wrong else SAME
    theirs, ours = state_of(there), state_of(here)
    wrong = [name for name in ours if theirs[name] != ours[name]]
    wrong += ["figures"] if figures_of(there) != figures_of(here) else []
    return f"differs: {', '.join(wrong)}" if wrong else SAME


def cell(engine: str, make: Make, here: RunResult) -> Cell:
    """One run on an engine."""
    started = time.monotonic()
    try:
        recipe = make()
        said = verdict(recipe.execute(environment(engine, device="cpu")), here, recipe.secure)
    except SflError as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"said": said, "seconds": round(time.monotonic() - started, 1), "when": f"{datetime.now(UTC):%Y-%m-%d}"}


def table(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """The results as Markdown."""
    every = [found for row in cells.values() for found in row.values()]
    same, near = (sum(found["said"] == said for found in every) for said in (SAME, f"within {WITHIN:g}"))
    last = max(found["when"] for found in every)
    lines = [
        "# Every algorithm on every engine",
        "",
        f"{SITES} sites, {ROUNDS} rounds, engines as real processes; {same} of {len(every)} runs gave the bits and",
        f"figures of the run in-process, {near} encrypted ones its numbers within {WITHIN:g}. Last run: {last}.",
        "`python benchmarks/parity.py`",
        "",
        f"| `--algorithm` | {' | '.join(ENGINES)} |",
        "|---|" + "---|" * len(ENGINES),
    ]
    for name, row in cells.items():
        said = [f"{row[e]['said']}, {row[e]['seconds']:.0f} s" if e in row else "not run" for e in ENGINES]
        lines.append(f"| {name} | {' | '.join(text.replace('|', '/') for text in said)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    args = parser.parse_args()
    path = RESULTS / "parity.json"
    before: dict[str, dict[str, Cell]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    cells = {name: before.get(name, {}) for name in ALGORITHMS}
    here = {name: ALGORITHMS[name]().execute(environment("sim", device="cpu")) for name in args.algorithms.split(",")}
    for engine in args.engines.split(","):
        for name, result in here.items():
            cells[name][engine] = cell(engine, ALGORITHMS[name], result)
            print(f"{engine:18} {name:18} {cells[name][engine]}", flush=True)
            path.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
            (RESULTS / "parity.md").write_text(table(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
