"""DP-SGD against a loop over single examples, on the architectures that are trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sfl.core import rng
from sfl.errors import ConfigError, ModelError
from sfl.esm2.loss import mlm_losses
from sfl.esm2.masking import MaskedBatch, mask, pad
from sfl.privacy import noise
from sfl.privacy.accountant import PrivacyAccountant
from sfl.privacy.dpsgd import calibrate_dpsgd, dpsgd_event, poisson_batches
from sfl.train import factors
from sfl.train.dpsgd import Clipping, ExampleLosses, PrivateTrainer
from sfl.train.per_example import trained_parameters
from sfl.train.rules import add_rules
from sfl.train.trainer import BatchLoss, seed_draws

transformers = pytest.importorskip("transformers")
CLIPPINGS: tuple[Clipping, ...] = ("hooks", "ghost")
TOLERANCE = 1e-5


def seen(losses: torch.Tensor) -> ExampleLosses:
    return ExampleLosses(losses, BatchLoss(losses.sum(), len(losses), torch.zeros((), dtype=torch.int64)))


def gpt2(tied: bool, **options: Any) -> nn.Module:
    torch.default_generator.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return spread(transformers.GPT2LMHeadModel(config))


def esm(tied: bool) -> nn.Module:
    torch.default_generator.manual_seed(3)
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=66, pad_token_id=1, mask_token_id=32, token_dropout=True, tie_word_embeddings=tied,
        position_embedding_type="rotary", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return spread(transformers.EsmForMaskedLM(config))


def spread(module: nn.Module) -> nn.Module:
    """Parameters away from their first values, at which gradients are small or alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def lora(module: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False, **options)
    with warnings.catch_warnings():  # peft asks transformers for a name that goes away
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(module, config)


def causal(module: nn.Module, ids: torch.Tensor) -> ExampleLosses:
    """Next-token losses; 0 is padding."""
    logits = module(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    each = nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return seen(each.sum(1) / (targets >= 0).sum(1).clamp(min=1))


def inner_esm(module: nn.Module, batch: MaskedBatch) -> ExampleLosses:
    return mlm_losses(module.get_base_model() if hasattr(module, "get_base_model") else module, batch)


def sentences(count: int = 5) -> torch.Tensor:
    ids = torch.from_numpy(rng.public(1, 0, "sentences").integers(1, 61, (count, 14)))
    for row in range(1, count):
        ids[row, 14 - row :] = 0
    return ids


def proteins(count: int = 5) -> MaskedBatch:
    generator = rng.public(2, 0, "proteins")
    return mask(pad([generator.integers(4, 24, 8 + 3 * row).astype(np.uint8) for row in range(count)]), generator)


def single(batch: Any, index: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[index : index + 1]
    one = slice(index, index + 1)
    starts = np.concatenate([[0], np.cumsum(batch.selected.sum(1))])
    targets = batch.targets[starts[index] : starts[index + 1]]
    return MaskedBatch(batch.ids[one], batch.selected[one], targets, bool((batch.ids[one] == 1).any()))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., ExampleLosses], Callable[[], Any]]] = {
    "esm tied": (lambda: esm(True), inner_esm, proteins),
    "esm untied": (lambda: esm(False), inner_esm, proteins),
    "esm lora": (lambda: lora(esm(True), ["query", "value", "dense"]), inner_esm, proteins),
    "gpt2 tied": (lambda: gpt2(True), causal, sentences),
    "gpt2 untied": (lambda: gpt2(False), causal, sentences),
    "gpt2 lora": (lambda: lora(gpt2(True), ["c_attn", "c_proj"], fan_in_fan_out=True), causal, sentences),
}


def trainer(losses: Callable[..., ExampleLosses], **options: Any) -> PrivateTrainer[Any]:
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "noise_multiplier": 0.0, "expected_batch_size": 5.0}
    return PrivateTrainer(losses=losses, size=lambda b: len(b) if hasattr(b, "__len__") else 0, **(defaults | options))


def gradients(module: nn.Module, losses: Callable[..., ExampleLosses], batch: Any) -> dict[str, torch.Tensor]:
    """By autograd, of one example, in float64."""
    module.zero_grad()
    losses(module, batch).losses.sum().backward()
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for name, p in trained_parameters(module).items()
    }


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def by_loop(
    module: nn.Module, losses: Callable[..., ExampleLosses], batch: Any, weight: Callable[[float], float]
) -> dict[str, torch.Tensor]:
    """The definition: one example after the other."""
    total: dict[str, torch.Tensor] = {}
    for index in range(len(batch)):
        each = gradients(module, losses, single(batch, index))
        by = weight(norm(each))
        total = {name: total.get(name, 0.0) + by * value for name, value in each.items()}
    module.zero_grad()
    return total


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all parameters, relative to the other."""
    assert one.keys() == other.keys()
    return norm({name: one[name].double() - other[name].double() for name in one}) / norm(other)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("model", MODELS)
def test_each_fast_path_is_the_loop_over_examples(model: str, clipping: Clipping) -> None:
    build, losses, data = MODELS[model]
    module, batch = build(), data()
    norms = [norm(gradients(module, losses, single(batch, index))) for index in range(len(batch))]
    clip = float(np.median(norms))  # some are clipped, some are not
    private = trainer(losses, clipping=clipping, clip_norm=clip)
    expected = by_loop(module, losses, batch, lambda n: clip / max(n, clip))
    assert distance(private.clipped_sum(module, batch), expected) < TOLERANCE
    automatic = replace(private, autoclip=True)
    expected = by_loop(module, losses, batch, lambda n: 1.0 / (n + 0.01))
    assert distance(automatic.clipped_sum(module, batch), expected) < TOLERANCE


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("model", MODELS)
def test_no_example_passes_the_bound(model: str, clipping: Clipping) -> None:
    build, losses, data = MODELS[model]
    module, batch = build(), data()
    norms = [norm(gradients(module, losses, single(batch, index))) for index in range(len(batch))]
    module.zero_grad()
    for clip in (1e-3, 0.3):
        for options in ({"clip_norm": clip}, {"autoclip": True}):
            private = trainer(losses, clipping=clipping, **options)
            for index in range(len(batch)):
                found = norm(private.clipped_sum(module, single(batch, index)))
                assert found <= private.sensitivity * (1.0 + TOLERANCE)
                if not private.autoclip and norms[index] > clip:  # the bound is not met by doing too little
                    assert found >= clip * (1.0 - TOLERANCE)


def test_a_protein_without_a_selected_residue_adds_nothing() -> None:
    batch = proteins()
    row = int(batch.selected.sum(1).argmin())
    assert batch.selected[row].sum() == 0, "the sample should hold one such protein"
    assert norm(trainer(inner_esm).clipped_sum(esm(True), single(batch, row))) == 0.0


@pytest.mark.parametrize("model", ["esm tied", "gpt2 tied"])
def test_the_formula_for_untied_weights_fails_the_bound_on_tied_ones(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm without cross terms, as ghost clipping elsewhere has it: the check above must see that."""
    build, losses, data = MODELS[model]
    module, batch = build(), data()
    private = trainer(losses, clipping="ghost", clip_norm=1e-3)
    rows = range(1, len(batch))
    assert max(norm(private.clipped_sum(module, single(batch, row))) for row in rows) <= 1e-3 * (1.0 + TOLERANCE)
    zero = lambda one, other: torch.zeros(())  # noqa: E731
    monkeypatch.setattr(factors, "_dot", zero)
    assert max(norm(private.clipped_sum(module, single(batch, row))) for row in rows) > 1e-3 * 1.0001


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_virtual_steps_are_one_large_batch(clipping: Clipping) -> None:
    ids = sentences(6)
    private = trainer(causal, clipping=clipping, clip_norm=0.5)
    ends = []
    for batches in ([ids], [ids[:1], ids[1:4], ids[4:]]):
        module = gpt2(True)
        outcome = private.fit(module, iter([batches]), 0)
        assert (outcome.steps, outcome.examples) == (1, 6)
        ends.append({name: p.detach() for name, p in module.named_parameters()})
    assert distance(*ends) < TOLERANCE


def test_dropout_of_a_device_is_seeded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU draws from a generator of its own, whose first seed is public."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_draws(torch.device("cuda", 1), 7)
    assert (seeds, torch.initial_seed()) == ([7], 7)
    seed_draws(torch.device("cpu"), 8)
    assert (seeds, torch.initial_seed()) == ([7], 8)


def test_a_step_is_the_clipped_sum_over_the_expected_size() -> None:
    """With SGD's gradient read from Adam's first step it would hide the scale, so the gradients are caught."""
    ids, module = sentences(), gpt2(False)
    private = trainer(causal, clip_norm=0.5, expected_batch_size=7.5)
    expected = {name: value / 7.5 for name, value in private.clipped_sum(module, ids).items()}
    assert distance(caught(module, private, [[ids]])[0], expected) < TOLERANCE


def caught(module: nn.Module, private: PrivateTrainer[Any], samples: list[list[Any]]) -> list[dict[str, torch.Tensor]]:
    """The gradients that the optimizer was given, step by step."""
    steps: list[dict[str, torch.Tensor]] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(before)
    try:
        private.fit(module, iter(samples), 0)
    finally:
        handle.remove()
    return steps


@pytest.mark.parametrize("autoclip", [False, True])
def test_noise_has_its_standard_deviation(autoclip: bool) -> None:
    """Empty samples are noise alone; the same test refuses two thirds and three halves of it."""
    clip, multiplier, expected = 0.5, 1.5, 4.0
    private = trainer(
        causal, clip_norm=clip, noise_multiplier=multiplier, expected_batch_size=expected, autoclip=autoclip
    )
    steps = caught(gpt2(False), private, [[], []])
    drawn = [torch.cat([value.flatten() for value in step.values()]).double().numpy() for step in steps]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.05, "each step draws anew"
    sigma = multiplier * (1.0 if autoclip else clip) / expected
    sample = drawn[0][:5000]
    assert stats.kstest(sample / sigma, "norm").pvalue > 1e-4
    for wrong in (2.0 / 3.0, 1.5):
        assert stats.kstest(sample / (sigma * wrong), "norm").pvalue < 1e-6


def test_noise_is_added_to_the_clipped_sum_and_differs_from_run_to_run() -> None:
    ids = sentences()
    private = trainer(causal, clip_norm=0.5, noise_multiplier=1e-4)
    ends = [caught(gpt2(True), private, [[ids]])[0] for _ in range(2)]
    assert 0.0 < distance(*ends) < 0.1
    assert distance(ends[0], {k: v / 5.0 for k, v in private.clipped_sum(gpt2(True), ids).items()}) < 0.1


class Plain(nn.Module):
    """A small classifier with what may be asked of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def squares(module: nn.Module, batch: torch.Tensor) -> ExampleLosses:
    return seen(module(batch).flatten(1).square().sum(1))


def plain_data(count: int = 4, width: int = 3) -> torch.Tensor:
    return torch.from_numpy(rng.public(5, 0, "plain").standard_normal((count, width))).float()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_an_example_without_a_finite_gradient_adds_nothing(clipping: Clipping, bad: float) -> None:
    module, x = Plain(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), plain_data()
    module = Plain(nn.Linear(3, 4), nn.Linear(4, 2)) if bad == 1e30 else module
    private = trainer(squares, clipping=clipping, clip_norm=0.1)
    expected = private.clipped_sum(module, x[1:])
    x[0] = bad
    assert distance(private.clipped_sum(module, x), expected) < TOLERANCE
    outcome = private.fit(module, iter([[x]]), 0)
    assert outcome.steps == 1
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_gradient_of_zero_stays_zero() -> None:
    module, x = Plain(nn.Linear(3, 2, bias=False)), torch.zeros(2, 3)
    for options in ({}, {"autoclip": True}, {"clipping": "ghost"}):
        assert norm(trainer(squares, **options).clipped_sum(module, x)) == 0.0


def test_norms_survive_cancellation() -> None:
    """Positions that nearly cancel: Gram sums in float32 alone would give a norm that is far off, or none at all."""
    generator = rng.public(9, 0, "cancel")
    left = torch.from_numpy(generator.standard_normal((2, 1, 200))).float().repeat(1, 2, 1)
    right = torch.from_numpy(generator.standard_normal((2, 1, 300))).float().repeat(1, 2, 1)
    right[:, 1] *= -(1.0 - 1e-3)
    use = factors.Outer(left, right)
    assert factors.compact(use) is use
    true = (left.double().mT @ right.double()).square().sum((1, 2))
    torch.testing.assert_close(factors.squared_norms([use]).double(), true, rtol=1e-4, atol=0.0)
    raw = ((left @ left.mT) * (right @ right.mT)).sum((1, 2)).double()
    assert ((raw - true).abs() / true).max() > 1e-2, "the case should be hard"


@pytest.mark.parametrize("shape", [(3, 5, 40, 30), (3, 40, 4, 3), (2, 1, 7, 7)])
def test_norms_of_shared_parameters_in_every_form(shape: tuple[int, int, int, int]) -> None:
    """All pairs of forms, against the gradients themselves."""
    examples, positions, m, n = shape
    generator = rng.public(4, 0, "forms")
    draw = lambda *size: torch.from_numpy(generator.standard_normal(size))  # noqa: E731
    ids = lambda: torch.from_numpy(generator.integers(0, m, (examples, positions)))  # noqa: E731
    forms = {
        "outer": lambda: factors.Outer(draw(examples, positions, m), draw(examples, positions, n)),
        "rows": lambda: factors.Rows(ids(), draw(examples, positions, n), m),
        "dense": lambda: factors.Dense(draw(examples, m, n)),
    }
    for first in forms.values():
        for second in forms.values():
            uses = [first(), second(), second()]
            gradient = torch.zeros(examples, m, n, dtype=torch.float64)
            for index in range(examples):
                for use in uses:
                    factors.add_sum(use, gradient[index], torch.eye(examples, dtype=torch.float64)[index])
            expected = gradient.square().sum((1, 2))
            for these in (uses, [factors.compact(use) for use in uses]):
                torch.testing.assert_close(factors.squared_norms(these), expected, rtol=1e-9, atol=1e-9)
            total = torch.zeros(m, n, dtype=torch.float64)
            for use in uses:
                factors.add_sum(use, total, None)
            torch.testing.assert_close(total, gradient.sum(0))


class Shared(nn.Module):
    """Embeddings whose ids all examples share, one of them twice, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])[None]
        return self.words(ids) * self.places(places) + self.places(places.flip(1)) * self.words(ids.flip(1))


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_shared_positions_and_padding_rows(clipping: Clipping) -> None:
    torch.default_generator.manual_seed(0)
    module, ids = Shared(), torch.tensor([[1, 2, 0], [3, 3, 5], [8, 0, 0]])
    module.words.weight.data[0] = 1.0  # padding may hold anything; it has no gradient
    expected = by_loop(module, squares, ids, lambda n: min(1.0, 0.2 / n))
    assert distance(trainer(squares, clipping=clipping, clip_norm=0.2).clipped_sum(module, ids), expected) < TOLERANCE


def test_frozen_parameters_stay_and_trainable_ones_are_given_back() -> None:
    module = gpt2(True)
    module.transformer.wte.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    wanted = {name: p.requires_grad for name, p in module.named_parameters()}
    trainer(causal, noise_multiplier=1.0).fit(module, iter([[sentences()]]), 0)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == wanted
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (not wanted[name])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_the_contact_head_of_esm_is_left_alone() -> None:
    module = esm(True)
    head = module.esm.contact_head.regression.weight
    assert head.requires_grad
    before = head.detach().clone()
    trainer(inner_esm, noise_multiplier=1.0).fit(module, iter([[proteins()]]), 0)
    assert torch.equal(head, before)


class Functional(Plain):
    """Uses a weight past its layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + nn.functional.linear(x, self.layers[0].weight)


class Mixing(Plain):
    """Takes the mean over the batch away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layers(x)
        return out - out.mean(0)


class Overwriting(Plain):
    """Changes a layer's input once the layer has read it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        out = self.layers(x)
        x += 1.0
        return out


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


class Counting(Plain):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean += x.mean(0)
        return self.layers(x)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Flat(Plain):
    """Examples and positions in one dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.reshape(-1, 1)).view(len(x), -1)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no rule": (lambda: Plain(Scale()), "Scale at 'layers.0'.*add_rules"),
    "another forward": (lambda: Plain(Doubled(3, 2)), "Doubled at 'layers.0'"),
    "batch norm": (lambda: Plain(nn.Linear(3, 3), nn.BatchNorm1d(3)), "mix examples.*BatchNorm1d at 'layers.1'"),
    "frozen batch norm": (lambda: Plain(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False)), "BatchNorm1d"),
    "mixing": (lambda: Mixing(nn.Linear(3, 2)), "examples must be apart"),
    "past its layer": (lambda: Functional(nn.Linear(3, 2)), "used through its own layer"),
    "overwritten": (lambda: Overwriting(nn.Linear(3, 2)), "changed in place"),
    "flat": (lambda: Flat(nn.Linear(1, 2)), "4 examples as its first dimension"),
    "buffers": (lambda: Counting(), "buffers must not change"),
    "nothing to train": (lambda: Plain(nn.Linear(3, 2)).requires_grad_(False), "must have trainable parameters"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_and_where(case: str) -> None:
    build, words = REFUSALS[case]
    module = build()
    with pytest.raises(ModelError, match=words):
        trainer(squares).fit(module, iter([[plain_data()]]), 0)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_losses_must_be_one_for_each_example() -> None:
    module, x = Plain(nn.Linear(3, 2)), plain_data()
    with pytest.raises(ModelError, match=r"shape \(4,\)"):
        trainer(lambda m, b: seen(m(b).flatten())).clipped_sum(module, x)
    with pytest.raises(ModelError, match="depend on a trained parameter"):
        trainer(lambda m, b: seen(b.sum(1))).clipped_sum(module, x)
    with pytest.raises(ModelError, match="at least one batch"):
        trainer(squares).fit(module, iter([]), 0)


def test_gradient_checkpointing_is_refused() -> None:
    module = gpt2(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name came with transformers 5.2x
        module.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="Turn gradient checkpointing off"):
        trainer(causal).fit(module, iter([[sentences()]]), 0)


def test_a_rule_can_be_taught() -> None:
    add_rules(Scale, by=lambda layer, x, gradient: factors.Dense((x * gradient).reshape(len(x), -1, 3).sum(1)))
    module, x = Plain(nn.Linear(3, 3), Scale()), plain_data()
    expected = by_loop(module, squares, x, lambda n: min(1.0, 0.3 / n))
    assert distance(trainer(squares, clip_norm=0.3).clipped_sum(module, x), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"expected_batch_size": math.inf}, "expected_batch_size must be positive"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite and 0 or more, got -1.0"),
        ({"clip_norm": 1e-320, "noise_multiplier": 1.0}, "sigma must be 0, or between 1e-250 and 1e250"),
        ({"clipping": "fast"}, "clipping must be hooks or ghost, got 'fast'"),
    ],
)
def test_figures_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(squares, **options)


def test_evaluation_is_the_trainers() -> None:
    module, x = Plain(nn.Linear(3, 2)), plain_data()
    outcome = trainer(squares).evaluate(module, iter([x[:1], x[1:]]))
    assert (outcome.steps, outcome.examples) == (2, 4)
    assert outcome.loss == pytest.approx(float(squares(module, x).losses.mean().detach()), rel=1e-5)


def test_opacus_agrees_on_untied_weights() -> None:
    """An implementation that shares no code: its per-example gradients, clipped and summed by hand."""
    import opacus

    module, batch = esm(False), proteins()
    module.esm.contact_head.requires_grad_(False)
    ours = trainer(inner_esm, clip_norm=0.5).clipped_sum(module, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = opacus.GradSampleModule(module, loss_reduction="sum", strict=False)
        inner_esm(wrapped._module, batch).losses.sum().backward()
    samples = {name: p.grad_sample for name, p in module.named_parameters() if p.requires_grad}
    norms = sum(value.flatten(1).square().sum(1) for value in samples.values()).sqrt()
    weights = (0.5 / norms).clamp(max=1.0)
    expected = {name: torch.tensordot(weights, value, 1) for name, value in samples.items()}
    assert distance(ours, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "published"), [(1.1, 256 / 6e4, 3515, 1.1337), (4.0, 0.01, 10_000, 0.9470)]
)
def test_published_rows(sigma: float, rate: float, steps: int, published: float) -> None:
    accountant = PrivacyAccountant(delta=1e-5)
    event = dpsgd_event(sigma, rate, steps)
    assert accountant.epsilon([replace(event, noise_multiplier=sigma)]) == pytest.approx(published, abs=2e-4)
    booked = accountant.epsilon([event])
    assert published < booked < published * 1.005, "the books lower the noise a little"


def test_the_event_says_what_it_depends_on() -> None:
    event = dpsgd_event(1.0, 0.1, 7)
    assert (event.unit, event.adjacency, event.adversary, event.count) == ("example", "add_remove", "server_curious", 7)
    assert event.noise_multiplier == 1.0 - noise.SLACK
    assert "Poisson" in event.sampling
    assert "how many examples the site has is taken to be public" in event.sampling
    assert "Poisson" not in dpsgd_event(1.0, 1.0, 7).sampling
    assert math.isinf(PrivacyAccountant(delta=1e-5).epsilon([dpsgd_event(0.0, 0.1, 7)]))
    for wrong in ((-1.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, 0)):
        with pytest.raises(ConfigError):
            dpsgd_event(*wrong)


def test_calibration_meets_the_budget_and_no_more() -> None:
    found = calibrate_dpsgd(2.0, delta=1e-5, sampling_rate=1.0, steps=12)
    accountant = PrivacyAccountant(delta=1e-5)
    assert accountant.epsilon([dpsgd_event(found, 1.0, 12)]) <= 2.0
    assert accountant.epsilon([dpsgd_event(found * 0.997, 1.0, 12)]) > 2.0


@pytest.mark.slow
def test_calibration_counts_on_sampling() -> None:
    found = calibrate_dpsgd(2.0, delta=1e-5, sampling_rate=0.1, steps=12)
    assert found < calibrate_dpsgd(2.0, delta=1e-5, sampling_rate=1.0, steps=12) / 2.0
    assert PrivacyAccountant(delta=1e-5).epsilon([dpsgd_event(found, 0.1, 12)]) <= 2.0


def test_poisson_samples_are_independent_draws() -> None:
    generator = rng.public(6, 0, "poisson")
    lengths = generator.integers(1, 90, 40)
    taken = np.zeros((3000, 40))
    for step, batches in enumerate(poisson_batches(40, 0.2, 3000, 3, generator, lengths=lengths)):
        assert all(len(batch) <= 3 for batch in batches)
        drawn = np.concatenate(batches) if batches else np.zeros(0, np.int64)
        assert (np.diff(lengths[drawn]) >= 0).all()
        taken[step, drawn] += 1.0
    assert taken.max() == 1.0, "without repetition"
    sizes = taken.sum(1)
    assert stats.chisquare(taken.sum(0)).pvalue > 1e-4, "each alike"
    assert sizes.mean() == pytest.approx(8.0, abs=0.2)
    assert sizes.var() == pytest.approx(40 * 0.2 * 0.8, rel=0.15), "a fixed size has none, repetition has more"
    assert list(poisson_batches(5, 1e-9, 2, 3, generator)) == [[], []]
    assert [len(batch) for batch in next(poisson_batches(5, 1.0, 1, 3, generator))] == [3, 2]
    with pytest.raises(ConfigError, match="sampling_rate must be in"):
        next(poisson_batches(5, 0.0, 1, 3, generator))
    with pytest.raises(ConfigError, match="physical must be 1"):
        next(poisson_batches(5, 0.5, 1, 0, generator))


def test_masks_of_one_protein_do_not_depend_on_others() -> None:
    ids = pad([np.arange(4, 6, dtype=np.uint8)] * 2)
    masks = [mask(ids, rng.public(seed, 0, "apart"), apart=True).selected for seed in range(200)]
    share = np.mean(masks) * ids.size / 4  # of four residues
    assert share == pytest.approx(0.15, abs=0.04)
    assert any(not selected.any() for selected in masks)
    assert all(mask(ids, rng.public(seed, 0, "apart")).selected.any() for seed in range(200))
