"""Attention of every image of a folder, a list or a data set as files, at each image's own resolution, on one rank or
many.

The images are cut into blocks of neighbours. A block belongs to one rank and one thread. The thread decodes the block,
shows images of one patch grid to the backbone together, draws and writes; while one thread draws, others compute.

The last bits of a matrix product depend on its batch and on its threads. Here the list of images alone decides what is
computed together, and each operation has one thread. So the files are the same, byte for byte, on any number of ranks
and threads. Memory grows by a few dozen bytes for each image.

Axes: B images, C channels, H x W pixels of a file, gh x gw patches, h heads.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vit_suite import distributed
from vit_suite.attention.drawing import Drawing, Export
from vit_suite.attention.estimate import estimate
from vit_suite.attention.export_merge import merge
from vit_suite.attention.export_options import BASES, MAPS, OVERLAYS, UPSAMPLING, ExportOptions
from vit_suite.attention.export_worker import Worker
from vit_suite.attention.formats import FORMATS, attentive, check_formats
from vit_suite.attention.grids import cut, view_size
from vit_suite.attention.manifest import NAME, discard_parts, part
from vit_suite.attention.maps import require_cls
from vit_suite.attention.video import FRAMES, cut_frames, is_video, need_av
from vit_suite.data.decode import DecodeError
from vit_suite.data.inputs import Pictures, open_pictures
from vit_suite.data.pixels import Reading
from vit_suite.data.registry import set_reading
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, unknown_name
from vit_suite.evaluation.features import frozen
from vit_suite.hardware import cores, one_thread
from vit_suite.logs import progress_bar
from vit_suite.places import check_new_folder

__all__ = ["FORMATS", "MAPS", "UPSAMPLING", "ExportSummary", "export_attention", "view_size"]

log = logging.getLogger("vit_suite")

RATE = 10.0
"""Frames a second where no video says otherwise."""
MOST_THREADS = 8
"""Threads of a rank; more would wait for the disk."""


@dataclass
class ExportSummary:
    """What an export did: on rank 0 everything, on another rank its share, without the files."""

    output: Path
    images: int = 0
    """Images drawn."""
    files: Counter = field(default_factory=Counter)
    """Files written, by format."""
    failures: list[DecodeError] = field(default_factory=list)
    """Files that did not decode. They are listed in `quarantine` and in the manifest."""
    quarantine: Path | None = None
    """quarantine.txt, when something failed."""
    reading: Reading = Reading()
    """How the files were read."""
    shrunk: int = 0
    """Number of images that the backbone saw smaller than they are, because of the token limit."""
    coarse: int = 0
    """Number of images that the backbone saw as fewer than 16 patches. A larger `image_size` would show more."""
    reduced: int = 0
    """Number of images that were drawn smaller than they are, because of `draw_side`."""
    artifacts: int = 0
    """Number of patches that `clip_artifacts` replaced."""
    seconds: float = 0.0
    model_share: float = 0.0
    """The part of the time of this rank's threads that the forward pass took, 0..1."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def export_attention(
    backbone: Any,
    images: str | os.PathLike | ImageSource,
    output: str | os.PathLike,
    mean: Sequence[float],
    std: Sequence[float],
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Write what the CLS token looks at, for every image of `images`.

    Args:
        backbone: vit_suite.models.backbone.Backbone; it runs where it is. Without rollout, clip_artifacts and pca,
            anything that `maps.attention_maps` takes.
        images: a folder tree, an image, a list of paths, a video, or a data set.
        output: the folder that is written. It mirrors the tree of the images: DIR/cats/a.jpg gives
            OUTPUT/cats/a_head0_overlay.png, ..., OUTPUT/cats/a_mean_mask.png, OUTPUT/cats/a_attention.npz. Names that
            differ only in their extension keep it (a.jpg_head0_..., a.png_head0_...). Images of a data set are called
            SPLIT/INDEX. manifest.csv lists every file (vit_suite.attention.manifest).
        mean, std: of the backbone's channels, in 0..1. Files are converted to as many channels.

    With a process group every rank takes its share, and rank 0 merges. Masks and labels have the size of their file
    (after EXIF rotation); overlays and heat maps too, up to `draw_side`. Files that do not decode are skipped, returned
    and listed in OUTPUT/quarantine.txt.

    Raises:
        UserError: before anything is written, for no images, an output folder that is not empty (unless `overwrite`),
            an unknown format, or a backbone without CLS token where attention is drawn; later only when not one image
            decodes.
    """
    options = options or ExportOptions()
    drawing = Drawing.of(Path(output), options)
    _check(backbone, drawing, options)
    started = time.monotonic()
    pictures, rate = _open(images, drawing, len(mean), options)
    if options.progress and distributed.rank() == 0:
        log.info("%s", estimate(pictures, drawing, backbone.heads))
    worker = Worker(backbone, drawing, pictures, options, mean, std)
    blocks = cut(len(pictures), options.batch_size)[distributed.rank() :: distributed.world_size()]
    threads = min(MOST_THREADS, options.workers or cores())
    summary = ExportSummary(drawing.output, reading=pictures.source.reading)
    drawing.output.mkdir(parents=True, exist_ok=True)
    try:
        with (
            part(drawing.output, distributed.rank()).open("w") as file,
            _alone(backbone),
            _bar(sum(map(len, blocks)), options.progress) as bar,
        ):
            if "pca" in drawing.formats and options.pca_basis == "folder":
                worker.find_basis()
            for lines in worker.run(blocks, threads, bar):
                file.writelines(lines)
    except BaseException:
        discard_parts(drawing.output)
        raise
    distributed.barrier()
    if distributed.rank() == 0:
        merge(summary, Export(drawing, pictures, backbone.heads, options.fps or rate, threads))
    else:
        summary.images = sum(map(len, blocks))
    summary.seconds = time.monotonic() - started
    summary.model_share = worker.model_seconds / max(worker.seconds, 1e-9)
    return summary


def _open(images: Any, drawing: Drawing, channels: int, options: ExportOptions) -> tuple[Pictures, float]:
    """(the pictures, frames a second of an animation).

    A video is cut into frames here. Nothing is written unless everything is in order on every rank.
    """
    video, output, reading = is_video(images), drawing.output, options.reading
    if video and reading is not None and reading.frame:
        raise UserError(f"data.frame {reading.frame}, but all frames of the video '{images}' are drawn.")
    if video and Path(images).suffix.lower() != ".gif":
        need_av(f"reading the video '{images}'")
    if not video:
        pictures = open_pictures(images, output, channels)
        if reading is not None and not isinstance(images, ImageSource):
            set_reading(pictures.source, reading)
    check_new_folder("output", output, options.overwrite)
    distributed.barrier()
    if distributed.rank() == 0:
        (output / NAME).unlink(missing_ok=True)  # of an earlier export: a manifest means that the export is finished
    if not video:
        return pictures, RATE
    # Only rank 0 cuts the video, and only rank 0 writes animations.
    rate = cut_frames(Path(images), output / FRAMES) if distributed.rank() == 0 else RATE
    distributed.barrier()
    return open_pictures(output / FRAMES, output, channels), rate


def _check(backbone: Any, drawing: Drawing, options: ExportOptions) -> None:
    chosen: tuple[tuple[str, Sequence[str], Iterable[str]], ...] = (
        ("format", drawing.formats, FORMATS),
        ("map", drawing.maps, MAPS),
        ("upsampling", [drawing.mode], UPSAMPLING),
        ("overlay format", [drawing.overlay_format], OVERLAYS),
        ("basis", [options.pca_basis], BASES),
    )
    for kind, words, known in chosen:
        for word in words:
            if word not in known:
                raise unknown_name(kind, word, known)
        if not words:
            raise UserError(f"no {kind} to write; known: {', '.join(known)}")
    if attentive(drawing.formats):
        require_cls(backbone)
    if not 0 < drawing.threshold <= 1:
        raise UserError(f"threshold is {drawing.threshold}; expected a share of the mass above 0, at most 1")
    for name in ("image_size", "max_tokens", "batch_size", "guided_radius", "draw_side"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a whole number from 1 up")
    if options.clip_artifacts is not None and not options.clip_artifacts > 1:
        raise UserError(f"clip_artifacts is {options.clip_artifacts}; expected a multiple of the median norm, above 1")
    check_formats(drawing.formats)


@contextmanager
def _alone(backbone: Any) -> Iterator[None]:
    """Within it, the backbone is in eval mode and each tensor operation has one thread."""
    with one_thread(), frozen(backbone) if isinstance(backbone, nn.Module) else nullcontext():
        yield


def _bar(total: int, shown: bool):
    """Progress bar of rank 0: its images that are drawn or skipped, and their number a second."""
    ranks = distributed.world_size()
    name = "attention" if ranks == 1 else f"attention (rank 0 of {ranks})"
    return progress_bar(total, name, "image", shown=shown and distributed.rank() == 0, leave=True)
