"""A step of DP-SGD as the auditor takes it: canaries whose gradients are directions of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sfl.privacy.accountant import Guarantee, PrivacyAccountant, guarantees
from sfl.privacy.audit import NormCheck
from sfl.privacy.audit.directions import Directions
from sfl.privacy.audit.scoring import Scoring
from sfl.privacy.dpsgd import dpsgd_event
from sfl.train.dpsgd import ExampleLosses, PrivateTrainer
from sfl.train.trainer import BatchLoss
from sfl.types import Array, Parameters

__all__ = ["StepPipeline"]

_PER_CANARY = 4  # parameters of the model that is made up, for each canary
_BATCH = 64  # canaries whose gradients are held at once


@dataclass(frozen=True, kw_only=True)
class StepPipeline:
    """One step of a ``PrivateTrainer``: its clipping, its sum and its noise, on the strongest canaries there are.

    A canary is an example whose gradient is a direction of its own, ten times as long as the clip bound (the Dirac
    canaries of Nasr et al. 2023, white-box; Steinke, Nasr & Jagielski 2023). The model is made up for them, linear in
    its inputs; the trainer is the run's own. Every canary that is in is in the step: what is claimed is a step without
    the help of sampling, and any number of steps and any sampling rate are composed from just that.

    Attributes:
        trainer: The run's.
        canaries: How many.
        delta: δ of the claim.
        checked: What was found of single examples' norms on the run's own model.
    """

    trainer: PrivateTrainer[Any]
    canaries: int
    delta: float
    checked: Callable[[], NormCheck]
    length: float = 10.0

    @property
    def rounds(self) -> int:
        """One step."""
        return 1

    @property
    def sees(self) -> Literal["models", "updates"]:
        """The noisy sum, which the step of the optimizer follows from."""
        return "updates"

    @property
    def claim(self) -> Guarantee:
        """What the ledger says of one step at a sampling rate of 1."""
        event = dpsgd_event(self.trainer.noise_multiplier, 1.0, 1)
        (found,) = guarantees([event], PrivacyAccountant(delta=self.delta))
        return found

    @property
    def scoring(self) -> Scoring:
        """Plain: everybody is in every step, and noise is drawn anew."""
        return Scoring(noise_multiplier=self.trainer.noise_multiplier)

    def observe(self, coins: Array, seed: int) -> Array:
        """One step; see ``Pipeline``."""
        weights = nn.Linear(_PER_CANARY * len(coins), 1, bias=False)
        zeros: Parameters = {"weight": np.zeros((1, _PER_CANARY * len(coins)), np.float32)}
        directions = Directions.within(zeros, len(coins), seed)
        size = self.length * self.trainer.sensitivity
        rows = [directions.add(zeros, int(index), size)["weight"][0] for index in np.flatnonzero(coins)]
        sample = [torch.from_numpy(np.stack(rows[at : at + _BATCH])) for at in range(0, len(rows), _BATCH)]
        trainer = replace(self.trainer, losses=_linear, size=len)
        return directions.project(trainer.noisy_sum(weights, sample))[None, :]

    def norms(self) -> tuple[NormCheck, ...]:
        """That of the run's own model."""
        return (self.checked(),)


def _linear(module: nn.Module, batch: Tensor) -> ExampleLosses:
    scores = module(batch).squeeze(1)
    return ExampleLosses(scores, BatchLoss(scores.sum(), len(batch), torch.zeros((), dtype=torch.int64)))
