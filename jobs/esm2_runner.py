"""Run the esm2 job: `python jobs/esm2_runner.py [flags]` is `sfl run esm2 [flags]`."""

import sys

from sfl.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", "esm2", *sys.argv[1:]]))
