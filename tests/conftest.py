"""Before anything imports torch: one thread (the tensors are small, numbers then repeat), and waiting threads sleep
(vit_suite/cli.py).

Set in the environment, so that the commands that tests start run with the same.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
