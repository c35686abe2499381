"""Homomorphic encryption: the server adds up what it cannot read."""

from sfl.privacy.he.protocol import CKKS

__all__ = ["CKKS"]
