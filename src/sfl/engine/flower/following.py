"""What comes home of a run on a SuperLink of others, read from its log: events as they happen, then the result."""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, cast

from sfl.core.events import Notice
from sfl.engine.flower.home import EVENT, LEFT, PART, PIECE
from sfl.engine.launch import Launch
from sfl.errors import EngineError
from sfl.io.tree import write_text
from sfl.privacy.sealed import Reader
from sfl.utils.plain import describe

_NUMBER = re.compile(r"(\d{1,9})/([1-9]\d{0,8})")


class Following:
    """What has come home of a run.

    Args:
        launch: Where events are written to, and what the run made.
        reader: Opens the result.
    """

    def __init__(self, launch: Launch, reader: Reader) -> None:
        self._launch, self._reader = launch, reader
        self._packed = launch.folder / "home.tar"
        self._events = 0
        self._has_gap = False
        self._parts: set[int] = set()
        self._wanted = 0

    def read(self, log: IO[str]) -> None:
        """Take in a log; the lines that are not ours go to this process's output."""
        self._packed.touch()
        with self._launch.events.open("a", encoding="utf-8") as events, self._packed.open("r+b") as packed:
            for line in log:
                kind, _, rest = line.rstrip("\n").partition(" ")
                number, _, text = rest.partition(" ")
                part = _NUMBER.fullmatch(number)
                if kind == EVENT and number.isdecimal():
                    if line.endswith("\n") and _is_json(text):  # else it is cut, and the log is asked for again
                        self._tell(int(number), text, events)
                elif kind == PART and part:
                    self._keep(int(part[1]), int(part[2]), text, packed)
                elif line.strip():
                    sys.stdout.write(line)
                    sys.stdout.flush()

    def _keep(self, number: int, count: int, text: str, packed: IO[bytes]) -> None:
        """Keep a part of the result; one that is torn is as one that is lost."""
        try:
            data = self._reader.open(base64.b64decode(text, validate=True), number, count)
        except (binascii.Error, EngineError):
            return
        packed.seek(number * PIECE)
        packed.write(data)
        self._wanted = count
        self._parts.add(number)

    def _tell(self, number: int, text: str, events: IO[str]) -> None:
        """Pass an event on, unless it is known: a log that is asked for again begins anew."""
        if number < self._events:
            return
        if number > self._events and not self._has_gap:
            self._has_gap = True
            self._warn(
                f"events were lost on the way from the SuperLink, the first is number {self._events}: the run goes on, "
                "and what follows is shown. Its folder has all figures when it comes home.",
                events,
            )
        self._events = number + 1
        events.write(text + "\n")
        events.flush()

    def _warn(self, text: str, events: IO[str]) -> None:
        events.write(json.dumps(describe(Notice(text=text, level="warning"), "event")) + "\n")

    def is_whole(self) -> bool:
        """Whether the result is all there."""
        return self.has_begun() and len(self._parts) == self._wanted

    def has_begun(self) -> bool:
        """Whether a part of the result is there."""
        return self._wanted > 0

    def missing(self) -> str:
        """What is not there of a result that has begun, in words."""
        if not self.has_begun():
            return ""
        there = f"{len(self._parts)} of {self._wanted} parts"
        return f" that came home whole, got {there} of it: resume the run, and it comes again"

    def unpack(self) -> bool:
        """Write what came home into the launch, the outcome last; whether there was one.

        Raises:
            EngineError: If the run went well and its last state did not fit.
        """
        if not self.is_whole():
            return False
        made = Launch(self._launch.folder / "home")
        _extract(self._packed, made.folder)
        self._packed.unlink()
        text = made.outcome.read_text(encoding="utf-8")
        with self._launch.events.open("a", encoding="utf-8") as events:
            self._tell_the_rest(made, events)
        if made.final.exists():
            shutil.move(made.final, self._launch.final)
        elif json.loads(text)["error"] is None:
            raise EngineError(f"the last state of a run must fit to come home, got more. It is {self._where()}.")
        write_text(self._launch.outcome, text)
        return True

    def _tell_the_rest(self, made: Launch, events: IO[str]) -> None:
        """What the log did not say: events whose lines were lost at its end, and files that were too much for it."""
        if made.events.exists():
            for number, text in enumerate(made.events.read_text(encoding="utf-8").splitlines()):
                self._tell(number, text, events)
        left = json.loads((made.folder / LEFT).read_text(encoding="utf-8"))
        if left:
            names = f"{', '.join(left[:3])}{' …' if left[3:] else ''}"
            self._warn(f"{len(left)} files did not fit to come home: {names}. They are {self._where()}.", events)

    def _where(self) -> str:
        return f"on the SuperLink's machine, in sfl-runs/{self._launch.read_settings()['run']} of FLWR_HOME"


def _extract(packed: Path, folder: Path) -> None:
    """The regular files of an archive, below ``folder``: what a server sends has nothing else.

    Raises:
        EngineError: If it has a link, a device, or a name that leads elsewhere.
    """
    with tarfile.open(packed) as tar:
        for member in tar:
            target = PurePosixPath(member.name)
            if member.isdir():
                continue
            if not member.isreg() or target.is_absolute() or ".." in target.parts:
                raise EngineError(f"what comes home must be files below one folder, got {member.name!r}.")
            content = tar.extractfile(member)
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            with (folder / target).open("wb") as file:
                shutil.copyfileobj(cast("IO[bytes]", content), file)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
