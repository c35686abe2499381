"""Mechanisms: a clip half, a noise half, and the event that they cost, in one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from sfl.core.transform import Transform

Unit = Literal["site", "example"]
Adjacency = Literal["add_remove", "replace_one"]
Placement = Literal["local", "central"]
Adversary = Literal["server_trusted", "server_curious"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DpEvent:
    """What one exchange costs, with everything its ε depends on. Written to the ledger before the exchange.

    Either it is Gaussian noise and says its ``noise_multiplier``, or it is a mechanism that is (ε, δ)-private by itself
    and says ``epsilon``. One that says neither has no guarantee.

    Attributes:
        mechanism: Its name for people, e.g. ``"gaussian"``.
        noise_multiplier: σ of Gaussian noise over sensitivity; 0 if it is none.
        sampling_rate: Probability that one unit takes part; 1.0 claims no amplification.
        unit: Whose presence is hidden.
        adjacency: Which neighbours are indistinguishable.
        adversary: Whom the guarantee holds against.
        sampling: The assumption under which ``sampling_rate`` is true, in words.
        count: How often the event happens in this exchange.
        epsilon: ε of one event that is no Gaussian noise, under its own ``adjacency``; 0 if it is Gaussian noise.
        delta: δ of such an event.
        steps: Of noise of whole numbers, which then is Skellam noise: the sensitivity in them; 0 for noise of reals.
        group: The only units that it concerns, by a name; empty if it concerns all. What happens to other groups costs
            a unit nothing (parallel composition), so the guarantee is that of the group that is worst off.
    """

    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    unit: Unit
    adjacency: Adjacency
    adversary: Adversary
    sampling: str
    count: int = 1
    epsilon: float = 0.0
    delta: float = 0.0
    steps: int = 0
    group: str = ""


class Mechanism(ABC):
    """A private mechanism. Local or central is where its halves are placed, never a second implementation.

    On a site the clip half is always part of the chain. A *local* mechanism's noise half follows it there, and protects
    the site's own release; a *central* one's runs on the server, on the sum, before the server optimizer. Sums are
    divided by the planned cohort.
    """

    @property
    @abstractmethod
    def placement(self) -> Placement:
        """Where the noise half runs."""

    @property
    def on_sum(self) -> bool:
        """Whether it protects what is seen of the sum alone, so that nothing else may be made of the updates."""
        return self.placement == "central"

    @property
    def rounds_apart(self) -> int:
        """How many rounds must lie between two of a site's turns for ``event`` to be true, the later one counted."""
        return 1

    @property
    def least_sites(self) -> int:
        """Updates without which a round must fail for ``event`` to be true; 0 if it does not matter."""
        return 0

    @property
    def grid(self) -> float:
        """What all noised values are multiples of, a power of two, if its noise is of whole numbers; else 0."""
        return 0.0

    def reach(self, cohort: int) -> float:  # noqa: ARG002
        """How large a coordinate of the sum of so many sites gets, noise of whole numbers in it."""
        return 0.0

    @abstractmethod
    def clip(self) -> Transform:
        """The half that bounds the sensitivity (``clips = True``)."""

    @abstractmethod
    def noise(self) -> Transform:
        """The half that adds the noise (``adds_noise = True``); it draws from a cryptographic source."""

    @abstractmethod
    def event(self, cohort: int, population: int) -> DpEvent:
        """What one exchange with ``cohort`` of ``population`` sites costs."""
