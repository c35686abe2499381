"""What a sequence of events costs together, as ε at a δ.

By privacy-loss distributions (Koskela et al. 2020; Meiser and Mohammadi 2018) as ``dp-accounting`` composes them, from
above; never by the central limit, which under-reports. ``prv`` asks a second library that shares no code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from statistics import NormalDist
from typing import Any, Literal

from sfl.core.mechanism import Adjacency, Adversary, DpEvent, Unit
from sfl.errors import CompositionError, ConfigError, MissingExtraError

__all__ = ["Guarantee", "PrivacyAccountant", "compose_auxiliary", "guarantees", "worst_off"]

Method = Literal["pld", "prv"]
_FINEST = 1e-4  # of a grid of privacy losses
_LARGE = 100.0
_PRV_ERROR = 0.01  # absolute, in ε


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """(ε, δ), with everything that it depends on.

    Attributes:
        epsilon: ε; infinite if there is no guarantee.
        delta: δ.
        unit: Whose presence is hidden.
        adjacency: Which neighbours are indistinguishable.
        adversary: Whom it holds against.
        sampling: The assumptions on sampling, in words.
        events: How many events it is composed of.
    """

    epsilon: float
    delta: float
    unit: Unit
    adjacency: Adjacency
    adversary: Adversary
    sampling: tuple[str, ...]
    events: int


class PrivacyAccountant:
    """Composes events of one unit and one adjacency.

    Args:
        delta: δ, in (0, 1).
        method: ``"pld"`` or ``"prv"``.

    Raises:
        ConfigError: If δ or the method is none.

    Example:
        >>> accountant = PrivacyAccountant(delta=1e-5)
        >>> event = DpEvent(mechanism="gaussian", noise_multiplier=1.1, sampling_rate=256 / 6e4, unit="example",
        ...                 adjacency="add_remove", adversary="server_trusted", sampling="Poisson", count=3515)
        >>> round(accountant.epsilon([event]), 2)
        1.13
    """

    def __init__(self, *, delta: float, method: Method = "pld") -> None:
        if not 0.0 < delta < 1.0:
            raise ConfigError(f"delta must be in (0, 1), got {delta}. A common choice is below 1 / number of units.")
        if method not in ("pld", "prv"):
            raise ConfigError(f"an accountant must be pld or prv, got {method!r}.")
        self.delta, self.method = delta, method

    def epsilon(self, events: Iterable[DpEvent]) -> float:
        """ε of all ``events`` together, for the units that are worst off; 0 for none, infinite without noise.

        Raises:
            CompositionError: If they are of different units or adjacencies: those are never added.
            MissingExtraError: If the accounting library is not installed.
        """
        return self.worst(list(events))[0]

    def worst(self, events: list[DpEvent]) -> tuple[float, int]:
        """ε for the group of units that is worst off, and how many of the events concern it."""
        kinds = {(event.unit, event.adjacency) for event in events}
        if len(kinds) > 1:
            raise CompositionError(
                f"events must be of one unit and adjacency to be added up, got {sorted(kinds)}. "
                "Report them side by side."
            )
        alternatives = {frozenset(_counted(these).items()) for these in _by_group(events)}
        found = [(self._composed(Counter(dict(each))), sum(count for _, count in each)) for each in alternatives]
        return max(found)

    def _composed(self, counted: Counter[DpEvent]) -> float:
        if not counted:
            return 0.0
        if any(event.noise_multiplier <= 0.0 and event.epsilon <= 0.0 for event in counted):
            return math.inf
        if any(event.steps for event in counted):
            return _renyi(counted, self.delta)
        if self.method == "prv":
            return self._prv(counted)
        try:
            return _pld(frozenset(counted.items()), self.delta)
        except OverflowError:  # of e^ε, past 700
            return _closed_form(counted, self.delta)

    def require(self) -> None:
        """Fail now rather than after the first round.

        Raises:
            MissingExtraError: If the accounting library is not installed.
        """
        _library("dp_accounting.pld" if self.method == "pld" else "prv_accountant")

    def _prv(self, counted: Counter[DpEvent]) -> float:
        library = _library("prv_accountant")
        mechanisms = [_prv_mechanism(library, event) for event in counted]
        counts = list(counted.values())
        try:
            accountant = library.PRVAccountant(
                prvs=mechanisms, max_self_compositions=counts, eps_error=_PRV_ERROR, delta_error=self.delta / 1000
            )
            _, _, upper = accountant.compute_epsilon(delta=self.delta, num_self_compositions=counts)
        except (MemoryError, OverflowError):  # its grid is as fine for large losses as for small ones
            least = min(event.noise_multiplier for event in counted)
            raise CompositionError(f"noise must be larger to be accounted by prv, got {least:g}. Use pld.") from None
        return float(upper)


def compose_auxiliary(
    events: Sequence[DpEvent], auxiliary: Sequence[tuple[float, float]], accountant: PrivacyAccountant
) -> float:
    """ε of events together with (ε, δ) mechanisms on the same units that are none of SFL's: a query, a statistic.

    Each is composed as the worst mechanism that its (ε, δ) allows (Kairouz, Oh and Viswanath, ICML 2015), under the
    adjacency of the events; sums of ε are never taken, and what concerns another unit has no place here.

    Args:
        events: Of one unit and adjacency, at least one.
        auxiliary: (ε, δ) of each release.
        accountant: Its δ is that of the result, and covers those of ``auxiliary``.

    Raises:
        ConfigError: If there is no event, or an ε is negative or a δ outside [0, 1).

    Example:
        >>> event = DpEvent(mechanism="gaussian", noise_multiplier=4.0, sampling_rate=1.0, unit="site",
        ...                 adjacency="add_remove", adversary="server_trusted", sampling="none")
        >>> accountant = PrivacyAccountant(delta=1e-5)
        >>> alone, both = accountant.epsilon([event]), compose_auxiliary([event], [(0.5, 0.0)], accountant)
        >>> alone < both < alone + 0.5
        True
    """
    if not events:
        raise ConfigError("auxiliary costs must be composed with at least one event, got none. Charge one first.")
    for epsilon, delta in auxiliary:
        if not (epsilon >= 0.0 and math.isfinite(epsilon) and 0.0 <= delta < 1.0):
            raise ConfigError(
                f"an auxiliary cost must have epsilon of 0 or more and delta in [0, 1), got {epsilon}, {delta}."
            )
    others = [
        replace(
            events[0],
            mechanism="auxiliary",
            noise_multiplier=0.0,
            sampling_rate=1.0,
            count=1,
            epsilon=epsilon,
            delta=delta,
        )
        for epsilon, delta in auxiliary
        if epsilon > 0.0
    ]
    return accountant.epsilon([*events, *others])


@lru_cache(maxsize=256)
def _pld(counted: frozenset[tuple[DpEvent, int]], delta: float) -> float:
    """Remembered: a budget is asked, and the same is then reported."""
    losses = _library("dp_accounting.pld.privacy_loss_distribution")
    total: Any = None
    step = max(_interval(event, count) for event, count in counted)  # all must be on one grid
    for event, count in sorted(counted, key=repr):
        loss = _loss(losses, event, count, step)
        total = loss if total is None else total.compose(loss)
    return float(total.get_epsilon_for_delta(delta))


def _renyi(counted: Mapping[DpEvent, int], delta: float) -> float:
    """ε of Skellam noise, and what is composed with it, by Rényi divergences, from above.

    With Δ₂ the sensitivity in whole numbers and μ = (z Δ₂)² the variance (Agarwal, Kairouz and Liu 2021, Theorem 3.5):

        ε(α) ≤ α Δ₂² / 2μ + min( ((2α − 1) Δ₂² + 6 Δ₁) / 4μ², 3 Δ₁ / 2μ ),   Δ₁ ≤ Δ₂², as all are whole numbers.

    Raises:
        CompositionError: If there is among them what no such divergence is known of here.
    """
    orders = [*range(2, 64), *range(64, 512, 8), *range(512, 4096, 128)]
    total = [0.0] * len(orders)
    for event, count in counted.items():
        if event.noise_multiplier <= 0.0 or event.sampling_rate < 1.0:
            raise CompositionError(
                "Skellam noise must be composed with noise without sampling, got other events on the same data. "
                "Report them side by side, under another --dataset-id."
            )
        moved = 2.0 if event.adjacency == "replace_one" else 1.0
        inverse = (moved / event.noise_multiplier) ** 2  # Δ₂² / μ
        for at, order in enumerate(orders):
            total[at] += count * order * inverse / 2.0
            if event.steps:
                square = (moved * event.steps) ** 2
                total[at] += count * min(((2.0 * order - 1.0) + 6.0) * inverse**2 / (4.0 * square), 1.5 * inverse)
    epsilon, _ = _library("dp_accounting.rdp.rdp_privacy_accountant").compute_epsilon(orders, total, delta)
    return float(epsilon)


def _closed_form(counted: Mapping[DpEvent, int], delta: float) -> float:
    """ε from above where it is too large for a grid of losses: sums of what is private by itself, and of all Gaussian
    noise as one without sampling, μ²/2 + μ Φ⁻¹(1 − δ) (Balle and Wang 2018, Theorem 8, without its second term).
    """
    own = sum(event.epsilon * count for event, count in counted.items() if event.noise_multiplier <= 0.0)
    spare = delta - sum(event.delta * count for event, count in counted.items())
    moves = [
        (2.0 if event.adjacency == "replace_one" else 1.0) / event.noise_multiplier * math.sqrt(count)
        for event, count in counted.items()
        if event.noise_multiplier > 0.0
    ]
    if spare < 0.0 or (moves and spare == 0.0):
        return math.inf
    mu = math.hypot(*moves)
    return own + (mu * mu / 2.0 - mu * NormalDist().inv_cdf(spare) if moves else 0.0)


def guarantees(events: Iterable[DpEvent], accountant: PrivacyAccountant) -> list[Guarantee]:
    """One guarantee for each unit, adjacency and adversary: they stand side by side and are never summed."""
    return [_guarantee(these, accountant) for these in _by_kind(events)]


def worst_off(events: Iterable[DpEvent], accountant: PrivacyAccountant) -> list[DpEvent]:
    """For each kind of guarantee, the events of the group of units that is worst off, said of no group any more."""
    worst = [max(_by_group(these), key=accountant.epsilon) for these in _by_kind(events)]
    return [replace(event, group="") for these in worst for event in these]


def _guarantee(events: list[DpEvent], accountant: PrivacyAccountant) -> Guarantee:
    epsilon, count = accountant.worst(events)
    return Guarantee(
        epsilon=epsilon,
        delta=accountant.delta,
        unit=events[0].unit,
        adjacency=events[0].adjacency,
        adversary=events[0].adversary,
        sampling=tuple(dict.fromkeys(event.sampling for event in events)),
        events=count,
    )


def _by_kind(events: Iterable[DpEvent]) -> list[list[DpEvent]]:
    """What is of one unit, adjacency and adversary."""
    kinds: dict[tuple[Unit, Adjacency, Adversary], list[DpEvent]] = {}
    for event in events:
        kinds.setdefault((event.unit, event.adjacency, event.adversary), []).append(event)
    return list(kinds.values())


def _by_group(events: Sequence[DpEvent]) -> list[list[DpEvent]]:
    """For each group of units, what concerns it; all of it once if no event is of a group."""
    groups = sorted({event.group for event in events if event.group}) or [""]
    return [[event for event in events if event.group in ("", group)] for group in groups]


def _counted(events: Iterable[DpEvent]) -> Counter[DpEvent]:
    """Events that cost the same, together: names and words cost nothing."""
    counted = Counter[DpEvent]()
    for event in events:
        counted[replace(event, count=1, group="", sampling="", mechanism="")] += event.count
    return counted


def _scale(event: DpEvent, count: int) -> float:
    """Noise over sensitivity of what is composed: without sampling so many Gaussians are one."""
    return event.noise_multiplier / math.sqrt(count) if event.sampling_rate >= 1.0 else event.noise_multiplier


def _interval(event: DpEvent, count: int) -> float:
    """The grid of privacy losses: a two-hundredth of what one release's loss spreads, q √(exp(1/σ²) − 1).

    Losses grow as 1 / σ², so on a fixed grid little noise would take minutes to account. A coarser grid rounds further
    up (Doroshenko et al., PoPETs 2022), so that ε stays an upper bound.
    """
    if event.noise_multiplier <= 0.0:
        return _FINEST
    inverse = _scale(event, count) ** -2
    spread = event.sampling_rate * math.sqrt(math.expm1(min(inverse, _LARGE)))
    return max(_FINEST, min(spread / 200.0, 5.0 * _FINEST * max(1.0, inverse)))


def _loss(losses: Any, event: DpEvent, count: int, step: float) -> Any:
    """The privacy loss of ``count`` such events. An (ε, δ) event is dominated by randomised response (Kairouz, Oh and
    Viswanath, ICML 2015), under whichever adjacency its ε is true.
    """
    if event.noise_multiplier <= 0.0:
        parameters = _library("dp_accounting.pld.common").DifferentialPrivacyParameters(event.epsilon, event.delta)
        return losses.from_privacy_parameters(parameters, value_discretization_interval=step).self_compose(count)
    relation = getattr(
        _library("dp_accounting").NeighboringRelation,
        "ADD_OR_REMOVE_ONE" if event.adjacency == "add_remove" else "REPLACE_ONE",
    )
    if event.sampling_rate >= 1.0:  # Gaussians compose to one
        return losses.from_gaussian_mechanism(
            _scale(event, count), value_discretization_interval=step, neighboring_relation=relation
        )
    return losses.from_gaussian_mechanism(
        event.noise_multiplier,
        sampling_prob=event.sampling_rate,
        value_discretization_interval=step,
        neighboring_relation=relation,
    ).self_compose(count)


def _prv_mechanism(library: Any, event: DpEvent) -> Any:
    if event.noise_multiplier <= 0.0:
        if event.delta > 0.0:
            raise CompositionError("events of their own (ε, δ) must have δ = 0 with prv, got more. Use pld.")
        return library.PureDPMechanism(event.epsilon)
    # replace-one of a clipped sum moves it by twice the bound: the same as half the noise
    scale = event.noise_multiplier / (2.0 if event.adjacency == "replace_one" else 1.0)
    if event.sampling_rate >= 1.0:
        return library.GaussianMechanism(scale)
    if event.adjacency == "replace_one":
        raise CompositionError("sampling must be accounted under add_remove with prv, got replace_one. Use pld.")
    return library.PoissonSubsampledGaussianMechanism(sampling_probability=event.sampling_rate, noise_multiplier=scale)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtraError(name.partition(".")[0].replace("_", "-"), "privacy") from None
