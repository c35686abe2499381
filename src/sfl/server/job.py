"""A job: the parts that a recipe put together, ready for the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sfl.client.site import SiteProgram
from sfl.core.aggregator import Aggregator
from sfl.core.algorithm import Algorithm
from sfl.core.mechanism import Mechanism
from sfl.core.transform import Chain, flat
from sfl.privacy.budget import PrivacyBudget, example_report, example_statement
from sfl.privacy.ledger import PrivacyLedger
from sfl.server.callbacks import Callback
from sfl.server.selection import Selection
from sfl.types import Array, FederationConfig, Metrics, Parameters

if TYPE_CHECKING:
    from sfl.server.workflow import Workflow


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs except the engine that carries it. Made by ``Recipe.build()`` alone.

    Attributes:
        name: The recipe's name.
        initial: Makes the initial parameters; called once, so that the run holds the only copy.
        algorithm: What is sent to whom, and what becomes of the aggregate; or a workflow that does all of it.
        aggregator: How updates become one.
        program: What every site runs.
        server_chain: Server halves of the mechanisms, in the order in which they run (reverse of the sites').
        mechanisms: Charged to the ledger before every exchange that trains.
        budget: What may be spent, and at which δ it is reported.
        federation: Sites, rounds, minimum, seed.
        central: The global model's figures on the global held-out data, if the job has some.
        derive: Adds figures that follow from others, such as a perplexity from a mean loss; never averaged themselves.
        callbacks: Called at named moments of the run, on the server.
        selection: Which model is the best one.
        evaluate_every: Evaluate after every n-th round and the last; 0 never evaluates, ``"end"`` only after the last.
    """

    name: str
    initial: Callable[[], Parameters]
    algorithm: Algorithm | Workflow
    aggregator: Aggregator
    program: SiteProgram
    federation: FederationConfig
    server_chain: Chain = field(default_factory=Chain)
    mechanisms: tuple[Mechanism, ...] = ()
    budget: PrivacyBudget | None = None
    central: Callable[[Parameters], Metrics] | None = None
    derive: Callable[[Metrics], Metrics] = dict
    callbacks: tuple[Callback, ...] = ()
    selection: Selection = field(default_factory=Selection)
    evaluate_every: int | Literal["end"] = 1

    @property
    def accounting(self) -> PrivacyBudget:
        """At which δ, and with which accountant, what was spent is reported."""
        return self.budget or PrivacyBudget()

    def caveats(self) -> list[str]:
        """What the job's filters do not promise, in words."""
        return [line for line in (transform.caveat() for transform in flat(self.program.chain.transforms)) if line]

    def model_like(self, parameters: Mapping[str, Array]) -> Parameters:
        """Arrays like those of the model that the server keeps as ``parameters``, which may be closed to it."""
        secure = self.program.secure
        return dict(parameters) if secure is None else secure.like(dict(parameters))

    def secure_lines(self) -> list[str]:
        """What the job's secure sum promises, in words; nothing without one."""
        secure = self.program.secure
        return [] if secure is None else secure.described(self.federation.planned_sites)

    @property
    def has_statement(self) -> bool:
        """Whether there is anything to say about privacy."""
        return bool(self.mechanisms or self.caveats() or self.secure_lines()) or self.program.example_budget is not None

    def statement(self, ledger: PrivacyLedger, examples: Mapping[str, float]) -> list[str]:
        """What was spent, in words, and what is not promised.

        Args:
            ledger: The run's.
            examples: What the sites' own ledgers have said of their examples' ε.
        """
        budget = self.program.example_budget
        lines = [
            *self.accounting.statement(ledger.events, ledger.earlier()),
            *(example_statement(examples, budget) if budget is not None else []),
        ]
        if self.caveats() and not (self.mechanisms or budget):
            lines = ["privacy: no formal guarantee: filters alone choose what leaves, and add no noise"]
        return [*self.secure_lines(), *lines, *self.caveats()]

    def privacy_report(self, ledger: PrivacyLedger, examples: Mapping[str, float]) -> dict[str, Any]:
        """The same for ``privacy.json``."""
        report = self.accounting.report(ledger.events, ledger.earlier())
        return {
            **report,
            "statement": self.statement(ledger, examples),
            "unproven": self.caveats(),
            "over_rounds": self.accounting.over_rounds([(entry.round, entry.event) for entry in ledger.entries]),
            "examples": example_report(examples, self.program.example_budget),
        }

    def evaluates(self, round: int) -> bool:
        """Whether the model is evaluated after ``round``; 0 is before the first."""
        is_last = round == self.federation.num_rounds
        every = self.evaluate_every
        return is_last if every == "end" else every > 0 and (is_last or round % every == 0)
