"""Run the llm job: `python jobs/llm_runner.py [flags]` is `sfl run llm [flags]`."""

import sys

from sfl.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", "llm", *sys.argv[1:]]))
