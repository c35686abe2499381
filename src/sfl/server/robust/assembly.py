"""From a runner's options to the aggregator of a recipe."""

from __future__ import annotations

from collections.abc import Callable

from sfl.core.aggregator import Aggregator, WeightedMean
from sfl.engine.attacker import Attack
from sfl.errors import CompositionError
from sfl.server.robust.clipping import CenteredClipping
from sfl.server.robust.config import AggregationConfig
from sfl.server.robust.coordinates import CoordinateMedian, TrimmedMean
from sfl.server.robust.foundation import FoundationFL
from sfl.server.robust.geometric import GeometricMedian
from sfl.server.robust.krum import Bulyan, Krum, MultiKrum
from sfl.server.robust.norms import NormBound
from sfl.server.robust.pre import NNM, Bucketing, PreAggregated
from sfl.server.robust.trust import CosineTrust, FLTrust, Root
from sfl.types import FederationConfig

__all__ = ["build_aggregator", "build_attack"]

_RULES: dict[str, Callable[[AggregationConfig, Root | None], Aggregator]] = {
    "mean": lambda _, __: WeightedMean(),
    "krum": lambda c, _: Krum(c.krum_byzantine, projection=c.krum_projection),
    "multi-krum": lambda c, _: MultiKrum(c.krum_byzantine, projection=c.krum_projection),
    "bulyan": lambda c, _: Bulyan(c.krum_byzantine, projection=c.krum_projection),
    "trimmed-mean": lambda c, _: TrimmedMean(c.trim_ratio),
    "median": lambda _, __: CoordinateMedian(),
    "geometric-median": lambda _, __: GeometricMedian(),
    "centered-clipping": lambda c, _: CenteredClipping(c.clip_radius, c.clip_iterations),
    "foundation-fl": lambda c, root: CosineTrust(
        c.ffl_threshold, root, allow_untrusted_reference=c.allow_untrusted_reference
    ),
    "foundation-fl-ndss": lambda c, _: FoundationFL(c.krum_byzantine),
    "fltrust": lambda _, root: FLTrust(root if root is not None else {}),
}


def build_aggregator(
    config: AggregationConfig, federation: FederationConfig, root_update: Root | None = None
) -> Aggregator:
    """The aggregator that the options ask for: a bound on norms, then what mixes updates, then the rule.

    Args:
        config: The options.
        federation: Who takes part.
        root_update: The server's own update, for ``fltrust`` and ``foundation-fl``.

    Raises:
        CompositionError: If a round as planned has too few sites for it, or there is no root update.
    """
    if config.needs_root and root_update is None:
        raise CompositionError(
            f"aggregation={config.aggregation} must have a root update of the server's own clean data, got none. Give "
            "root_update in Python, choose another rule, or with foundation-fl set allow_untrusted_reference."
        )
    rule = _RULES[config.aggregation](config, root_update)
    if config.pre_aggregation == "nnm":
        rule = PreAggregated(rule, NNM(config.krum_byzantine, projection=config.krum_projection))
    elif config.pre_aggregation == "bucketing":
        rule = PreAggregated(rule, Bucketing(config.bucket_size))
    if config.max_update_norm is not None:
        rule = NormBound(rule, config.max_update_norm)
    rule.require(federation.planned_sites)
    return rule


def build_attack(config: AggregationConfig, seed: int) -> Attack | None:
    """Who lies in a simulation, and how; ``None`` for nobody.

    Args:
        config: The options.
        seed: The run's.
    """
    return None if config.attack is None else Attack(config.attack, config.attackers, config.attack_scale, seed)
