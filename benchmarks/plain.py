"""The same jobs by hand: PyTorch loops without a framework, as a good engineer would write them.

Each entry of ``JOBS`` gets everything ready (data, imports) and returns the loop; the loop returns the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import work

Loop = Callable[[], dict[str, np.ndarray]]


def classifier(job: work.Job) -> Loop:
    """Weighted federated averaging over one resident module."""
    shards = job.shards()
    work.optimizer_is_imported()

    def loop() -> dict[str, np.ndarray]:
        module = job.module()
        current = [p.detach().clone() for p in module.parameters()]
        examples = sum(len(shard) for shard in shards)
        history = [evaluate_all(job, module, shards)]
        for round in range(1, job.rounds + 1):
            total = [torch.zeros_like(p) for p in current]
            for client, shard in enumerate(shards):
                load(module, current)
                job.train(module, shard, work.local_seed(round, client))
                add(total, module, len(shard) / examples)
            current = total
            load(module, current)
            history.append(evaluate_all(job, module, shards))
        return named(module, current)

    return loop


def evaluate_all(job: work.Job, module: nn.Module, shards: list[work.Shard]) -> tuple[float, float]:
    """Mean loss and accuracy over the sites, weighted by what each holds out."""
    loss = accuracy = count = 0.0
    for shard in shards:
        weight = len(shard.held_labels)
        site_loss, site_accuracy = job.evaluate(module, shard)
        loss, accuracy, count = loss + weight * site_loss, accuracy + weight * site_accuracy, count + weight
    return loss / count, accuracy / count


@torch.no_grad()
def load(module: nn.Module, values: list[torch.Tensor]) -> None:
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def add(total: list[torch.Tensor], module: nn.Module, share: float) -> None:
    for sum_, parameter in zip(total, module.parameters(), strict=True):
        sum_.add_(parameter, alpha=share)


def named(module: nn.Module, values: list[torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for (name, _), value in zip(module.named_parameters(), values, strict=True)}


def large(width: int = work.LARGE_WIDTH) -> Loop:
    """Three models: the resident one, the global parameters, and their running mean."""

    def loop() -> dict[str, np.ndarray]:
        module = work.Large(width)
        current = [p.detach().clone() for p in module.parameters()]
        weights = [work.large_weight(client) for client in range(work.LARGE_SITES)]
        for _ in range(work.LARGE_ROUNDS):
            total = [torch.zeros_like(p) for p in current]
            for client, weight in enumerate(weights):
                load(module, current)
                module.work(client)
                add(total, module, weight / sum(weights))
            current = total
        return named(module, current)

    return loop


def large_numpy(width: int = work.LARGE_WIDTH) -> Loop:
    """The same with arrays; each site's update is a new dict of new arrays."""

    def loop() -> dict[str, np.ndarray]:
        current = work.large_arrays(width)
        weights = [work.large_weight(client) for client in range(work.LARGE_SITES)]
        for _ in range(work.LARGE_ROUNDS):
            total = {name: np.zeros_like(value) for name, value in current.items()}
            for client, weight in enumerate(weights):
                update = {name: value + np.float32(work.STEP * (client + 1)) for name, value in current.items()}
                for name, value in update.items():
                    value *= weight / sum(weights)
                    total[name] += value
                del update, value
            current = total
        return current

    return loop


def esm2(folder: Path) -> Loop:
    """ESM2 under masked language modelling, on the batches that SFL draws (its masking is data, not framework)."""
    from plain_esm2 import prepare

    return prepare(work.ESM2Files(folder))


JOBS: dict[str, Callable[[Path], Loop]] = {
    "tiny": lambda _: classifier(work.TINY),
    "digits": lambda _: classifier(work.DIGITS),
    "large": lambda _: large(),
    "large-empty": lambda _: large(width=1),
    "large-numpy": lambda _: large_numpy(),
    "large-numpy-empty": lambda _: large_numpy(width=1),
    "esm2": esm2,
}
