"""Causal language models: which is meant, what of it is trained, and a loss in which documents do not meet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_models import save_tiny
from sfl.application.server import WorkloadServer
from sfl.core.lora import pairs
from sfl.errors import CompositionError, ConfigError, DataError, ModelError
from sfl.llm.config import LLMClientConfig, LLMRunConfig
from sfl.llm.documents import Document
from sfl.llm.loss import lm_loss, lm_losses
from sfl.llm.model import BUNDLED, bundled_folder, find_model, load_model, load_tokenizer, with_adapters
from sfl.llm.tokens import IGNORED, Packed, Rows, TokenBatch, Tokens
from sfl.llm.workload import LLMWorkload
from sfl.privacy.config import PrivacyConfig
from sfl.server.robust.config import AggregationConfig
from sfl.train.module import exchanged, lend_parameters, load_parameters, release_resident
from sfl.train.trainer import Trainer


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


def drawn(seed: int, lengths: list[int]) -> tuple[Tokens, ...]:
    draw = np.random.default_rng(seed)
    return tuple(Tokens.of([0, *draw.integers(1, 2048, n - 1).tolist()], [True] * n) for n in lengths)


def alone(module: nn.Module, document: Tokens) -> TokenBatch:
    return TokenBatch(document.ids[None], document.targets[None])


# ------------------------------------------------------------------------------------------------------------- bundled


def test_the_bundled_model_is_small_and_beats_the_unigram_baseline() -> None:
    size = sum(path.stat().st_size for path in bundled_folder().iterdir())
    assert size < 8 * 2**20
    figures = json.loads((bundled_folder() / "evaluation.json").read_text())
    assert figures["model"]["perplexity"] < figures["unigram"]["perplexity"] - 1.0
    assert figures["model"]["token_accuracy"] > figures["unigram"]["token_accuracy"]
    card = (bundled_folder() / "README.md").read_text()
    assert f"{figures['model']['perplexity']:.1f}" in card
    assert "CC BY 2.5" in card


def test_offline_the_bundled_model_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_model(None)
    assert (found.name, found.location) == (BUNDLED, str(bundled_folder()))
    assert "GPT-2" in found.why


def test_a_model_of_another_kind_and_one_without_a_tokenizer_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="must be a causal language model"):
        load_model(find_model(str(tmp_path)))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(find_model(str(bare)))


# --------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, "lora_"),
        ({"peft": "prompt"}, "prompt_encoder"),
        ({"peft": "p-tuning"}, "prompt_encoder"),
        ({"peft": "none"}, ""),
    ],
)
def test_what_is_trained_travels_and_nothing_else(tiny: Path, options: dict[str, Any], trained: str) -> None:
    config = LLMClientConfig(**options)
    base = load_model(find_model(str(tiny)))
    count = sum(p.numel() for p in base.parameters())
    module = with_adapters(base, config, seed=1)
    names = list(exchanged(module))
    assert names
    assert all(trained in name for name in names)
    assert all(value.dtype == np.float32 for value in lend_parameters(module).values())
    if options.get("peft") == "none":
        assert sum(v.size for v in lend_parameters(module).values()) == count
    else:
        assert sum(v.size for v in lend_parameters(module).values()) < count / 4
    again = with_adapters(load_model(find_model(str(tiny))), config, seed=1)
    for name, value in lend_parameters(again).items():
        np.testing.assert_array_equal(value, lend_parameters(module)[name])


def test_targets_are_found_for_the_architecture_or_named(tiny: Path) -> None:
    known = {"gpt2": {"c_attn"}, "llama": {"q_proj", "v_proj"}}[tiny.name]
    module = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig())
    found = pairs(lend_parameters(module))
    assert {pair.frame.split(".lora_A")[0].rsplit(".", 1)[-1] for pair in found} == known
    assert {pair.rank for pair in found} == {8}
    mlp = {"gpt2": "c_fc", "llama": "up_proj"}[tiny.name]
    named = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig(lora_targets=mlp, lora_r=2))
    assert all(mlp in name for name in exchanged(named))
    with pytest.raises(ConfigError, match="lora_targets must be names of the model's layers, got nowhere"):
        with_adapters(load_model(find_model(str(tiny))), LLMClientConfig(lora_targets="nowhere"))


def test_an_unknown_architecture_gets_adapters_on_every_linear_layer(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    monkeypatch.setattr(peft.utils, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    module = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig())
    layers = {pair.frame.split(".lora_A")[0].rsplit(".", 1)[-1] for pair in pairs(lend_parameters(module))}
    assert layers >= {"gpt2": {"c_attn", "c_proj", "c_fc"}, "llama": {"q_proj", "down_proj"}}[tiny.name]
    assert "lm_head" not in layers


def test_a_base_in_bfloat16_trains_float32_adapters(tiny: Path) -> None:
    base = load_model(find_model(str(tiny)), dtype="bfloat16")
    module = with_adapters(base, LLMClientConfig(dtype="bfloat16"))
    kinds = {p.dtype for p in module.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in module.parameters()}
    trainer = Trainer(loss=lm_loss, size=len, learning_rate=1e-2)
    documents = drawn(0, [20, 30])
    before = {name: value.copy() for name, value in lend_parameters(module).items()}
    outcome = trainer.fit(module, Packed(documents, 2, 16).epoch(np.random.default_rng(0)), 0)
    assert np.isfinite(outcome.loss)
    assert any((before[name] != value).any() for name, value in lend_parameters(module).items())


def test_rows_longer_than_the_model_are_refused(tiny: Path) -> None:
    model = find_model(str(tiny))
    with pytest.raises(ConfigError, match="block_size must be at most the model's 64 positions, got 65"):
        LLMWorkload(config=LLMRunConfig(client=LLMClientConfig(block_size=65)), model=model).module("cpu")
    client = LLMClientConfig(block_size=60, peft="prompt")
    with pytest.raises(ConfigError, match="64 positions less 8 virtual tokens, got 60"):
        LLMWorkload(config=LLMRunConfig(client=client), model=model).module("cpu")


def test_frozen_first_factors_are_a_protection_of_their_own(tiny: Path) -> None:
    client = LLMClientConfig(block_size=32, lora_aggregation="freeze-a")
    workload = LLMWorkload(config=LLMRunConfig(client=client), model=find_model(str(tiny)))
    assert workload.privacy.freeze_layers == "*lora_A*"
    both = replace(workload, config=replace(workload.config, privacy=PrivacyConfig(freeze_layers="*h.0*")))
    assert both.privacy.freeze_layers == "*h.0*,*lora_A*"
    odd = replace(workload, config=replace(workload.config, privacy=PrivacyConfig(exclude_layers="*h.0*")))
    with pytest.raises(CompositionError, match="exclude_layers must be empty"):
        _ = odd.privacy


# --------------------------------------------------------------------------------------------------------------- loss


def each_alone(module: nn.Module, documents: tuple[Tokens, ...]) -> tuple[float, int]:
    results = [lm_loss(module, alone(module, document)) for document in documents]
    return sum(r.total.item() for r in results), sum(r.count for r in results)


def test_the_loss_is_that_of_transformers(tiny: Path) -> None:
    module = load_model(find_model(str(tiny))).eval()
    (document,) = drawn(1, [30])
    ids = torch.from_numpy(document.ids[None])
    wanted = module(input_ids=ids, labels=ids).loss.item()
    found = lm_loss(module, alone(module, document))
    assert found.total.item() / found.count == pytest.approx(wanted, rel=1e-6)
    assert found.count == 29


@pytest.mark.parametrize("peft", ["prompt", "p-tuning"])
def test_virtual_tokens_are_put_where_peft_puts_them(tiny: Path, peft: Any) -> None:
    module: Any = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig(peft=peft, prompt_tokens=4)).eval()
    batch = Rows(drawn(1, [9, 30]), 2, 32).apart(np.arange(2), np.random.default_rng(0))
    assert batch.real is not None
    with torch.inference_mode():
        found = lm_loss(module, batch)
        mask, labels = torch.from_numpy(batch.real).long(), torch.from_numpy(batch.ids)
        labels = torch.where(mask.bool(), labels, IGNORED)
        wanted = module(input_ids=torch.from_numpy(batch.ids), attention_mask=mask, labels=labels).loss.item()
    # peft's own labels: the first token is foretold from the last virtual one, which nothing here asks for
    assert found.count == 37
    assert found.total.item() == pytest.approx(wanted * 39 - first_tokens(module, batch), rel=1e-5)


def first_tokens(module: Any, batch: TokenBatch) -> float:
    with torch.inference_mode():
        logits = module(input_ids=torch.from_numpy(batch.ids)).logits[:, 3]
    return float(nn.functional.cross_entropy(logits, torch.from_numpy(batch.ids[:, 0]), reduction="sum"))


def test_documents_of_a_packed_row_do_not_see_each_other(tiny: Path) -> None:
    module = load_model(find_model(str(tiny))).eval()
    documents = drawn(2, [7, 12, 9, 4])
    (batch,) = Packed(documents, 4, 32).evaluation(np.random.default_rng(0))
    assert batch.ids.shape == (1, 32)
    with torch.inference_mode():
        found = lm_loss(module, batch)
        total, count = each_alone(module, documents)
    assert found.count == count
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    with torch.inference_mode():  # and without their positions they would
        mixed = lm_loss(module, replace(batch, positions=None))
    assert mixed.total.item() != pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("architecture", ["opt", "bloom", "falcon", "gemma2", "mamba"])
def test_documents_do_not_meet_in_models_that_know_of_no_packing(architecture: str) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "opt": {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2},
        "bloom": {"hidden_size": 16, "n_head": 2},
        "falcon": {"hidden_size": 16, "num_attention_heads": 2},
        "gemma2": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        "mamba": {"hidden_size": 16},
    }[architecture]
    config = transformers.AutoConfig.for_model(architecture, vocab_size=2048, num_hidden_layers=2, **sizes)
    torch.default_generator.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    documents = drawn(1, [6, 1, 9, 3, 7, 2])
    with torch.no_grad():
        packed = [lm_loss(module, batch) for batch in Packed(documents, 2, 64).evaluation(np.random.default_rng(0))]
        apart = [lm_loss(module, alone(module, document)) for document in documents]
    assert sum(each.count for each in packed) == sum(each.count for each in apart)
    total = sum(float(each.total) for each in apart)
    assert sum(float(each.total) for each in packed) == pytest.approx(total, rel=1e-5)


def test_whether_a_model_knows_of_packing_is_tried_without_a_trace(tiny: Path) -> None:
    module = load_model(find_model(str(tiny))).train()
    before = torch.default_generator.get_state()
    assert lm_loss(module, next(Packed(drawn(1, [5, 9]), 1, 14).epoch(np.random.default_rng(0)))).count == 12
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.default_generator.get_state(), before)


def test_padded_rows_are_worth_their_documents(tiny: Path) -> None:
    module = load_model(find_model(str(tiny))).eval()
    documents = drawn(3, [7, 12, 9, 31])
    with torch.inference_mode():
        batches = list(Rows(documents, 3, 31).evaluation(np.random.default_rng(0)))
        results = [lm_loss(module, batch) for batch in batches]
        total, count = each_alone(module, documents)
    assert sum(r.count for r in results) == count
    assert sum(r.total.item() for r in results) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("peft", ["lora", "prompt", "p-tuning", "none"])
def test_each_rows_own_loss_is_its_mean(tiny: Path, peft: Any) -> None:
    module = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig(peft=peft, prompt_tokens=4)).eval()
    documents = (*drawn(4, [7, 12, 9]), Tokens.of([0, 5, 6], [False] * 3))
    batch = Rows(documents, 4, 16).apart(np.arange(4), np.random.default_rng(0))
    with torch.inference_mode():
        found = lm_losses(module, batch)
        for row, document in enumerate(documents):
            one = lm_loss(module, alone(module, document))
            assert found.losses[row].item() == pytest.approx(one.total.item() / max(one.count, 1), rel=1e-4, abs=1e-6)
    assert found.losses[3].item() == 0.0


@pytest.mark.parametrize("peft", ["lora", "prompt", "p-tuning", "none"])
@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_gradients_of_each_document_equal_those_of_a_loop(tiny: Path, peft: Any, clipping: Any) -> None:
    from sfl.train.dpsgd import PrivateTrainer

    module = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig(peft=peft, prompt_tokens=4), seed=3)
    warm(module)
    documents = drawn(5, [7, 12, 9])
    trainer = PrivateTrainer(
        losses=lm_losses, size=len, learning_rate=1e-3, clip_norm=0.05, noise_multiplier=1.0,
        expected_batch_size=3.0, clipping=clipping,
    )  # fmt: skip
    batch = Rows(documents, 4, 16).apart(np.arange(3), np.random.default_rng(0))
    found = trainer.clipped_sum(module, batch)
    wanted = looped(module, documents, 0.05)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].float(), value, rtol=2e-4, atol=1e-7)


def warm(module: nn.Module) -> None:
    """LoRA's B begins at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def looped(module: nn.Module, documents: tuple[Tokens, ...], bound: float) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for document in documents:
        result = lm_loss(module, alone(module, document))
        gradients = torch.autograd.grad(result.total / result.count, list(named.values()), allow_unused=True)
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients if g is not None))
        for (name, _), gradient in zip(named.items(), gradients, strict=True):
            if gradient is not None:
                total[name] += gradient * min(1.0, bound / float(norm))
    return total


def test_accumulated_batches_are_one_step_of_their_mean(tiny: Path) -> None:
    documents = drawn(6, [16] * 8)

    def trained(batch_size: int, accumulation: int) -> dict[str, Any]:
        module = load_model(find_model(str(tiny)))
        trainer = Trainer(loss=lm_loss, size=len, learning_rate=1e-3, accumulation=accumulation, bf16=False)
        batches = Packed(documents, batch_size, 16).epoch(np.random.default_rng(0))
        outcome = trainer.fit(module, batches, 0)
        assert outcome.steps == 2
        assert outcome.examples == 8
        return {name: value.copy() for name, value in lend_parameters(module).items()}

    whole, parts = trained(4, 1), trained(2, 2)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=2e-4, atol=2e-6)


def test_adapters_are_loaded_into_the_shared_base(tiny: Path) -> None:
    module = with_adapters(load_model(find_model(str(tiny))), LLMClientConfig())
    others: dict[str, Callable[[], Any]] = {
        name: value.clone for name, value in module.state_dict().items() if "lora_" not in name
    }
    before = {name: copy() for name, copy in others.items()}
    load_parameters(module, {name: np.ones_like(value) for name, value in lend_parameters(module).items()})
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value)


def test_no_target_is_worth_nothing(tiny: Path) -> None:
    module = load_model(find_model(str(tiny))).eval()
    batch = TokenBatch(np.array([[0, 1]]), np.full((1, 2), IGNORED))
    found = lm_loss(module, batch)
    assert (found.count, found.total.item(), int(found.correct)) == (0, 0.0, 0)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_what_a_checkpoint_lacks_is_the_same_in_every_process(tmp_path: Path) -> None:
    import transformers

    folder = save_tiny(tmp_path / "llama", "llama")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    whole.model.save_pretrained(folder)  # without its untied head
    workload = LLMWorkload(config=LLMRunConfig(client=LLMClientConfig(block_size=32)), model=find_model(str(folder)))
    heads: list[torch.Tensor] = []
    adapters: list[torch.Tensor] = []
    for seed in (0, 7):  # a site's, and the server's
        release_resident()
        found = dict(workload.module("cpu", seed=seed).named_parameters())
        heads.append(next(value for name, value in found.items() if "lm_head" in name).detach())
        adapters.append(next(value for name, value in found.items() if "lora_A" in name).detach())
    release_resident()
    assert torch.equal(*heads)
    assert not torch.equal(*adapters)


@pytest.mark.parametrize("client", [{}, {"peft": "prompt", "prompt_tokens": 11}])
def test_what_is_said_has_a_place_in_the_model(client: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "short", positions=19)
    config = LLMRunConfig(client=LLMClientConfig(block_size=8, **client))
    workload = LLMWorkload(config=config, model=find_model(str(folder)))
    release_resident()
    said = workload.shown(workload.module("cpu"))
    release_resident()
    assert len(said) == 3
    assert all(text for text, _ in said)


@pytest.mark.parametrize(("targets", "warns"), [("lm_head", True), ("wte", True), ("c_attn", False)])
def test_adapters_that_must_not_be_merged_are_named(
    targets: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_model(find_model(str(save_tiny(tmp_path / "tied"))))
    with caplog.at_level("WARNING", logger="sfl.llm"):
        with_adapters(base, LLMClientConfig(lora_targets=targets))
    assert ("do not merge" in caplog.text) == warns


def test_the_servers_own_update_freezes_what_sites_freeze(tiny: Path) -> None:
    options = LLMClientConfig(block_size=32, local_steps=2, lora_aggregation="freeze-a")
    config = LLMRunConfig(client=options, aggregation=AggregationConfig(aggregation="fltrust"))
    server = WorkloadServer(workload=LLMWorkload(config=config, model=find_model(str(tiny))))
    update = server.root_update(server.initial_parameters(), 1)
    release_resident()
    assert {name for name, value in update.items() if value.any()} == {name for name in update if "lora_B" in name}


def test_documents_of_which_nothing_is_learnt_have_no_perplexity_of_one(tiny: Path) -> None:
    long, short = "who goes there in the dead of night", "ho"
    records = [Document("", (("prompt", text), ("completion", "a friend"))) for text in (long, short)]
    options = LLMClientConfig(block_size=32, max_length=5)
    workload = LLMWorkload(config=LLMRunConfig(client=options), model=find_model(str(tiny)))
    assert len(workload.examples(records)) == 2
    with pytest.raises(DataError, match="Raise max_length"):
        workload.examples(records[:1])
    private = replace(workload, config=LLMRunConfig(client=options, privacy=PrivacyConfig(dpsgd=True)))
    assert len(private.examples(records[:1])) == 1
