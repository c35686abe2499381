"""The kit of a site: certificate, key and root, with which other sites know it. Its operator says where it lies."""

from __future__ import annotations

import os
from pathlib import Path

from sfl.errors import ConfigError, MissingExtraError

__all__ = ["CERTIFICATE", "identity_of", "use_kit"]

CERTIFICATE = "client.crt"
_KIT = "_SFL_SITE_KIT"


def use_kit(folder: str | Path) -> None:
    """From now on sites of this process, and of those that it starts, are who this folder says, if it is a kit."""
    if (Path(folder) / CERTIFICATE).exists():
        os.environ[_KIT] = str(Path(folder).absolute())


def identity_of(site: str, *, required: bool) -> object:
    """Who a site is; ``None`` if it is simulated.

    Args:
        site: Its name.
        required: Whether it is one of a deployment, where it must be told apart from others.

    Raises:
        ConfigError: If it must have a kit and has none, or has that of another site.
    """
    folder = os.environ.get(_KIT)
    if folder is None:
        if required:
            raise ConfigError(
                "a site of a deployment must have a kit, with which other sites know it, got none. Start its "
                "node with the folder of client.crt, client.key and rootCA.pem: --node-config 'kit=\"FOLDER\"'."
            )
        return None
    try:
        from sfl.privacy.secagg.identity import CertifiedIdentity
    except ImportError:
        raise MissingExtraError("cryptography", "privacy") from None
    identity = CertifiedIdentity.of_kit(Path(folder))
    if identity.name != site:
        raise ConfigError(f"a site's kit must be its own, got that of {identity.name!r} for {site}. Give its folder.")
    return identity
