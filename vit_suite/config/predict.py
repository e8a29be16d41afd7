"""Options of `vit-suite predict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vit_suite.config.data import ImagesConfig
from vit_suite.config.limits import Batch, Checkpoint, Input, OutputFile, Processes, Range, Seed, Side


@dataclass
class PredictConfig:
    """The class of every image of a folder, a list or a data set, by the head of a supervised or fine-tuned run, as a
    CSV file.

    Started by torchrun or srun, the processes share the images; the file is the same, byte for byte."""

    checkpoint: Checkpoint
    """Run directory of `vit-suite finetune`, or of `pretrain --method.name supervised`."""
    images: Input | None = None
    """Folder of images (searched through), one image, or a list (text or CSV); without it the split of data.name."""
    data: ImagesConfig = field(default_factory=lambda: ImagesConfig(name=""))
    output: OutputFile = "labels.csv"
    """CSV file that is written: path, class (its name), number (from 0), probability (0 to 1). Files that do not decode
    are listed beside it, in NAME.quarantine.txt."""
    top: Annotated[int, Range(1, ceiling=1000)] = 1
    """Classes of each image, the most probable first; the further ones in columns class_2, number_2, probability_2,
    ..."""
    image_size: Side | None = None
    """Side in pixels of the center crop; the one stored with the weights when not given."""
    batch_size: Batch = 64
    """Images in a forward pass."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the backbone's forward pass; auto = bf16 where the hardware multiplies it natively. The head is fp32."""
    workers: Processes | None = None
    """Threads that decode and compute, each its own batch; the process's cores, at most 8, when not given."""
    seed: Seed = 0
    """Of generated data, and of the draw behind data.test_length."""
    overwrite: bool = False
    """Replace what stands at `output`."""
