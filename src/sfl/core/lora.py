"""LoRA's pairs of factors, found by ``peft``'s names, and what a site of a lower rank holds of them.

A pair adds B·A to a frozen weight (Hu et al., ICLR 2022). One factor, here the *frame*, begins at random, the other,
here the *grown* one, at zero: A and B of a linear or convolutional layer, but B and A of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sfl.errors import ConfigError
from sfl.types import Array, Parameters

__all__ = ["Pair", "frames", "pairs", "restored", "restricted", "rows", "unrolled"]

_KINDS = (("lora_A", "lora_B", 0), ("lora_embedding_B", "lora_embedding_A", 1))


@dataclass(frozen=True, slots=True)
class Pair:
    """The names of two factors whose product is one change of a weight.

    Attributes:
        frame: The factor that begins at random: ``lora_A``, or ``lora_embedding_B``.
        grown: The factor that begins at zero: ``lora_B``, or ``lora_embedding_A``.
        frame_axis: The axis of the frame that counts the rank, 0 or 1; the grown factor's is the other.
        rank: r.
    """

    frame: str
    grown: str
    frame_axis: int
    rank: int

    def axis(self, name: str) -> int:
        """The axis of one of the two that counts the rank."""
        return self.frame_axis if name == self.frame else 1 - self.frame_axis


def pairs(parameters: Mapping[str, Array]) -> list[Pair]:
    """The pairs of a model, in its order.

    Two arrays are a pair if their dotted names differ in ``lora_A`` and ``lora_B``, or ``lora_embedding_A`` and
    ``lora_embedding_B``, alone. All else (biases, heads, an A whose B is not there) is in none.

    Args:
        parameters: By name; A of shape (r, in, …) and B of shape (out, r, …).

    Raises:
        ConfigError: If the two factors of a pair are of different ranks.

    Example:
        >>> a, b = np.ones((2, 5)), np.zeros((3, 2))
        >>> [pair.rank for pair in pairs({"h.lora_A.weight": a, "h.lora_B.weight": b, "head.weight": a})]
        [2]
    """
    found: list[Pair] = []
    for name, value in parameters.items():
        parts = name.split(".")
        for frame, grown, axis in _KINDS:
            partner = ".".join(grown if part == frame else part for part in parts)
            if partner == name or partner not in parameters:
                continue
            other = parameters[partner]
            if min(value.ndim, other.ndim) < 2 or value.shape[axis] != other.shape[1 - axis]:
                raise ConfigError(
                    f"the factors {name!r} and {partner!r} must be of one rank, got shapes {value.shape} and "
                    f"{other.shape}. Look at how the adapters were made."
                )
            found.append(Pair(name, partner, axis, value.shape[axis]))
    return found


def frames(parameters: Mapping[str, Array]) -> tuple[str, ...]:
    """The names of the factors that ``freeze-a`` keeps as they began: for ``FreezeLayers``.

    It is B for an embedding, whose A begins at zero: with that frozen, nothing would be learned.

    Raises:
        ConfigError: If the model has no pair.
    """
    names = tuple(pair.frame for pair in pairs(parameters))
    if not names:
        raise ConfigError(f"a model must have pairs lora_A and lora_B, got {list(parameters)[:3]}. Add adapters to it.")
    return names


def rows(value: Array, axis: int) -> Array:
    """A factor as float64 of shape (r, everything else), its rank first."""
    return np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1).astype(np.float64)


def unrolled(flat: Array, like: Array, axis: int) -> Array:
    """The inverse of ``rows``: of ``like``'s shape."""
    first = np.moveaxis(like, axis, 0).shape
    return np.moveaxis(flat.reshape(first), 0, axis)


def restricted(parameters: Mapping[str, Array], rank: int) -> Parameters:
    """What a site of this rank has of the global factors: the first ``rank`` rows of A and columns of B; zero beyond.

    A row of A and a column of B that are both zero get no gradient, so that a site which trains what it is given trains
    a model of its rank. Where the directions are ordered, largest first, as after ``LoraProductMean``, this is the best
    approximation of its rank (Eckart and Young 1936).

    Args:
        parameters: The global ones; not written to.
        rank: The site's; at or above that of a pair, the pair is as it was.

    Returns:
        The same names and shapes; arrays that are not cut are the very same.

    Raises:
        ConfigError: If ``rank`` is below 1.
    """
    return _joined(parameters, None, rank)


def restored(trained: Mapping[str, Array], received: Mapping[str, Array], rank: int) -> Parameters:
    """What a site of this rank returns, with the directions that it did not have as it received them.

    They are no part of its update then: neither a clip nor noise is spent on them, and the global model's directions
    beyond the smallest rank do not shrink in every round. Without it (zeros are returned) the site says that its
    product has none of them, as in zero padding.

    Args:
        trained: What was trained from ``restricted(received, rank)``.
        received: The global parameters.
        rank: The site's.

    Raises:
        ConfigError: If ``rank`` is below 1.
    """
    return _joined(trained, received, rank)


def _joined(head: Mapping[str, Array], tail: Mapping[str, Array] | None, rank: int) -> Parameters:
    if isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"a site's rank must be at least 1, got {rank!r}.")
    joined = dict(head)
    for pair in pairs(head):
        for name in (pair.frame, pair.grown) if rank < pair.rank else ():
            value = np.array(head[name])
            beyond = (slice(None),) * pair.axis(name) + (slice(rank, None),)
            value[beyond] = 0 if tail is None else tail[name][beyond]
            joined[name] = value
    return joined
