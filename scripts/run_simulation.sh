#!/usr/bin/env bash
# Set up, then simulate the ESM2 federation on this machine, offline. Options go to jobs/esm2_runner.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
make setup
HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" exec .venv/bin/python jobs/esm2_runner.py "$@"
