"""The words SFL is written in: parameters, configs, and what a client hands back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sfl.errors import ConfigError

if TYPE_CHECKING:  # numpy is a fifth of the time that `sfl --help` takes
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]
else:
    Array = Any

Scalar: TypeAlias = bool | int | float | str

Parameters: TypeAlias = dict[str, Array]
"""Named, ordered tensors of a model. Names carry freezing, adapters, per-layer clipping and exclusion."""

Metrics: TypeAlias = dict[str, float]
"""Named figures that a site reports beside its update. They are *not* protected by a mechanism."""

Config: TypeAlias = Mapping[str, Scalar]
"""What the server tells a client for one task: ``round``, ``seed``, and the recipe's own scalars."""

ClientUpdate: TypeAlias = tuple[Parameters, int, Metrics]
"""What ``compute_update`` returns: the updated parameters, how many examples they saw, metrics."""

Evaluation: TypeAlias = tuple[float | None, int, Metrics]
"""What ``evaluate`` returns: the mean loss (``None`` if it has none), over how many examples, metrics."""

StateTree: TypeAlias = Any
"""A checkpointable value: ``None``, bool, int, float, str, ndarray, or a dict / list / tuple of those."""

BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Patterns of the names of BatchNorm's statistics: averaged like all else, never optimised, corrected or personal."""

Backend: TypeAlias = Literal[
    "sim", "flower", "flower-deploy", "nvflare", "nvflare-poc", "nvflare-prod", "flower-in-nvflare"
]
BACKENDS: tuple[str, ...] = (
    "sim",
    "flower",
    "flower-deploy",
    "nvflare",
    "nvflare-poc",
    "nvflare-prod",
    "flower-in-nvflare",
)

MessageDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
MESSAGE_DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16", "int8", "nf4")

LogFormat: TypeAlias = Literal["rich", "simple", "json"]


def _require(holds: bool, what: str, rule: str, value: object, remedy: str = "") -> None:
    if not holds:
        raise ConfigError(f"{what} must be {rule}, got {value!r}.{' ' + remedy if remedy else ''}")


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part, for how long, and how a simulation shares out one data set.

    Attributes:
        num_clients: Number of sites in the federation.
        num_rounds: Number of federated rounds.
        fraction_fit: Share of the sites that is sampled to train in a round, in (0, 1].
        sampling: fixed (a round has as many sites as planned), weighted (the same, sites of greater site_weights more
            often), poisson (each site is drawn by itself, in secret, as amplification by sampling assumes) or turns
            (each takes part once in 1/fraction_fit rounds, in order).
        site_weights: For weighted sampling, how likely each site is drawn beside others: site-1=3,site-2=1. A site
            that is not named weighs 0.
        min_available_clients: A round with fewer usable updates than this fails.
        weighting: examples (a site counts by the number of its examples) or equal; by default examples, and equal under
            a mechanism of differential privacy, which does not allow the other.
        partition: How a simulation shares one data set among the sites: iid, dirichlet:ALPHA, key:FIELD or files.
        seed: Seed of everything reproducible: sampling, partition, masking, data order. Never of noise or keys.
        workers: Processes that train sites side by side; 0 means one per core. The result has the same bits.
        threads: CPU threads that each worker computes with. The last bits of a result depend on it.
        round_timeout: Seconds after which a site that has not answered is late and left out; 0 means no limit.
        wait_for: Updates after which a round waits for no more sites: those still at work are late. 0 waits for all.
        message_dtype: Numbers in which arrays travel, both ways: float32 (as they are), bfloat16, float16 (half the
            bytes), int8 (a quarter) or nf4 (a seventh).
        message_error_feedback: Send what rounding left out with the next message; under differential privacy only to
            the sites.
        backend: What carries the job: sim (this process), flower, nvflare or flower-in-nvflare (simulators),
            flower-deploy or nvflare-poc (server and sites as processes of this machine, over TLS), nvflare-prod (a
            provisioned federation). Same bits in all.
        startup_kit: Folder of an admin's kit, for the backend nvflare-prod.
        superlink: Control API of a Flower SuperLink that runs already, as host:port, for the backend flower-deploy.
        root_certificates: File of certificates that the superlink is checked with; by default those of the system.
    """

    num_clients: int = 2
    num_rounds: int = 3
    fraction_fit: float = 1.0
    sampling: Literal["fixed", "weighted", "poisson", "turns"] = "fixed"
    site_weights: str = ""
    min_available_clients: int = 1
    weighting: Literal["examples", "equal"] | None = None
    partition: str = "iid"
    seed: int = 0
    workers: int = 1
    threads: int = 1
    round_timeout: float = 0.0
    wait_for: int = 0
    message_dtype: MessageDtype = "float32"
    message_error_feedback: bool = True
    backend: Backend = "sim"
    startup_kit: str | None = None
    superlink: str | None = None
    root_certificates: str | None = None

    def __post_init__(self) -> None:
        _require(self.num_clients >= 1, "num_clients", "at least 1", self.num_clients)
        _require(self.num_rounds >= 1, "num_rounds", "at least 1", self.num_rounds)
        _require(0.0 < self.fraction_fit <= 1.0, "fraction_fit", "in (0, 1]", self.fraction_fit)
        _require(
            1 <= self.min_available_clients <= self.num_clients,
            "min_available_clients",
            f"between 1 and num_clients={self.num_clients}",
            self.min_available_clients,
        )
        _require(self.weighting in (None, "examples", "equal"), "weighting", "examples or equal", self.weighting)
        known = ("fixed", "weighted", "poisson", "turns")
        _require(self.sampling in known, "sampling", "fixed, weighted, poisson or turns", self.sampling)
        is_weighted = self.sampling == "weighted"
        _require(is_weighted == bool(self.weights), "site_weights", "given with sampling=weighted", self.site_weights)
        if self.sampling == "turns":
            most = self.num_clients // self.turns
            _require(most >= 1, "fraction_fit", "at least 1 / num_clients with turns", self.fraction_fit)
            rule = f"at most the {most} sites of a turn"
            _require(self.min_available_clients <= most, "min_available_clients", rule, self.min_available_clients)
        _require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)
        _require(self.workers >= 0, "workers", "0 (one per core) or more", self.workers)
        _require(1 <= self.threads <= 1024, "threads", "between 1 and 1024", self.threads)
        _require(0.0 <= self.round_timeout <= 1e6, "round_timeout", "0 (no limit) or up to 1e6 s", self.round_timeout)
        holds = self.wait_for == 0 or self.min_available_clients <= self.wait_for
        _require(holds, "wait_for", "0 (all) or at least min_available_clients", self.wait_for)
        _require(
            self.message_dtype in MESSAGE_DTYPES,
            "message_dtype",
            f"one of {', '.join(MESSAGE_DTYPES)}",
            self.message_dtype,
        )
        _require(self.backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", self.backend)

    @property
    def turns(self) -> int:
        """Rounds in which each site takes part once, where sites take turns; otherwise 1."""
        return max(1, round(1.0 / self.fraction_fit)) if self.sampling == "turns" else 1

    @property
    def weights(self) -> dict[str, float]:
        """What ``site_weights`` says, by site.

        Raises:
            ConfigError: If it is not names with positive numbers.
        """
        found: dict[str, float] = {}
        for part in filter(None, self.site_weights.split(",")):
            name, _, number = part.strip().partition("=")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = math.nan
            holds = bool(name) and 0.0 < found[name] < math.inf
            _require(holds, "site_weights", "names with positive numbers, such as site-1=3,site-2=1", part)
        return found

    @property
    def planned_cohort(self) -> float:
        """Sites that a round is planned with: how many, or how many on average (at least 1) under Poisson sampling and
        with turns.
        """
        if self.sampling == "turns":
            return self.num_clients / self.turns
        if self.sampling == "poisson":
            return max(1.0, self.fraction_fit * self.num_clients)
        return float(max(self.min_available_clients, round(self.fraction_fit * self.num_clients), 1))

    @property
    def planned_sites(self) -> int:
        """The same as a number of sites."""
        return min(round(self.planned_cohort), self.num_clients)


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a site trains. Applications extend it with their own fields.

    Attributes:
        learning_rate: Step size of the local optimizer.
        batch_size: Examples per local step.
        local_epochs: Passes over the site's data in a round (not together with local_steps).
        local_steps: Optimizer steps in a round (not together with local_epochs).
        device: auto, cpu, cuda, cuda:N or mps.
    """

    learning_rate: float = 1e-3
    batch_size: int = 16
    local_epochs: int | None = None
    local_steps: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        _require(
            self.learning_rate > 0.0 and math.isfinite(self.learning_rate),
            "learning_rate",
            "positive and finite",
            self.learning_rate,
        )
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        both = self.local_epochs is not None and self.local_steps is not None
        _require(
            not both,
            "local work",
            "given as local_epochs or as local_steps",
            f"local_epochs={self.local_epochs} and local_steps={self.local_steps}",
            "Remove one of them.",
        )
        for name in ("local_epochs", "local_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run says while it runs, and where it writes.

    Attributes:
        format: rich (progress bars and colours), simple (plain lines) or json (one object a line).
        verbose: Also say what each site did, and show tracebacks of what failed.
        out: Folder of the run; by default runs/<job>-<time>.
    """

    format: LogFormat = "rich"
    verbose: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        _require(self.format in ("rich", "simple", "json"), "logging.format", "rich, simple or json", self.format)


class ParamsType(StrEnum):
    """Whether the parameters of an ``FLModel`` are the model's, or what is added to those received."""

    FULL = "FULL"
    DIFF = "DIFF"


@dataclass(eq=False)
class FLModel:
    """What travels between a site and its training script.

    Attributes:
        params_type: FULL or DIFF; by default FULL where there are parameters, else ``None``.
        params: Named arrays or tensors, or ``None``.
        optimizer_params: Taken and not sent: an optimizer's state stays on its site.
        metrics: Named numbers, ``"loss"`` among them if there is one.
        start_round: The first round, 0.
        current_round: The round, from 0.
        total_rounds: How many rounds there are.
        meta: More about the model; ``"NUM_STEPS_CURRENT_ROUND"`` is the weight of an update.

    Raises:
        ConfigError: If ``params_type`` is given without parameters, or a field has another type than it must.
    """

    params_type: ParamsType | str | None = None
    params: Any = None
    optimizer_params: Any = None
    metrics: dict[str, Any] | None = None
    start_round: int | None = 0
    current_round: int | None = None
    total_rounds: int | None = None
    meta: dict[str, Any] | None = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.params_type is not None:
            _require(self.params_type in ("FULL", "DIFF"), "params_type", "FULL or DIFF", self.params_type)
            _require(self.params is not None, "params", "given with a params_type", None)
            self.params_type = ParamsType(self.params_type)
        elif self.params is not None:
            self.params_type = ParamsType.FULL
        for name in ("metrics", "meta"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, dict), name, "a dict", value)
        self.meta = {} if self.meta is None else self.meta

    def __repr__(self) -> str:
        size = 0 if self.params is None else len(self.params)
        return f"FLModel({self.params_type}, {size} arrays, metrics={self.metrics}, current_round={self.current_round})"


def site_names(count: int) -> tuple[str, ...]:
    """Names of a simulation's sites, padded so that their alphabetical order is their order.

    >>> site_names(2)
    ('site-1', 'site-2')
    >>> site_names(10)[0]
    'site-01'
    """
    width = len(str(count))
    return tuple(f"site-{number:0{width}d}" for number in range(1, count + 1))
