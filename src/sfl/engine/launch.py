"""The folder through which a driver and the processes of an engine know of each other.

The driver writes what to run; the server's process writes what happens and how it ended. Everything in it can be read
by a person; nothing of it is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from sfl.client.script_code import placed
from sfl.client.site import SiteProgram
from sfl.engine.host import HostSettings
from sfl.engine.kit import kit_of_site
from sfl.errors import EngineError
from sfl.io.tree import write_text
from sfl.utils.plain import describe, from_json, restore, to_json

Server = Callable[["Launch", Any], None]
_SERVER = "sfl.env.serve:serve"


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of a job on an engine.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def recipe(self) -> Path:
        """The recipe, for the server alone."""
        return self.folder / "recipe.safetensors"

    @property
    def program(self) -> Path:
        """What every site runs."""
        return self.folder / "program.json"

    @property
    def settings(self) -> Path:
        """Where, with which sites, and whether to go on."""
        return self.folder / "launch.json"

    @property
    def events(self) -> Path:
        """What happened, one event a line."""
        return self.folder / "events.jsonl"

    @property
    def outcome(self) -> Path:
        """How it ended; written last."""
        return self.folder / "outcome.json"

    @property
    def kits(self) -> Path:
        """By site, what its kit must hold beside certificates."""
        return self.folder / "kits"

    def add_to_kit(self, site: str, kit: Path) -> None:
        """Put what a site's kit must hold into it."""
        if (self.kits / site).is_dir():
            shutil.copytree(self.kits / site, kit, dirs_exist_ok=True)

    @property
    def final(self) -> Path:
        """The last server state."""
        return self.folder / "final.safetensors"

    def move(self, folder: Path) -> Launch:
        """Put a launch that was made aside in its place, unless another process was faster; the one that is there."""
        try:
            self.folder.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(self.folder)
        return Launch(folder)

    def read_settings(self) -> dict[str, Any]:
        """The settings.

        Raises:
            EngineError: If they are not there or not whole.
        """
        try:
            return dict(json.loads(self.settings.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise EngineError(f"{self.settings} must be whole JSON, got: {error}.") from error

    def add_settings(self, **more: Any) -> None:
        """Write more settings beside those that are there."""
        write_text(self.settings, json.dumps({**self.read_settings(), **more}, indent=1) + "\n")

    def read_error(self) -> str:
        """How the job failed, in one line; empty if it did not."""
        outcome = json.loads(self.outcome.read_text(encoding="utf-8"))
        return "" if outcome["error"] is None else f"{outcome['error']}: {outcome['message']}"

    def write_program(self, program: SiteProgram) -> None:
        """Write what sites run.

        Raises:
            ConfigError: If it cannot be said as plain values.
        """
        described = to_json(describe(program, "the job"))
        write_text(self.program, json.dumps(described, indent=1) + "\n")

    def allowed(self) -> tuple[str, ...]:
        """Prefixes of the names that this launch may import: all, unless whoever unpacked it has said which."""
        return tuple(self.read_settings().get("allow", ("",)))

    def host(self, place: int = 0) -> HostSettings:
        """What a process needs to be sites of this run.

        Args:
            place: Its place among such processes: they share out the devices.
        """
        settings = self.read_settings()
        sites, devices = settings["sites"], list(settings["devices"])
        return HostSettings(
            program=self.read_program,
            sites=Path(sites) if sites else None,
            device=devices[place % len(devices)],
            threads=settings["threads"],
            kit=partial(kit_of_site, required=bool(settings.get("deployed"))),
            turns=tuple(self.folder / f"turn-{number}.lock" for number in range(int(settings["workers"]))),
        )

    def read_program(self) -> SiteProgram:
        """What sites run."""
        text = self.program.read_text(encoding="utf-8")
        program = restore(from_json(json.loads(text)), allow=self.allowed())
        if not isinstance(program, SiteProgram):
            raise EngineError(f"{self.program} must hold a site's program, got {type(program).__name__}.")
        code = str(self.read_settings().get("code", ""))
        return placed(program, Path(code)) if code else program


def resolve_server() -> Server:
    """The function that runs a job over an engine. It lies in a layer above, so it is known by name alone."""
    module, _, attribute = _SERVER.partition(":")
    return getattr(import_module(module), attribute)
