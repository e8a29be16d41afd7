"""Attention of every image of a folder, a list or a data set as files, at each image's own resolution, on one rank or
many.

The images are cut into blocks of neighbours. A block belongs to one rank and one thread, which decodes it, shows images
of one patch grid to the backbone together, draws and writes; while one thread draws, others compute. What is computed
together, and in how many threads (one), is settled by the list of images alone: so the files are the same, byte for
byte, on any number of ranks and threads, although the last bits of a matrix product depend on its batch and its
threads. Nothing grows with the number of images but a few dozen bytes for each.

Axes: B images, C channels, H x W pixels of a file, gh x gw patches, h heads.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vit_suite import distributed
from vit_suite.attention.export_draw import FORMATS, MAPS, UPSAMPLING, Drawing
from vit_suite.attention.export_inputs import FRAMES, Pictures, cut_frames, is_video, need_av, open_pictures
from vit_suite.attention.export_merge import merge
from vit_suite.attention.export_worker import Limits, Worker
from vit_suite.attention.grids import cut, view_size
from vit_suite.attention.manifest import NAME, discard_parts, part
from vit_suite.attention.maps import require_cls
from vit_suite.config import ImagesConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.registry import set_reading
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, unknown_name
from vit_suite.evaluation.features import frozen
from vit_suite.hardware import cores, one_thread, pick_precision

__all__ = ["FORMATS", "MAPS", "UPSAMPLING", "ExportSummary", "export_attention", "view_size"]

RATE = 10.0
"""Frames a second where no video says otherwise."""


@dataclass
class ExportSummary:
    """What an export did: on rank 0 all of it, on others their share, without files."""

    output: Path
    images: int = 0
    """Images drawn."""
    files: Counter = field(default_factory=Counter)
    """Files written, by format."""
    failures: list[DecodeError] = field(default_factory=list)
    """Files that did not decode; they are listed in `quarantine` and in the manifest."""
    quarantine: Path | None = None
    """quarantine.txt, when something failed."""
    shrunk: int = 0
    """Images shown to the backbone smaller than they are, because of the token limit."""
    coarse: int = 0
    """Images that the backbone saw as fewer than 16 patches; a `resize` would show more."""
    artifacts: int = 0
    """Patches that `clip_artifacts` replaced."""
    seconds: float = 0.0
    model_share: float = 0.0
    """Share of the time of this rank's threads that the forward pass took."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def export_attention(
    backbone: Any,
    images: str | os.PathLike | ImageSource,
    output: str | os.PathLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    formats: Sequence[str] = ("overlay", "mask"),
    maps: Sequence[str] = ("heads", "mean"),
    threshold: float = 0.6,
    clip_artifacts: float | None = None,
    resize: int | None = None,
    max_tokens: int = 4096,
    batch_size: int = 16,
    upsample: Literal["nearest", "bilinear", "guided"] = "nearest",
    guided_radius: int | None = None,
    guided_eps: float = 1e-3,
    fps: float | None = None,
    device: torch.device | str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    reading: ImagesConfig | None = None,
    progress: bool = False,
) -> ExportSummary:
    """Write what the CLS token looks at, for every image of `images`: a folder tree, an image, a list of paths, a
    video, or a data set.

    backbone: vit_suite.models.backbone.Backbone (without rollout and clip_artifacts anything that `maps.attention_maps`
    takes).
    output: mirrors the tree: DIR/cat.jpg gives OUTPUT/cat_head0_overlay.png, ..., OUTPUT/cat_mean_mask.png,
        OUTPUT/cat_attention.npz with DIR's subfolders; where names differ in the extension alone, it stays
        (cat.jpg_head0_..., cat.png_head0_...). Images of a data set are SPLIT/INDEX. manifest.csv lists every file
        (vit_suite.attention.manifest).
    mean, std: of the backbone's channels, in 0..1; their number is the number of channels that files are converted to.
    formats: png (heat map), overlay, mask (top `threshold` of the mass), labels (which head wins each pixel; palette
        index = head), npz (the numbers: attention (h, gh, gw), mean, max, rollout, grid, sizes), coco (coco.json: all
        masks), gif and mp4 (the images as frames, overlays in fixed colors).
    maps: each head of the last block (heads), their mean, their max (each head at mass 1), the rollout over all blocks.
    clip_artifacts: patches whose token after the last block is longer than so many times the image's median get the
        median of their neighbours in every map (arXiv 2309.16588); npz tells which. None: nothing is clipped.
    resize: shorter side in pixels before the backbone, the image's own when None. Sides then go to the nearest multiple
        of the patch (the whole picture is seen, none cut off), and both shrink until there are at most `max_tokens`
        patches.
    upsample: nearest repeats patches as the DINO release does; bilinear interpolates, guided then draws the map to the
        picture's edges (window radius in pixels, a patch when None; eps); masks are then taken pixel by pixel.
    fps: frames a second of gif and mp4; the video's own, else 10, when None.
    reading: how files are read (value_range, max_pixels); a data set brings its own.
    device, precision: of the forward pass; the backbone's own device when None. workers: threads (the cores, at most 8,
    when None).

    With a process group every rank takes its share, and rank 0 merges. Every picture written has the size of its file
    (EXIF rotation applied). Files that do not decode are skipped, returned and listed in OUTPUT/quarantine.txt. Raises
    UserError, before anything is written, for no images, an output folder that is not empty (unless `overwrite`: files
    are replaced, others stay), an unknown format, or a backbone without CLS token; later only when not one image
    decodes.
    """
    unique = (tuple(dict.fromkeys(words)) for words in (formats, maps))
    drawing = Drawing(Path(output), *unique, threshold, upsample, guided_radius, guided_eps)
    _check(backbone, drawing, resize=resize, max_tokens=max_tokens, batch_size=batch_size, guided_radius=guided_radius)
    if clip_artifacts is not None and not clip_artifacts > 1:
        raise UserError(f"clip_artifacts is {clip_artifacts}; expected a multiple of the median norm, above 1")
    started = time.monotonic()
    pictures, rate = _open(images, drawing, len(mean), overwrite)
    if reading is not None and not isinstance(images, ImageSource):
        set_reading(pictures.source, reading)
    device = torch.device(device) if device is not None else _device_of(backbone)
    limits = Limits(resize, max_tokens, batch_size)
    worker = Worker(
        backbone, drawing, pictures, limits, mean, std, clip_artifacts, device, pick_precision(precision, device)
    )
    blocks = cut(len(pictures), batch_size)[distributed.rank() :: distributed.world_size()]
    threads = min(8, workers or cores())
    summary = ExportSummary(drawing.output)
    drawing.output.mkdir(parents=True, exist_ok=True)
    try:
        with (
            part(drawing.output, distributed.rank()).open("w") as file,
            _alone(backbone),
            _bar(sum(map(len, blocks)), progress) as bar,
        ):
            for lines in worker.run(blocks, threads, bar):
                file.writelines(lines)
    except BaseException:
        discard_parts(drawing.output)
        raise
    distributed.barrier()
    if distributed.rank() == 0:
        merge(summary, drawing, pictures, backbone.heads, fps or rate, threads)
    else:
        summary.images = sum(map(len, blocks))
    summary.seconds = time.monotonic() - started
    summary.model_share = worker.model_seconds / max(worker.seconds, 1e-9)
    return summary


def _open(images: Any, drawing: Drawing, channels: int, overwrite: bool) -> tuple[Pictures, float]:
    """The pictures, and how many a second an animation shows. Nothing is written unless everything is in order on every
    rank."""
    video, output = is_video(images), drawing.output
    if video and Path(images).suffix.lower() != ".gif":
        need_av(f"reading the video '{images}'")
    pictures = None if video else open_pictures(images, output, channels)
    _check_output(output, overwrite)
    distributed.barrier()
    if distributed.rank() == 0:
        (output / NAME).unlink(missing_ok=True)  # of an earlier export: it stands for a finished one
    if not video:
        return pictures, RATE
    rate = (
        cut_frames(Path(images), output / FRAMES) if distributed.rank() == 0 else RATE
    )  # only rank 0 writes animations
    distributed.barrier()
    return open_pictures(output / FRAMES, output, channels), rate


def _check(backbone: Any, drawing: Drawing, **numbers: int | None) -> None:
    chosen = (
        ("format", drawing.formats, FORMATS),
        ("map", drawing.maps, MAPS),
        ("upsampling", [drawing.mode], UPSAMPLING),
    )
    for kind, words, known in chosen:
        for word in words:
            if word not in known:
                raise unknown_name(kind, word, known)
        if not words:
            raise UserError(f"no {kind} to write; known: {', '.join(known)}")
    require_cls(backbone)
    if not 0 < drawing.threshold <= 1:
        raise UserError(f"threshold is {drawing.threshold}; expected a share of the mass above 0, at most 1")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a whole number from 1 up")
    if "mp4" in drawing.formats:
        need_av("format mp4")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file; expected a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(
            f"output '{output}' is not empty; name another folder, or give --overwrite to replace its files"
        )


def _device_of(backbone: Any) -> torch.device:
    first = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def _alone(backbone: Any) -> Iterator[None]:
    """The backbone in eval mode, and one thread for each tensor operation."""
    with one_thread(), frozen(backbone) if isinstance(backbone, nn.Module) else nullcontext():
        yield


def _bar(total: int, shown: bool):
    """Progress in images that are drawn (or skipped), and their number a second; on many ranks that of rank 0."""
    from tqdm import tqdm

    ranks = distributed.world_size()
    name = "attention" if ranks == 1 else f"attention (rank 0 of {ranks})"
    return tqdm(total=total, desc=name, unit="image", disable=not shown or distributed.rank() != 0)
