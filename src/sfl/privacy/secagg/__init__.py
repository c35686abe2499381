"""Secure aggregation: the server sees the sum of the sites' updates, and no single one (Bell et al., CCS 2020)."""

from sfl.privacy.secagg.protocol import SecAgg

__all__ = ["SecAgg"]
