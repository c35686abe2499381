"""What a run of federated ESM2 can be told; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from sfl.engine.clock import VirtualClock
from sfl.errors import ConfigError
from sfl.privacy.config import PrivacyConfig
from sfl.server.config import AlgorithmConfig
from sfl.server.robust.config import AggregationConfig
from sfl.types import ClientConfig, FederationConfig, LoggingConfig

MAX_RESIDUES = 1022
"""Residues that ESM2 was trained on at once: 1024 tokens less the two that open and close a protein."""

RESUMABLE: Final = (
    "num_rounds",
    "workers",
    "backend",
    "startup_kit",
    "superlink",
    "root_certificates",
    "device",
    "verbose",
    "format",
)
"""Options that may change when a run goes on; any other would make it a different run."""


@dataclass(frozen=True, kw_only=True)
class ESM2ClientConfig(ClientConfig):
    """How a site trains ESM2 by masked language modelling.

    Attributes:
        model: Name on the hub, such as facebook/esm2_t6_8M_UR50D, or a local folder; by default the 8M model if it
            is in the cache, else the bundled one.
        data: Protein sequences: FASTA, CSV, TSV or Parquet files, comma-separated, or hf:NAME; empty for the bundled
            sample.
        max_length: Residues per crop, from 8 to 1022.
        eval_proteins: Held-out proteins evaluated per site and globally each round; 0 means all.
    """

    learning_rate: float = 5e-4
    local_steps: int | None = 20
    model: str | None = None
    data: str = ""
    max_length: int = 128
    eval_proteins: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.max_length <= MAX_RESIDUES:
            raise ConfigError(f"max_length must be between 8 and {MAX_RESIDUES} residues, got {self.max_length}.")
        if self.eval_proteins < 0:
            raise ConfigError(f"eval_proteins must be 0 (all) or more, got {self.eval_proteins}.")


@dataclass(frozen=True, kw_only=True)
class ESM2RunConfig:
    """All options of ``sfl run esm2``.

    Attributes:
        federation: Who takes part, and for how long.
        client: How a site trains.
        algorithm: Which federated algorithm.
        simulation: How long sites take in simulated time, for the backend sim.
        privacy: Its protections.
        aggregation: How updates become one, and which sites of a simulation lie.
        logging: What the run says, and where it writes.
    """

    federation: FederationConfig = field(default_factory=lambda: FederationConfig(workers=0))
    client: ESM2ClientConfig = field(default_factory=ESM2ClientConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    simulation: VirtualClock = field(default_factory=VirtualClock)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        backend = self.federation.backend
        if self.aggregation.attack is not None and backend != "sim":
            raise ConfigError(
                f"attack must come with backend=sim, where sites are simulated, got {backend}. Leave it out."
            )
        if self.simulation.is_on and backend != "sim":
            raise ConfigError(
                f"site_seconds must come with backend=sim, where time can be simulated, got {backend}. Leave it out."
            )
