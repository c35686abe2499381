"""FedBuff: nobody waits for the slowest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfl.core import arrays, rng
from sfl.core.algorithm import ServerState
from sfl.core.task import Reply, Status, Update
from sfl.errors import ConfigError, RoundError
from sfl.server.strategy import step
from sfl.server.workflow import Sites, Workflow
from sfl.types import Parameters


@dataclass(frozen=True, kw_only=True)
class FedBuff(Workflow):
    """Buffered asynchronous aggregation (Nguyen et al., AISTATS 2022, Algorithm 1).

    So many sites train at a time, each from the model that was there when it was asked. Once ``buffer`` updates have
    come, w ← w + η · mean of s(τ) Δ, where τ is by how many versions an update's model was behind and
    s(τ) = 1/√(1 + τ); that is a round. A site is asked at most once for each version of the model: the same data on the
    same model would count twice. Updates that are under way when a run is killed are done anew by its resume, from the
    models that they had.

    | input | result |
    |---|---|
    | a buffer as large as the federation, all of which trains at once | FedAvg, the same bits |
    | a site that fails | it is asked again with the next version |
    | more failures in a row than there are sites, or nobody answers in time | ``RoundError`` |

    Attributes:
        buffer: K, updates that make a round.
        concurrency: Sites that train at a time; 0 is all.
        server_learning_rate: η.
    """

    buffer: int
    concurrency: int = 0
    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.concurrency < 0 or not math.isfinite(self.server_learning_rate):
            raise ConfigError(
                "FedBuff must have buffer >= 1, concurrency >= 0 and a finite server_learning_rate, got "
                f"{self.buffer}, {self.concurrency} and {self.server_learning_rate}."
            )

    def run(self, sites: Sites, state: ServerState) -> ServerState:
        """Version after version."""
        at_once = self.concurrency or len(sites.names)
        if max(self.buffer, at_once) > len(sites.names):
            raise ConfigError(
                f"buffer and concurrency must be at most the {len(sites.names)} sites there are, got {self.buffer} and "
                f"{self.concurrency}. Lower them."
            )
        flight = _Flight.resumed(sites, state)
        while sites.goes_on(state):
            buffered: list[tuple[Reply, int]] = []
            failed: list[Reply] = []
            while len(buffered) < self.buffer:
                flight.fill(state, at_once)
                reply, began = flight.next(failed)
                if reply.update is not None:
                    buffered.append((reply, state.round - began))
                else:
                    failed.append(reply)
            state = self._stepped(sites, state, buffered, failed, flight)
        return state

    def _stepped(
        self, sites: Sites, state: ServerState, buffered: list[tuple[Reply, int]], failed: list[Reply], flight: _Flight
    ) -> ServerState:
        aged = [_aged(reply, staleness) for reply, staleness in buffered]
        mean = sites.aggregate(aged)
        new = {
            name: step(before, mean.delta[name], self.server_learning_rate) if name in mean.delta else before
            for name, before in state.parameters.items()
        }
        is_last = state.round + 1 == sites.rounds
        kept = replace(state, algorithm=flight.kept())
        replies = [reply for reply, _ in buffered] + failed
        return sites.finish_round(kept, replies, new, ask_sites=is_last)


class _Flight:
    """Which sites train, from which version of the model."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._began: dict[str, int] = {}  # by site that trains
        self._asked: dict[str, int] = {}  # by site, the last version that it was given
        self._models: dict[int, Parameters] = {}

    @classmethod
    def resumed(cls, sites: Sites, state: ServerState) -> _Flight:
        """With what was under way when the checkpoint was written, asked for again."""
        flight = cls(sites)
        kept: Mapping[str, Any] = state.algorithm or {}
        models = {int(version): model for version, model in kept.get("models", {}).items()}
        flight._asked = {site: int(version) for site, version in kept.get("asked", {}).items()}
        for site, version in kept.get("began", {}).items():
            if site in sites.names:
                flight._ask(site, replace(state, round=int(version), parameters=models[int(version)]))
        return flight

    def fill(self, state: ServerState, at_once: int) -> None:
        """Ask sites that are idle and have not had this version, drawn at random, until so many train."""
        idle = [s for s in self._sites.names if s not in self._began and self._asked.get(s, -1) < state.round]
        free = min(at_once - len(self._began), len(idle))
        if free <= 0:
            return
        draw = rng.public(self._sites.seed, state.round, "fedbuff", ",".join(sorted(self._began)))
        for place in sorted(draw.permutation(len(idle))[:free]):
            self._ask(idle[place], state)

    def next(self, failed: list[Reply]) -> tuple[Reply, int]:
        """The next reply, and the version that its site had.

        Raises:
            RoundError: If nobody trains any more, or nobody has answered in time.
        """
        timeout = self._sites.default_timeout()
        found = self._sites.next(timeout) if self._began else None
        if found is None:
            said = "".join(f"\n  {reply.reason}" for reply in failed)
            waited = f"{', '.join(sorted(self._began))} within {timeout:g} s" if self._began and timeout else "nobody"
            raise RoundError(
                f"a buffer must be filled by the sites that train, got no more updates; waiting for {waited}. "
                f"Mend the sites below, or lower the buffer.{said}"
            )
        reply = found[1]
        return reply, self._began.pop(reply.site)

    def kept(self) -> dict[str, Any]:
        """For the checkpoint."""
        models = {str(version): self._models[version] for version in sorted(set(self._began.values()))}
        return {"began": dict(self._began), "asked": dict(self._asked), "models": models}

    def _ask(self, site: str, state: ServerState) -> None:
        self._began[site] = self._asked[site] = state.round
        self._models = {v: m for v, m in self._models.items() if v in self._began.values()}
        self._models[state.round] = state.parameters
        self._sites.send(self._sites.fit_task(state), site)


def _aged(reply: Reply, staleness: int) -> Reply:
    update = reply.update
    if update is None or reply.status is not Status.USED or staleness == 0:
        return reply
    factor = 1.0 / math.sqrt(1.0 + staleness)
    return replace(reply, update=Update(update.site, arrays.scale(update.delta, factor), update.weight, update.metrics))
