"""Aggregation that stands sites which lie (Byzantine-robust): rules, what comes before them, a look at norms.

Every rule takes the updates as they are; what a site says of its number of examples does not weigh. What a rule needs
(sites in a round, a root update) is checked before a run, and again in each round.
"""

from sfl.server.robust.clipping import CenteredClipping
from sfl.server.robust.coordinates import CoordinateMedian, TrimmedMean
from sfl.server.robust.foundation import FoundationFL
from sfl.server.robust.geometric import GeometricMedian
from sfl.server.robust.krum import Bulyan, Krum, MultiKrum
from sfl.server.robust.norms import NormBound, NormReport, verify_update_norms
from sfl.server.robust.pre import NNM, Bucketing, PreAggregated, PreAggregation
from sfl.server.robust.trust import CosineTrust, FLTrust

__all__ = [
    "NNM",
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
    "NormBound",
    "NormReport",
    "PreAggregated",
    "PreAggregation",
    "TrimmedMean",
    "verify_update_norms",
]
