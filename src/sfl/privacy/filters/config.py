"""What a runner can be told about filters; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.errors import ConfigError

__all__ = ["FilterConfig"]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which part of an update leaves a site.

    Attributes:
        percentile_privacy: Keep home this percentage of an update's coordinates, those of smallest size; a filter, no
            guarantee.
        percentile_epsilon: Choose and noise the coordinates privately, at this ε for each update: the sound variant.
        percentile_fixed_k: Send a fixed number of coordinates, whatever their sizes.
        percentile_gamma: Clamp coordinates to this size; 0.01 with percentile_epsilon if left out.
        svt_privacy: Send only coordinates that the sparse vector technique finds above a threshold.
        svt_epsilon: Its ε for each update, search and values together.
        svt_count: Coordinates after which it stops.
        svt_threshold: The threshold, in the units of the parameters.
        svt_gamma: Clamp coordinates to this size.
        compress: Share of an update's coordinates that is sent.
        compress_topk: Send the largest; the default.
        compress_random: Send coordinates drawn by public randomness.
        compress_error_feedback: Add what was left out to the next update.
        exclude_layers: Layers whose updates stay home: positions, names or patterns, comma-separated.
        freeze_layers: Layers that are neither trained nor sent.
    """

    percentile_privacy: float | None = None
    percentile_epsilon: float | None = None
    percentile_fixed_k: bool = False
    percentile_gamma: float | None = None
    svt_privacy: bool = False
    svt_epsilon: float = 1.0
    svt_count: int = 100
    svt_threshold: float = 1e-3
    svt_gamma: float = 1e-2
    compress: float | None = None
    compress_topk: bool = False
    compress_random: bool = False
    compress_error_feedback: bool = False
    exclude_layers: str = ""
    freeze_layers: str = ""

    def __post_init__(self) -> None:
        positive = ("percentile_epsilon", "percentile_gamma", "svt_epsilon", "svt_threshold", "svt_gamma", "svt_count")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 1e-9 <= value <= 1e9:
                raise ConfigError(f"{name} must be between 1e-9 and 1e9, got {value}.")
        if self.percentile_privacy is not None and not 0.0 <= self.percentile_privacy < 100.0:
            raise ConfigError(f"percentile_privacy must be in [0, 100), got {self.percentile_privacy}.")
        if self.compress is not None and not 0.0 < self.compress <= 1.0:
            raise ConfigError(f"compress must be the share that is sent, in (0, 1], got {self.compress}.")
        self._check_filters()

    @property
    def selects_privately(self) -> bool:
        """Whether a selection costs an ε of its own."""
        return self.svt_privacy or self.percentile_epsilon is not None

    def _check_filters(self) -> None:
        asked = [name for name in _WITH_PERCENTILE if getattr(self, name)]
        if asked and self.percentile_privacy is None:
            raise ConfigError(f"{', '.join(asked)} must come with percentile_privacy. Add --percentile-privacy 90.")
        asked = [name for name in _WITH_SVT if getattr(self, name) != getattr(FilterConfig, name)]
        if asked and not self.svt_privacy:
            raise ConfigError(f"{', '.join(asked)} must come with svt_privacy, got none. Add --svt-privacy.")
        asked = [name for name in _WITH_COMPRESS if getattr(self, name)]
        if asked and self.compress is None:
            raise ConfigError(f"{', '.join(asked)} must come with compress, got none. Add --compress 0.1.")
        if self.compress_topk and self.compress_random:
            raise ConfigError("compress must be by size or at random, got both. Leave one out.")
        if self.svt_privacy and self.percentile_privacy is not None:
            raise ConfigError(
                "svt_privacy and percentile_privacy both choose coordinates, got both: the second would choose among "
                "the noise of the first. Leave one out."
            )
        if self.compress_error_feedback and self.selects_privately:
            raise ConfigError(
                "compress_error_feedback must not feed a private selection, got both: what was left out of one round "
                "would be paid for again in each later one. Leave --compress-error-feedback out."
            )


_WITH_PERCENTILE = ("percentile_epsilon", "percentile_fixed_k", "percentile_gamma")
_WITH_SVT = ("svt_epsilon", "svt_count", "svt_threshold", "svt_gamma")
_WITH_COMPRESS = ("compress_topk", "compress_random", "compress_error_feedback")
