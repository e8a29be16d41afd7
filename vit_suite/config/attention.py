"""Options of the commands that show and score where a backbone looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vit_suite.config.limits import Count, Share


@dataclass
class AttentionConfig:
    """Where the CLS token looks in each image of a folder: the last block's attention as heat maps, overlays and masks."""

    checkpoint: str
    """Run directory, .ckpt, .safetensors, .pth of the DINO release, or timm:NAME."""
    images: str
    """Folder of images (searched through), or one image."""
    output: str = "attention"
    """Folder the files are written to, in the tree of `images`."""
    formats: list[Literal["png", "overlay", "mask", "npz"]] = field(default_factory=lambda: ["overlay", "mask"])
    """Files an image: png = heat map, overlay = heat map on the image, mask = the top mass, npz = the raw numbers."""
    threshold: Share = 0.6
    """Share of the attention's mass that a mask keeps."""
    heads: Literal["all", "mean", "heads"] = "all"
    """Which maps: each head and their mean (all), the mean alone, or each head alone."""
    resize: Count | None = None
    """Shorter side in pixels an image is resized to before the backbone; its own size when not given."""
    max_tokens: Count = 4096
    """Larger images are shrunk until they have at most so many patches."""
    batch_size: Count = 16
    """Images in a forward pass; only images of one size share one."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """From patches to pixels; nearest is the DINO release's."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; auto = bf16 where the hardware multiplies it natively. The softmax is fp32."""
    overwrite: bool = False
    """Replace files that stand in `output`."""
