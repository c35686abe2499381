"""What a run of federated causal-LM fine-tuning can be told; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self, TypeAlias

from sfl.application.config import ModelConfig, RunConfig
from sfl.errors import ConfigError
from sfl.types import FederationConfig

__all__ = ["Aggregating", "LLMClientConfig", "LLMRunConfig", "Peft"]

Peft: TypeAlias = Literal["lora", "prompt", "p-tuning", "none"]
Aggregating: TypeAlias = Literal["mean", "exact", "freeze-a"]

_WITH_LORA: Final = ("lora_targets", "lora_ranks", "lora_aggregation")


@dataclass(frozen=True, kw_only=True)
class LLMClientConfig(ModelConfig):
    """How a site fine-tunes a causal language model.

    Attributes:
        model: Name on the hub, such as openai-community/gpt2, or a local folder; by default GPT-2 if it is in the
            cache, else the bundled one.
        data: Texts: TXT, JSONL, CSV, TSV or Parquet files, comma-separated, or hf:NAME; empty for the bundled sample.
        max_length: Tokens of a document that are used; 0 means all.
        eval_documents: Held-out documents evaluated per site and globally each round; 0 means all.
        block_size: Tokens in a row of a batch.
        gradient_accumulation: Batches whose gradients make one step.
        dtype: What the base model is held in while adapters train: auto (float32), float32 or bfloat16. What is
            trained stays float32; auto and bfloat16 compute in bfloat16 where the hardware has it.
        peft: What is trained, and travels: lora (low-rank adapters), prompt (tuned virtual tokens), p-tuning (their
            encoder) or none (the whole model).
        lora_r: Rank of the adapters.
        lora_alpha: Their scale: what they add is multiplied by lora_alpha / lora_r.
        lora_targets: Names of the modules that get one, comma-separated, or all-linear; by default those that peft
            knows for the architecture, else every linear layer.
        lora_dropout: Dropout before them, in [0, 1).
        lora_ranks: A rank for each site, at most lora_r, comma-separated; by default lora_r for all.
        lora_aggregation: How adapters become one: mean (of the factors), exact (of their products, truncated) or
            freeze-a (A is not trained, so that the mean of B is exact).
        prompt_tokens: Virtual tokens of prompt and p-tuning.
    """

    learning_rate: float = 1e-3
    batch_size: int = 8
    local_steps: int | None = 20
    max_length: int = 0
    eval_documents: int = 128
    block_size: int = 128
    gradient_accumulation: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    peft: Peft = "lora"
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_targets: str = ""
    lora_dropout: float = 0.0
    lora_ranks: str = ""
    lora_aggregation: Aggregating = "mean"
    prompt_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("block_size", 8),
            ("gradient_accumulation", 1),
            ("lora_r", 1),
            ("prompt_tokens", 1),
            ("eval_documents", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.max_length != 0 and self.max_length < 2:
            raise ConfigError(f"max_length must be 0 (all) or at least 2 tokens, got {self.max_length}.")
        if not 0.0 < self.lora_alpha <= 1e6:
            raise ConfigError(f"lora_alpha must be positive and at most 1e6, got {self.lora_alpha}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        if self.peft != "lora":
            odd = [name for name in _WITH_LORA if getattr(self, name) != getattr(LLMClientConfig, name)]
            if odd:
                raise ConfigError(f"{', '.join(odd)} must come with peft=lora, got {self.peft}. Leave it out.")
        if self.dtype == "bfloat16" and self.peft == "none":
            raise ConfigError(
                "dtype must be auto or float32 where the whole model is trained, got bfloat16: small steps would be "
                "rounded away. Use --dtype auto, which computes in bfloat16 where the hardware has it."
            )
        self.ranks(1)

    @property
    def eval_records(self) -> int:
        """Held-out documents that are evaluated."""
        return self.eval_documents

    def ranks(self, sites: int) -> tuple[int, ...]:
        """The rank of each site's adapters.

        Raises:
            ConfigError: If what is named is no rank, or not one for each site.
        """
        if not self.lora_ranks:
            return (self.lora_r,) * sites
        try:
            found = tuple(int(word) for word in self.lora_ranks.split(","))
        except ValueError:
            found = ()
        if not found or not all(1 <= rank <= self.lora_r for rank in found):
            raise ConfigError(
                f"lora_ranks must be whole numbers from 1 to lora_r={self.lora_r}, comma-separated, got "
                f"{self.lora_ranks!r}. Write for instance 8,4."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class LLMRunConfig(RunConfig):
    """All options of ``sfl run llm``.

    Attributes:
        client: How a site trains.
    """

    client: LLMClientConfig = field(default_factory=LLMClientConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        sites, named = self.federation.num_clients, self.client.ranks(self.federation.num_clients)
        if len(named) != sites:
            raise ConfigError(f"lora_ranks must be one for each of num_clients={sites} sites, got {len(named)}.")
        if self.client.lora_aggregation == "exact" and self.aggregation.aggregation != "mean":
            raise ConfigError(
                f"lora_aggregation must be mean or freeze-a beside aggregation={self.aggregation.aggregation}, got "
                "exact: both say how updates become one. Leave one out."
            )
        if self.privacy.dpsgd and self.client.gradient_accumulation > 1:
            raise ConfigError(
                f"gradient_accumulation must be 1 under dpsgd, got {self.client.gradient_accumulation}: a step takes "
                "the whole sample already. Use --dpsgd-physical-batch to bound memory."
            )
        if self.privacy.dpsgd and self.client.lora_ranks:
            raise ConfigError(
                f"lora_ranks must be left out under dpsgd, got {self.client.lora_ranks}: noise is on the whole of the "
                "factors, so that each site trains at lora_r."
            )

    def shared_by(self, federation: FederationConfig) -> Self:
        """The same run of another federation, whose sites are all of one rank."""
        return replace(self, federation=federation, client=replace(self.client, lora_ranks=""))
