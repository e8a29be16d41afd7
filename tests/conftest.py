"""Before anything imports torch: threads that wait sleep, as under the command line (see vit_suite/cli.py)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
