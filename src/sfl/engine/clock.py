"""Simulated time: how long sites take, and when they are there. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sfl.errors import ConfigError

__all__ = ["SiteProfile", "VirtualClock"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteProfile:
    """What simulated time knows of one site.

    Attributes:
        seconds: Of a training task.
        bandwidth: Bytes per second, each way.
        period: Seconds after which its pattern of presence repeats; 0 is always there.
        online: Share of a period in which it is there.
        offset: Seconds by which its periods began before the run.
    """

    seconds: float
    bandwidth: float = math.inf
    period: float = 0.0
    online: float = 1.0
    offset: float = 0.0

    def is_online(self, time: float) -> bool:
        """Whether it is there."""
        return self.period == 0.0 or (time + self.offset) % self.period < self.online * self.period

    def next_online(self, time: float) -> float:
        """The first moment from ``time`` on at which it is there."""
        if self.is_online(time):
            return time
        return time + self.period - (time + self.offset) % self.period


@dataclass(frozen=True, kw_only=True)
class VirtualClock:
    """Sites that differ in speed, bandwidth and presence, drawn once for a run from its seed.

    A site's seconds are ``site_seconds`` times exp(``site_spread`` · z), with z a standard normal draw: the median site
    takes ``site_seconds``. Bandwidth alike. Each site's period begins at a moment of its own.

    Attributes:
        site_seconds: Simulated seconds that a training task takes the median site; 0 leaves time as it is.
        site_spread: How much sites differ in speed: standard deviation of the logarithm; 0.5 makes the slowest of
            twenty about six times as slow as the fastest.
        site_bandwidth: Simulated bytes per second to and from the median site; 0 takes no time.
        bandwidth_spread: How much sites differ in bandwidth.
        site_period: Simulated seconds after which a site's presence repeats, such as a day; 0 is always there.
        site_online: Share of each period in which a site is there.
    """

    site_seconds: float = 0.0
    site_spread: float = 0.0
    site_bandwidth: float = 0.0
    bandwidth_spread: float = 0.0
    site_period: float = 0.0
    site_online: float = 1.0

    def __post_init__(self) -> None:
        for name in ("site_seconds", "site_spread", "site_bandwidth", "bandwidth_spread", "site_period"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"{name} must be 0 or more, got {value}.")
        if not 0.0 < self.site_online <= 1.0:
            raise ConfigError(f"site_online must be in (0, 1], got {self.site_online}.")
        differ = self.site_spread or self.site_bandwidth or self.bandwidth_spread or self.site_period
        if not self.is_on and (differ or self.site_online != 1.0):
            raise ConfigError("site_seconds must be positive where sites differ in time, got 0.")

    @property
    def is_on(self) -> bool:
        """Whether time is simulated."""
        return self.site_seconds > 0.0

    def profiles(self, names: Sequence[str], seed: int) -> dict[str, SiteProfile]:
        """One for each site; the same for the same seed."""
        return {name: self._profile(name, seed) for name in names}

    def _profile(self, name: str, seed: int) -> SiteProfile:
        from sfl.core import rng

        draw = rng.public(seed, 0, "virtual-clock", name)
        speed, width, start = draw.normal(), draw.normal(), draw.random()
        bandwidth = self.site_bandwidth * math.exp(self.bandwidth_spread * width)
        return SiteProfile(
            seconds=self.site_seconds * math.exp(self.site_spread * speed),
            bandwidth=bandwidth if self.site_bandwidth > 0.0 else math.inf,
            period=self.site_period,
            online=self.site_online,
            offset=start * self.site_period,
        )
