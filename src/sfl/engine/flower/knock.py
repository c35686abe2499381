"""The names that Flower finds its commands by on ``PATH``, where each of them is a fork: a few lines that ask for it.

Only the standard library: it is read by processes that have not imported Flower.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_KNOCK = """import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as door:
    door.connect({door!r})
    socket.send_fds(door, [json.dumps(sys.argv[1:]).encode()], [1, 2])
    door.shutdown(socket.SHUT_WR)
    door.recv(1)
"""


def door_in(folder: Path) -> Path:
    """Where the process that forks listens."""
    return folder / "door"


def names_in(folder: Path) -> Path:
    """Where the names are, for ``PATH``."""
    return folder / "bin"


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Write the names.

    Args:
        folder: Of the process that forks.
        names: Of commands.
    """
    bin_folder = names_in(folder)
    bin_folder.mkdir(parents=True)
    knock = bin_folder / "knock.py"
    knock.write_text(_KNOCK.format(door=str(door_in(folder))), encoding="utf-8")
    for name in names:
        words = [sys.executable, "-I", "-S", str(knock), name]
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        (bin_folder / name).chmod(0o700)
