# Sourced by demo.sh and test.sh: makes .venv in the checkout with this package in it. Usage: . scripts/env.sh [EXTRA]
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "vit-suite needs Python 3.11 or newer; set PYTHON to one." >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv || exit 1
# Installing again is skipped until pyproject.toml changes or another extra is wanted.
stamp=".venv/.installed${1:+-$1}"
if ! [ "$stamp" -nt pyproject.toml ]; then
  echo "Installing vit-suite and what it needs into .venv (about 5 GB the first time, some minutes) ..."
  .venv/bin/python -m pip install -qq --disable-pip-version-check -e ".${1:+[$1]}" || exit 1
  touch "$stamp"
fi
