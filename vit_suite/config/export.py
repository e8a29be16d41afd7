"""Options of `vit-suite export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vit_suite.config.data import ImagesConfig
from vit_suite.config.limits import Checkpoint, Input, OutputFolder, Range, Seed
from vit_suite.config.shared import ReadingConfig


@dataclass
class ExportConfig(ReadingConfig):
    """Write a backbone for other programs, load it again as they do, and compare: largest error on real images on the
    screen and in README.md, the model card. Above 1e-4 nothing is left."""

    checkpoint: Checkpoint
    """Run directory, file or folder of a released network (DINO, DINOv2, DINOv3, MAE, SiT, Hugging Face, timm,
    solo-learn, lightly), or timm:NAME."""
    format: Literal["safetensors", "timm", "huggingface", "onnx", "torch"] = "safetensors"
    """safetensors = this suite's own; timm = a folder for timm.create_model("local-dir:..."); huggingface = one for
    transformers.AutoModel; onnx, torch (.pt2) = a graph of any batch and image size."""
    output: OutputFolder = "export"
    """Folder that is written; it has to be new or empty."""
    outputs: list[Literal["features", "patches", "attention"]] = field(default_factory=lambda: ["features"])
    """What a graph (onnx, torch) answers: the representation, the patch tokens, what the CLS token looks at in the last
    block, head by head."""
    opset: Annotated[int, Range(1, ceiling=1000)] = 18
    """ONNX operator set; at least 18."""
    images: Input | None = None
    """Folder of images to compare on; without it those of data.name, else of the run's own data, else generated
    ones."""
    data: ImagesConfig = field(default_factory=lambda: ImagesConfig(name=""))
    seed: Seed = 0
    """Seed of the draw behind data.test_length, and of generated data."""
