#!/usr/bin/env bash
# Makes .venv, installs vit-suite and runs the demo; arguments go to `vit-suite demo`.
set -euo pipefail
. "$(dirname "$0")/env.sh" "" # no extra; without an argument env.sh would see those of the demo
.venv/bin/vit-suite demo --overwrite "$@"
