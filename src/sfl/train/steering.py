"""What an algorithm adds to the steps of a torch module's training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sfl.core.terms import LocalTerms
from sfl.types import Array


class Steering:
    """``LocalTerms`` for a module: the proximal term among its gradients, the drift after its optimizer's step.

    With SGD that is exactly y ← y − η (g + μ (y − anchor) + drift). With another optimizer the proximal term is part
    of the loss that it minimises, and the drift is added to the direction that it has chosen, as SCAFFOLD's control
    variates are means of such directions.

    Args:
        module: What is trained; only its trainable parameters are steered.
        terms: By the names of the module's parameters.
    """

    def __init__(self, module: nn.Module, terms: LocalTerms) -> None:
        self.factor = terms.learning_rate_factor
        self._mu = terms.proximal_mu
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        anchor = terms.anchor if terms.anchor is not None and terms.proximal_mu != 0.0 else {}
        self._pulled, self._anchors = _matched(trained, anchor)
        self._drifting, self._drifts = _matched(trained, terms.drift or {})

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add μ (y − anchor) to the gradients; one that is not there yet is taken as zero."""
        for parameter, anchor in zip(self._pulled, self._anchors, strict=True):
            pull = (parameter - anchor).mul_(self._mu)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    @torch.no_grad()
    def drift(self, learning_rate: float) -> None:
        """After the optimizer's step: y ← y − η · drift."""
        for parameter, drift in zip(self._drifting, self._drifts, strict=True):
            parameter.sub_(drift, alpha=learning_rate)


def _matched(
    trained: Mapping[str, nn.Parameter], arrays: Mapping[str, Array]
) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    names = [name for name in trained if name in arrays]
    placed = [torch.tensor(arrays[name], dtype=trained[name].dtype, device=trained[name].device) for name in names]
    return [trained[name] for name in names], placed
