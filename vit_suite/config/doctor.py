"""`vit-suite doctor`: what to look at before a training is submitted."""

from __future__ import annotations

from dataclasses import dataclass, field

from vit_suite.config.limits import Whole
from vit_suite.config.pretrain import PretrainConfig


@dataclass
class DoctorConfig(PretrainConfig):
    """Look at a training, `vit-suite doctor --config NAME ...`, at a folder of images, `vit-suite doctor PHOTOS`, or at
    a checkpoint, `vit-suite doctor RUN`, and say what is ok, what is doubtful, and what is wrong, with the mend. The
    options are those of `pretrain`. Nothing is written. Exit status 2 when something is wrong."""

    targets: list[str] = field(default_factory=list)
    """Folders or lists of images, run directories, checkpoints."""
    steps: Whole = 2
    """Optimizer steps that are timed on this machine, after one that is not; 0 times none. They take one process and
    the share of the batch that one rank will have."""
