"""Options of the commands that show where a backbone looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vit_suite.config.data import ImagesConfig
from vit_suite.config.limits import (
    Batch,
    Checkpoint,
    EpochsOrNone,
    Input,
    OutputFolder,
    PositiveShare,
    Processes,
    Range,
    Seed,
    Side,
    Width,
)
from vit_suite.config.shared import ReadingConfig


@dataclass
class AttentionConfig(ReadingConfig):
    """Where the CLS token looks in each image: attention as heat maps, overlays, masks, labels, numbers and animations.

    Started by torchrun or srun, the processes share the images; the files are those of one process."""

    checkpoint: Checkpoint
    """Run directory, file or folder of a released network (DINO, DINOv2, DINOv3, MAE, SiT, Hugging Face, timm,
    solo-learn, lightly), timm:NAME, or builtin:shapes."""
    images: Input | None = None
    """Folder of images (searched through), one image, a list (text or CSV), or a video; without it the split of
    data.name to score."""
    data: ImagesConfig = field(default_factory=lambda: ImagesConfig(name=""))
    output: OutputFolder = "attention"
    """Folder the files are written to, in the tree of `images` (SPLIT/INDEX for a data set), listed in its
    manifest.csv."""
    formats: list[Literal["png", "overlay", "mask", "labels", "pca", "npz", "coco", "gif", "mp4"]] = field(
        default_factory=lambda: ["overlay", "mask"]
    )
    """png = heat map, overlay = heat map on the image, mask = the top mass, labels = the head that wins each pixel
    (palette index = head), pca = three principal components of the patch features as colors, npz = the
    numbers, coco = one coco.json of all masks, gif and mp4 = the images as frames of an animation in fixed colors."""
    maps: list[Literal["heads", "mean", "max", "rollout"]] = field(default_factory=lambda: ["heads", "mean"])
    """Each head of the last block, their mean, their max (each head at mass 1), the rollout over all blocks (arXiv
    2005.00928)."""
    threshold: PositiveShare = 0.6
    """Share of the attention's mass that a mask keeps."""
    clip_artifacts: Annotated[float, Range(above=1, ceiling=1_000_000)] | None = None
    """Patches whose token after the last block is longer than so many times the image's median (artifacts of networks
    without registers, arXiv 2309.16588; 2 is a good start) get the median of their neighbours in every map; nothing is
    clipped when not given."""
    image_size: Side | Literal["own"] = "own"
    """Shorter side in pixels that the backbone sees; own = each image's."""
    max_tokens: Width = 4096
    """Larger images are shrunk until they have at most so many patches."""
    batch_size: Batch = 16
    """Images in a forward pass; only images of one size share one."""
    upsample: Literal["nearest", "bilinear", "guided"] = "nearest"
    """From patches to pixels: nearest is the DINO release's; guided draws the bilinear map to the image's edges (He et
    al. 2010)."""
    guided_radius: Side | None = None
    """Window radius of `guided` in pixels; the side of a patch in the image when not given."""
    guided_eps: Annotated[float, Range(above=0, ceiling=1000)] = 1e-3
    """Variance of the brightness (0..1) below which a window of `guided` counts as flat."""
    draw_side: Side = 2048
    """Longest side in pixels of overlays, heat maps, components and animations; larger images are drawn smaller. Masks,
    labels and COCO masks always have the size of the image."""
    overlay_format: Literal["auto", "png", "jpeg"] = "auto"
    """auto = PNG up to a megapixel, JPEG above, which takes a quarter of the bytes."""
    fps: Annotated[float, Range(above=0, ceiling=1000)] | None = None
    """Frames a second of gif and mp4; the video's own, or 10 for images, when not given."""
    pca_basis: Literal["folder", "image"] = "folder"
    """Principal components of the whole folder (of 256 images, evenly spaced, where there are more), so that alike
    parts of different images get alike colors; or of each image by itself."""
    pca_foreground: bool = False
    """Show the components of the foreground alone, the rest black. The first component of all patches splits them; the
    side that holds fewer patches of the images' borders is the foreground."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward pass; auto = bf16 where the hardware multiplies it natively. The softmax is fp32."""
    workers: Processes | None = None
    """Threads that decode, compute, draw and write, each its own images; the process's cores, at most 8, when not
    given."""
    gallery: bool = False
    """Also write index.html: all images in one page that works from disk, with a slider for the threshold (adds npz to
    the formats)."""
    seed: Seed = 0
    """Seed of generated data, and of the draw behind data.test_length."""
    overwrite: bool = False
    """Replace files that stand in `output`."""


@dataclass
class SnapshotConfig:
    """Attention on the same images every few epochs, in RUN/snapshots: one watches it emerge."""

    every_epochs: EpochsOrNone = 0
    """Epochs between two pictures; one is drawn before training and one at the end too, then all side by side. 0 turns
    them off."""
    images: Annotated[int, Range(1, ceiling=1024)] = 8
    """Scored images that are drawn, class by class."""
