"""Masked language modelling of proteins: what a site and the server do with ESM2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from sfl.application.workload import Workload
from sfl.esm2.alphabet import PackedProteins
from sfl.esm2.config import ESM2RunConfig
from sfl.esm2.dataset import COLLECTION, figures
from sfl.esm2.loss import mlm_loss, mlm_losses
from sfl.esm2.masking import MaskedBatch, ProteinExamples
from sfl.esm2.model import load_model, save_model
from sfl.esm2.proteins import ProteinRecord
from sfl.train.dpsgd import ExampleLosses
from sfl.train.module import resident
from sfl.train.pretrained import placed
from sfl.train.trainer import BatchLoss, Outcome
from sfl.types import Metrics

if TYPE_CHECKING:
    from transformers import EsmForMaskedLM

__all__ = ["ESM2Workload"]


@dataclass(frozen=True, kw_only=True)
class ESM2Workload(Workload[ProteinRecord, MaskedBatch]):
    """Fine-tuning of ESM2 on proteins.

    Attributes:
        config: The run's configuration.
        model: The model that the run starts from.
    """

    name: ClassVar[str] = "esm2"
    unit: ClassVar[str] = "residues"
    kinds: ClassVar[str] = "organisms"
    collection = COLLECTION
    config: ESM2RunConfig

    def module(self, device: str, *, seed: int = 0) -> EsmForMaskedLM:
        """The worker's one model of this source; ``seed`` is that of arrays which the checkpoint lacks."""
        key = ("esm2", self.model.location, device)
        return resident(key, lambda: placed(load_model(self.model, seed=seed), device))

    def examples(self, records: Sequence[ProteinRecord]) -> ProteinExamples:
        """Proteins as masked crops."""
        client = self.config.client
        packed = PackedProteins.pack(record.sequence for record in records)
        return ProteinExamples(packed, client.batch_size, client.max_length)

    def loss(self, module: nn.Module, batch: MaskedBatch) -> BatchLoss:
        """Summed cross-entropy over the selected residues."""
        return mlm_loss(module, batch)

    def losses(self, module: nn.Module, batch: MaskedBatch) -> ExampleLosses:
        """Each protein's mean cross-entropy over its own selected residues."""
        return mlm_losses(module, batch)

    def figures(self, outcome: Outcome) -> Metrics:
        """Loss and masked accuracy."""
        return {"loss": outcome.loss, "masked_accuracy": outcome.accuracy}

    def described(self, records: Sequence[ProteinRecord]) -> dict[str, Any]:
        """Residues and most frequent organisms."""
        return figures(records)

    def save(self, module: nn.Module, folder: Path) -> None:
        """The final model as ``transformers`` loads it."""
        save_model(cast("EsmForMaskedLM", module), folder)
