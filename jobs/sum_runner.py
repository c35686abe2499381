"""Run the sum job: `python jobs/sum_runner.py [flags]` is `sfl run sum [flags]`."""

import sys

from sfl.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", "sum", *sys.argv[1:]]))
