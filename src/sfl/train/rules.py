"""For each kind of layer, how its parameters' gradients follow from its input and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sfl.errors import ModelError
from sfl.train.factors import Dense, Outer, Rows, Use

__all__ = ["Rule", "add_rules", "rules_of"]

Rule: TypeAlias = Callable[[Any, Tensor, Tensor], Use]
"""Of a layer, its input and the gradient of its output, both with the examples first."""


def add_rules(kind: type[nn.Module], **rules: Rule) -> None:
    """Teach a layer of one's own: a rule for each parameter that it holds itself, by name.

    Args:
        kind: The layer's class. A subclass with a ``forward`` of its own needs rules of its own.
        rules: What each parameter's gradients are, for each example.
    """
    _RULES[_name(kind)] = dict(rules)


def rules_of(layer: nn.Module, path: str) -> Mapping[str, Rule]:
    """The rules of a layer that holds parameters.

    Args:
        layer: The layer.
        path: Its name in the model, for the error.

    Raises:
        ModelError: If there are none for its kind, or if it mixes examples.
    """
    refuse_mixing(layer, path)
    for kind in type(layer).__mro__:
        rules = _RULES.get(_name(kind))
        if rules is not None and type(layer).forward is kind.forward:
            return rules
    raise ModelError(
        f"a layer with trainable parameters must be of a kind whose example gradients are known, got "
        f"{_name(type(layer))} at {path or 'the top'!r}. Freeze its parameters, or teach it with "
        "sfl.train.rules.add_rules."
    )


def refuse_mixing(layer: nn.Module, path: str) -> None:
    """Refuse a layer by which one example changes what others give.

    Raises:
        ModelError: If it is one.
    """
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage] # the common base
        raise ModelError(
            f"no layer may mix examples under DP-SGD, got {type(layer).__name__} at {path!r}. "
            "Use LayerNorm or GroupNorm there."
        )
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        raise ModelError(
            "no layer may mix examples under DP-SGD, got an Embedding with max_norm or scale_grad_by_freq at "
            f"{path!r}. Turn both off."
        )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _positions(values: Tensor) -> Tensor:
    """(examples, positions, features)."""
    return values.reshape(len(values), -1, values.shape[-1])


def _linear(_: nn.Module, x: Tensor, gradient: Tensor) -> Use:
    return Outer(_positions(gradient), _positions(x))


def _conv1d(_: nn.Module, x: Tensor, gradient: Tensor) -> Use:
    return Outer(_positions(x), _positions(gradient))


def _sum(_: nn.Module, x: Tensor, gradient: Tensor) -> Use:  # noqa: ARG001 - a rule's signature
    return Dense(_positions(gradient).sum(1))


def _embedding(layer: nn.Embedding, ids: Tensor, gradient: Tensor) -> Use:
    rows = ids.reshape(len(ids), -1)
    gradient = _positions(gradient)
    if layer.padding_idx is not None:
        gradient = gradient.masked_fill((rows == layer.padding_idx)[:, :, None], 0.0)
    return Rows(rows, gradient, layer.num_embeddings)


def _norm_weight(layer: nn.LayerNorm, x: Tensor, gradient: Tensor) -> Use:
    normal = nn.functional.layer_norm(x.to(gradient.dtype), layer.normalized_shape, eps=layer.eps)
    return Dense(_over(layer, normal * gradient))


def _norm_bias(layer: nn.LayerNorm, x: Tensor, gradient: Tensor) -> Use:  # noqa: ARG001 - a rule's signature
    return Dense(_over(layer, gradient))


def _rms_weight(layer: Any, x: Tensor, gradient: Tensor) -> Use:
    """Of w · x / sqrt(mean(x²) + ε) (Zhang and Sennrich, NeurIPS 2019), over the last axis."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)
    return Dense((normal * gradient).reshape(len(x), -1, layer.weight.numel()).sum(1).to(gradient.dtype))


def _over(layer: nn.LayerNorm, values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, *layer.normalized_shape).sum(1)


_RULES: dict[str, dict[str, Rule]] = {
    _name(nn.Linear): {"weight": _linear, "bias": _sum},
    _name(nn.Embedding): {"weight": _embedding},
    _name(nn.LayerNorm): {"weight": _norm_weight, "bias": _norm_bias},
    "transformers.pytorch_utils.Conv1D": {"weight": _conv1d, "bias": _sum},
    **{
        f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}RMSNorm": {"weight": _rms_weight}
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")  # their forward passes are the same
    },
    "transformers.models.esm.modeling_esm.EsmLMHead": {"bias": _sum},  # added to the decoder's output, last of all
}
