"""Shortens the waits of Flower's processes that FLARE starts, then makes way for the sitecustomize of before.

Its folder stands on ``PYTHONPATH`` of a FLARE simulation that carries Flower, and nowhere else.
"""

import sys
from pathlib import Path

from sfl.engine.flower.waits import shorten
from sfl.utils.sitehook import make_way

if any(Path(part).name == "flower-superlink" for part in sys.argv[:1]):
    # By default it installs what an app names from a package registry in the middle of a run; FLARE cannot stop it.
    sys.argv.append("--disable-runtime-dependency-installation")
shorten(0.2)  # every site has several processes that look, and they share this machine
make_way(__file__)
