"""The loss of causal language modelling: of a batch, and of each of its rows on its own."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from sfl.llm.tokens import IGNORED, TokenBatch, unpacked
from sfl.train.dpsgd import ExampleLosses
from sfl.train.trainer import BatchLoss

__all__ = ["lm_loss", "lm_losses"]


def lm_loss(module: nn.Module, batch: TokenBatch) -> BatchLoss:
    """Summed cross-entropy over the tokens that are to be foretold.

    Packed rows are shown to a model that does not keep their documents apart as a row for each document.
    """
    if batch.positions is not None and not _keeps_apart(module):
        batch = unpacked(batch)
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

    Positions that begin anew within a row tell ``transformers`` that documents are packed: it lets none see another.
    """
    model = cast("Any", module)
    device = next(model.parameters()).device
    ids, targets = torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.targets).to(device)
    real = None if batch.real is None else torch.from_numpy(batch.real).to(device)
    if getattr(model, "prompt_encoder", None):
        return _prompted(model, ids, real), targets
    more: dict[str, Tensor] = {}
    if batch.positions is not None:
        more["position_ids"] = torch.from_numpy(batch.positions).to(device)
    if real is not None:
        more["attention_mask"] = real.long()
    return model(input_ids=ids, use_cache=False, **more).logits, targets


_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _keeps_apart(module: nn.Module) -> bool:
    """Whether a token of the model sees nothing of another document in its row; tried once, without a trace."""
    if module not in _apart:
        was, ids = module.training, torch.tensor([[1, 1, 1, 2, 3], [0, 2, 1, 2, 3]])
        places = torch.tensor([[0, 1, 2, 0, 1]]).expand(2, -1)
        device = next(module.parameters()).device
        module.eval()
        try:
            with torch.no_grad():
                shown = {"input_ids": ids.to(device), "position_ids": places.to(device)}
                one, other = cast("Any", module)(**shown, use_cache=False).logits[:, 3:].float()
            _apart[module] = bool((one - other).abs().max() <= 1e-6 * one.abs().max())
        except TypeError:  # it takes no positions
            _apart[module] = False
        finally:
            module.train(was)
    return _apart[module]


def _prompted(model: Any, ids: Tensor, real: Tensor | None) -> Tensor:
    """Scores behind virtual tokens, which each row gets of its own: ``peft`` makes one for all, of which no row's
    own gradient is known.
    """
    name = model.active_adapter
    virtual = model.prompt_tokens[name].to(ids.device).expand(len(ids), -1)
    prompts, words = model.prompt_encoder[name](virtual), model.word_embeddings(ids)
    seen = torch.ones_like(ids) if real is None else real.long()
    logits = model.base_model(
        inputs_embeds=torch.cat((prompts.to(words.dtype), words), dim=1),
        attention_mask=torch.cat((torch.ones_like(virtual), seen), dim=1),
        use_cache=False,
    ).logits
    return logits[:, virtual.shape[1] :]
