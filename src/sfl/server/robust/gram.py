"""Distances between all pairs of updates, in two products a coordinate and a block's memory.

‖xᵢ − xⱼ‖² = Gᵢᵢ + Gⱼⱼ − 2Gᵢⱼ with G the inner products of the updates less a common centre. Blocks are turned into
float64, centred and multiplied there, so the sum over coordinates is in float64 throughout. Where the two terms of a
pair cancel (both lie far from the centre and near each other, as honest updates do when the centre is an outlier) the
pair is measured again about one of the two, which cannot cancel.
"""

from __future__ import annotations

import numpy as np

from sfl.privacy.noise import secret
from sfl.server.robust.stack import Stack
from sfl.types import Array, Parameters

__all__ = ["distances_between", "gram", "squared_distances"]

_LOST = 1e-7  # a pair of less than this share of its terms has lost seven of float64's sixteen digits


def gram(stack: Stack, about: int | Parameters) -> Array:
    """Inner products of the rows less a centre, shape (sites, sites).

    Args:
        stack: The updates.
        about: The centre: one of the rows, or arrays (a name that they lack is zero).
    """
    total = np.zeros((len(stack), len(stack)))
    if isinstance(about, int):
        about = stack.updates[about].delta
    at = stack.aligned(about)
    with np.errstate(over="ignore", invalid="ignore"):  # past 1e154 a square is inf, which callers look for
        for name, place, block in stack.blocks():
            block -= np.asarray(at(name, place), np.float64)  # once, not once a row
            total += block @ block.T
    return total


def squared_distances(stack: Stack) -> Array:
    """‖xᵢ − xⱼ‖² for all pairs, shape (sites, sites): symmetric, zero on the diagonal, never negative or NaN.

    Two updates so far apart that the square has no float64 are at distance inf.
    """
    count = len(stack)
    found = np.zeros((count, count))
    unknown = ~np.eye(count, dtype=bool)
    while unknown.any():
        centre = int(unknown.sum(axis=0).argmax())
        members = np.flatnonzero(unknown[centre] | (np.arange(count) == centre))
        distances, sure = _about(stack.subset(members.tolist()), int(np.searchsorted(members, centre)))
        here = np.ix_(members, members)
        found[here] = np.where(unknown[here] & sure, distances, found[here])
        unknown[here] &= ~sure
    return found


def _about(stack: Stack, centre: int) -> tuple[Array, Array]:
    """Squared distances by way of one row, and which of them are sure."""
    products = gram(stack, centre)
    norms = products.diagonal()
    with np.errstate(over="ignore", invalid="ignore"):
        terms = norms[:, None] + norms
        distances = np.maximum(terms - 2.0 * products, 0.0)
        sure = np.isfinite(terms) & (distances >= _LOST * terms)
    distances[centre], distances[:, centre] = norms, norms
    sure[centre], sure[:, centre] = True, True
    return distances, sure


def distances_between(stack: Stack, projection: int | None) -> Array:
    """``squared_distances``, of the updates or of their random projection to so many coordinates.

    The projection (Charikar, Chen and Farach-Colton 2002) adds every coordinate, with a random sign, to one of
    ``projection`` random places: distances are right on average and err by a factor of about 1 ± √(2/projection). It
    is drawn now, with the updates in, from a cryptographic source: who knew it could hide in what it drops.
    """
    return squared_distances(stack if projection is None else _projected(stack, projection))


def _projected(stack: Stack, size: int) -> Stack:
    source = secret()
    rows = np.zeros((len(stack), size))
    for _, _, block in stack.blocks():
        places = source.integers(0, size, block.shape[1])
        block *= 2.0 * source.integers(0, 2, block.shape[1]) - 1.0
        for total, row in zip(rows, block, strict=True):
            total += np.bincount(places, weights=row, minlength=size)
    return Stack.of(
        type(update)(update.site, {"projection": row}, 1.0) for update, row in zip(stack.updates, rows, strict=True)
    )
