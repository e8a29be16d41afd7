#!/usr/bin/env bash
# Makes .venv with the test extra, runs ruff, mypy and the tests; arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/env.sh" test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
