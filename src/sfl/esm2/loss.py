"""The loss of masked language modelling: of a batch, and of each protein on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from sfl.esm2.alphabet import PAD
from sfl.esm2.masking import MaskedBatch
from sfl.train.dpsgd import ExampleLosses
from sfl.train.trainer import BatchLoss

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM

__all__ = ["mlm_loss", "mlm_losses"]


def mlm_loss(module: nn.Module, batch: MaskedBatch) -> BatchLoss:
    """Summed cross-entropy over the selected residues; the head runs on those positions alone."""
    model = cast("EsmForMaskedLM", module)
    device = model.lm_head.bias.device
    ids = torch.from_numpy(batch.ids).to(device)
    attention = (ids != PAD).long() if batch.padded else torch.ones_like(ids)
    hidden = model.esm(ids, attention_mask=attention).last_hidden_state
    logits = model.lm_head(hidden[torch.from_numpy(batch.selected).to(device)]).float()
    targets = torch.from_numpy(batch.targets).to(device)
    total = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return BatchLoss(total, len(batch.targets), (logits.argmax(-1) == targets).sum())


def mlm_losses(module: nn.Module, batch: MaskedBatch) -> ExampleLosses:
    """Each protein's mean cross-entropy over its own selected residues; 0 for a protein without any.

    The head runs on the selected positions alone, padded to the protein with most of them, so that each keeps a row.
    """
    model = cast("EsmForMaskedLM", module)
    device = model.lm_head.bias.device
    ids = torch.from_numpy(batch.ids).to(device)
    attention = (ids != PAD).long() if batch.padded else torch.ones_like(ids)
    hidden = model.esm(ids, attention_mask=attention).last_hidden_state
    counts = batch.selected.sum(1)
    first = np.argsort(~batch.selected, axis=1, kind="stable")[:, : max(int(counts.max()), 1)]
    chosen = torch.from_numpy(np.arange(first.shape[1]) < counts[:, None]).to(device)
    places = torch.from_numpy(first).to(device)[:, :, None].expand(-1, -1, hidden.shape[2])
    logits = model.lm_head(hidden.gather(1, places)).float()
    targets = torch.full(chosen.shape, -100, device=device)
    targets[chosen] = torch.from_numpy(batch.targets).to(device)
    each = nn.functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
    losses = each.sum(1) / chosen.sum(1).clamp(min=1)
    correct = (logits.argmax(-1) == targets).sum()
    return ExampleLosses(losses, BatchLoss(each.sum(), len(batch.targets), correct))
