"""The one account of a run's SuperLink. Without it, Flower's Control API takes apps from every user of the machine."""

from __future__ import annotations

import hmac
import sys
from collections.abc import Sequence
from typing import TypeAlias

from flwr.cli.auth_plugin import OidcCliPlugin
from flwr.common.constant import ACCESS_TOKEN_KEY
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.superlink.auth_plugin import ControlAuthnPlugin, NoOpControlAuthnPlugin

from sfl.errors import EngineError

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
_LOADER = "load_control_authn_plugin"


class RunAccount(ControlAuthnPlugin):
    """Lets in who knows the run's token, and nobody else.

    Args:
        token: The token.
    """

    def __init__(self, token: str) -> None:
        self._token = token

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        """Nobody can log in: the token is handed over in a file."""

    def validate_tokens_in_metadata(self, metadata: Metadata) -> tuple[bool, AccountInfo | None]:
        """Whether a call carries the token."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        said = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(said, self._token.encode()):
            return False, None
        return NoOpControlAuthnPlugin().validate_tokens_in_metadata(metadata)

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:
        """None: see above."""

    def refresh_tokens(self, metadata: Metadata) -> tuple[Metadata | None, AccountInfo | None]:
        """None: a token lives as long as its run."""
        return None, None


def install_account(token: str) -> None:
    """Make the SuperLink of this process ask for the token.

    Flower loads its account plugin from a part of it that is not open source; this puts ours where that would be.

    Raises:
        EngineError: If this version of Flower does not look there.
    """
    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("flwr.superlink.") and hasattr(module, _LOADER)
    ]
    if "flwr.superlink.cli.flower_superlink" not in {module.__name__ for module in places}:
        raise EngineError("Flower's SuperLink must take an account plugin, got a version that does not. Use flwr 1.34.")
    for module in places:
        setattr(module, _LOADER, lambda: RunAccount(token))


def store_token(address: str, token: str) -> None:
    """Write the token where Flower's command line looks for that of a SuperLink, in ``FLWR_HOME``."""
    OidcCliPlugin(address).store_tokens(AccountAuthCredentials(access_token=token, refresh_token=token))
