"""One model that goes from site to site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfl.core import rng
from sfl.core.algorithm import ServerState
from sfl.server.workflow import Sites, Workflow

Order = Literal["fixed", "random"]


@dataclass(frozen=True, kw_only=True)
class Cyclic(Workflow):
    """Cyclic weight transfer (Chang et al., JAMIA 2018): each site trains on what the one before it has left.

    A round is one pass over all sites. A site that fails is passed over; a pass that fewer than
    ``min_available_clients`` sites did fails.

    | input | result |
    |---|---|
    | one site | its local training, round after round |
    | a site that fails or is late | the next goes on from the one before it |

    Attributes:
        order: By name in every round, or another random order in each.
    """

    order: Order = "fixed"

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        """Pass after pass."""
        while sites.goes_on(state):
            relay = sites.relay(sites.fit_task(state), self._turns(sites, state.round + 1))
            replies = relay.wait()
            sites.check_enough(relay)
            state = sites.finish_round(state, replies, relay.parameters)
        return state

    def _turns(self, sites: Sites, round: int) -> list[str]:
        if self.order == "fixed":
            return sites.names
        places = rng.public(sites.seed, round, "cyclic-order").permutation(len(sites.names))
        return [sites.names[place] for place in places]
