"""What the process from which workers fork does beyond forking: it leaves nothing behind, however its driver ends.

While workers live they see to it, too (`sfl.engine.worker`): a server that somebody else has started before does not
know of this. Of a driver that is killed after its run, only the server is left.
"""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing import util

_FOLDER = "_SFL_FORK_SERVER_FOLDER"


@contextmanager
def told() -> Generator[None]:
    """Environment for a server that is started inside: it imports this module, and finds where it listens."""
    os.environ[_FOLDER] = util.get_temp_dir()
    try:
        yield
    finally:
        os.environ.pop(_FOLDER, None)


def _leave(folder: str, server: int) -> None:
    if os.getpid() == server:  # workers inherit this, and end while others go on
        shutil.rmtree(folder, ignore_errors=True)


_folder = os.environ.pop(_FOLDER, None)
if _folder is not None:
    atexit.register(_leave, _folder, os.getpid())
