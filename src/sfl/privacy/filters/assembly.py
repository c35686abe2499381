"""From a runner's options to filters."""

from __future__ import annotations

from sfl.core.mechanism import Mechanism
from sfl.core.transform import Transform
from sfl.errors import CompositionError
from sfl.privacy.config import PrivacyConfig
from sfl.privacy.filters.compress import ErrorFeedback, RandomK, TopK
from sfl.privacy.filters.layers import ExcludeLayers, FreezeLayers, parse_layers
from sfl.privacy.filters.percentile import PercentileFilter
from sfl.privacy.filters.private_topk import PrivateTopK
from sfl.privacy.filters.svt import SparseVector

__all__ = ["filters", "selection"]

_GAMMA = 0.01


def filters(config: PrivacyConfig) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
    """What an update passes before the mechanisms, and after them.

    Raises:
        CompositionError: If noise would be on what is left out alone, or compression spare nothing.
    """
    first = _layers(config)
    if config.percentile_privacy is not None and config.percentile_epsilon is None:
        first.append(PercentileFilter(config.percentile_privacy, config.percentile_gamma, config.percentile_fixed_k))
    if config.compress is None:
        return tuple(first), ()
    compressor = _compressor(config)
    if not config.dp or config.dp_mode == "server":
        return (*first, compressor), ()
    if config.dp_mode == "local" and isinstance(compressor, TopK):
        return tuple(first), (compressor,)  # after noise it costs nothing, and before it would spare nothing
    raise CompositionError(
        f"compress must choose among noised coordinates where sites add noise to all of them, got dp_mode="
        f"{config.dp_mode} and {'error feedback' if config.compress_error_feedback else type(compressor).__name__}. "
        "Use --compress-topk alone with --dp-mode local, or --dp-mode server."
    )


def _layers(config: PrivacyConfig) -> list[Transform]:
    """One transform for both: positions are those of the whole model."""
    excluded, frozen = parse_layers(config.exclude_layers), parse_layers(config.freeze_layers)
    if excluded and frozen:
        return [ExcludeLayers((*excluded, *frozen))]
    if frozen:
        return [FreezeLayers(frozen)]
    return [ExcludeLayers(excluded)] if excluded else []


def _compressor(config: PrivacyConfig) -> TopK | RandomK | ErrorFeedback:
    ratio = config.compress or 1.0
    feedback = config.compress_error_feedback
    compressor = RandomK(ratio, unbiased=not feedback) if config.compress_random else TopK(ratio)
    return ErrorFeedback(compressor) if feedback else compressor


def selection(config: PrivacyConfig) -> Mechanism | None:
    """The private selection that the options ask for."""
    if config.svt_privacy:
        return SparseVector(
            epsilon=config.svt_epsilon,
            count=config.svt_count,
            threshold=config.svt_threshold,
            gamma=config.svt_gamma,
        )
    if config.percentile_privacy is None or config.percentile_epsilon is None:
        return None
    return PrivateTopK(
        epsilon=config.percentile_epsilon,
        share=1.0 - config.percentile_privacy / 100.0,
        gamma=_GAMMA if config.percentile_gamma is None else config.percentile_gamma,
    )
