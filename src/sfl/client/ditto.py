"""Ditto's half on a site: a model of its own beside the global one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.client.rule import LocalRule
from sfl.core import arrays
from sfl.core.terms import PROXIMAL, LocalTerms
from sfl.types import Array, Config, Metrics, Parameters

_STATE = "ditto"
PERSONAL = "personal_"
"""What the names of a personal model's figures begin with."""


@dataclass(frozen=True)
class DittoRule(LocalRule):
    """Li, Hu, Beirami & Smith, ICML 2021, Algorithm 1.

    Beside its part in training the global model w, a site trains a model v of its own on its loss plus
    λ/2 ‖v − w‖². v begins as the w of the site's first round and never leaves it. ``compute_update`` is called twice
    in a round, for v and for w.

    Attributes:
        personal_lambda: λ; 0 trains v by itself, large values keep it at w.
    """

    personal_lambda: float

    asks: ClassVar[frozenset[str]] = frozenset({PROXIMAL})

    def before(
        self, client: BaseFederatedClient, sent: Mapping[str, Array], config: Config, terms: LocalTerms
    ) -> LocalTerms:
        """Train the site's own model. It comes first: what a client returns for w may be lent."""
        own: Parameters = client.state.get(_STATE) or arrays.copy(sent)
        client.terms = LocalTerms(self.personal_lambda, sent, learning_rate_factor=terms.learning_rate_factor)
        trained, _, _ = client.compute_update(arrays.read_only(own), config)
        client.state[_STATE] = {name: np.array(trained[name]) for name in own}
        return terms

    def figures(self, client: BaseFederatedClient, config: Config) -> Metrics:
        """The personal model's figures on the site's held-out data; none before the site has one."""
        own: Parameters | None = client.state.get(_STATE)
        if own is None:
            return {}
        loss, _, metrics = client.evaluate(arrays.read_only(own), config)
        named = metrics if loss is None else {"loss": float(loss), **metrics}
        return {PERSONAL + name: value for name, value in named.items()}
