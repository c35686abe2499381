"""A global model that stays closed to the server: what sites have sealed is what they are sent next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sfl.core.algorithm import Algorithm, ServerState
from sfl.core.secure import SecureSum
from sfl.core.task import Task, Update
from sfl.types import Parameters

__all__ = ["SealedModel"]


@dataclass(frozen=True)
class SealedModel(Algorithm):
    """An algorithm whose next model is the mean of its sites' models, so that it follows without a look at any.

    Attributes:
        inner: The algorithm; it plans as ever, and finishes what is not sealed.
        secure: What seals.
    """

    inner: Algorithm
    secure: SecureSum

    @property
    def asks(self) -> frozenset[str]:
        """Those of the inner one."""
        return self.inner.asks

    @property
    def sampling_rate(self) -> float:
        """That of the inner one."""
        return self.inner.sampling_rate

    @property
    def rounds_apart(self) -> int:
        """Those of the inner one."""
        return self.inner.rounds_apart

    def group(self, round: int) -> str:
        """That of the inner one."""
        return self.inner.group(round)

    def init(self, parameters: Parameters) -> ServerState:
        """As the inner one: a run starts from a model that everybody may see."""
        return self.inner.init(parameters)

    def joined(self, state: ServerState, clients: Sequence[str]) -> ServerState:
        """As the inner one."""
        return self.inner.joined(state, clients)

    def plan(self, state: ServerState, clients: Sequence[str]) -> tuple[Task, list[str]]:
        """As the inner one."""
        return self.inner.plan(state, clients)

    def finish(self, state: ServerState, aggregate: Update) -> ServerState:
        """Sealed arrays take the place of what they are of; the others move by their mean."""
        sealed = self.secure.sealed(aggregate.delta)
        plain = {name: value for name, value in aggregate.delta.items() if name not in sealed}
        bare = self.secure.bare(state.parameters, sealed)
        state = self.inner.finish(replace(state, parameters=bare), replace(aggregate, delta=plain))
        return replace(state, parameters={**sealed, **state.parameters})
