"""What each example adds to a parameter's gradient, kept as factors: norms and weighted sums without the gradients.

A linear layer's gradient for example i is Σ_t l_it r_itᵀ over positions t, with l the gradients of its outputs and r
its inputs. Norms follow from Gram matrices, ‖Σ_t l_t r_tᵀ‖² = Σ_ts (l_t·l_s)(r_t·r_s) (Goodfellow 2015; Li, Tramèr,
Liang and Hashimoto, ICLR 2022, §4), and so do the cross terms of a parameter that is used more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Dense", "Outer", "Rows", "Use", "add_sum", "compact", "squared_norms", "without"]

_BLOCK = 1 << 23  # entries of a Gram matrix that are held at once
_CANCELLED = 2.0**-12
"""Below this share of what the positions could add up to, a Gram sum in float32 has lost too many digits to
cancellation (its relative error grows as the share's inverse), and the gradient itself is summed."""


@dataclass(frozen=True, slots=True, eq=False)
class Outer:
    """Σ_t left_t right_tᵀ: ``left`` of shape (examples, positions, m), ``right`` (examples, positions, n)."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """``right_t`` added to row ``ids_t``: ``ids`` (examples, positions), ``right`` (examples, positions, n)."""

    ids: Tensor
    right: Tensor
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """The gradients themselves: ``values`` of shape (examples, …)."""

    values: Tensor


Use: TypeAlias = Outer | Rows | Dense


def compact(use: Use) -> Use:
    """The gradients themselves where they are no larger than their factors; their norms are then cheaper, too."""
    if isinstance(use, Outer):
        (positions, m), n = use.left.shape[1:], use.right.shape[2]
        return Dense(use.left.mT @ use.right) if m * n <= positions * (m + n) else use
    if isinstance(use, Rows) and use.count <= use.ids.shape[1]:
        return Dense(_gradients(use))
    return use


def squared_norms(uses: Sequence[Use]) -> Tensor:
    """‖g_i‖² of one parameter, g_i the sum over all its uses, shape (examples,).

    Cross terms count: a weight that is both embedding and head has the norm of the *sum* of both gradients.

    Edge cases: no position gives 0; an example that holds NaN or inf gives NaN or inf, and leaves the others alone.
    """
    squares, reaches = zip(*map(_square, uses), strict=True)
    total = torch.stack(squares).sum(0)
    for one, other in combinations(uses, 2):
        total = total + 2.0 * _dot(one, other)
    reach = torch.stack(reaches).sqrt().sum(0).square()
    for index in torch.nonzero(total < _CANCELLED * reach).flatten().tolist():
        gradient = sum(_gradients(_only(use, index)) for use in uses)
        total[index] = torch.as_tensor(gradient).square().sum()
    return total


def add_sum(use: Use, out: Tensor, weights: Tensor | None) -> None:
    """Add Σ_i w_i g_i to ``out``, of the parameter's shape; ``weights`` of shape (examples,), all 1 if ``None``."""
    if isinstance(use, Dense):
        flat = use.values.flatten(1)
        out += (flat.sum(0) if weights is None else weights @ flat).view(out.shape)
        return
    left, right = use.ids if isinstance(use, Rows) else use.left, use.right
    if weights is not None:
        right = right * weights[:, None, None]
    if isinstance(use, Rows):
        out.index_add_(0, left.flatten(), right.flatten(0, 1))
    else:
        out.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))


def without(use: Use, bad: Tensor) -> Use:
    """Zeros for the examples that are ``bad``, whatever they held; bool, shape (examples,)."""

    def clear(values: Tensor) -> Tensor:
        return values.masked_fill(bad.view(-1, *[1] * (values.ndim - 1)), 0.0)

    if isinstance(use, Outer):
        return Outer(clear(use.left), clear(use.right))
    if isinstance(use, Rows):
        return Rows(use.ids, clear(use.right), use.count)
    return Dense(clear(use.values))


def _square(use: Use) -> tuple[Tensor, Tensor]:
    """‖g_i‖², and what it could have been without cancellation."""
    if isinstance(use, Outer):
        return _gram(use)
    values = _summed_rows(use) if isinstance(use, Rows) else use.values.flatten(1).square().sum(1)
    return values, values


def _gram(use: Outer) -> tuple[Tensor, Tensor]:
    step = max(1, _BLOCK // max(use.left.shape[1] ** 2, 1))
    squares, reaches = [], []
    for left, right in zip(use.left.split(step), use.right.split(step), strict=True):
        gram = (left @ left.mT).mul_(right @ right.mT)
        squares.append(gram.sum((1, 2)))
        reaches.append(gram.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt().sum(1).square())
    return torch.cat(squares), torch.cat(reaches)


def _summed_rows(use: Rows) -> Tensor:
    """Of each example, rows of equal id first become one."""
    examples, _, width = use.right.shape
    owner = torch.arange(examples, device=use.ids.device)
    keys, place = torch.unique(use.ids + owner[:, None] * use.count, return_inverse=True)
    rows = use.right.new_zeros(len(keys), width).index_add_(0, place.flatten(), use.right.reshape(-1, width))
    return use.right.new_zeros(examples).index_add_(0, keys // use.count, rows.square().sum(1))


def _dot(one: Use, other: Use) -> Tensor:
    """⟨g_i, h_i⟩ of two uses of one parameter, shape (examples,)."""
    if isinstance(one, Dense) and isinstance(other, Dense):
        return (one.values * other.values).flatten(1).sum(1)
    if isinstance(other, Dense):
        return _dot(other, one)
    if isinstance(one, Dense):
        there = _picked(one.values, other.ids) if isinstance(other, Rows) else other.left @ one.values
        return (there * other.right).sum((1, 2))
    products = one.right @ other.right.mT
    return (products * _overlap(one, other)).sum((1, 2))


def _overlap(one: Outer | Rows, other: Outer | Rows) -> Tensor:
    """Products of the left factors, a row's being one-hot; (examples, positions of one, positions of other)."""
    if isinstance(one, Rows):
        if isinstance(other, Rows):
            return one.ids[:, :, None] == other.ids[:, None, :]
        return _overlap(other, one).mT
    if isinstance(other, Rows):
        return one.left.gather(2, other.ids[:, None, :].expand(-1, one.left.shape[1], -1))
    return one.left @ other.left.mT


def _picked(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(1, ids[:, :, None].expand(-1, -1, values.shape[2]))


def _only(use: Use, index: int) -> Use:
    at = slice(index, index + 1)
    if isinstance(use, Outer):
        return Outer(use.left[at], use.right[at])
    if isinstance(use, Rows):
        return Rows(use.ids[at], use.right[at], use.count)
    return Dense(use.values[at])


def _gradients(use: Use) -> Tensor:
    if isinstance(use, Dense):
        return use.values
    if isinstance(use, Outer):
        return use.left.mT @ use.right
    examples, _, width = use.right.shape
    out = use.right.new_zeros(examples, use.count, width)
    return out.scatter_add_(1, use.ids[:, :, None].expand(-1, -1, width), use.right)
