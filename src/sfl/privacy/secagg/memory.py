"""What a site remembers of secure aggregation: the secrets of the round it is in, and which rounds it has answered.

It lies apart from what else the site remembers: secrets of a round are gone with it, and an earlier state of the site
never comes back.
"""

from __future__ import annotations

from typing import Any

from sfl.core.secure import Keeper
from sfl.errors import ProtocolError

__all__ = ["Memory"]

_RUNS = 64  # runs of which the answered rounds are remembered


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

    def answered(self, run: str) -> int:
        """The last round of a run of which something masked has left."""
        return int(self._read()["answered"].get(run, 0))

    def answer(self, run: str, round: int) -> None:
        """Note that something masked is about to leave."""
        kept = self._read()
        answered: dict[str, int] = {name: last for name, last in kept["answered"].items() if name != run}
        kept["answered"] = dict([*answered.items(), (run, round)][-_RUNS:])
        self._write(kept)

    def _read(self) -> dict[str, Any]:
        kept: Any = self._keeper.load()
        return {"round": None, "answered": {}} if kept is None else dict(kept)

    def _write(self, kept: dict[str, Any]) -> None:
        self._keeper.save(kept)
