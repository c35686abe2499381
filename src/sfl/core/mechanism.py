"""Mechanisms: a clip half, a noise half, and the event that they cost, in one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from sfl.core.transform import Transform

Unit = Literal["site", "example"]
Adjacency = Literal["add_remove", "replace_one"]
Adversary = Literal["server_trusted", "server_curious"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DpEvent:
    """What one exchange costs, with everything its ε depends on. Written to the ledger before the exchange.

    Attributes:
        mechanism: Its name, e.g. ``"gaussian"``.
        noise_multiplier: σ over sensitivity.
        sampling_rate: Probability that one unit takes part; 1.0 claims no amplification.
        unit: Whose presence is hidden.
        adjacency: Which neighbours are indistinguishable.
        adversary: Whom the guarantee holds against.
        sampling: The assumption under which ``sampling_rate`` is true, in words.
        count: How often the event happens in this exchange.
    """

    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    unit: Unit
    adjacency: Adjacency
    adversary: Adversary
    sampling: str
    count: int = 1


class Mechanism(ABC):
    """A private mechanism. Local or central is where its halves are placed, never a second implementation.

    On a site the clip half is always part of the chain. A *local* mechanism's noise half follows it there; a *central*
    one's runs on the server, on the aggregate, before the server optimizer.
    """

    @property
    @abstractmethod
    def placement(self) -> Literal["local", "central"]:
        """Where the noise half runs."""

    @abstractmethod
    def clip(self) -> Transform:
        """The half that bounds the sensitivity (``clips = True``)."""

    @abstractmethod
    def noise(self) -> Transform:
        """The half that adds the noise (``adds_noise = True``); it draws from a cryptographic source."""

    @abstractmethod
    def event(self, cohort: int, population: int) -> DpEvent:
        """What one exchange with ``cohort`` of ``population`` sites costs."""
