"""Gradients of single examples, from one forward pass of a whole batch: hooks see every use of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sfl.errors import ModelError
from sfl.train.factors import Use, add_sum, compact, squared_norms, without
from sfl.train.rules import Rule, refuse_mixing, rules_of

__all__ = ["Recorder", "recording", "trained_parameters"]

Rules: TypeAlias = list[tuple[str, Rule]]
_checked: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
_TOLERANCE = 1e-2  # of a gradient's norm; what is missed or mixed is missed whole
_NEVER_USED = "transformers.models.esm.modeling_esm.EsmContactPredictionHead"


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once; without those of ESM's ``contact_head``, which no loss reaches.

    All of them are noised, used or not: which are used may depend on the data.

    Raises:
        ModelError: If there are none.
    """
    unused = {
        id(parameter)
        for layer in module.modules()
        if f"{type(layer).__module__}.{type(layer).__qualname__}" == _NEVER_USED
        for parameter in layer.parameters()
    }
    found = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in unused}
    if not found:
        raise ModelError("a model must have trainable parameters, got none. Unfreeze some.")
    return found


@dataclass(slots=True, eq=False)
class _Call:
    """One pass through a layer: its input, kept until the gradient of its output is there."""

    layer: nn.Module
    path: str
    rules: Rules
    x: Tensor | None
    version: int


@contextmanager
def recording(module: nn.Module) -> Generator[Recorder]:
    """Hooks on every layer whose parameters are trained; autograd itself computes no gradient of a parameter meanwhile.

    Raises:
        ModelError: If a layer has no rule, or mixes examples.
    """
    parameters = trained_parameters(module)
    recorder = Recorder(module, parameters)
    try:
        recorder.attach()
        recorder.freeze(True)
        yield recorder
    finally:
        recorder.freeze(False)
        recorder.detach()


class Recorder:
    """Norms and weighted sums of the examples' gradients; made by ``recording``.

    First ``forward``, then ``norms``, then ``weighted_sum``.

    Args:
        module: The model.
        parameters: Its trained parameters by name.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.module, self.parameters = module, parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._handles: list[RemovableHandle] = []
        self._losses = torch.empty(0)
        self._reset(0)

    def _reset(self, size: int) -> None:
        self._size, self._open, self._last, self._kept = size, False, False, False
        self._roots: list[Tensor] = []
        self._expected: dict[str, int] = {}
        self._uses: dict[str, list[Use]] = {}
        self._arrived: Callable[[str, Use], None] | None = None

    def freeze(self, frozen: bool) -> None:
        """Whether autograd itself leaves the parameters alone."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(not frozen)

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def attach(self) -> None:
        """Put the hooks on."""
        for path, layer in self.module.named_modules():
            refuse_mixing(layer, path)
            own = {
                name: self._names[id(parameter)]
                for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in self._names
            }
            if not own:
                continue
            known = rules_of(layer, path)
            lacking = sorted(own.keys() - known.keys())
            if lacking:
                raise ModelError(f"parameters must have a rule, got none for {lacking} of {path!r}. Freeze them.")
            if isinstance(layer, nn.Embedding):
                self._handles.append(layer.register_forward_pre_hook(self._spread))
            hook = self._hook(path, [(own[name], known[name]) for name in own])
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def _spread(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG002 - torch's
        """Ids that all examples share, such as positions, become each example's own."""
        if args and args[0].ndim >= 2 and args[0].shape[0] == 1 < self._size:
            return (args[0].expand(self._size, *args[0].shape[1:]), *args[1:])
        return None

    def _hook(self, path: str, rules: Rules) -> Callable[..., Tensor]:
        def passed(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not self._open:
                raise ModelError(f"layers must run forward only, got {path!r} again. Turn gradient checkpointing off.")
            x = args[0] if args else next(iter(kwargs.values()))
            if not output.requires_grad:
                root = output.detach().requires_grad_(True)
                self._roots.append(root)
                output = root.clone()
            for name, _ in rules:
                self._expected[name] = self._expected.get(name, 0) + 1
            call = _Call(layer, path, rules, x.detach(), x._version)
            output.register_hook(partial(self._receive, call))
            return output

        return passed

    def _receive(self, call: _Call, gradient: Tensor) -> None:
        x, arrived = call.x, self._arrived
        if x is None or arrived is None:
            return
        if x._version != call.version:
            raise ModelError(f"the input of {call.path!r} must stay as it is, got one changed in place. Copy it first.")
        if len(x) != self._size or len(gradient) != self._size:
            raise ModelError(
                f"the input of {call.path!r} must have the {self._size} examples as its first dimension, got shape "
                f"{tuple(x.shape)}. Keep the examples apart."
            )
        if self._last:
            call.x = None
        for name, rule in call.rules:
            arrived(name, rule(call.layer, x, gradient))

    def forward(self, losses: Callable[[], Tensor], size: int) -> Tensor:
        """Run the model once.

        Args:
            losses: The forward pass; gives each example's loss, shape (examples,).
            size: How many examples.

        Raises:
            ModelError: If the losses have another shape, or depend on no trained parameter.
        """
        self._reset(size)
        self._open = True
        result = losses()
        self._open = False
        if result.shape != (size,):
            raise ModelError(f"losses must have shape ({size},), one for each example, got {tuple(result.shape)}.")
        if not result.requires_grad:
            raise ModelError("losses must depend on a trained parameter, got none that do. Unfreeze some.")
        self._losses = result
        return result

    def norms(self, *, keep: bool) -> Tensor:
        """The L2 norm of each example's gradient over all parameters, shape (examples,).

        Args:
            keep: Keep the factors for ``weighted_sum``; otherwise it goes through the model backward again, and no
                more than one parameter's are held at a time.
        """
        squares: list[Tensor] = [torch.zeros_like(self._losses.detach())]
        open_: dict[str, list[Use]] = {}

        def arrived(name: str, use: Use) -> None:
            uses = open_.setdefault(name, [])
            uses.append(compact(use))
            if keep:
                self._uses[name] = uses
            if len(uses) == self._expected[name]:
                squares.append(squared_norms(open_.pop(name)))

        self._arrived, self._last, self._kept = arrived, keep, keep
        self._backward(torch.ones_like(self._losses), again=not keep)
        squares += [squared_norms(uses) for uses in open_.values()]  # another use of theirs reaches no loss
        return torch.stack(squares).sum(0).sqrt()

    def weighted_sum(self, weights: Tensor, total: dict[str, Tensor]) -> None:
        """Add Σ_i w_i g_i by parameter; an example of weight 0 adds nothing, whatever its gradient holds.

        Args:
            weights: w, shape (examples,).
            total: Sums so far; a parameter that is not there yet is put there once its activations can be let go.
        """
        absent = weights == 0.0
        clean: Callable[[Use], Use] = (lambda use: without(use, absent)) if absent.any() else (lambda use: use)
        if not self._kept:

            def arrived(name: str, use: Use) -> None:
                add_sum(clean(use), self._sum(total, name), None)

            self._arrived, self._last = arrived, True
            self._backward(weights, again=False)
        while self._uses:
            name, uses = self._uses.popitem()
            for use in uses:
                add_sum(clean(use), self._sum(total, name), weights)

    def check(self, losses: Callable[[], Tensor], size: int) -> None:
        """Once for a model: one example's loss must reach its own rows alone, and every parameter through its layers.

        Args:
            losses: As for ``forward``; torch's random state is left as it was.
            size: How many examples; nothing is checked below two.

        Raises:
            ModelError: If examples are mixed, or a parameter is used past its layer.
        """
        names = frozenset(self.parameters)
        if size < 2 or _checked.get(self.module) == names:
            return
        self.freeze(False)
        try:
            with torch.random.fork_rng():
                result = self.forward(losses, size)
            self._compare(result)
        finally:
            self.freeze(True)
            self._reset(0)
        _checked[self.module] = names

    def _compare(self, result: Tensor) -> None:
        index, out = int(result.argmax()), dict[str, Tensor]()

        def arrived(name: str, use: Use) -> None:
            others = squared_norms([compact(use)])
            others[index] = 0.0
            if (others > 0.0).any():
                raise ModelError(
                    f"examples must be apart, got the loss of one that depends on another by {name!r}. Normalise and "
                    "average within examples, and give each its own row in every layer."
                )
            add_sum(use, self._sum(out, name), None)

        self._arrived, self._last = arrived, True
        found = torch.autograd.grad(result[index], list(self.parameters.values()), allow_unused=True)
        gradients = cast("Sequence[Tensor | None]", found)
        for name, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None and (self._sum(out, name) - gradient).norm() > _TOLERANCE * gradient.norm():
                raise ModelError(f"{name!r} must be used through its own layer, got a use past it. Freeze it.")

    def _sum(self, total: dict[str, Tensor], name: str) -> Tensor:
        if name not in total:
            total[name] = torch.zeros_like(self.parameters[name].data)
        return total[name]

    def _backward(self, weights: Tensor, *, again: bool) -> None:
        torch.autograd.grad(self._losses, self._roots, weights, retain_graph=again, allow_unused=True)
