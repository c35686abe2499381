"""What a run of any application can be told; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Self

from sfl.engine.clock import VirtualClock
from sfl.errors import ConfigError
from sfl.privacy.config import PrivacyConfig
from sfl.server.config import AlgorithmConfig
from sfl.server.robust.config import AggregationConfig
from sfl.types import ClientConfig, FederationConfig, LoggingConfig

__all__ = ["ModelConfig", "RESUMABLE", "RunConfig"]  # noqa: RUF022 - plain order

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
class ModelConfig(ClientConfig):
    """How a site fine-tunes a pretrained model.

    Attributes:
        model: Name on the hub, or a local folder.
        data: Files, comma-separated, or hf:NAME; empty for the bundled sample.
    """

    model: str | None = None
    data: str = ""

    @property
    def eval_records(self) -> int:
        """Held-out records that are evaluated per site and globally each round; 0 means all."""
        return 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All options of a run of an application.

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
    client: ModelConfig = field(default_factory=ModelConfig)
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

    @property
    def global_fraction(self) -> float:
        """Share of the records that no site gets. None where each site brings its file and the run is private: what the
        server then evaluates on would be the sites' own. Nor where the server cannot read the model.
        """
        privacy = self.privacy
        if privacy.seals:  # the server has no model to evaluate
            return 0.0
        is_private = privacy.dp or privacy.dpsgd or privacy.selects_privately
        return 0.0 if is_private and self.federation.partition.strip() == "files" else 0.1

    def shared_by(self, federation: FederationConfig) -> Self:
        """The same run of another federation, whose sites are all alike."""
        return replace(self, federation=federation)
