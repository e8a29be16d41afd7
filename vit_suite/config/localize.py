"""Options of `vit-suite localize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vit_suite.config.data import LocalizeDataConfig
from vit_suite.config.limits import Batch, Checkpoint, Input, OutputFile, PositiveShare, Range, Seed, Side, Width
from vit_suite.config.shared import ReadingConfig


@dataclass
class LocalizeConfig(ReadingConfig):
    """How well a backbone finds objects that nobody named to it: Jaccard index against masks; box IoU, CorLoc and the
    pointing game against boxes. Truth is a folder or file beside `images`, or comes with a data set (data.name
    tiny_imagenet or shapes)."""

    checkpoint: Checkpoint
    """Run directory, file or folder of a released network (DINO, DINOv2, DINOv3, MAE, SiT, Hugging Face, timm,
    solo-learn, lightly), timm:NAME, or builtin:shapes."""
    images: Input | None = None
    """Folder of images (searched through), with `truth`; without it the split of data.name to score (tiny_imagenet,
    shapes)."""
    truth: Input | None = None
    """Where their objects are: a folder of masks or of VOC XML, a COCO .json, or lines `name [WNID] x0 y0 x1 y1`
    (.txt)."""
    mask_values: Literal["auto", "index", "gray"] = "auto"
    """What masks hold: index = class numbers, 0 ground, 255 left out (VOC); gray = object above 127; auto = told from
    the file where it is certain."""
    box_origin: Annotated[int, Range(0, 1)] = 1
    """Number that VOC XML gives the first pixel: 1 as VOC itself, 0 as many labeling tools."""
    data: LocalizeDataConfig = field(default_factory=lambda: LocalizeDataConfig(name=""))
    method: list[Literal["attention", "lost", "tokencut"]] = field(
        default_factory=lambda: ["attention", "lost", "tokencut"]
    )
    """attention = the CLS token's, each head and their mean; lost, tokencut = from the last block's keys (no CLS token
    needed)."""
    threshold: list[PositiveShare] = field(default_factory=lambda: [0.4, 0.5, 0.6, 0.7, 0.8])
    """Shares of the attention's mass that masks keep; one of them is chosen on images that are not scored."""
    image_size: Side | Literal["own"] = "own"
    """Shorter side in pixels that the backbone sees; own = each image's."""
    max_tokens: Width = 4096
    """Larger images are shrunk until they have at most so many patches."""
    batch_size: Batch = 64
    """Images in a forward pass; only images of one size share one."""
    seed: Seed = 0
    """Seed of the halves (one chooses thresholds and heads, the other is scored), the untrained backbone, and generated
    data."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward pass; auto = bf16 where the hardware multiplies it natively."""
    output: OutputFile | None = None
    """File the scores are appended to; results.json in the run directory when the checkpoint is one, else in this
    folder."""
