"""Local training: so many optimizer steps of a module on batches. Knows nothing of clients or rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from sfl.core.terms import NO_TERMS, LocalTerms
from sfl.errors import ModelError
from sfl.train.steering import Steering

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What local training saw.

    Attributes:
        steps: Optimizer steps taken.
        examples: Examples seen, with repetition.
        loss: Mean loss over the predicted tokens (or examples) of all steps.
        accuracy: Share of them predicted right.
        travelled: Sum of the steps' learning rates.
    """

    steps: int
    examples: int
    loss: float
    accuracy: float
    travelled: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """One forward pass: ``total`` is the summed loss over ``count`` predictions, ``correct`` of them right."""

    total: torch.Tensor
    count: int
    correct: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Trainer(Generic[Batch]):
    """AdamW on batches (Loshchilov & Hutter, ICLR 2019), its moments fresh every round.

    Attributes:
        loss: Forward pass of a module on a batch.
        size: Number of examples in a batch.
        learning_rate: Constant over the round.
        weight_decay: Of matrices; biases and norms have none.
        max_grad_norm: Gradients above it are scaled down to it.
        bf16: Compute in bfloat16 where the hardware has it.
        accumulation: Batches whose gradients make one step: that of the mean over all their predictions.
    """

    loss: Callable[[nn.Module, Batch], BatchLoss]
    size: Callable[[Batch], int]
    learning_rate: float
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = True
    accumulation: int = 1

    def fit(self, module: nn.Module, batches: Iterator[Batch], seed: int, terms: LocalTerms = NO_TERMS) -> Outcome:
        """One optimizer step for each batch, or for each ``accumulation`` of them; what is left at the end is one, too.

        Args:
            module: Trained in place.
            batches: As many as steps are wanted.
            seed: Of torch's own draws (dropout).
            terms: What the run's algorithm adds.

        Raises:
            ModelError: If there was no batch.
        """
        module.train()
        trainable = [p for p in module.parameters() if p.requires_grad]
        seed_draws(trainable[0].device, seed)
        steering = Steering(module, terms)
        rate = self.learning_rate * steering.factor
        optimizer = adamw(trainable, rate, self.weight_decay)
        context = autocast(trainable[0].device, self.bf16)
        steps = examples = 0
        tally = Tally(trainable[0].device)
        while group := list(islice(batches, self.accumulation)):
            counts = 0
            for batch in group:
                with context:
                    result = self.loss(module, batch)
                alone = len(group) == 1
                (result.total / max(result.count, 1) if alone else result.total).backward()
                counts += result.count
                tally.add(result)
                examples += self.size(batch)
            if len(group) > 1:
                _divide_gradients(trainable, max(counts, 1))
            steering.add_gradients()
            nn.utils.clip_grad_norm_(trainable, self.max_grad_norm)
            optimizer.step()
            steering.drift(rate)
            optimizer.zero_grad(set_to_none=True)
            steps += 1
        if steps == 0:
            raise ModelError("local training must have at least one batch, got none. Give the site more data.")
        return Outcome(steps, examples, *tally.means(), travelled=steps * rate)

    def evaluate(self, module: nn.Module, batches: Iterator[Batch]) -> Outcome:
        """Loss and accuracy over batches; an empty iterator gives zeros over 0 examples."""
        return evaluate(module, batches, loss=self.loss, size=self.size, bf16=self.bf16)


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    batches: Iterator[Batch],
    *,
    loss: Callable[[nn.Module, Batch], BatchLoss],
    size: Callable[[Batch], int],
    bf16: bool,
) -> Outcome:
    """Loss and accuracy over batches; an empty iterator gives zeros over 0 examples."""
    module.eval()
    device = next(module.parameters()).device
    context = autocast(device, bf16)
    examples = steps = 0
    tally = Tally(device)
    for batch in batches:
        with context:
            tally.add(loss(module, batch))
        steps, examples = steps + 1, examples + size(batch)
    return Outcome(steps, examples, *tally.means())


def seed_draws(device: torch.device, seed: int) -> None:
    """Seed what torch itself draws (dropout), on the host and on ``device``, which has a generator of its own."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def adamw(trainable: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW whose decay is of matrices alone."""
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def _divide_gradients(trainable: Sequence[nn.Parameter], count: int) -> None:
    for parameter in trainable:
        if parameter.grad is not None:
            parameter.grad.div_(count)


class Tally:
    """Running sums, kept on the device so that no step waits for a copy to the host."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0

    def add(self, result: BatchLoss) -> None:
        """Count one forward pass."""
        self._loss += result.total.detach()
        self._correct += result.correct
        self._count += result.count

    def means(self) -> tuple[float, float]:
        """Loss and accuracy of all that was predicted; zeros of nothing."""
        count = max(self._count, 1)
        return float(self._loss) / count, int(self._correct) / count


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware, and so is faster: emulated, it is five times slower than float32.

    x86 has it as AMX or AVX-512 BF16; with plain AVX-512, oneDNN calls it supported and emulates it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    found: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return found.get("architecture") != "x86_64" or bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def autocast(device: torch.device, wanted: bool) -> AbstractContextManager[object]:
    """bfloat16 autocast where it is wanted and the hardware has it; re-enterable, and does nothing otherwise."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted and has_bf16(device))
