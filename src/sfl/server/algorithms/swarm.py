"""Swarm learning: another site aggregates in each round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfl.client.swarm import AGGREGATE, KEY, READER, SEALED, TRAIN
from sfl.core import check
from sfl.core.aggregator import sum_dtype
from sfl.core.algorithm import ServerState
from sfl.core.task import Reply, Update
from sfl.errors import RoundError, UpdateError
from sfl.server.workflow import Sites, Workflow
from sfl.types import Parameters


@dataclass(frozen=True, kw_only=True)
class Swarm(Workflow):
    """Federated averaging whose aggregate is made by a site (Warnat-Herresthal et al., Nature 2021).

    In round r the site at place r - 1 (counted around) makes a key of this round's, the others train and seal their
    updates for it, and it adds them up. The server carries what it cannot open and sees each round's aggregate alone.
    It hands out the keys, so it is trusted to hand out those that it was given; one that does not could read updates.

    A site that fails to make its key, or to aggregate, is passed over: the next in turn does it, and the sites train
    anew, for it.

    | input | result |
    |---|---|
    | any number of sites | FedAvg, the same bits |
    | a site that fails to train | the others' mean, as in FedAvg |
    | every site fails to aggregate | ``RoundError`` with all reasons |
    """

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        """Round after round, each with another site in the server's place."""
        while sites.goes_on(state):
            mean, trained = self._round(sites, state)
            state = sites.finish_round(state, trained, mean)
        return state

    def _round(self, sites: Sites, state: ServerState) -> tuple[Update, list[Reply]]:
        first = state.round % len(sites.names)
        reasons: list[str] = []
        for name in sites.names[first:] + sites.names[:first]:
            round = state.round + 1
            (made,) = sites.send(sites.task(KEY, round, {}), name).wait()
            if made.update is None:
                reasons.append(made.reason)
                continue
            carried = {**state.parameters, READER: made.update.delta.get(READER, np.zeros(0, np.uint8))}
            training = sites.broadcast(sites.task(TRAIN, round, carried, aggregator=name))
            trained = training.wait()
            sites.check_enough(training)
            (added,) = sites.send(sites.task(AGGREGATE, round, _sealed(trained)), name).wait()
            try:
                return _checked(added, state.parameters), trained
            except UpdateError as error:
                reasons.append(str(error))
        raise RoundError("some site must be able to aggregate, got none:\n  " + "\n  ".join(reasons))


def _sealed(trained: Sequence[Reply]) -> Parameters:
    found: Parameters = {}
    for reply in trained:
        for name, part in ({} if reply.update is None else reply.update.delta).items():
            found[f"{SEALED}{reply.site}/{name.removeprefix(SEALED)}"] = part
    return found


def _checked(reply: Reply, model: Parameters) -> Update:
    """The aggregate, if it is one of this model."""
    if reply.update is None:
        raise UpdateError(reply.reason or f"{reply.site}: {reply.status}")
    as_sums = {name: np.empty(value.shape, sum_dtype(value)) for name, value in model.items()}
    check.check_update(reply.update, as_sums)
    return reply.update
