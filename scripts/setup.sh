#!/usr/bin/env bash
# Create .venv and install SFL into it; does nothing where that is done already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec make setup "$@"
