"""Filters: what of an update leaves a site. They are transforms, the same code on every engine.

A filter by itself has no guarantee, whatever its name suggests, and a run says so. Where a sound variant exists it is a
mechanism with an ε of its own, which the ledger is charged with.
"""

from sfl.privacy.filters.compress import ErrorFeedback, RandomK, TopK
from sfl.privacy.filters.layers import ExcludeLayers, FreezeLayers, chosen_layers, parse_layers
from sfl.privacy.filters.percentile import PercentileFilter
from sfl.privacy.filters.private_topk import PrivateTopK
from sfl.privacy.filters.quantise import Quantise, QuantiseBounded
from sfl.privacy.filters.svt import SparseVector

__all__ = [
    "ErrorFeedback",
    "ExcludeLayers",
    "FreezeLayers",
    "PercentileFilter",
    "PrivateTopK",
    "Quantise",
    "QuantiseBounded",
    "RandomK",
    "SparseVector",
    "TopK",
    "chosen_layers",
    "parse_layers",
]
