"""Aggregation that stands sites which lie (Byzantine-robust): rules, what comes before them, a look at norms.

Every rule takes the updates as they are; what a site says of its number of examples does not weigh. What a rule needs
(sites in a round, a root update) is checked before a run, and again in each round. Names resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfl.server.robust.assembly import build_aggregator, build_attack
    from sfl.server.robust.clipping import CenteredClipping
    from sfl.server.robust.config import AggregationConfig
    from sfl.server.robust.coordinates import CoordinateMedian, TrimmedMean
    from sfl.server.robust.foundation import FoundationFL
    from sfl.server.robust.geometric import GeometricMedian
    from sfl.server.robust.krum import Bulyan, Krum, MultiKrum
    from sfl.server.robust.norms import NormBound, NormReport, verify_update_norms
    from sfl.server.robust.pre import NNM, Bucketing, PreAggregated, PreAggregation
    from sfl.server.robust.trust import CosineTrust, FLTrust

_HOMES = {
    "AggregationConfig": "sfl.server.robust.config",
    "Bucketing": "sfl.server.robust.pre",
    "Bulyan": "sfl.server.robust.krum",
    "CenteredClipping": "sfl.server.robust.clipping",
    "CoordinateMedian": "sfl.server.robust.coordinates",
    "CosineTrust": "sfl.server.robust.trust",
    "FLTrust": "sfl.server.robust.trust",
    "FoundationFL": "sfl.server.robust.foundation",
    "GeometricMedian": "sfl.server.robust.geometric",
    "Krum": "sfl.server.robust.krum",
    "MultiKrum": "sfl.server.robust.krum",
    "NNM": "sfl.server.robust.pre",
    "NormBound": "sfl.server.robust.norms",
    "NormReport": "sfl.server.robust.norms",
    "PreAggregated": "sfl.server.robust.pre",
    "PreAggregation": "sfl.server.robust.pre",
    "TrimmedMean": "sfl.server.robust.coordinates",
    "build_aggregator": "sfl.server.robust.assembly",
    "build_attack": "sfl.server.robust.assembly",
    "verify_update_norms": "sfl.server.robust.norms",
}

__all__ = [  # noqa: RUF022 - plain order
    "AggregationConfig",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "CoordinateMedian",
    "CosineTrust",
    "FLTrust",
    "FoundationFL",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "NNM",
    "NormBound",
    "NormReport",
    "PreAggregated",
    "PreAggregation",
    "TrimmedMean",
    "build_aggregator",
    "build_attack",
    "verify_update_norms",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfl.server.robust' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
