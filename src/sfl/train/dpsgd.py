"""Local training that is private for each example (DP-SGD). Knows nothing of clients or rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sfl.errors import ConfigError, ModelError
from sfl.privacy import noise
from sfl.train.per_example import Recorder, recording, trained_parameters
from sfl.train.trainer import Batch, BatchLoss, Outcome, Tally, adamw, evaluate, seed_draws
from sfl.types import Array

__all__ = ["Clipping", "ExampleLosses", "PrivateTrainer"]

Clipping: TypeAlias = Literal["hooks", "ghost"]
_STABILISER = 0.01  # γ of AUTO-S


@dataclass(frozen=True, slots=True)
class ExampleLosses:
    """One forward pass.

    Attributes:
        losses: Each example's loss, shape (examples,): of its own data alone.
        seen: The same pass in figures.
    """

    losses: Tensor
    seen: BatchLoss


@dataclass(frozen=True, kw_only=True)
class PrivateTrainer(Generic[Batch]):
    """DP-SGD (Abadi et al., CCS 2016, Algorithm 1) with AdamW, its moments fresh every round.

    A step's gradient is (Σ_i w_i g_i + N(0, (zS)²)) / L over the examples of one Poisson sample: g_i the gradient of
    example i over all trained parameters, w_i = min(1, C/‖g_i‖) and S = C; with ``autoclip`` w_i = 1/(‖g_i‖ + 0.01) and
    S = 1 (AUTO-S: Bu, Wang, Zha and Karypis, NeurIPS 2023, §3). L is ``expected_batch_size`` whatever was drawn.

    Formal guarantees: one example moves the sum by at most S in L2, apart from float32 rounding, for which
    ``sfl.privacy.noise.SLACK`` leaves a hundred times what is measured, though not the worst that could be; so a step
    of a sample that takes each example by itself with probability q is what ``sfl.privacy.dpsgd.dpsgd_event(z, q, 1)``
    says. The outcome is not private, and not to be released.

    Attributes:
        losses: Forward pass of a module on a physical batch.
        size: Number of examples in a physical batch.
        learning_rate: Constant over the round.
        weight_decay: Of matrices; biases and norms have none.
        clip_norm: C.
        noise_multiplier: z; 0 adds no noise, and has no guarantee.
        expected_batch_size: L, examples in a Poisson sample on average.
        clipping: ``"hooks"`` keeps each layer's factors from one backward pass; ``"ghost"`` goes backward twice and
            keeps those of one layer at a time.
        autoclip: AUTO-S in place of clipping to C.

    Raises:
        ConfigError: If a figure is out of its range.

    Edge cases:

    | what | then |
    |---|---|
    | an empty sample | the step is noise alone |
    | a gradient of zero | adds zero |
    | a gradient with NaN or inf, or whose norm overflows | that example adds zero; the others are as without it |
    | a parameter that no loss reaches | is noised like the others |
    | a layer without a rule, BatchNorm, gradient checkpointing | ``ModelError`` |
    | a saved buffer that changes in training | ``ModelError``: nothing protects it |
    """

    losses: Callable[[nn.Module, Batch], ExampleLosses]
    size: Callable[[Batch], int]
    learning_rate: float
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    noise_multiplier: float
    expected_batch_size: float
    clipping: Clipping = "hooks"
    autoclip: bool = False

    def __post_init__(self) -> None:
        for name in ("clip_norm", "expected_batch_size"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name} must be positive and finite, got {value}.")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ConfigError(f"noise_multiplier must be finite and 0 or more, got {self.noise_multiplier}.")
        noise.check_sigma(self.noise_multiplier * self.sensitivity)
        if self.clipping not in ("hooks", "ghost"):
            raise ConfigError(f"clipping must be hooks or ghost, got {self.clipping!r}.")

    @property
    def sensitivity(self) -> float:
        """S: the most that one example can move a step's sum, in L2."""
        return 1.0 if self.autoclip else self.clip_norm

    def fit(self, module: nn.Module, batches: Iterator[Sequence[Batch]], seed: int) -> Outcome:
        """One noisy optimizer step for each Poisson sample.

        Args:
            module: Trained in place.
            batches: The samples, each in physical batches that fit the memory; one may be empty.
            seed: Of torch's own draws (dropout); the noise has none.

        Raises:
            ModelError: If there was no sample, or the module cannot be trained so; see ``recording``.
        """
        module.train()
        parameters = trained_parameters(module)
        seed_draws(next(iter(parameters.values())).device, seed)
        optimizer = adamw(list(parameters.values()), self.learning_rate, self.weight_decay)
        tally = Tally(next(iter(parameters.values())).device)
        steps = examples = 0
        buffers = _buffers(module)
        with recording(module) as recorder:
            for sample in batches:
                total: dict[str, Tensor] = {}
                for batch in sample:
                    self._add_clipped(recorder, batch, total, tally)
                    examples += self.size(batch)
                self._step(parameters, total, optimizer)
                steps += 1
        if steps == 0:
            raise ModelError("local training must have at least one batch, got none. Give the site more data.")
        changed = sorted(name for name, state in _buffers(module).items() if buffers.get(name) != state)
        if changed:
            raise ModelError(f"saved buffers must not change under DP-SGD, got a change in {changed[:3]}. Freeze them.")
        return Outcome(steps, examples, *tally.means())

    def evaluate(self, module: nn.Module, batches: Iterator[Batch]) -> Outcome:
        """Loss and accuracy over batches; an empty iterator gives zeros over 0 examples."""
        return evaluate(module, batches, loss=lambda m, b: self.losses(m, b).seen, size=self.size, bf16=False)

    def clipped_sum(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Σ_i w_i g_i of one physical batch by parameter, before the noise: for tests and audits, not for release.

        Of one example its L2 norm over all parameters is at most ``sensitivity``.
        """
        total: dict[str, Tensor] = {}
        with recording(module) as recorder:
            self._add_clipped(recorder, batch, total, Tally(next(module.parameters()).device))
        return {name: total.get(name, torch.zeros_like(p.data)) for name, p in trained_parameters(module).items()}

    def noisy_sum(self, module: nn.Module, sample: Sequence[Batch]) -> dict[str, Array]:
        """Σ_i w_i g_i + N(0, (zS)²) of one Poisson sample by parameter: all that a step takes from its examples."""
        total: dict[str, Tensor] = {}
        parameters = trained_parameters(module)
        with recording(module) as recorder:
            for batch in sample:
                self._add_clipped(recorder, batch, total, Tally(next(module.parameters()).device))
        return self._noised(parameters, total)

    def _add_clipped(self, recorder: Recorder, batch: Batch, total: dict[str, Tensor], tally: Tally) -> None:
        size, seen = self.size(batch), list[BatchLoss]()
        if size == 0:
            return

        def forward() -> Tensor:
            result = self.losses(recorder.module, batch)
            seen.append(result.seen)
            return result.losses

        recorder.check(forward, size)
        recorder.forward(forward, size)
        norms = recorder.norms(keep=self.clipping == "hooks")
        tally.add(seen[-1])
        recorder.weighted_sum(self._weights(norms), total)

    def _weights(self, norms: Tensor) -> Tensor:
        # a norm of zero gives inf below, so a weight of 1
        weights = 1.0 / (norms + _STABILISER) if self.autoclip else (self.clip_norm / norms).clamp(max=1.0)
        return torch.where(norms.isfinite(), weights, 0.0)

    def _noised(self, parameters: dict[str, nn.Parameter], total: dict[str, Tensor]) -> dict[str, Array]:
        """The sum with its noise, also on parameters that no example reached; ``total`` is emptied."""
        sums = {name: total.pop(name, torch.zeros_like(p.data)).cpu().numpy() for name, p in parameters.items()}
        sigma = self.noise_multiplier * self.sensitivity
        return noise.add_noise(sums, sigma, noise.secret()) if sigma else sums

    def _step(
        self, parameters: dict[str, nn.Parameter], total: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        noised = self._noised(parameters, total)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(noised[name]).to(parameter.device).div_(self.expected_batch_size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _buffers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which buffers a checkpoint holds, and the state each is in."""
    saved = module.state_dict(keep_vars=True)
    return {name: (id(b), b._version) for name, b in module.named_buffers() if name in saved}
