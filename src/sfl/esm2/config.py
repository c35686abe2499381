"""What a run of federated ESM2 can be told; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfl.application.config import ModelConfig, RunConfig
from sfl.errors import ConfigError

__all__ = ["ESM2ClientConfig", "ESM2RunConfig", "MAX_RESIDUES"]  # noqa: RUF022 - plain order

MAX_RESIDUES = 1022
"""Residues that ESM2 was trained on at once: 1024 tokens less the two that open and close a protein."""


@dataclass(frozen=True, kw_only=True)
class ESM2ClientConfig(ModelConfig):
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
    max_length: int = 128
    eval_proteins: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 8 <= self.max_length <= MAX_RESIDUES:
            raise ConfigError(f"max_length must be between 8 and {MAX_RESIDUES} residues, got {self.max_length}.")
        if self.eval_proteins < 0:
            raise ConfigError(f"eval_proteins must be 0 (all) or more, got {self.eval_proteins}.")

    @property
    def eval_records(self) -> int:
        """Held-out proteins that are evaluated."""
        return self.eval_proteins


@dataclass(frozen=True, kw_only=True)
class ESM2RunConfig(RunConfig):
    """All options of ``sfl run esm2``.

    Attributes:
        client: How a site trains.
    """

    client: ESM2ClientConfig = field(default_factory=ESM2ClientConfig)
