"""Federated algorithms beyond averaging, each beside its paper. ``FedAvg`` itself is in ``sfl.server.strategy``."""

from sfl.server.algorithms.cyclic import Cyclic, Order
from sfl.server.algorithms.evaluation import CrossSiteEvaluation, FederatedEvaluation
from sfl.server.algorithms.fedbuff import FedBuff
from sfl.server.algorithms.fedopt import FedOpt, ServerOptimizer
from sfl.server.algorithms.scaffold import Scaffold
from sfl.server.algorithms.swarm import Swarm

__all__ = [
    "CrossSiteEvaluation",
    "Cyclic",
    "FedBuff",
    "FedOpt",
    "FederatedEvaluation",
    "Order",
    "Scaffold",
    "ServerOptimizer",
    "Swarm",
]
