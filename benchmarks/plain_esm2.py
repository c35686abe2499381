"""Federated ESM2 by hand: ``transformers``, AdamW and a loop. Only the data pipeline is SFL's, so batches are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import EsmForMaskedLM

import work
from sfl.core import rng
from sfl.esm2.alphabet import PAD, PackedProteins
from sfl.esm2.dataset import federate_proteins, load_proteins
from sfl.esm2.masking import MaskedBatch, ProteinExamples, epoch
from sfl.train.examples import repeated

LEARNING_RATE, MAX_NORM, DECAY = 5e-4, 1.0, 0.01


@dataclass(frozen=True)
class Proteins:
    """What one site trains on and holds out."""

    name: str
    train: PackedProteins
    held_out: PackedProteins


def prepare(files: work.ESM2Files) -> Callable[[], dict[str, np.ndarray]]:
    """Read the data; the loop loads the model, as SFL's does."""
    sites, held_out = read(files)
    work.optimizer_is_imported()

    def loop() -> dict[str, np.ndarray]:
        model = load_model(files)
        parameters = dict(p for p in model.named_parameters() if p[1].requires_grad)
        current = [p.detach().clone() for p in parameters.values()]
        examples = sum(len(site.train) for site in sites)
        history = [[evaluate(model, part) for part in (*(s.held_out for s in sites), held_out)]]
        for round in range(1, work.ESM2_ROUNDS + 1):
            total = [torch.zeros_like(p) for p in current]
            for site in sites:
                load(parameters, current)
                train(model, list(parameters.values()), batches(site, round))
                add(total, parameters, len(site.train) / examples)
            current = total
            load(parameters, current)
            history.append([evaluate(model, part) for part in (*(s.held_out for s in sites), held_out)])
        return {name: value.numpy() for name, value in zip(parameters, current, strict=True)}

    return loop


def read(files: work.ESM2Files) -> tuple[list[Proteins], PackedProteins]:
    """Every site's proteins, and those that no site has."""
    records, _ = load_proteins(str(files.proteins))
    data = federate_proteins(records, partition="iid", num_clients=work.ESM2_SITES, seed=work.SEED)
    sites = [
        Proteins(
            site.name,
            PackedProteins.pack(record.sequence for record in site.train),
            PackedProteins.pack(chosen([record.sequence for record in site.held_out], site.name)),
        )
        for site in data.sites
    ]
    return sites, PackedProteins.pack(chosen([record.sequence for record in data.held_out], "global"))


def chosen(sequences: list[str], name: str) -> list[str]:
    if len(sequences) <= work.ESM2_EVAL:
        return sequences
    draw = rng.public(work.SEED, 0, "esm2-eval-sample", name)
    return [sequences[i] for i in sorted(draw.choice(len(sequences), size=work.ESM2_EVAL, replace=False))]


def load_model(files: work.ESM2Files) -> EsmForMaskedLM:
    model = EsmForMaskedLM.from_pretrained(str(files.model), dtype="float32", attn_implementation="sdpa")
    model.esm.contact_head.requires_grad_(False)
    return model


def batches(site: Proteins, round: int) -> Iterator[MaskedBatch]:
    generator = rng.public(work.SEED, round, "esm2-train", site.name)
    examples = ProteinExamples(site.train, work.ESM2_BATCH, work.ESM2_LENGTH)
    return repeated(examples, epochs=None, steps=work.ESM2_STEPS, generator=generator)


@torch.no_grad()
def load(parameters: dict[str, nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters.values(), values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def add(total: list[torch.Tensor], parameters: dict[str, nn.Parameter], share: float) -> None:
    for sum_, parameter in zip(total, parameters.values(), strict=True):
        sum_.add_(parameter, alpha=share)


def train(model: EsmForMaskedLM, parameters: list[nn.Parameter], batches: Iterator[MaskedBatch]) -> float:
    """AdamW with clipped gradients; the loss is read once, at the end."""
    model.train()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        loss, _ = forward(model, batch)
        (loss / len(batch.targets)).backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        count += len(batch.targets)
    return float(total) / count


@torch.inference_mode()
def evaluate(model: EsmForMaskedLM, proteins: PackedProteins) -> tuple[float, float]:
    """Mean loss and masked accuracy, with the same masks every round."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    generator = rng.public(work.SEED, 0, "esm2-eval-mask")
    for batch in epoch(proteins, work.ESM2_BATCH, work.ESM2_LENGTH, generator, evaluation=True):
        batch_loss, right = forward(model, batch)
        loss, correct, count = loss + float(batch_loss), correct + int(right), count + len(batch.targets)
    return loss / count, correct / count


def forward(model: EsmForMaskedLM, batch: MaskedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and right answers over the masked residues; the head runs on those positions alone."""
    found = torch.cpu.get_capabilities()
    bf16 = bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden = model.esm(ids, attention_mask=(ids != PAD).long()).last_hidden_state
        logits = model.lm_head(hidden[torch.from_numpy(batch.selected)]).float()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.argmax(-1) == targets).sum()
