"""Contexts: files with the parameters of the encryption and whichever keys their owner may have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfl.errors import ConfigError
from sfl.privacy.he.cipher import Cipher
from sfl.privacy.he.scheme import HELD, SHARED, Scheme

__all__ = [
    "CLIENT_CONTEXT",
    "SERVER_CONTEXT",
    "check_server_kit",
    "kit_cipher",
    "make_contexts",
    "scheme_of",
    "shared_out",
]

CLIENT_CONTEXT, SERVER_CONTEXT = "client_context.tenseal", "server_context.tenseal"
"""Their names in a kit, which are those of NVIDIA FLARE's."""


def make_contexts(sites: Sequence[str], holder: str = "") -> tuple[bytes, dict[str, bytes]]:
    """New keys for a federation.

    Args:
        sites: Their names.
        holder: The one site that may decrypt; by default all sites share one secret key.

    Returns:
        The server's context, which holds no key, and by site its own.

    Raises:
        ConfigError: If the holder is no site.
    """
    cipher = Cipher.fresh(scheme_of(holder))
    return cipher.exported(secret=False, public=False), shared_out(cipher, sites, holder)


def shared_out(cipher: Cipher, sites: Sequence[str], holder: str) -> dict[str, bytes]:
    """By site, a context with the keys of ``cipher`` that it may have.

    Raises:
        ConfigError: If the holder is no site.
    """
    if holder and holder not in sites:
        raise ConfigError(f"he_holder must be one of the sites {', '.join(sites)}, got {holder!r}.")
    secret, public = cipher.exported(secret=True), cipher.exported(secret=False)
    return {site: secret if holder in ("", site) else public for site in sites}


def scheme_of(holder: str) -> Scheme:
    """The parameters: with a holder each site encrypts with a public key, and what is decrypted is told."""
    return HELD if holder else SHARED


def kit_cipher(kit: Path, scheme: Scheme) -> Cipher:
    """The cipher of a site's kit.

    Raises:
        ConfigError: If there is none, or it is of other parameters.
    """
    path = kit / CLIENT_CONTEXT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"a site's kit must hold {CLIENT_CONTEXT} for homomorphic encryption, got none: {error.strerror}. Make it "
            "with `sfl provision` or `sfl he keys`."
        ) from error
    return Cipher.of(data, scheme, str(path))


def check_server_kit(kit: Path) -> None:
    """Refuse a server that could decrypt.

    Raises:
        ConfigError: If its kit holds a secret key.
    """
    for path in (kit / CLIENT_CONTEXT, kit / SERVER_CONTEXT):
        if path.exists() and Cipher.holds_secret(path.read_bytes()):
            raise ConfigError(
                f"a server's context must hold no secret key, got one in {path}. Remove it, give all sites new keys, "
                "and make the server's file with `sfl he keys`."
            )
