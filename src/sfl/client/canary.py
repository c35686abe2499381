"""The client of an audit: in place of a site's data it has a coin and a direction."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.client.base import BaseFederatedClient
from sfl.privacy.adaptive_clip import BOUND
from sfl.privacy.audit.directions import Directions
from sfl.types import ClientUpdate, Config, Evaluation, Parameters

__all__ = ["Canaries", "CanaryClient", "CanaryStayedAwayError"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """All canaries of a run.

    Attributes:
        directions: Theirs.
        coins: One character for each: ``"1"`` is heads.
        length: Norm of a step over the clip bound.
        bound: The clip bound, where a task does not carry the round's own.
        mirrored: Whether tails is the opposite step rather than none.
    """

    directions: Directions
    coins: str
    length: float
    bound: float
    mirrored: bool


class CanaryStayedAwayError(Exception):
    """What the task of a canary ends with whose coin keeps it out: the site does not take part."""


class CanaryClient(BaseFederatedClient):
    """Sends a step in its own direction, longer than any clip bound, if its coin says so.

    | coin | under add-or-remove-one | under replace-one |
    |---|---|---|
    | heads | its direction | its direction |
    | tails | nothing: the task fails, as that of a site that is not there | the opposite direction |
    | none (a bystander) | no change, in every round | does not occur |

    A bystander keeps a round alive in which every coin fell on tails. It is the same whatever the coins.

    Args:
        client_id: Index of the site: canaries come first, bystanders last.
        device: Unused.
        canaries: All of them.
    """

    def __init__(self, client_id: int = 0, device: str = "cpu", *, canaries: Canaries) -> None:
        super().__init__(client_id=client_id, device=device)
        self.canaries = canaries

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        """The parameters with the canary's step.

        Raises:
            CanaryStayedAwayError: If the coin keeps it out.
        """
        canaries = self.canaries
        if self.client_id >= len(canaries.coins):
            return dict(parameters), 1, {}
        heads = canaries.coins[self.client_id] == "1"
        if not heads and not canaries.mirrored:
            raise CanaryStayedAwayError(f"{self.site} takes no part")
        length = canaries.length * float(config.get(BOUND, canaries.bound))
        return canaries.directions.add(parameters, self.client_id, length if heads else -length), 1, {}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        """Nothing to say."""
        return None, 1, {}
