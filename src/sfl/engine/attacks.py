"""What sites that lie send: pure functions of what the honest send, to test aggregation against.

The attackers of a round know every honest update, as the strongest of adversaries does, and act together. All
arithmetic is in float64; what is sent has the dtypes of the honest updates, rounded where those are whole numbers.

| name | what every attacker sends |
|---|---|
| ``sign-flip`` | −s · the honest mean, s = 1 |
| ``ipm`` | −s · the honest mean, s = 0.5: inner-product manipulation (Xie, Koyejo and Gupta, UAI 2020) |
| ``gaussian`` | the honest mean and noise of s = 10 times their spread |
| ``inf``, ``nan`` | no number |
| ``alie`` | the honest mean + s · their standard deviation, s = 1.5: A Little Is Enough (Baruch et al., NeurIPS 2019) |
| ``mimic`` | what the most unusual honest site sends (Karimireddy, He and Jaggi, ICLR 2022) |
| ``min-max``, ``min-sum`` | mean − γ · deviation with the largest γ that hides (Shejwalkar and Houmansadr, NDSS 2021) |
| ``num-examples`` | its own update, as that of s = 1e6 times as many examples |
| ``replay`` | its own update of the first round, for ever |
| ``label-flip`` | an update from data whose labels are exchanged: the site's client does it |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

from sfl.types import Array, Parameters

__all__ = ["alie", "alie_factor", "filled", "gaussian", "mimic", "min_max", "min_sum", "scaled_mean"]

Vectors = Sequence[Parameters]


def scaled_mean(honest: Vectors, scale: float = -1.0) -> Parameters:
    """``scale`` times the honest mean: −1 flips its sign, a smaller negative number manipulates inner products.

    Example:
        >>> x = [{"w": np.array(row)} for row in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0])]
        >>> scaled_mean(x)["w"].tolist()
        [-4.0, -5.0, -6.0]
    """
    return _each(honest, lambda rows: (scale * rows).mean(axis=0))


def alie_factor(sites: int, attackers: int) -> float:
    """How many standard deviations hide among ``sites``, ``attackers`` of them liars (Baruch et al. 2019).

    z_max = Φ⁻¹((n − f − s) / (n − f)) with s = ⌊n/2 + 1⌋ − f, the honest sites that would have to stand farther out;
    never negative.
    """
    honest = sites - attackers
    supporters = min(max(sites // 2 + 1 - attackers, 1), honest - 1) if honest > 1 else 0
    return max(NormalDist().inv_cdf((honest - supporters) / honest), 0.0) if supporters else 0.0


def alie(honest: Vectors, factor: float) -> Parameters:
    """Mean + ``factor`` · standard deviation of every coordinate, that of a sample (n − 1).

    Example:
        >>> x = [{"w": np.array(row)} for row in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0])]
        >>> alie(x, 1.5)["w"].tolist()
        [8.5, 9.5, 10.5]
    """
    return _each(honest, lambda rows: rows.mean(axis=0) + factor * _deviation(rows))


def gaussian(honest: Vectors, scale: float, generator: np.random.Generator) -> Parameters:
    """The honest mean and Gaussian noise of ``scale`` times the root mean square of the honest deviations."""
    spread = math.sqrt(sum(float(np.square(_deviation(rows)).sum()) for _, rows in _stacked(honest)))
    size = max(sum(value.size for value in honest[0].values()), 1)
    sigma = scale * (spread / math.sqrt(size) or 1.0)

    def noisy(rows: Array) -> Array:
        return rows.mean(axis=0) + sigma * generator.standard_normal(rows.shape[1])

    return _each(honest, noisy)


def filled(like: Parameters, value: float) -> Parameters:
    """``value`` everywhere; arrays of whole numbers, which hold no NaN, stay as they are."""
    return {name: np.full_like(array, value) if array.dtype.kind == "f" else array for name, array in like.items()}


def mimic(honest: Vectors) -> int:
    """Which honest site to copy: that with the largest part along the direction in which the honest differ most.

    The direction is the first principal one of this round's updates; the paper follows it over the rounds.
    """
    count = len(honest)
    products = np.zeros((count, count))
    for _, rows in _stacked(honest):
        centred = rows - rows.mean(axis=0)
        products += centred @ centred.T
    return int(np.abs(np.linalg.eigh(products)[1][:, -1]).argmax())


def min_max(honest: Vectors) -> Parameters:
    """μ − γσ, γ as large as can be with no honest update farther away than the farthest two honest ones are from each
    other (Shejwalkar and Houmansadr, NDSS 2021, with their inverse standard deviation).

    ‖μ − γσ − xᵢ‖² is a parabola in γ, so γ is exact: the least of the sites' larger roots.
    """
    away, along, length, pairs = _geometry(honest)
    bound = float(pairs.max())
    if length == 0.0:
        return scaled_mean(honest, 1.0)
    gamma = float(((along + np.sqrt(np.maximum(along**2 + length * (bound - away), 0.0))) / length).min())
    return _each(honest, lambda rows: rows.mean(axis=0) - gamma * _deviation(rows))


def min_sum(honest: Vectors) -> Parameters:
    """μ − γσ, γ as large as can be with a sum of squared distances to the honest updates no larger than that of any of
    them (the same).

    The sum is Σ‖μ − xᵢ‖² + nγ²‖σ‖², so γ is a square root.
    """
    away, _, length, pairs = _geometry(honest)
    if length == 0.0:
        return scaled_mean(honest, 1.0)
    room = max(float(pairs.sum(axis=1).max()) - float(away.sum()), 0.0)
    gamma = math.sqrt(room / (len(honest) * length))
    return _each(honest, lambda rows: rows.mean(axis=0) - gamma * _deviation(rows))


def _geometry(honest: Vectors) -> tuple[Array, Array, float, Array]:
    """‖μ − xᵢ‖², ⟨σ, μ − xᵢ⟩, ‖σ‖², and all pairs' squared distances."""
    count = len(honest)
    products, along, length = np.zeros((count, count)), np.zeros(count), 0.0
    for _, rows in _stacked(honest):
        deviation = _deviation(rows)
        centred = rows - rows.mean(axis=0)
        products += centred @ centred.T
        along -= centred @ deviation
        length += float(deviation @ deviation)
    away = products.diagonal()
    return away, along, length, np.maximum(away[:, None] + away - 2.0 * products, 0.0)


def _deviation(rows: Array) -> Array:
    return rows.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])


def _stacked(vectors: Vectors) -> Iterator[tuple[str, Array]]:
    """Every array of the vectors, shape (vectors, elements), in float64; zero where one lacks it."""
    names = dict.fromkeys(name for vector in vectors for name in vector)
    for name in names:
        like = next(vector[name] for vector in vectors if name in vector)
        rows = [np.asarray(vector.get(name, np.zeros_like(like)), np.float64).reshape(-1) for vector in vectors]
        yield name, np.stack(rows)


def _each(vectors: Vectors, rule: Callable[[Array], Array]) -> Parameters:
    out: Parameters = {}
    for name, rows in _stacked(vectors):
        like = next(vector[name] for vector in vectors if name in vector)
        out[name] = _as(rule(rows).reshape(like.shape), like)
    return out


def _as(value: Array, like: Array) -> Array:
    if like.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a lie that is no number in this dtype is inf
            return np.asarray(value, like.dtype)
    if like.dtype.kind == "b":
        return np.asarray(value >= 0.5)
    limits = np.iinfo(like.dtype)
    return np.asarray(np.clip(np.rint(value), limits.min, limits.max), like.dtype)
