"""What a measured process does: ``child.py SIDE JOB FOLDER REPORT [PARAMETERS]``, or the small chores around it.

A job of ``none`` imports all that the side imports and stops: the process without a model.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

TOLERANCE = 1e-3
"""Root mean square, per array: two AdamW steps of ESM2's job, of which it makes forty. The two sides sum in another
order; AdamW turns the sign of a gradient near zero into a whole step, and bfloat16 makes such signs a matter of
rounding. A site left out, or weighed wrongly, moves every array by ten steps."""


def run(side: str, job: str, folder: Path, report: Path, parameters: Path | None) -> None:
    """Run one job and write down what its loop took, without imports and data."""
    jobs = import_module(side).JOBS
    if job == "none":
        return
    loop = jobs[job](folder)
    cpu, wall = time.process_time(), time.perf_counter()
    final = loop()
    seconds = {"loop_cpu": time.process_time() - cpu, "loop_wall": time.perf_counter() - wall}
    report.write_text(json.dumps(seconds))
    if parameters is not None:
        import numpy as np

        np.savez(parameters, **final)


def agree(left: Path, right: Path, report: Path) -> None:
    """Compare two files of parameters by the names of the first, so that the measuring process never holds them.

    SFL also exchanges the buffers of a checkpoint (ESM2 has one, constant); the plain loop leaves them alone.
    """
    import numpy as np

    with np.load(left) as a, np.load(right) as b:
        same = set(a.files) <= set(b.files)
        close = same and all(float(np.sqrt(np.mean((a[name] - b[name]) ** 2))) <= TOLERANCE for name in a.files)
        equal = same and all(np.array_equal(a[name], b[name]) for name in a.files)
        largest = max(float(np.abs(a[name] - b[name]).max()) for name in a.files) if same else float("inf")
    report.write_text(json.dumps({"close": close, "equal": equal, "largest": largest}))


def main(what: str, *rest: str) -> None:
    """Do what the command line says."""
    paths = [Path(text) for text in rest]
    if what == "agree":
        agree(*paths)
    elif what == "esm2-files":
        import_module("work").ESM2Files(paths[0]).write()
    else:
        run(what, rest[0], paths[1], paths[2], paths[3] if len(paths) > 3 else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
