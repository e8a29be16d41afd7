"""What an export draws, and how: the options of `export_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vit_suite.config import ImagesConfig

MAPS = ("heads", "mean", "max", "rollout")
UPSAMPLING = ("nearest", "bilinear", "guided")
OVERLAYS = ("auto", "png", "jpeg")
BASES = ("folder", "image")


@dataclass(frozen=True)
class ExportOptions:
    """How pictures are drawn. The fields have the names of the command's options."""

    formats: Sequence[str] = ("overlay", "mask")
    """Rows of `formats.FORMATS`: png (heat map), overlay, mask (top `threshold` of the mass), labels (the head that
    wins each pixel; palette index = head), pca (three principal components of the patch features as colors), npz (the
    numbers: attention (h, gh, gw), mean, max, rollout, grid, sizes), coco (coco.json of all masks), gif and mp4 (the
    images as frames, overlays in fixed colors)."""
    maps: Sequence[str] = ("heads", "mean")
    """Each head of the last block (heads), their mean, their max (each head at mass 1), the rollout over all blocks."""
    threshold: float = 0.6
    """Share of the mass that a mask keeps."""
    clip_artifacts: float | None = None
    """Multiple of the image's median norm. A patch whose token after the last block is longer than that gets the median
    of its neighbours in every map (arXiv 2309.16588); the npz tells which. Nothing is clipped when None."""
    image_size: int | None = None
    """Length in pixels of the shorter side that the backbone sees; the image's own when None. Both sides then go to the
    nearest multiple of the patch: the whole picture is seen, nothing is cut off."""
    max_tokens: int = 4096
    """Largest number of patches. The backbone sees larger images shrunk."""
    batch_size: int = 16
    """Largest number of images in a forward pass."""
    upsample: Literal["nearest", "bilinear", "guided"] = "nearest"
    """nearest repeats patches as the DINO release does; bilinear interpolates; guided then draws the map to the
    picture's edges. Masks of the last two are taken pixel by pixel."""
    guided_radius: int | None = None
    """Window radius of `guided` in pixels; a patch when None."""
    guided_eps: float = 1e-3
    """Variance of the brightness (0..1) below which a window of `guided` counts as flat."""
    draw_side: int = 2048
    """Longest side in pixels of pictures for the eye: overlays, heat maps, components, animations. Larger images are
    drawn smaller. Masks, labels and COCO masks always have the size of the file."""
    overlay_format: Literal["auto", "png", "jpeg"] = "auto"
    """auto: PNG up to a megapixel (2**20 pixels), JPEG above, which takes a quarter of the bytes."""
    pca_basis: Literal["folder", "image"] = "folder"
    """One basis for all images, or one for each."""
    pca_foreground: bool = False
    """Color the foreground alone; the rest is black."""
    fps: float | None = None
    """Frames a second of gif and mp4; the video's own, else 10, when None."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass."""
    workers: int | None = None
    """Threads; the cores, at most 8, when None."""
    reading: ImagesConfig | None = None
    """How files are read (value_range, max_pixels); a data set brings its own."""
    overwrite: bool = False
    """Replace files that stand in the output folder; others stay."""
    progress: bool = False
    """Show a progress bar."""
