"""What a site remembers of secure aggregation: the secrets of the round it is in, and which rounds it has answered.

It lies apart from what else the site remembers: secrets of a round are gone with it, and an earlier state of the site
never comes back.
"""

from __future__ import annotations

from typing import Any

from sfl.core.secure import Keeper
from sfl.errors import ProtocolError

__all__ = ["Memory"]


class Memory:
    """One site's memory.

    Args:
        keeper: Where it lies.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def secrets(self, run: str, round: int) -> dict[str, Any]:
        """What was kept of a round.

        Raises:
            ProtocolError: If nothing was: another round has begun since, or the step before was left out.
        """
        kept = self._read()["round"]
        if kept is None or (kept["run"], kept["number"]) != (run, round):
            raise ProtocolError(f"a step of round {round} must follow the one before it, got no secrets of that round.")
        return dict(kept["secrets"])

    def keep(self, run: str, round: int, secrets: dict[str, Any] | None) -> None:
        """Keep this of a round in place of what was kept; ``None`` forgets it."""
        kept = self._read()
        kept["round"] = None if secrets is None else {"run": run, "number": round, "secrets": secrets}
        self._write(kept)

    def last(self, what: str) -> int:
        """The last round in which something was done; -1 if it was in none."""
        return int(self._read()["done"].get(what, -1))

    def note(self, what: str, round: int) -> None:
        """Note that it is done in this round, before anything of it leaves."""
        kept = self._read()
        self._write({**kept, "done": {**kept["done"], what: round}})

    def pinned(self, run: str) -> str:
        """The run that this memory is of: the first that it was told."""
        kept = self._read()
        if not kept["run"]:
            self._write({**kept, "run": run})
            return run
        return str(kept["run"])

    def forget(self) -> None:
        """The secrets of a round that is not gone on with."""
        kept = self._read()
        if kept["round"] is not None:
            self._write({**kept, "round": None})

    def _read(self) -> dict[str, Any]:
        kept: Any = self._keeper.load()
        return {"round": None, "run": "", "done": {}} if kept is None else dict(kept)

    def _write(self, kept: dict[str, Any]) -> None:
        self._keeper.save(kept)
