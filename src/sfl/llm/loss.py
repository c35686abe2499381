"""The loss of causal language modelling: of a batch, and of each of its rows on its own."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sfl.llm.tokens import IGNORED, TokenBatch
from sfl.train.dpsgd import ExampleLosses
from sfl.train.trainer import BatchLoss

__all__ = ["lm_loss", "lm_losses"]


def lm_loss(module: nn.Module, batch: TokenBatch) -> BatchLoss:
    """Summed cross-entropy over the tokens that are to be foretold."""
    logits, targets = _logits(module, batch)
    kept = targets != IGNORED
    count = int(np.count_nonzero(batch.targets != IGNORED))
    chosen, wanted = logits[kept].float(), targets[kept]
    total = nn.functional.cross_entropy(chosen, wanted, reduction="sum")
    return BatchLoss(total, count, (chosen.argmax(-1) == wanted).sum())


def lm_losses(module: nn.Module, batch: TokenBatch) -> ExampleLosses:
    """Each row's mean cross-entropy over its own tokens; 0 for a row that foretells none."""
    logits, targets = _logits(module, batch)
    each = nn.functional.cross_entropy(logits.float().mT, targets, reduction="none", ignore_index=IGNORED)
    counts = (targets != IGNORED).sum(1)
    count = int(np.count_nonzero(batch.targets != IGNORED))
    correct = (logits.argmax(-1) == targets).sum()
    return ExampleLosses(each.sum(1) / counts.clamp(min=1), BatchLoss(each.sum(), count, correct))


def _logits(module: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Scores of the next token, shape (rows, length, vocabulary), and the targets, on the module's device.

    Virtual tokens of an adapter come first and foretell nothing. Positions that begin anew within a row tell
    ``transformers`` that documents are packed: it lets none see another.
    """
    model = cast("Any", module)
    device = next(model.parameters()).device
    more: dict[str, Tensor] = {}
    if batch.positions is not None:
        more["position_ids"] = torch.from_numpy(batch.positions).to(device)
    if batch.real is not None:
        more["attention_mask"] = torch.from_numpy(batch.real).long().to(device)
    logits = model(input_ids=torch.from_numpy(batch.ids).to(device), use_cache=False, **more).logits
    return logits[:, -batch.ids.shape[1] :], torch.from_numpy(batch.targets).to(device)
