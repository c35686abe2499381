"""What every recipe is: a job described once, as frozen configuration. Only ``build()`` puts objects together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np

from sfl.client.base import BaseFederatedClient
from sfl.client.callbacks import SiteCallback
from sfl.client.rule import LocalRule
from sfl.client.script import ScriptClient
from sfl.client.site import SiteProgram
from sfl.core import arrays
from sfl.core.aggregator import Aggregator, Sum, WeightedMean
from sfl.core.algorithm import Algorithm
from sfl.core.events import Observer
from sfl.core.mechanism import Mechanism
from sfl.core.quantise import FLOAT32
from sfl.core.secure import SecureSum
from sfl.core.transform import Chain, Divide, Transform, chain, flat
from sfl.errors import CompositionError, ConfigError
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.filters.compress import ErrorFeedback
from sfl.privacy.filters.quantise import Quantise, QuantiseBounded
from sfl.privacy.rules import check_examples, check_together
from sfl.server.callbacks import Callback
from sfl.server.job import Job
from sfl.server.secure import averages, check_secure, check_whole_numbers
from sfl.server.selection import Mode, Selection
from sfl.server.session import RunResult
from sfl.server.workflow import Workflow
from sfl.types import Array, FederationConfig, Metrics, Parameters

__all__ = ["Environment", "Recipe"]


class Environment(Protocol):
    """Where a recipe runs. Changing it changes nothing else."""

    def run(self, recipe: Recipe, *, out: Path | None, resume: bool, observers: Sequence[Observer]) -> RunResult:
        """Run a recipe: see ``Recipe.execute``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Frozen description of a job.

    Attributes:
        name: Its name.
        client: The client class, or a function, called with ``client_id``, ``device`` and ``client_kwargs``.
        initial_parameters: The initial global parameters, or a function that makes them.
        federation: Sites, rounds, sampling, seed, workers.
        client_kwargs: Arguments of the client.
        aggregator: How updates become one.
        transforms: What an update passes on its site before the mechanisms, in order.
        released: What it passes after them: post-processing of what is private by then, such as compression.
        mechanisms: Differential privacy; the order is that of the sites.
        secure: Keeps single updates from the server: what it aggregates are sums alone.
        budget: Ends the run before a round that would pass it, and says at which δ what was spent is reported.
        example_budget: What each example of a site may lose, for clients whose training is private by itself: every
            site keeps a ledger of its own, and trains no more when the budget would be passed.
        central: The global model's figures on global held-out data.
        derive: Adds figures that follow from others, such as a perplexity from a mean loss. It is applied to each
            site's figures and to their means, so what it adds is never averaged.
        callbacks: Called at named moments of the run, on the server; frozen dataclasses, so that they travel.
        site_callbacks: Called at named moments on each site.
        key_metric: The figure by which a global model is the best; by default ``accuracy`` where it is reported, else
            ``loss``. The best model's round is in the result, its parameters in ``best.safetensors`` of the run.
        key_metric_mode: ``"min"``, ``"max"``, or ``"auto"``: lower is better for losses and errors.
        evaluate_every: Evaluate after every n-th round and the last; 0 never evaluates, ``"end"`` only after the last.
            By default 1, and ``"end"`` for a training script.
    """

    name: str
    client: Callable[..., BaseFederatedClient] | None = None
    initial_parameters: Parameters | Callable[[], Parameters] | None = None
    federation: FederationConfig = field(default_factory=FederationConfig)
    client_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    aggregator: Aggregator = field(default_factory=WeightedMean)
    transforms: tuple[Transform, ...] = ()
    released: tuple[Transform, ...] = ()
    mechanisms: tuple[Mechanism, ...] = ()
    secure: SecureSum | None = None
    budget: PrivacyBudget | None = None
    example_budget: PrivacyBudget | None = None
    central: Callable[[Parameters], Metrics] | None = None
    derive: Callable[[Metrics], Metrics] = dict
    callbacks: tuple[Callback, ...] = ()
    site_callbacks: tuple[SiteCallback, ...] = ()
    key_metric: str | None = None
    key_metric_mode: Mode = "auto"
    evaluate_every: int | Literal["end"] | None = None

    @abstractmethod
    def algorithm(self) -> Algorithm | Workflow:
        """The algorithm that this recipe stands for."""

    def rule(self) -> LocalRule:
        """The half of the algorithm that runs on the sites."""
        return LocalRule()

    def resolved(self) -> Self:
        """The same job said in terms of clients; one of a training script becomes one of script clients."""
        return self

    def build(self) -> Job:
        """Compose the job, after checking that its parts fit.

        Raises:
            CompositionError: Naming the parts that do not fit, and what to change.
        """
        return self.resolved()._compose()

    def _compose(self) -> Job:
        every = 1 if self.evaluate_every is None else self.evaluate_every
        if every != "end" and every < 0:
            raise CompositionError(f"evaluate_every must be 0 (never) or more, got {every}.")
        if self.client is None:
            raise CompositionError("client must be the class of the sites' clients, got none.")
        if self.key_metric_mode not in ("auto", "min", "max"):
            raise CompositionError(f"key_metric_mode must be auto, min or max, got {self.key_metric_mode!r}.")
        algorithm = self.algorithm()
        self._check_parts(algorithm)
        halves: list[Transform] = []
        for mechanism in self.mechanisms:
            halves += [mechanism.clip()] + ([mechanism.noise()] if mechanism.placement == "local" else [])
        halves += self.released
        private = bool(self.mechanisms) or self.example_budget is not None
        rule = self._heeded(self.rule(), algorithm)
        aggregator, server_chain = self._server_side()
        equal = (
            private
            or self.federation.weighting == "equal"
            or (self.secure is not None and not self.federation.weighting)
        )
        return Job(
            name=self.name,
            initial=self._initial,
            algorithm=algorithm,
            aggregator=aggregator,
            program=SiteProgram(
                client=self.client,
                kwargs=self.client_kwargs,
                chain=chain(*self.transforms, *halves, *self._quantised((*self.transforms, *halves), rule)),
                fixed_weight=1.0 if equal else None,
                share_metrics=not private,
                callbacks=self.site_callbacks,
                example_budget=self.example_budget,
                rule=rule,
                secure=self._secure_sum(),
            ),
            federation=self.federation,
            server_chain=server_chain,
            mechanisms=self.mechanisms,
            budget=self.budget,
            central=self.central,
            derive=self.derive,
            callbacks=self.callbacks,
            selection=Selection(metric=self.key_metric, mode=self.key_metric_mode, received=self._scores_received()),
            evaluate_every=every,
        )

    def _check_parts(self, algorithm: Algorithm | Workflow) -> None:
        """Whether aggregator, mechanisms, budgets and secure sum fit the algorithm and each other.

        Raises:
            CompositionError: If they do not.
        """
        if isinstance(algorithm, Workflow) and (self.mechanisms or self.example_budget is not None):
            raise CompositionError(
                "mechanisms must come with an algorithm, whose every exchange is charged, got a workflow. "
                "Leave them out, or describe the job in rounds."
            )
        if self.example_budget is not None:
            self.example_budget.make_accountant().require()
            check_examples(self.transforms, self.federation)
        self.aggregator.require(self.federation.planned_sites)
        if self.aggregator.rebuilds:
            self._check_rebuilt(algorithm)
        check_whole_numbers(self.mechanisms, self.secure)
        if self.secure is not None:
            check_secure(self.secure, self.aggregator, algorithm, self.mechanisms, self.federation)
            if self.secure.seals and self.central is not None:
                raise CompositionError(
                    "central must be none under homomorphic encryption without a holder, got a function: the server "
                    "cannot read the model that it would evaluate. Leave it to the sites' evaluation."
                )
        if self.mechanisms:
            (self.budget or PrivacyBudget()).make_accountant().require()
        if isinstance(algorithm, Algorithm):
            self._check_private(algorithm)
        if self.released and any(m.on_sum and m.placement == "local" for m in self.mechanisms):
            raise CompositionError(
                f"nothing may follow noise that is shared out among the sites, got {type(self.released[0]).__name__}: "
                "what one site leaves out, another's noise would not hide. Put it among the transforms."
            )

    def _check_rebuilt(self, algorithm: Algorithm | Workflow) -> None:
        """Whether nothing remembers the numbers that an aggregate gives anew in each round.

        Raises:
            CompositionError: If the server, a site or a message does.
        """
        asked = self.aggregator.rebuilds
        if not averages(algorithm) or type(self.rule()) is not LocalRule:
            raise CompositionError(
                f"{asked} must come with fedavg or fedprox at a server learning rate of 1, got {type(self).__name__}: "
                "each round describes the model by other numbers, so that what is remembered of them means nothing. "
                "Use another aggregation."
            )
        coded = self.federation.message_dtype != FLOAT32 and self.federation.message_error_feedback
        if coded or any(isinstance(transform, ErrorFeedback) for transform in flat(self.transforms)):
            raise CompositionError(
                f"{asked} must come without error feedback, got some: what rounding or a filter left out is of numbers "
                "that the next round gives anew. Set message_error_feedback to false, and leave "
                "compress_error_feedback out."
            )

    def _secure_sum(self) -> SecureSum | None:
        """As it is told of noise of whole numbers, which is then neither clipped nor rounded."""
        if self.secure is None:
            return None
        federation = self.federation
        secure = self.secure.among(federation.min_available_clients, federation.planned_sites, federation.threads)
        gridded = [mechanism for mechanism in self.mechanisms if mechanism.grid]
        return secure.on_grid(gridded[0].grid, gridded[0].reach(federation.planned_sites)) if gridded else secure

    def _quantised(self, before: Sequence[Transform], rule: LocalRule) -> list[Transform]:
        """How an update leaves after all else; see ``docs/messages.md`` for what each choice rests on."""
        federation = self.federation
        if federation.message_dtype == FLOAT32 or self.secure is not None:  # which has words of its own
            return []
        if any(m.on_sum and m.placement == "local" for m in self.mechanisms):
            raise CompositionError(
                f"message_dtype must be float32 under noise that is shared out among the sites, got "
                f"{federation.message_dtype}: rounding each share by itself, the sum has no noise that is known. Leave "
                "it out, or use noise on the sum or of each site's own."
            )
        thin = not rule.tasks  # what a site seals for another comes to who does not know what size arrays may have
        if any(transform.clips for transform in flat(before)):
            return [QuantiseBounded(federation.message_dtype, thin)]
        feedback = federation.message_error_feedback and self.example_budget is None
        return [Quantise(federation.message_dtype, feedback, thin)]

    def _heeded(self, rule: LocalRule, algorithm: Algorithm | Workflow) -> LocalRule:
        """The rule, after a look at whether clients of this class heed what the algorithm asks of them.

        A function that makes clients says nothing of them; each site looks at its own.
        """
        asked = rule.asks | (algorithm.asks if isinstance(algorithm, Algorithm) else frozenset())
        honours: frozenset[str] = getattr(self.client, "honours", asked)
        if asked - honours:
            raise CompositionError(
                f"clients of {type(self).__name__} must heed {', '.join(sorted(asked - honours))} of self.terms, got "
                f"{getattr(self.client, '__name__', self.client)}.honours = {sorted(honours)}. Heed them in "
                "compute_update and name them there, or use another algorithm."
            )
        return rule

    def _scores_received(self) -> bool:
        """Whether sites report, as they train, figures of the model that they were sent: training scripts do."""
        return self.client is ScriptClient

    def execute(
        self,
        env: Environment | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        observers: Sequence[Observer] = (),
    ) -> RunResult:
        """Run the recipe.

        Args:
            env: Where; by default in-process, as ``federation`` says.
            out: A folder for checkpoints, metrics and the report; ``None`` leaves nothing behind.
            resume: Go on from the newest whole checkpoint in ``out``.
            observers: Called with every event of the run.

        Returns:
            The final parameters and what happened in each round.

        Raises:
            CompositionError: If the parts of the recipe do not fit.
            RoundError: If a round ends with fewer usable replies than ``min_available_clients``.
        """
        if env is None:
            from importlib import import_module

            default: Environment = import_module("sfl.env").SimEnv()  # the default environment lies a layer above
            env = default
        if resume and out is None:
            raise ConfigError("out must be the folder of the run to resume, got none.")
        return env.run(self, out=Path(out) if out is not None else None, resume=resume, observers=observers)

    def _initial(self) -> Parameters:
        given: Any = self.initial_parameters
        made: Any = given() if callable(given) else given  # what a function made is the run's already
        if not isinstance(made, Mapping):
            raise ConfigError(f"initial_parameters must be a dict of named arrays, got {type(made).__name__}.")
        return {str(name): _initial_array(name, value, copied=made is given) for name, value in made.items()}

    def _server_side(self) -> tuple[Aggregator, Chain]:
        """What noise was calibrated for is the *sum*, which is then divided by the planned cohort, whoever answered."""
        on_sum = any(mechanism.on_sum for mechanism in self.mechanisms)
        if on_sum and not isinstance(self.aggregator, WeightedMean):
            name = type(self.aggregator).__name__
            raise CompositionError(
                f"aggregator must be WeightedMean under noise on the sum, got {name}: its sensitivity is not known. "
                "Use the mean, or noise of each site's own (local)."
            )
        central = [mechanism.noise() for mechanism in self.mechanisms if mechanism.placement == "central"]
        if not central:
            return WeightedMean(wide=True) if on_sum else self.aggregator, Chain()
        return Sum(wide=True), Chain([*reversed(central), Divide(self.federation.planned_cohort)])

    def _check_private(self, algorithm: Algorithm) -> None:
        """What the mechanisms' claim rests on beside themselves."""
        federation = self.federation
        check_together(self.mechanisms, federation)
        for mechanism in self.mechanisms:
            claimed = mechanism.event(federation.planned_sites, federation.num_clients).sampling_rate
            if claimed < 1.0 and abs(claimed - algorithm.sampling_rate) > 1e-12:
                raise CompositionError(
                    f"a mechanism may claim a sampling rate only if sites are drawn by Poisson sampling at that rate, "
                    f"got {claimed} claimed and {algorithm.sampling_rate} drawn. Set sampling=poisson, or claim 1.0."
                )
            if mechanism.rounds_apart > algorithm.rounds_apart:
                raise CompositionError(
                    f"a site's turns must be {mechanism.rounds_apart} rounds apart for "
                    f"{type(mechanism).__name__}, got {algorithm.rounds_apart}. Set sampling=turns with a fraction_fit "
                    f"of 1/{mechanism.rounds_apart} or less, or fewer bands."
                )


def _initial_array(name: object, value: Any, *, copied: bool) -> Array:
    """One initial array in this machine's byte order, after checking that it can be averaged."""
    array = np.array(value) if copied else np.asarray(value)
    if not (isinstance(name, str) and _is_real(array) and arrays.is_finite(array)):
        raise ConfigError(
            f"initial_parameters must be finite arrays of real numbers under names, got {name!r}: {value!r:.60}."
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _is_real(array: Array) -> bool:
    return array.dtype.kind in "fiub" and array.dtype.itemsize <= 8  # what a checkpoint holds
