"""What DP-SGD costs over plain training: step time and memory of SFL's two ways, and of Opacus as it comes.

    python benchmarks/bench_dpsgd.py [--models esm2-8m,gpt2] [--repeats 3]

Every figure is of fresh processes of one thread, the sides in turn. A step is one batch forward and backward, clipping
and AdamW; its time is the median CPU time of the steps after the first. Noise stands by itself. Memory is the process's
peak over that of the same process that stops before its first step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench_overhead import machine
from measure import HERE, alternate, measure, middle

RESULTS = HERE / "results"
STEPS = 4
MEGABYTE = 1e6


@dataclass(frozen=True)
class Shape:
    """A model's configuration and one batch of it."""

    family: str
    config: dict[str, Any]
    examples: int
    length: int


SHAPES = {
    "esm2-8m": Shape(
        "esm",
        {"vocab_size": 33, "hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 20, "pad_token_id": 1,
         "intermediate_size": 1280, "max_position_embeddings": 1026, "position_embedding_type": "rotary",
         "token_dropout": True, "mask_token_id": 32, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        16, 128,
    ),
    "gpt2": Shape("gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 6}, 8, 128),
    "gpt2-small": Shape("gpt2", {}, 8, 128),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One side of one model."""

    model: str
    side: str
    step: float
    memory: float
    runs: int


def build(shape: Shape) -> tuple[Any, Callable[[Any, Any], Any], Any]:
    """A model with a seed of its own, its per-example losses, and a batch."""
    import numpy as np
    import torch
    import transformers

    from sfl.core import rng
    from sfl.esm2.loss import mlm_losses
    from sfl.esm2.masking import mask, pad
    from sfl.train.dpsgd import ExampleLosses
    from sfl.train.trainer import BatchLoss

    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)
    generator = rng.public(0, 0, "bench-dpsgd")
    if shape.family == "esm":
        model = transformers.EsmForMaskedLM(transformers.EsmConfig(**shape.config))
        model.esm.contact_head.requires_grad_(False)
        crops = [generator.integers(4, 24, shape.length - 2).astype(np.uint8) for _ in range(shape.examples)]
        return model, mlm_losses, mask(pad(crops), generator)
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **shape.config)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.from_numpy(generator.integers(0, config.vocab_size, (shape.examples, shape.length)))
    places = torch.arange(shape.length).expand(shape.examples, -1).contiguous()  # Opacus asks for the user's help here

    def losses(module: Any, batch: Any) -> Any:
        logits = module(input_ids=batch, position_ids=places[: len(batch)]).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(1)
        return ExampleLosses(each, BatchLoss(each.sum(), len(batch), torch.zeros((), dtype=torch.int64)))

    return model, losses, ids


def plain(model: Any, losses: Any, batches: Iterator[Any]) -> None:
    from sfl.train.trainer import adamw

    optimizer = adamw([p for p in model.parameters() if p.requires_grad], 1e-4, 0.01)
    for batch in batches:
        losses(model, batch).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def opacus(model: Any, losses: Any, batches: Iterator[Any]) -> None:
    import warnings

    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from sfl.train.trainer import adamw

    warnings.simplefilter("ignore")
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    inner = adamw([p for p in model.parameters() if p.requires_grad], 1e-4, 0.01)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1, loss_reduction="sum")
    for batch in batches:
        losses(wrapped._module, batch).losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ours(model: Any, losses: Any, batches: Iterator[Any], *, clipping: Any) -> None:
    from sfl.train.dpsgd import PrivateTrainer

    trainer = PrivateTrainer(
        losses=losses, size=len, learning_rate=1e-4, noise_multiplier=0.0, expected_batch_size=1.0, clipping=clipping
    )
    trainer.fit(model, ([batch] for batch in batches), 0)


SIDES: dict[str, Callable[..., None]] = {
    "plain": plain,
    "hooks": partial(ours, clipping="hooks"),
    "ghost": partial(ours, clipping="ghost"),
    "opacus": opacus,
}


def process(model: str, side: str, report: Path) -> None:
    """What a measured process does; a side of ``none`` stops before the first step."""
    import opacus as _opacus  # noqa: F401 - all sides import the same

    built, losses, batch = build(SHAPES[model])
    times: list[float] = []

    def batches() -> Iterator[Any]:
        for _ in range(STEPS):
            started = time.process_time()
            yield batch
            times.append(time.process_time() - started)  # the side has asked for the next: this step is done

    if side == "noise":
        draw(built, batches())
    elif side != "none":
        SIDES[side](built, losses, batches())
    report.write_text(json.dumps(median(times[1:] or [0.0])))


def draw(model: Any, batches: Iterator[Any]) -> None:
    """The noise of a step and nothing else."""
    from sfl.privacy.noise import add_noise, secret

    values = {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    for _ in batches:
        add_noise(values, 1.0, secret())


def run(model: str, side: str, folder: Path, *, tight: bool) -> tuple[float, float]:
    """Seconds a step, and the peak in bytes, of one fresh process; ``tight`` gives freed arrays back at once."""
    report = folder / "report.json"
    malloc = [f"{name}={1 << 16}" for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")] if tight else []
    peak = measure(["/usr/bin/env", *malloc, sys.executable, __file__, "--process", model, side, str(report)]).peak
    return float(json.loads(report.read_text())), peak


def compare(model: str, repeats: int) -> list[Row]:
    """All sides of one model, in turn."""
    with tempfile.TemporaryDirectory() as name:
        timed = {side: partial(run, model, side, Path(name), tight=False) for side in (*SIDES, "noise")}
        runs = alternate(timed, repeats)
        tight = {side: partial(run, model, side, Path(name), tight=True) for side in (*SIDES, "none")}
        peaks = {side: middle(found, lambda figures: figures[1]) for side, found in alternate(tight, repeats).items()}
    return [
        Row(model, side, middle(runs[side], lambda figures: figures[0]),
            0.0 if side == "noise" else (peaks[side] - peaks["none"]) / MEGABYTE, repeats)
        for side in runs
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | side | step | over plain | memory | over plain | runs |", "|---|---|---|---|---|---|---|"]
    first = {row["model"]: row for row in rows if row["side"] == "plain"}
    for row in rows:
        base = first[row["model"]]
        time_ = f"{row['step']:.2f} s | {row['step'] / base['step']:.2f}"
        memory = f"{row['memory']:.0f} MB | {row['memory'] / base['memory']:.2f}" if row["memory"] else "|"
        lines.append(f"| {row['model']} | {row['side']} | {time_} | {memory} | {row['runs']} |")
    return lines


def write(rows: list[Row]) -> list[str]:
    """Replace the measured models in the results, keep the others."""
    path = RESULTS / "dpsgd.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = [row for row in kept if row["model"] not in {row.model for row in rows}] + [asdict(row) for row in rows]
    about = machine() | {"opacus": version("opacus"), "date": datetime.now(UTC).date().isoformat()}
    path.write_text(json.dumps({"machine": about, "rows": merged}, indent=2) + "\n")
    words = ", ".join(f"{name} {value}" for name, value in about.items())
    lines = ["# DP-SGD: step time and memory", "", f"Medians; {words}. {EXPLAINED}", "", *table(merged)]
    (RESULTS / "dpsgd.md").write_text("\n".join(lines) + "\n")
    return table(merged)


EXPLAINED = (
    "Fresh processes of one thread, the sides in turn; float32 for all. A step is one batch forward and backward, "
    f"clipping and AdamW: the median CPU time of {STEPS - 1} steps after the first. The noise of a whole step, SFL's "
    "from AES on a grid, stands by itself. Memory is the process's peak over that of the same process before its first "
    "step, in processes of their own in which malloc gives freed arrays back at once. "
    + "; ".join(f"{name}: {each.config or 'as published'}, {each.examples} of {each.length} tokens"
                for name, each in SHAPES.items())
    + "."
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="esm2-8m,gpt2", help=f"of {', '.join(SHAPES)} (default: esm2-8m,gpt2)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--process", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        model, side, report = arguments.process
        process(model, side, Path(report))
        return 0
    for model in arguments.models.split(","):
        print("\n".join(write(compare(model, arguments.repeats))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
