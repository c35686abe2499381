"""Whether the Hugging Face hub can be reached, found out at once: its own clients retry for half a minute."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request

_PROBE_SECONDS = 3.0
_TRUE = {"1", "ON", "YES", "TRUE"}


def is_offline() -> bool:
    """Whether the user has said that the hub is not to be asked."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def hub_refusal() -> str:
    """Why the hub cannot be reached; empty if it answers, or if a proxy stands between."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return ""  # whoever asked finds out what is missing, and names it
    if urllib.request.getproxies():
        return ""
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    host, port = endpoint.hostname or "", endpoint.port or 443
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        return f"no connection to {host}: {error}"
    return ""
