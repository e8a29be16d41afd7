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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vit_suite import distributed
from vit_suite.attention.export_draw import FORMATS, Drawing
from vit_suite.attention.export_merge import Export, merge
from vit_suite.attention.export_options import BASES, MAPS, UPSAMPLING, ExportOptions
from vit_suite.attention.export_worker import Worker
from vit_suite.attention.grids import cut, view_size
from vit_suite.attention.manifest import NAME, discard_parts, part
from vit_suite.attention.maps import require_cls
from vit_suite.attention.video import FRAMES, cut_frames, is_video, need_av
from vit_suite.data.decode import DecodeError
from vit_suite.data.inputs import Pictures, open_pictures
from vit_suite.data.registry import set_reading
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, unknown_name
from vit_suite.evaluation.features import frozen
from vit_suite.hardware import cores, one_thread

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
    """Images that the backbone saw as fewer than 16 patches; a larger `image_size` would show more."""
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
    mean: Sequence[float],
    std: Sequence[float],
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Write what the CLS token looks at, for every image of `images`: a folder tree, an image, a list of paths, a
    video, or a data set.

    backbone: vit_suite.models.backbone.Backbone; it runs where it is. (Without rollout, clip_artifacts and pca anything
        that `maps.attention_maps` takes.)
    output: mirrors the tree: DIR/cat.jpg gives OUTPUT/cat_head0_overlay.png, ..., OUTPUT/cat_mean_mask.png,
        OUTPUT/cat_attention.npz with DIR's subfolders. Where names differ in the extension alone, it stays
        (cat.jpg_head0_..., cat.png_head0_...). Images of a data set are SPLIT/INDEX. manifest.csv lists every file
        (vit_suite.attention.manifest).
    mean, std: of the backbone's channels, in 0..1; files are converted to as many channels.

    With a process group every rank takes its share, and rank 0 merges. Every picture written has the size of its file
    (EXIF rotation applied). Files that do not decode are skipped, returned and listed in OUTPUT/quarantine.txt.

    Raises UserError, before anything is written, for no images, an output folder that is not empty (unless
    `overwrite`), an unknown format, or a backbone without CLS token where attention is drawn; later only when not one
    image decodes.
    """
    options = options or ExportOptions()
    drawing = Drawing.of(Path(output), options)
    _check(backbone, drawing, options)
    started = time.monotonic()
    pictures, rate = _open(images, drawing, len(mean), options.overwrite)
    if options.reading is not None and not isinstance(images, ImageSource):
        set_reading(pictures.source, options.reading)
    worker = Worker(backbone, drawing, pictures, options, mean, std)
    blocks = cut(len(pictures), options.batch_size)[distributed.rank() :: distributed.world_size()]
    threads = min(8, options.workers or cores())
    summary = ExportSummary(drawing.output)
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


def _open(images: Any, drawing: Drawing, channels: int, overwrite: bool) -> tuple[Pictures, float]:
    """The pictures, and how many a second an animation shows. Nothing is written unless everything is in order on every
    rank."""
    video, output = is_video(images), drawing.output
    if video and Path(images).suffix.lower() != ".gif":
        need_av(f"reading the video '{images}'")
    if not video:
        pictures = open_pictures(images, output, channels)
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


def _check(backbone: Any, drawing: Drawing, options: ExportOptions) -> None:
    chosen: tuple[tuple[str, Sequence[str], Iterable[str]], ...] = (
        ("format", drawing.formats, FORMATS),
        ("map", drawing.maps, MAPS),
        ("upsampling", [drawing.mode], UPSAMPLING),
        ("basis", [options.pca_basis], BASES),
    )
    for kind, words, known in chosen:
        for word in words:
            if word not in known:
                raise unknown_name(kind, word, known)
        if not words:
            raise UserError(f"no {kind} to write; known: {', '.join(known)}")
    if drawing.attentive:
        require_cls(backbone)
    if not 0 < drawing.threshold <= 1:
        raise UserError(f"threshold is {drawing.threshold}; expected a share of the mass above 0, at most 1")
    for name in ("image_size", "max_tokens", "batch_size", "guided_radius"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a whole number from 1 up")
    if options.clip_artifacts is not None and not options.clip_artifacts > 1:
        raise UserError(f"clip_artifacts is {options.clip_artifacts}; expected a multiple of the median norm, above 1")
    if "mp4" in drawing.formats:
        need_av("format mp4")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file; expected a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(
            f"output '{output}' is not empty; name another folder, or give --overwrite to replace its files"
        )


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
