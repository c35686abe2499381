"""Causal language modelling: what a site and the server do with a language model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from sfl.application.workload import Workload
from sfl.core import rng
from sfl.core.lora import restored, restricted
from sfl.errors import CompositionError, ConfigError, DataError, ModelError
from sfl.llm.config import LLMRunConfig
from sfl.llm.dataset import COLLECTION, figures
from sfl.llm.documents import Document
from sfl.llm.encoding import encode
from sfl.llm.loss import lm_loss, lm_losses
from sfl.llm.model import load_model, load_tokenizer, save_model, with_adapters
from sfl.llm.tokens import IGNORED, Packed, Rows, TokenBatch, Tokens
from sfl.privacy.config import PrivacyConfig
from sfl.train.dpsgd import ExampleLosses
from sfl.train.module import resident
from sfl.train.pretrained import placed
from sfl.train.trainer import BatchLoss, Outcome, Trainer
from sfl.types import Metrics, Parameters

__all__ = ["LLMWorkload"]

_PROMPTS, _PROMPT_TOKENS, _SAID = 3, 12, 40
_FIRST_FACTORS = "*lora_A*"


@dataclass(frozen=True, kw_only=True)
class LLMWorkload(Workload[Document, TokenBatch]):
    """Fine-tuning of a causal language model, or of adapters to it, on documents.

    Attributes:
        config: The run's configuration.
        model: The model that the run starts from.
    """

    name: ClassVar[str] = "llm"
    unit: ClassVar[str] = "characters"
    kinds: ClassVar[str] = "sources"
    shows: ClassVar[bool] = True
    collection = COLLECTION
    config: LLMRunConfig

    def module(self, device: str, *, seed: int = 0) -> nn.Module:
        """The worker's one model, its base shared by all sites; ``seed`` is that of the adapters' first values.

        What a checkpoint lacks is frozen under adapters, and does not travel: it must be the same in every process.
        """
        client = self.config.client
        adapters = (client.peft, client.lora_r, client.lora_alpha, client.lora_targets, client.lora_dropout)
        key = ("llm", self.model.location, device, client.dtype, adapters, client.prompt_tokens)

        def build() -> nn.Module:
            lacking = rng.public_seed(self.config.federation.seed, 0, "llm-base")
            base = load_model(self.model, dtype="bfloat16" if client.dtype == "bfloat16" else "float32", seed=lacking)
            self._check(base)
            return placed(with_adapters(base, client, seed=seed), device)

        return resident(key, build)

    def tokenizer(self) -> Any:
        """The model's own, one in each process."""
        return resident(("tokenizer", self.model.location), lambda: load_tokenizer(self.model))

    def _check(self, base: nn.Module) -> None:
        """Whether the model has a place and a word for all that it will be shown."""
        client, words = self.config.client, len(self.tokenizer())
        size = int(cast("Any", base).get_input_embeddings().weight.shape[0])
        if words > size:
            raise ModelError(
                f"model must have a row for each of its tokenizer's {words} tokens, got {self.model.name!r} with "
                f"{size}. Use the tokenizer that it was trained with."
            )
        virtual = self._virtual
        if client.block_size > self._places(base):
            raise ConfigError(
                f"block_size must be at most the model's {self._places(base) + virtual} positions"
                f"{f' less {virtual} virtual tokens' if virtual else ''}, got {client.block_size}."
            )

    @property
    def _virtual(self) -> int:
        client = self.config.client
        return client.prompt_tokens if client.peft in ("prompt", "p-tuning") else 0

    def _places(self, module: nn.Module) -> int:
        """Tokens of a text that the model has a place for."""
        known = getattr(cast("Any", module).config, "max_position_embeddings", None)
        return sys.maxsize if known is None else int(known) - self._virtual

    @property
    def is_packed(self) -> bool:
        """Whether documents share rows: not where a row must be of one, and not before virtual tokens."""
        return not self.config.privacy.dpsgd and self.config.client.peft in ("lora", "none")

    def _encoded(self, records: Sequence[Document]) -> tuple[Tokens, ...]:
        return encode(records, self.tokenizer(), self.config.client.max_length)

    def examples(self, records: Sequence[Document]) -> Packed | Rows:
        """Documents as tokens in rows.

        Raises:
            DataError: If in none of them a token is to be learnt. Under DP-SGD that is not said: it is of the data.
        """
        client = self.config.client
        documents = self._encoded(records)
        if documents and not self.config.privacy.dpsgd and all((d.targets == IGNORED).all() for d in documents):
            raise DataError(
                f"documents must have a token to learn, got none in {len(documents)} documents"
                f"{f', of which {client.max_length} tokens are used. Raise max_length' if client.max_length else ''}."
            )
        kind = Packed if self.is_packed else Rows
        return kind(documents, client.batch_size, client.block_size, int(self.tokenizer().eos_token_id))

    def loss(self, module: nn.Module, batch: TokenBatch) -> BatchLoss:
        """Summed cross-entropy over the tokens that are to be foretold."""
        return lm_loss(module, batch)

    def losses(self, module: nn.Module, batch: TokenBatch) -> ExampleLosses:
        """Each document's mean cross-entropy over its own tokens."""
        return lm_losses(module, batch)

    def figures(self, outcome: Outcome) -> Metrics:
        """Loss and token accuracy."""
        return {"loss": outcome.loss, "token_accuracy": outcome.accuracy}

    def described(self, records: Sequence[Document]) -> dict[str, Any]:
        """Characters, and whose they are most often."""
        return figures(records)

    def trainer(self) -> Trainer[TokenBatch]:
        """The trainer of a site."""
        client = self.config.client
        return replace(super().trainer(), bf16=client.dtype != "float32", accumulation=client.gradient_accumulation)

    @property
    def privacy(self) -> PrivacyConfig:
        """The protections; where A is frozen it is neither trained nor sent."""
        privacy = self.config.privacy
        if self.config.client.lora_aggregation != "freeze-a":
            return privacy
        if privacy.exclude_layers:
            raise CompositionError("exclude_layers must be empty with lora_aggregation=freeze-a. Use --freeze-layers.")
        frozen = ",".join(filter(None, (privacy.freeze_layers, _FIRST_FACTORS)))
        return replace(privacy, freeze_layers=frozen)

    def received(self, parameters: Parameters, client_id: int) -> Parameters:
        """Of the adapters, what a site of this rank has."""
        rank = self._rank(client_id)
        return parameters if rank is None else restricted(parameters, rank)

    def returned(self, trained: Parameters, parameters: Parameters, client_id: int) -> Parameters:
        """What a site of this rank has trained, and the rest as it was sent."""
        rank = self._rank(client_id)
        return trained if rank is None else restored(trained, parameters, rank)

    def _rank(self, client_id: int) -> int | None:
        client = self.config.client
        return client.ranks(self.config.federation.num_clients)[client_id] if client.lora_ranks else None

    def save(self, module: nn.Module, folder: Path) -> None:
        """The final model, or its adapters, as ``peft`` and ``transformers`` load them."""
        save_model(module, self.tokenizer(), folder)

    def shown(self, module: nn.Module) -> list[tuple[str, str]]:
        """What the model says, taking the likeliest token each time, to the first words of texts that no site has."""
        tokenizer = self.tokenizer()
        said: list[tuple[str, str]] = []
        for tokens in self._encoded(self.data()[0].held_out[:_PROMPTS]):
            prompt = tokens.ids[: max(1, min(_PROMPT_TOKENS, len(tokens) - 1, self._places(module) - 1))]
            room = min(_SAID, self._places(module) - len(prompt))
            whole = _continued(module, prompt.tolist(), int(tokenizer.eos_token_id), room)
            texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, whole[len(prompt) :])]
            said.append((texts[0], texts[1]))
        return said


@torch.inference_mode()
def _continued(module: nn.Module, prompt: list[int], end: int, most: int) -> list[int]:
    module.eval()
    model = cast("Any", module)
    ids = torch.tensor([prompt], device=next(module.parameters()).device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it sets itself, such as positions before virtual tokens
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
        )
    return [int(token) for token in made[0]]
