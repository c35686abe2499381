"""A sealed model in the clear, for who has a key."""

from __future__ import annotations

from collections.abc import Mapping

from sfl.errors import ConfigError
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.contexts import CLIENT_CONTEXT
from sfl.privacy.he.crew import cores
from sfl.privacy.he.packing import is_sealed
from sfl.privacy.he.scheme import SHARED
from sfl.privacy.he.site import opened_model
from sfl.types import Array, Parameters

__all__ = ["opened"]


def opened(parameters: Mapping[str, Array], context: bytes | None) -> Parameters:
    """Parameters in the clear; those that are, as they are.

    Args:
        parameters: As the server has them.
        context: The content of a site's context, if there is one.

    Raises:
        ConfigError: If they are sealed, and the context is none that opens them.
    """
    if not is_sealed(parameters):
        return dict(parameters)
    if context is None:
        raise ConfigError(f"a sealed model must be opened with a site's {CLIENT_CONTEXT}, got none. Give its content.")
    return opened_model(Cipher.of(context, SHARED, CLIENT_CONTEXT), parameters, size=cores())
