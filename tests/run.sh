#!/usr/bin/env bash
# Lint and tests: bash tests/run.sh [arguments for pytest]. Makes .venv and installs what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
ruff check .
ruff format --check .
exec python -m pytest "$@"
