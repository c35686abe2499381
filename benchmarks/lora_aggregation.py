"""What becomes of LoRA's factors on the server: averaged, their products averaged exactly, or A frozen.

``python benchmarks/lora_aggregation.py [rates] [ways] [ranks] [splits] [whole] [cost]``: each writes its own part of
``results/lora_aggregation.json``, from which the tables are written (``tables`` writes them anew). A small GPT-2 of
characters, trained for a minute on the plays of ``data/speeches``, is fine-tuned by four sites on four other plays.
``TASKS`` says how a task makes a recipe: that is all that another model has to bring.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from sfl.client.base import BaseFederatedClient
from sfl.core import rng
from sfl.core.aggregator import Aggregator, Needs
from sfl.core.lora import frames, pairs, restored, restricted
from sfl.core.task import FIT, Task, Update
from sfl.env import SimEnv
from sfl.privacy.filters import FreezeLayers
from sfl.recipe import FedAvgRecipe
from sfl.server.lora import MEAN_ERROR, TRUNCATION, LoraAggregation, LoraProductMean, lora_aggregator
from sfl.train.module import copy_parameters, frozen, lend_parameters, load_parameters, resident
from sfl.types import FederationConfig, Parameters, StateTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PRETRAIN = ROOT / "data" / "speeches" / "speeches_pretrain.jsonl.gz"
PLAYS = ROOT / "src" / "sfl" / "llm" / "bundled" / "speeches_sample.jsonl.gz"

SITES, STEPS, RANK, ALPHA = 4, 96, 4, 8
LENGTH, BATCH, BASE_STEPS = 48, 8, 1500
SEEDS, RATES = (0, 1), (3e-3, 1e-2, 3e-2)
KINDS: tuple[LoraAggregation, ...] = ("mean", "exact", "freeze-a")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run.

    Attributes:
        kind: What the server does.
        sites: ``play`` gives each site one play, ``iid`` shares out all speeches at random.
        steps: Local steps in a round; all settings take the same number in all.
        rate: The learning rate of the sites' AdamW.
        ranks: By site; empty gives all sites the model's.
        back: Whether a site of a lower rank returns what it does not have as it was, rather than as zero.
        split: How the exact rule shares singular values out between the factors; see ``Split``.
    """

    kind: LoraAggregation = "mean"
    sites: str = "play"
    steps: int = 16
    rate: float = 3e-3
    seed: int = 0
    ranks: tuple[int, ...] = ()
    back: bool = True
    split: str = ""


# The small task


def speeches(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def alphabet() -> dict[str, int]:
    seen = {letter for record in speeches(PRETRAIN) + speeches(PLAYS) for letter in record["text"]} | {"\n"}
    return {letter: place for place, letter in enumerate(sorted(seen))}


def encoded(texts: Iterable[str]) -> np.ndarray:
    return np.array([alphabet()[letter] for letter in "\n\n".join(texts)], dtype=np.int64)


@cache
def shards(sites: str, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Each site's text, and the last tenth of each play, which nobody trains on, as rows."""
    plays: dict[str, list[str]] = {}
    for record in speeches(PLAYS):
        plays.setdefault(record["work"], []).append(record["text"])
    plays = dict(list(plays.items())[:SITES])
    kept = [texts[: len(texts) * 9 // 10] for texts in plays.values()]
    held = [encoded(texts[len(texts) * 9 // 10 :])[: 64 * LENGTH] for texts in plays.values()]
    if sites == "iid":
        everything = [text for texts in kept for text in texts]
        order = rng.public(seed, 0, "shards").permutation(len(everything))
        kept = [[everything[place] for place in order[site::SITES]] for site in range(SITES)]
    return [encoded(texts) for texts in kept], np.concatenate(held).reshape(-1, LENGTH)


def trained(module: torch.nn.Module, text: np.ndarray, steps: int, batch: int, rate: float, draw: Any) -> float:
    """Steps of AdamW on random windows; the mean loss."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    total = 0.0
    for _ in range(steps):
        starts = draw.integers(0, len(text) - LENGTH, batch)
        ids = torch.from_numpy(text[starts[:, None] + np.arange(LENGTH)])
        optimizer.zero_grad()
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


@torch.no_grad()
def held_out_loss(module: torch.nn.Module, rows: np.ndarray) -> float:
    return float(module(input_ids=torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss)


@cache
def base() -> dict[str, torch.Tensor]:
    """The weights of the small model."""
    model, text = new_base(), encoded(record["text"] for record in speeches(PRETRAIN))
    trained(model, text, BASE_STEPS, BATCH, 2e-3, rng.public(0, 0, "base"))
    return model.state_dict()


def new_base() -> GPT2LMHeadModel:
    shape = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    quiet = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(alphabet()), **shape, **quiet))


def adapted(seed: int) -> torch.nn.Module:
    model = new_base()
    model.load_state_dict(base())
    targets = ["c_attn", "c_proj", "c_fc"]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)


class Player(BaseFederatedClient):
    """Trains the process's one resident model on its text."""

    lends_arrays: ClassVar[bool] = True

    def __init__(self, setting: Setting, **identity: Any) -> None:
        super().__init__(**identity)
        self.setting = setting

    def compute_update(self, parameters: Parameters, config: Any) -> Any:
        setting, module = self.setting, resident("adapted", lambda: adapted(0))
        rank = setting.ranks[self.client_id] if setting.ranks else RANK
        load_parameters(module, restricted(parameters, rank))
        text = shards(setting.sites, setting.seed)[0][self.client_id]
        draw = rng.public(setting.seed, int(config["round"]), "windows", str(self.client_id))
        with frozen(module, frames(parameters) if setting.kind == "freeze-a" else ()):
            loss = trained(module, text, setting.steps, BATCH, setting.rate, draw)
        returned = lend_parameters(module)
        if setting.ranks and setting.back:
            returned = restored(returned, parameters, rank)
        return returned, len(text), {"loss": loss}

    def evaluate(self, parameters: Parameters, config: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Split(Aggregator):
    """The exact rule with singular values shared out otherwise.

    Attributes:
        how: ``balanced`` gives each factor their square roots, ``unit`` makes the frame's rows of length 1.
    """

    needs: ClassVar[Needs] = "individual"

    how: str
    rule: LoraProductMean = field(default_factory=LoraProductMean)

    def aggregate(self, updates: Iterable[Update]) -> Update:
        return self.rule.aggregate(updates)

    def step(self, updates: Iterable[Update], task: Task, state: StateTree) -> tuple[Update, StateTree]:
        out, state = self.rule.step(updates, task, state)
        for pair in pairs(task.parameters):
            frame, grown = (task.parameters[n] + out.delta[n] for n in (pair.frame, pair.grown))
            long, wide = np.linalg.norm(frame, axis=1), np.linalg.norm(grown, axis=0)
            factor = 1.0 / long if self.how == "unit" else np.sqrt(np.maximum(wide / long, 1e-12))
            new = frame * factor[:, None], grown / factor
            for name, value in zip((pair.frame, pair.grown), new, strict=True):
                out.delta[name][...] = value - task.parameters[name]
        return out, state


def small(setting: Setting) -> FedAvgRecipe:
    module = resident("adapted", lambda: adapted(0))
    initial = copy_parameters(adapted(setting.seed))
    held = shards(setting.sites, setting.seed)[1]

    def central(parameters: Parameters) -> dict[str, float]:
        load_parameters(module, parameters)
        return {"loss": held_out_loss(module, held)}

    return FedAvgRecipe(
        name="lora",
        client=Player,
        client_kwargs={"setting": setting},
        initial_parameters=initial,
        federation=FederationConfig(num_clients=SITES, num_rounds=STEPS // setting.steps, seed=setting.seed),
        aggregator=Split(setting.split) if setting.split else lora_aggregator(setting.kind),
        transforms=(FreezeLayers(frames(initial)),) if setting.kind == "freeze-a" else (),
        central=central,
        evaluate_every="end",
    )


def bundled(setting: Setting) -> FedAvgRecipe:
    """What ``sfl run llm`` does: the bundled model and plays, rank 8 on the modules that peft knows."""
    from sfl.llm.config import LLMClientConfig, LLMRunConfig
    from sfl.llm.model import BUNDLED, find_model
    from sfl.llm.server import llm_recipe

    partition = "key:work" if setting.sites == "play" else "iid"
    federation = FederationConfig(
        num_clients=SITES, num_rounds=STEPS // setting.steps, seed=setting.seed, partition=partition
    )
    client = LLMClientConfig(
        learning_rate=setting.rate, batch_size=8, local_steps=setting.steps, block_size=64, eval_documents=64,
        lora_aggregation=setting.kind,
    )  # fmt: skip
    recipe = llm_recipe(LLMRunConfig(federation=federation, client=client), find_model(BUNDLED))
    return replace(recipe, evaluate_every="end")


TASKS: dict[str, Callable[[Setting], FedAvgRecipe]] = {"small": small, "bundled": bundled}


# What is measured


def measured(setting: Setting, task: str = "small") -> dict[str, float]:
    """Held-out loss after the last round, and the means over rounds of what the server's figures say.

    Every run is kept in the file of results, so that a benchmark that was stopped goes on.
    """
    key = f"{task}, {SITES} sites, {STEPS} steps, rank {RANK}: {setting}"
    if key in stored().get("runs", {}):
        return stored()["runs"][key]
    result = TASKS[task](setting).execute(SimEnv(device="cpu"))
    rounds = result.rounds[1:]
    said = {n: statistics.mean(r.fit[n] for r in rounds) for n in (TRUNCATION, MEAN_ERROR) if n in rounds[0].fit}
    row = {"loss": rounds[-1].central["loss"], "bytes": float(rounds[0].bytes_up / SITES), **said}
    print(setting, {name: round(value, 4) for name, value in row.items()}, flush=True)
    keep(stored() | {"runs": stored().get("runs", {}) | {key: row}})
    return row


def repeated(setting: Setting, task: str = "small") -> dict[str, Any]:
    found = [measured(replace(setting, seed=seed), task) for seed in SEEDS]
    losses = [row["loss"] for row in found]
    said = {n: statistics.mean(row[n] for row in found) for n in found[0] if n != "loss"}
    return {"loss": statistics.mean(losses), "spread": statistics.stdev(losses), **said}


def rates() -> Any:
    """Each way's learning rate, found on a seed that is not reported."""
    return {k: {str(rate): measured(Setting(kind=k, rate=rate, seed=100))["loss"] for rate in RATES} for k in KINDS}


def best_rate(kind: str) -> float:
    losses = stored()["rates"][kind]
    return float(min(losses, key=losses.__getitem__))


def ways() -> Any:
    before = statistics.mean(held_out_loss(adapted(seed), shards("play", seed)[1]) for seed in SEEDS)
    rows = [
        {"sites": sites, "steps": steps, "kind": kind}
        | repeated(Setting(kind=kind, sites=sites, steps=steps, rate=best_rate(kind)))
        for sites in ("iid", "play")
        for steps in (16, 48)
        for kind in KINDS
    ]
    return {"before": before, "rows": rows}


def ranks() -> Any:
    """Half of the sites of rank 1, half of the model's."""
    uneven = (1,) * (SITES // 2) + (RANK,) * (SITES // 2)
    return [
        {"kind": kind, "back": back, "ranks": uneven}
        | repeated(Setting(kind=kind, rate=best_rate(kind), ranks=uneven, back=back))
        for kind in ("mean", "exact")
        for back in (False, True)
    ]


def whole() -> Any:
    """The three ways on the bundled model, each at the best of three learning rates."""
    tried = {
        k: {r: measured(Setting(kind=k, rate=r, seed=100, steps=24), "bundled")["loss"] for r in RATES} for k in KINDS
    }
    rows = [
        {"kind": k, "steps": steps, "rate": rate} | repeated(Setting(kind=k, rate=rate, steps=steps), "bundled")
        for k, losses in tried.items()
        for rate in [min(losses, key=losses.__getitem__)]
        for steps in (24, 48)
    ]
    return {"before": statistics.mean(map(untrained, SEEDS)), "rows": rows}


def untrained(seed: int) -> float:
    """Held-out loss of the bundled model before its first round."""
    recipe = bundled(Setting(kind="mean", steps=STEPS, seed=seed))
    result = replace(recipe, evaluate_every=1).execute(SimEnv(device="cpu"))
    return result.rounds[0].central["loss"]


def splits() -> Any:
    """How singular values are shared out, in many rounds."""
    return [
        {"split": split, "steps": 8, "rate": best_rate("exact")}
        | repeated(Setting(kind="exact", split=split, steps=8, rate=best_rate("exact")))
        for split in ("", "unit", "balanced")
    ]


def cost() -> Any:
    """Seconds of one pair on one thread, against forming the product."""
    rows = []
    for sites, rank, width in ((4, 8, 768), (10, 16, 768), (10, 16, 4096), (50, 16, 4096)):
        source = np.random.default_rng(0)
        sent = {"lora_A": source.normal(size=(rank, width)), "lora_B": source.normal(size=(width, rank))}
        sent = {name: value.astype(np.float32) for name, value in sent.items()}
        updates = [Update(f"{i}", {n: 0.1 * v for n, v in sent.items()}, 1.0) for i in range(sites)]
        for update in updates:
            for value in update.delta.values():
                value += source.normal(size=value.shape).astype(np.float32)
        started = time.process_time()
        LoraProductMean().step(updates, Task(FIT, 1, sent), None)
        ours = time.process_time() - started
        dense = 0.0
        if width <= 768:
            started = time.process_time()
            own = [{n: sent[n] + u.delta[n].astype(np.float64) for n in sent} for u in updates]
            np.linalg.svd(sum(f["lora_B"] @ f["lora_A"] for f in own) / sites)
            dense = time.process_time() - started
        rows.append({"sites": sites, "rank": rank, "width": width, "seconds": ours, "dense": dense})
        print(rows[-1], flush=True)
    return rows


# Tables


def stored() -> dict[str, Any]:
    path = RESULTS / "lora_aggregation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(found: dict[str, Any]) -> None:
    (RESULTS / "lora_aggregation.json").write_text(json.dumps(found, indent=1) + "\n")


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def loss_of(row: dict[str, Any]) -> str:
    return f"{row['loss']:.4f} ± {row['spread']:.4f}"


def percent(row: dict[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f} %" if name in row else "—"


def report(found: dict[str, Any]) -> str:
    parts = ["# LoRA's aggregation, measured\n", INTRODUCTION]
    for name, write in TABLES.items():
        if name in found:
            parts += write(found[name])
    return "\n".join(parts)


INTRODUCTION = (
    f"A GPT-2 of characters (2 layers, 64 wide, {BASE_STEPS} steps on other plays), LoRA of rank {RANK} on all linear "
    f"layers, {SITES} sites, {STEPS} steps of {BATCH} × {LENGTH} characters per site in all, AdamW. Held-out loss in "
    f"nats per character after the last round, mean and standard deviation of {len(SEEDS)} seeds. "
    "`python benchmarks/lora_aggregation.py`\n"
)


def rates_table(found: Any) -> list[str]:
    said = "Learning rates, by the loss on one more seed, sites by play, 16 local steps; the best is used below:\n"
    rows = [[kind, *(f"{loss:.4f}" for loss in by_rate.values())] for kind, by_rate in found.items()]
    return [said, table(["", *found["mean"]], rows)]


def ways_table(found: Any) -> list[str]:
    cells = {(r["sites"], r["steps"], r["kind"]): r for r in found["rows"]}
    settings = dict.fromkeys((r["sites"], r["steps"]) for r in found["rows"])
    rows: list[list[Any]] = []
    for setting in settings:
        figures = [percent(cells[(*setting, "exact")], name) for name in (MEAN_ERROR, TRUNCATION)]
        rows.append([*setting, *(loss_of(cells[(*setting, kind)]) for kind in KINDS), *figures])
    sizes = {k: cells[(*next(iter(settings)), k)]["bytes"] / 1e3 for k in KINDS}
    return [
        f"Before: {found['before']:.4f}. The figures on the right are those of the rounds of `exact`, averaged:\n",
        table(["sites", "local steps", *KINDS, f"`{MEAN_ERROR}`", f"`{TRUNCATION}`"], rows),
        "A site's update: " + ", ".join(f"{k} {size:.0f} kB" for k, size in sizes.items()) + ".\n",
    ]


def ranks_table(found: Any) -> list[str]:
    rows: list[list[str]] = []
    for r in found:
        beyond = "as it was" if r["back"] else "zero"
        rows.append([r["kind"], beyond, loss_of(r), percent(r, TRUNCATION)])
    said = "Half of the sites of rank 1, by play, 16 local steps; what they lack comes back as zero or as it was:\n"
    return [said, table(["aggregation", "beyond", "loss", f"`{TRUNCATION}`"], rows)]


def splits_table(found: Any) -> list[str]:
    names = {"": "frame keeps its norm", "unit": "frame of unit rows", "balanced": "square roots to each"}
    by = {(r["split"], r["steps"], r["rate"]): loss_of(r) for r in found}
    columns = sorted({key[1:] for key in by})
    head = ["", *(f"{steps} steps, rate {rate:g}" for steps, rate in columns)]
    rows = [[said, *(by[(name, *column)] for column in columns)] for name, said in names.items()]
    return ["How the exact rule shares singular values out (by play):\n", table(head, rows)]


def whole_table(found: Any) -> list[str]:
    rows: list[list[Any]] = []
    for r in found["rows"]:
        figures = [percent(r, name) for name in (MEAN_ERROR, TRUNCATION)]
        rows.append([r["kind"], r["steps"], f"{r['rate']:g}", loss_of(r), *figures, f"{r['bytes'] / 1e3:.0f} kB"])
    said = (
        f"The bundled model on the bundled plays, a play a site, as `sfl run llm` trains it: rank 8, {SITES} sites, "
        f"{STEPS} steps of 8 × 64 tokens per site in all; nats per token on plays that no site has, "
        f"{found['before']:.4f} before:\n"
    )
    head = ["aggregation", "local steps", "rate", "loss", f"`{MEAN_ERROR}`", f"`{TRUNCATION}`", "a site's update"]
    return [said, table(head, rows)]


def cost_table(found: Any) -> list[str]:
    rows = [
        [r["sites"], r["rank"], r["width"], f"{r['seconds']:.3f}", f"{r['dense']:.2f}" if r["dense"] else "—"]
        for r in found
    ]
    said = "CPU-seconds of the server for one pair (out = in), against the SVD of the formed product:\n"
    return [said, table(["sites", "rank", "width", "exact", "formed"], rows)]


TABLES: dict[str, Callable[[Any], list[str]]] = {
    "rates": rates_table,
    "ways": ways_table,
    "ranks": ranks_table,
    "splits": splits_table,
    "whole": whole_table,
    "cost": cost_table,
}
PARTS: dict[str, Callable[[], Any]] = {
    "rates": rates,
    "ways": ways,
    "ranks": ranks,
    "splits": splits,
    "whole": whole,
    "cost": cost,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or list(PARTS):
        made = {} if name == "tables" else {name: PARTS[name]()}
        found = stored() | made
        keep(found)
        (RESULTS / "lora_aggregation.md").write_text(report(found))


if __name__ == "__main__":
    main(sys.argv[1:])
