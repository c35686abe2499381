"""The kit of a site or a server: what it knows of its federation. Its operator says where it lies, and no task does."""

from __future__ import annotations

import os
from pathlib import Path

from sfl.errors import ConfigError
from sfl.privacy.he.contexts import CLIENT_CONTEXT, SERVER_CONTEXT

__all__ = ["CERTIFICATE", "kit_of_server", "kit_of_site", "use_kit", "use_server_kit"]

CERTIFICATE = "client.crt"
_SITE, _SERVER = "_SFL_SITE_KIT", "_SFL_SERVER_KIT"


def use_kit(folder: str | Path) -> None:
    """From now on sites of this process, and of those that it starts, are who this folder says, if it is a kit."""
    _use(_SITE, Path(folder), (CERTIFICATE, CLIENT_CONTEXT))


def use_server_kit(folder: str | Path) -> None:
    """From now on this folder is that of the server in this process, if it holds anything of a kit's."""
    _use(_SERVER, Path(folder), (CERTIFICATE, CLIENT_CONTEXT, SERVER_CONTEXT))


def _use(variable: str, folder: Path, marks: tuple[str, ...]) -> None:
    if any((folder / name).exists() for name in marks):
        os.environ[variable] = str(folder.absolute())


def kit_of_server() -> Path | None:
    """The server's; ``None`` if it has none that anybody knows of."""
    folder = os.environ.get(_SERVER)
    return None if folder is None else Path(folder)


def kit_of_site(*, required: bool) -> Path | None:
    """A site's; ``None`` if it is simulated.

    Args:
        required: Whether it is one of a deployment, where it must be told apart from others.

    Raises:
        ConfigError: If it must have a kit and has none.
    """
    folder = os.environ.get(_SITE)
    if folder is None and required:
        raise ConfigError(
            "a site of a deployment must have a kit, with which other sites know it, got none. Start its "
            "node with the folder of client.crt, client.key and rootCA.pem, and of client_context.tenseal for "
            "homomorphic encryption: --node-config 'kit=\"FOLDER\"'."
        )
    return None if folder is None else Path(folder)
