"""The work that both sides do: models, data and local training, as a user would write them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

SEED = 7
LARGE_LAYERS, LARGE_WIDTH = 25, 1000  # 25 000 000 parameters, 100 MB in float32
STEP = 1e-3  # of the trivial local work


@dataclass(frozen=True)
class Shard:
    """One site's examples: what it trains on, and what it holds out."""

    inputs: torch.Tensor
    labels: torch.Tensor
    held_inputs: torch.Tensor
    held_labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Job:
    """Federated training of a small classifier."""

    sites: int
    rounds: int
    widths: tuple[int, ...]
    batch_size: int
    epochs: int
    learning_rate: float = 0.1

    def module(self) -> nn.Sequential:
        """Linear layers with ReLU between them; the same weights every time."""
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(SEED)
            layers: list[nn.Module] = []
            for width, following in zip(self.widths, self.widths[1:], strict=False):
                layers += [nn.Linear(width, following), nn.ReLU()]
            return nn.Sequential(*layers[:-1])

    def shards(self) -> list[Shard]:
        """The sites' data: scikit-learn's digits where the input has 64 numbers, else drawn at random."""
        inputs, labels = _digits() if self.widths[0] == 64 else _random(256 * self.sites, self.widths)
        order = np.random.default_rng(SEED).permutation(len(labels))
        return [_shard(inputs[part], labels[part]) for part in np.array_split(order, self.sites)]

    def train(self, module: nn.Module, shard: Shard, seed: int) -> None:
        """Plain SGD over shuffled batches, its optimizer fresh every round."""
        optimizer = torch.optim.SGD(module.parameters(), lr=self.learning_rate)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(shard), generator=generator).split(self.batch_size):
                loss = nn.functional.cross_entropy(module(shard.inputs[batch]), shard.labels[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    @torch.inference_mode()
    def evaluate(self, module: nn.Module, shard: Shard) -> tuple[float, float]:
        """Mean loss and accuracy on what the site holds out."""
        logits = module(shard.held_inputs)
        loss = nn.functional.cross_entropy(logits, shard.held_labels)
        return float(loss), float((logits.argmax(-1) == shard.held_labels).float().mean())


TINY = Job(sites=2, rounds=3, widths=(16, 32, 4), batch_size=32, epochs=1)
DIGITS = Job(sites=100, rounds=20, widths=(64, 32, 10), batch_size=8, epochs=1)
LARGE_SITES, LARGE_ROUNDS = 4, 5


def local_seed(round: int, client: int) -> int:
    """Of the order in which one site sees its examples in one round."""
    return 1000 * round + client


def _shard(inputs: np.ndarray, labels: np.ndarray) -> Shard:
    held = max(1, len(labels) // 10)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    return Shard(x[held:], y[held:], x[:held], y[:held])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return (inputs / 16.0).astype(np.float32), labels.astype(np.int64)


def _random(count: int, widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(SEED)
    inputs = generator.standard_normal((count, widths[0]), dtype=np.float32)
    return inputs, inputs[:, : widths[-1]].argmax(axis=1)


class Large(nn.Module):
    """25 million parameters and no forward pass: its local work is one pass over memory."""

    def __init__(self, width: int = LARGE_WIDTH) -> None:
        super().__init__()
        shape = (width, width)
        self.layers = nn.ParameterList(torch.full(shape, float(i) / LARGE_LAYERS) for i in range(LARGE_LAYERS))

    @torch.no_grad()
    def work(self, client: int) -> None:
        """Add a small constant to every parameter."""
        for parameter in self.parameters():
            parameter.add_(STEP * (client + 1))


def large_arrays(width: int = LARGE_WIDTH) -> dict[str, np.ndarray]:
    """The same numbers as arrays."""
    shape = (width, width)
    return {f"layers.{i}": np.full(shape, i / LARGE_LAYERS, np.float32) for i in range(LARGE_LAYERS)}


def large_weight(client: int) -> int:
    """Examples of a site: they differ, so that the mean is a weighted one."""
    return 10 * (client + 1)


def optimizer_is_imported() -> None:
    """The first optimizer of a process imports a third of torch; do that before the loop is timed."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0).step()


@dataclass(frozen=True)
class ESM2Files:
    """Where the random ESM2 8M model and the random proteins lie."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "esm2_t6_8M_random"

    @property
    def proteins(self) -> Path:
        return self.folder / "proteins.fasta"

    def write(self) -> None:
        """Configuration of esm2_t6_8M_UR50D with weights drawn at random, and 240 random proteins of 64 residues."""
        from transformers import EsmConfig, EsmForMaskedLM

        from sfl.esm2.alphabet import STANDARD
        from sfl.esm2.model import save_model

        torch.default_generator.manual_seed(SEED)
        save_model(EsmForMaskedLM(EsmConfig(**ESM2_8M)), self.model)
        residues = np.random.default_rng(SEED).choice(list(STANDARD), size=(240, 64))
        lines = [f">protein{i}\n{''.join(row)}\n" for i, row in enumerate(residues)]
        self.proteins.write_text("".join(lines))


ESM2_8M = {
    "vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "hidden_size": 320, "num_hidden_layers": 6,
    "num_attention_heads": 20, "intermediate_size": 1280, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 1026, "position_embedding_type": "rotary",
    "emb_layer_norm_before": False, "token_dropout": True, "layer_norm_eps": 1e-5,
}  # fmt: skip
ESM2_SITES, ESM2_ROUNDS, ESM2_STEPS, ESM2_BATCH, ESM2_LENGTH, ESM2_EVAL = 2, 2, 20, 4, 64, 16
