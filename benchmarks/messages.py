"""What fewer bits on the wire cost: bytes, seconds and accuracy.

``python benchmarks/messages.py`` measures the codes by themselves (CPU seconds, so that other work on the machine
counts little), and trains a small MLP on scikit-learn's digits over eight sites that differ (Dirichlet α = 0.3) with
every ``message_dtype``, with and without error feedback, and under noise on the sum. Results go to
``results/messages.{json,md}``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from images import ImageSite, accuracy, initial
from sfl.core import arrays, quantise
from sfl.core.codes import CODED, decode, encode
from sfl.env import SimEnv
from sfl.privacy.dp import GaussianMechanism
from sfl.recipe import FedAvgRecipe
from sfl.types import FederationConfig

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
SITES, ROUNDS = 8, 25
COUNT = 1 << 22  # numbers a timing is of


def least(work: Callable[[], Any], times: int = 7) -> float:
    """CPU seconds of the fastest of some."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def codes() -> list[dict[str, Any]]:
    """Each format by itself, on normal numbers."""
    values = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    back, rows = np.empty_like(values), []
    copy = values.nbytes / least(lambda: np.copyto(back, values)) / 1e9
    for form in CODED:
        coded = encode(values, form)
        row = {
            "dtype": form,
            "encode_gb_s": values.nbytes / least(lambda form=form: encode(values, form)) / 1e9,
            "bounded_gb_s": values.nbytes / least(lambda form=form: encode(values, form, bounded=True)) / 1e9,
            "decode_gb_s": values.nbytes / least(lambda coded=coded: decode(*coded, back)) / 1e9,
            "copy_gb_s": copy,
            "error": float(np.linalg.norm(back - values) / np.linalg.norm(values)),
        }
        decode(*encode(values, form, bounded=True), back)
        row["bounded_error"] = float(np.linalg.norm(back - values) / np.linalg.norm(values))
        rows.append(row)
    return rows


def train(form: str, seed: int, *, feedback: bool, private: bool) -> dict[str, Any]:
    """One run of the digits."""
    recipe = FedAvgRecipe(
        name="messages",
        client=ImageSite,
        client_kwargs={
            "task": "digits", "sites": SITES, "alpha": 0.3, "seed": seed, "epochs": 8, "learning_rate": 0.05,
        },
        initial_parameters=lambda: initial("digits", seed),
        central=lambda parameters: accuracy("digits", parameters),
        federation=FederationConfig(
            num_clients=SITES, num_rounds=ROUNDS, seed=seed, message_dtype=form,  # type: ignore[arg-type]
            message_error_feedback=feedback,
        ),
    )  # fmt: skip
    if private:
        recipe = replace(recipe, mechanisms=(GaussianMechanism(clip_norm=2.0, noise_multiplier=0.2),))
    result = recipe.execute(SimEnv(device="cpu"))
    last = result.rounds[-1]
    size = arrays.nbytes(initial("digits", seed))
    return {
        "down": last.bytes_down / SITES / size,
        "up": last.bytes_up / SITES / size,
        "accuracy": [round(entry.central["accuracy"], 4) for entry in result.rounds if entry.central],
    }


def accuracies() -> list[dict[str, Any]]:
    """Every format, three seeds each."""
    ways = [("float32", True, False), ("float32", True, True)]
    ways += [(form, feedback, False) for form in CODED for feedback in (True, False)]
    ways += [(form, True, True) for form in CODED]
    rows = []
    for form, feedback, private in ways:
        runs = [train(form, seed, feedback=feedback, private=private) for seed in SEEDS]
        rows.append({"dtype": form, "feedback": feedback, "private": private, "runs": runs})
        last = statistics.mean(statistics.mean(run["accuracy"][-5:]) for run in runs)
        sys.stdout.write(f"{form} feedback={feedback} private={private}: {last:.4f} {runs[0]['up']:.3f}\n")
        sys.stdout.flush()
    return rows


def report(found: dict[str, Any]) -> str:
    """Tables."""
    lines = [
        "# Quantised messages",
        "",
        "`python benchmarks/messages.py`. GB of float32 per CPU second on one core; a copy in memory runs at "
        f"{found['codes'][0]['copy_gb_s']:.1f} GB/s. The error is that of normal numbers, in L2 norm over theirs.",
        "",
        "| dtype | encode | encode, bounded | decode | error | error, bounded |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['dtype']} | {row['encode_gb_s']:.2f} | {row['bounded_gb_s']:.2f} | {row['decode_gb_s']:.2f} | "
        f"{row['error']:.2%} | {row['bounded_error']:.2%} |"
        for row in found["codes"]
    ]
    lines += [
        "",
        f"Digits, {SITES} sites, Dirichlet α = 0.3, {ROUNDS} rounds of 8 epochs, seeds {', '.join(map(str, SEEDS))}: "
        "accuracy of the global model (in float32, as it is kept), mean of the last five rounds, with the standard "
        "deviation over seeds. Private: noise of multiplier 0.2 on the sum, clip 2.",
        "",
        "| dtype | feedback | private | bytes down | bytes up | accuracy |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in found["runs"]:
        ends = [statistics.mean(run["accuracy"][-5:]) for run in row["runs"]]
        to_sites = "to the sites" if row["private"] else "both ways"
        feedback = "-" if row["dtype"] == quantise.FLOAT32 else to_sites if row["feedback"] else "no"
        lines.append(
            f"| {row['dtype']} | {feedback} | {'yes' if row['private'] else 'no'} | {row['runs'][0]['down']:.1%} | "
            f"{row['runs'][0]['up']:.1%} | {statistics.mean(ends):.2%} ± {statistics.stdev(ends):.2%} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    measured = {"codes": codes(), "runs": accuracies()}
    RESULTS.joinpath("messages.json").write_text(json.dumps(measured, indent=1) + "\n")
    RESULTS.joinpath("messages.md").write_text(report(measured))
