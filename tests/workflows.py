"""Workflows and their clients, which engines' own processes import by name."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.core.algorithm import ServerState
from sfl.server.workflow import Sites, Workflow
from sfl.types import ClientUpdate, Config, Evaluation, Parameters


class Steps(BaseFederatedClient):
    """Doubles and adds its number; remembers how often it was asked to train."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        self.state["seen"] = self.state.get("seen", 0) + 1
        return {"w": 2 * parameters["w"] + self.client_id + 1}, 1, {"seen": float(self.state["seen"])}

    def evaluate(self, parameters: Parameters, config: Config) -> Evaluation:
        return float(parameters["w"].sum()), 1, {}

    def run_task(self, name: str, parameters: Parameters, config: Config) -> ClientUpdate:
        if name == "count":
            rows = np.full(self.client_id + 1, int(config["scale"]) * self.client_id)
            return {"rows": rows}, self.client_id + 1, {}
        if name == "nan":
            return {"x": np.array([np.nan])}, 1, {}
        if name == "seen":
            self.state["asked"] = self.state.get("asked", 0) + 1
            return {"seen": np.array([self.state.get("seen", 0), self.state["asked"]])}, 1, {}
        return super().run_task(name, parameters, config)


class Slow(Steps):
    """Site 2 takes too long."""

    def compute_update(self, parameters: Parameters, config: Config) -> ClientUpdate:
        time.sleep(2.0 * (self.client_id == 1))
        return super().compute_update(parameters, config)


@dataclass(frozen=True)
class Cyclic(Workflow):
    """One model that goes round."""

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        while sites.goes_on(state):
            relay = sites.relay(sites.fit_task(state))
            state = sites.finish_round(state, relay.wait(), relay.parameters)
        return state


@dataclass(frozen=True)
class Mixed(Workflow):
    """Broadcast, send and relay at once, two of them queued behind the first at every site."""

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        while sites.goes_on(state):
            many = sites.broadcast(sites.fit_task(state))
            one = sites.send(sites.task("seen", state.round + 1, {}), "site-2")
            relay = sites.relay(sites.fit_task(state), ["site-3", "site-1"])
            (asked,) = one.wait()
            relay.wait()
            mean = sites.aggregate(many.wait())
            known = asked.update.delta["seen"] if asked.update is not None else np.zeros(2)
            parameters = {"w": state.parameters["w"] + mean.delta["w"] + relay.parameters["w"] + known}
            state = sites.finish_round(state, many.replies, parameters)
        return state


def mixed() -> list[float]:
    """What ``Mixed`` comes to over ``Steps`` in two rounds of three sites, by hand."""
    w = np.zeros(2)
    for round in (1, 2):
        mean = np.mean([2 * w + k - w for k in (1, 2, 3)], axis=0)
        relayed = 2 * (2 * w + 3) + 1
        w = w + mean + relayed + np.array([round, round])
    return w.tolist()


MIXED = mixed()


@dataclass(frozen=True)
class Buffered(Workflow):
    """FedBuff in its simplest form (Nguyen et al. 2022, Algorithm 1): a step for every ``buffer`` updates, whosever."""

    buffer: int

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        sites.broadcast(sites.fit_task(state))
        replies = []
        while sites.goes_on(state) and (found := sites.next()) is not None:
            reply = found[1]
            replies.append(reply)
            if len(replies) == self.buffer:
                state = sites.finish_round(replace(state), replies, sites.aggregate(replies))
                replies = []
            sites.send(sites.fit_task(state), reply.site)
        return state
