"""A job: the parts that a recipe put together, ready for the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sfl.client.site import SiteProgram
from sfl.core.aggregator import Aggregator
from sfl.core.algorithm import Algorithm
from sfl.core.mechanism import Mechanism
from sfl.core.transform import Chain
from sfl.types import FederationConfig, Metrics, Parameters


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs except the engine that carries it. Made by ``Recipe.build()`` alone.

    Attributes:
        name: The recipe's name.
        initial: Makes the initial parameters; called once, so that the run holds the only copy.
        algorithm: What is sent to whom, and what becomes of the aggregate.
        aggregator: How updates become one.
        program: What every site runs.
        server_chain: Server halves of the mechanisms, in the order in which they run (reverse of the sites').
        mechanisms: Charged to the ledger before every exchange that trains.
        federation: Sites, rounds, minimum, seed.
        central: The global model's figures on the global held-out data, if the job has some.
        derive: Adds figures that follow from others, such as a perplexity from a mean loss; never averaged themselves.
        evaluate_every: Evaluate after every n-th round and the last; 0 never evaluates.
    """

    name: str
    initial: Callable[[], Parameters]
    algorithm: Algorithm
    aggregator: Aggregator
    program: SiteProgram
    federation: FederationConfig
    server_chain: Chain = field(default_factory=Chain)
    mechanisms: tuple[Mechanism, ...] = ()
    central: Callable[[Parameters], Metrics] | None = None
    derive: Callable[[Metrics], Metrics] = dict
    evaluate_every: int = 1
