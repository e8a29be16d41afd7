#!/usr/bin/env bash
# Makes .venv with the test extra, runs ruff, mypy and the tests.
#   bash scripts/test.sh               all tests: two processes or more, then those that need the machine for themselves
#   bash scripts/test.sh tests/views   arguments go to pytest
set -euo pipefail
. "$(dirname "$0")/env.sh" test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
# One process a core: every test has one thread.
processes=$(.venv/bin/python -c "import os; print(min(8, os.cpu_count() or 1))")
failed=0
.venv/bin/python -m pytest -n "$processes" --dist loadfile -m "not alone" || failed=$?
.venv/bin/python -m pytest -m alone || failed=$?
exit "$failed"
