"""Attacks to test an aggregation rule with: under this name for users, at home beside the engine that plays them."""

from sfl.engine.attacked import AttackedEngine
from sfl.engine.attacker import ATTACKS, Attack
from sfl.engine.attacks import alie, alie_factor, filled, gaussian, mimic, min_max, min_sum, scaled_mean

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackedEngine",
    "alie",
    "alie_factor",
    "filled",
    "gaussian",
    "mimic",
    "min_max",
    "min_sum",
    "scaled_mean",
]
