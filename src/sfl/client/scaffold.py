"""SCAFFOLD's half on a site: control variates that correct its drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.client.rule import LocalRule
from sfl.core import arrays
from sfl.core.terms import DRIFT, LocalTerms
from sfl.errors import UpdateError
from sfl.types import Array, Config, Parameters

CONTROL = "control/"
"""Under which a task carries the server's control variate of an array."""

_STATE = "scaffold"


@dataclass(frozen=True)
class ScaffoldRule(LocalRule):
    """Option II of Karimireddy et al., ICML 2020, Algorithm 1.

    Every local step goes y ← y − η (g(y) − cᵢ + c). After K steps cᵢ⁺ = cᵢ − c + (x − y)/(Kη), and the site sends
    y − x with cᵢ⁺ − cᵢ. With an optimizer other than SGD, g is the optimizer's own direction.

    Only floating arrays that are trained have a control variate; buffers of BatchNorm and whole numbers have none.
    """

    asks: ClassVar[frozenset[str]] = frozenset({DRIFT})

    def carried(self, model: Parameters) -> Parameters:
        """The model and a control variate of each of its trained arrays."""
        return {**model, **{CONTROL + name: value for name, value in model.items() if arrays.is_trained(name, value)}}

    def model(self, sent: Mapping[str, Array]) -> Parameters:
        """What is not a control variate."""
        return {name: value for name, value in sent.items() if not name.startswith(CONTROL)}

    def before(
        self, client: BaseFederatedClient, sent: Mapping[str, Array], config: Config, terms: LocalTerms
    ) -> LocalTerms:
        """With the drift c − cᵢ."""
        own: dict[str, Any] = client.state.get(_STATE, {})
        drift = {name: control - own[name] if name in own else control for name, control in _controls(sent).items()}
        client.travelled = 0.0
        return replace(terms, drift=drift)

    def after(self, client: BaseFederatedClient, sent: Mapping[str, Array], delta: Parameters) -> Parameters:
        """The model's difference, and that of the site's control variates.

        Raises:
            UpdateError: If the client has not said how far it went.
        """
        if not client.travelled > 0.0:
            raise UpdateError(
                f"{client.site}: travelled must be the sum of the learning rates of its steps for SCAFFOLD, got "
                f"{client.travelled}. Set self.travelled in compute_update."
            )
        own: dict[str, Any] = client.state.get(_STATE, {})
        changes: Parameters = {}
        for name, control in _controls(sent).items():
            change = np.asarray(-control - delta[name] / client.travelled, dtype=control.dtype)
            own = {**own, name: own[name] + change if name in own else change}
            changes[CONTROL + name] = change
        client.state[_STATE] = own
        return {**delta, **changes}


def _controls(sent: Mapping[str, Array]) -> Parameters:
    return {name.removeprefix(CONTROL): value for name, value in sent.items() if name.startswith(CONTROL)}
