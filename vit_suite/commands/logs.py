"""What the commands say: our messages, and of Lightning's the warnings only."""

from __future__ import annotations

import logging
import warnings


def speak() -> None:
    """Show the messages of this package on stderr."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vit_suite").setLevel(logging.INFO)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of a torch name
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # images are in memory, or data.workers said so
