"""Privacy: every (ε, δ) that is ever printed is composed from one append-only ledger. Names resolve on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfl.privacy.accountant import PrivacyAccountant, compose_auxiliary
    from sfl.privacy.adaptive_clip import AdaptiveClip
    from sfl.privacy.audit import PrivacyAuditor
    from sfl.privacy.budget import PrivacyBudget
    from sfl.privacy.dp import GaussianMechanism, calibrate_gaussian_sigma
    from sfl.privacy.ledger import PrivacyLedger
    from sfl.privacy.runner_utils import build_protections

_HOMES = {
    "AdaptiveClip": "sfl.privacy.adaptive_clip",
    "GaussianMechanism": "sfl.privacy.dp",
    "PrivacyAccountant": "sfl.privacy.accountant",
    "PrivacyAuditor": "sfl.privacy.audit",
    "PrivacyBudget": "sfl.privacy.budget",
    "PrivacyLedger": "sfl.privacy.ledger",
    "build_protections": "sfl.privacy.runner_utils",
    "calibrate_gaussian_sigma": "sfl.privacy.dp",
    "compose_auxiliary": "sfl.privacy.accountant",
}

__all__ = [
    "AdaptiveClip",
    "GaussianMechanism",
    "PrivacyAccountant",
    "PrivacyAuditor",
    "PrivacyBudget",
    "PrivacyLedger",
    "build_protections",
    "calibrate_gaussian_sigma",
    "compose_auxiliary",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfl.privacy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
