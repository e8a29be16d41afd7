"""`python -m vit_suite`, the same as `vit-suite`."""

import sys

from vit_suite.cli import program

if __name__ == "__main__":
    sys.exit(program())
