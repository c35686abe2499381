"""Memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_HOLES = """
import sys
import numpy as np, psutil
from sfl.utils.memory import return_large, trim
if sys.argv[1] == "returned":
    return_large()
np.ones(1 << 18)  # 2 MiB: from now on the C library keeps such a block
before = psutil.Process().memory_info().rss
kept = [np.ones(1 << 18) for _ in range(64)]
del kept[::2]
print((psutil.Process().memory_info().rss - before) / (1 << 21))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="other C libraries decide for themselves")
def test_large_blocks_go_back_as_soon_as_they_are_free() -> None:
    models = {
        how: float(subprocess.run([sys.executable, "-c", _HOLES, how], capture_output=True, check=True).stdout)
        for how in ("returned", "kept")
    }
    assert models["returned"] < 36 < 60 < models["kept"]
