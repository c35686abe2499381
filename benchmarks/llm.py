"""What federated fine-tuning of a language model costs over a plain loop: tokens a second, bytes a round, peak memory.

    python benchmarks/llm.py [--kinds full,lora,lora-int8] [--repeats 3]

Every figure is of fresh processes of one thread, the sides in turn. The plain side is written with ``transformers``,
``peft`` and torch alone: the same model, the same rows, the same AdamW, two sites, a mean of what was trained. Its rows
are made before the clock starts; SFL makes its own while it runs. Seconds are CPU time from the loaded model to the
trained one. Memory is the process's peak over that of the same process that stops before its first step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench_overhead import machine
from measure import HERE, alternate, measure, middle

RESULTS = HERE / "results"
SITES, ROUNDS, STEPS, ROWS, LENGTH, RATE = 2, 2, 8, 8, 128, 1e-3
KINDS = ("full", "lora", "full-int8", "lora-int8")
SHAPE = {"n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
TOKENS = SITES * ROUNDS * STEPS * ROWS * LENGTH


@dataclass(frozen=True)
class Row:
    """One kind of fine-tuning."""

    kind: str
    trained: int
    plain: float
    ours: float
    bytes: float
    plain_memory: float
    ours_memory: float
    runs: int


def make_model(folder: Path) -> None:
    """A GPT-2 of six layers with random weights and the bundled tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from sfl.llm.model import bundled_folder

    GPT2LMHeadModel(GPT2Config(vocab_size=2048, **SHAPE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled_folder()).save_pretrained(folder)


def configured(kind: str) -> Any:
    """The run's configuration."""
    from sfl.llm.config import LLMClientConfig, LLMRunConfig
    from sfl.types import FederationConfig

    peft, _, dtype = kind.partition("-")
    federation = FederationConfig(num_clients=SITES, num_rounds=ROUNDS, workers=1, message_dtype=dtype or "float32")
    client = LLMClientConfig(
        peft="none" if peft == "full" else "lora", local_steps=STEPS, batch_size=ROWS, block_size=LENGTH,
        learning_rate=RATE, eval_documents=1,
    )  # fmt: skip
    return LLMRunConfig(federation=federation, client=client)


def ours(kind: str, folder: Path, *, stop: bool) -> dict[str, float]:
    """The application's recipe, in-process."""
    from dataclasses import replace

    from sfl.env import SimEnv
    from sfl.llm.model import find_model
    from sfl.llm.server import llm_recipe
    from sfl.llm.workload import LLMWorkload

    config, source = configured(kind), find_model(str(folder))
    workload = LLMWorkload(config=config, model=source)
    workload.data()
    workload.tokenizer()
    recipe = replace(llm_recipe(config, source), evaluate_every=0, central=None)
    initial = recipe.initial_parameters
    first = initial() if callable(initial) else {}
    recipe = replace(recipe, initial_parameters=lambda: first)
    if stop:
        return {}
    started = time.process_time()
    result = recipe.execute(SimEnv(device="cpu"))
    seconds = time.process_time() - started
    last = result.rounds[-1]
    return {"seconds": seconds, "bytes": float(last.bytes_down + last.bytes_up), "trained": count(first)}


def count(parameters: Any) -> float:
    """Numbers that travel."""
    return float(sum(value.size for value in parameters.values()))


def plain(kind: str, folder: Path, *, stop: bool) -> dict[str, float]:
    """The same work, without a framework."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from sfl.train.trainer import has_bf16

    workload = plain_workload(kind, folder)
    started = time.process_time()  # SFL's sites tokenise and load, too
    rows = plain_rows(workload)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    if kind.startswith("lora"):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True
        )
        model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if stop:
        return {}
    bf16 = has_bf16(torch.device("cpu"))
    state = [p.detach().clone() for p in trained]
    for round_ in range(ROUNDS):
        total = [torch.zeros_like(p) for p in trained]
        for site in range(SITES):
            with torch.no_grad():
                for parameter, value in zip(trained, state, strict=True):
                    parameter.copy_(value)
            train(model, trained, rows[round_][site], bf16=bf16)
            with torch.no_grad():
                for sum_, parameter in zip(total, trained, strict=True):
                    sum_.add_(parameter, alpha=1 / SITES)
        state = total
    return {"seconds": time.process_time() - started}


def train(model: Any, trained: list[Any], batches: list[Any], *, bf16: bool) -> None:
    """One site's steps."""
    import torch

    model.train()
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    for ids, targets, positions in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain_workload(kind: str, folder: Path) -> Any:
    """Texts that are read, and what tokenises them."""
    from sfl.llm.model import find_model
    from sfl.llm.workload import LLMWorkload

    workload = LLMWorkload(config=configured(kind), model=find_model(str(folder)))
    workload.data()
    workload.tokenizer()
    return workload


def plain_rows(workload: Any) -> list[list[list[Any]]]:
    """The rows that SFL's sites train on, by round and site, as tensors."""
    import torch

    from sfl.core import rng
    from sfl.train.examples import repeated

    sites = [workload.examples(site.train) for site in workload.data()[0].sites]
    made = []
    for round_ in range(1, ROUNDS + 1):
        rows = []
        for number, examples in enumerate(sites, start=1):
            generator = rng.public(0, round_, "llm-train", f"site-{number}")
            batches = repeated(examples, epochs=None, steps=STEPS, generator=generator)
            rows.append([tuple(map(torch.from_numpy, (b.ids, b.targets, b.positions))) for b in batches])
        made.append(rows)
    return made


SIDES = {"plain": plain, "ours": ours}


def process(kind: str, side: str, folder: Path, report: Path, *, stop: bool) -> None:
    """What a fresh process does."""
    import torch

    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)
    torch.optim.AdamW([torch.zeros(1)])  # its first import takes a second that is no side's
    report.write_text(json.dumps(SIDES[side](kind, folder, stop=stop)))


def run(kind: str, side: str, folder: Path, *, stop: bool = False) -> tuple[dict[str, float], float]:
    """Figures and the peak, in bytes, of one fresh process."""
    report = folder / "report.json"
    words = [sys.executable, __file__, "--process", kind, side, str(folder), str(report), str(int(stop))]
    peak = measure(words).peak
    return json.loads(report.read_text()), peak


def compare(kind: str, folder: Path, repeats: int) -> Row:
    """Both sides of one kind, in turn."""
    found = alternate({side: partial(run, kind, side, folder) for side in SIDES}, repeats)
    idle = {side: run(kind, side, folder, stop=True)[1] for side in SIDES}
    seconds = {side: middle(runs, lambda made: made[0]["seconds"]) for side, runs in found.items()}
    peaks = {side: middle(runs, lambda made: made[1]) - idle[side] for side, runs in found.items()}
    told = found["ours"][0][0]
    return Row(
        kind, int(told["trained"]), TOKENS / seconds["plain"], TOKENS / seconds["ours"], told["bytes"],
        peaks["plain"], peaks["ours"], repeats,
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| fine-tuning | numbers trained | plain, tokens/s | SFL, tokens/s | ratio | bytes a round | plain, MB | "
        "SFL, MB | runs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['kind']} | {row['trained']:,} | {row['plain']:.0f} | {row['ours']:.0f} | "
            f"{row['ours'] / row['plain']:.3f} | {row['bytes']:,.0f} | {row['plain_memory'] / 1e6:.0f} | "
            f"{row['ours_memory'] / 1e6:.0f} | {row['runs']} |"
        )
    return lines


def write(rows: list[Row]) -> list[str]:
    """Replace the measured kinds in the results, keep the others."""
    path = RESULTS / "llm.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = [row for row in kept if row["kind"] not in {row.kind for row in rows}] + [asdict(row) for row in rows]
    merged.sort(key=lambda row: KINDS.index(row["kind"]))
    about = machine() | {"date": datetime.now(UTC).date().isoformat()}
    path.write_text(json.dumps({"machine": about, "rows": merged}, indent=2) + "\n")
    words = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = [
        "# Language models: federated against a plain loop",
        "",
        f"Medians; {words}. {EXPLAINED}",
        "",
        *table(merged),
    ]
    (RESULTS / "llm.md").write_text("\n".join(lines) + "\n")
    return table(merged)


EXPLAINED = (
    f"GPT-2 of {SHAPE['n_layer']} layers, {SHAPE['n_embd']} wide, {SITES} sites, {ROUNDS} rounds of {STEPS} steps of "
    f"{ROWS} rows of {LENGTH} tokens. Both sides tokenise, and load the model, in their time. The plain loop sends "
    "nothing, and codes nothing: int8 is compared with the same loop. Bytes are of both directions and all sites. "
    "Memory is the peak over that of the same process before its first step. `python benchmarks/llm.py`"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--process", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        kind, side, folder, report, stop = arguments.process
        process(kind, side, Path(folder), Path(report), stop=stop == "1")
        return 0
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name))
        for kind in arguments.kinds.split(","):
            print("\n".join(write([compare(kind, Path(name), arguments.repeats)])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
