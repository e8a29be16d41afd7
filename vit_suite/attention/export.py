"""Attention of every image of a folder tree as files: heat maps, overlays, masks, raw numbers, at each image's own resolution.

Images decode in threads, images of one patch grid share a forward pass, and files are drawn and written in threads beside the model.
Nothing grows with the number of images but the list of their names.

Axes: B images, C channels, H x W pixels of a file, gh x gw patches, h heads.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite.attention import maps, render
from vit_suite.data.decode import DecodeError, Quarantine, decode
from vit_suite.data.files import found_in, walk_images
from vit_suite.errors import UserError, unknown_name
from vit_suite.evaluation.features import cores, prefetch
from vit_suite.hardware import autocast, pick_precision
from vit_suite.views.multicrop import normalise_

FORMATS = {"png": "heat", "overlay": "overlay", "mask": "mask", "npz": "attention"}
"""Format -> last part of the file name."""
HEADS = ("all", "mean", "heads")
UPSAMPLING = ("nearest", "bilinear")

WAITING_BYTES = 256 * 2**20
"""Decoded pictures that wait for others of their grid; beyond it the fullest group runs as it is."""
ATTENTION_BYTES = 512 * 2**20
"""Largest attention matrix (B, h, T, T) in float32; a batch is cut to it, since T = 4096 takes 64 MiB a head and image."""


@dataclass
class ExportSummary:
    """What an export did."""

    output: Path
    images: int = 0
    """Images drawn."""
    files: Counter = field(default_factory=Counter)
    """Files written, by format."""
    failures: list[DecodeError] = field(default_factory=list)
    """Files that did not decode; they are listed in `quarantine`."""
    quarantine: Path | None = None
    """quarantine.txt, when something failed."""
    shrunk: int = 0
    """Images shown to the backbone smaller than they are, because of the token limit."""
    coarse: int = 0
    """Images that the backbone saw as fewer than 16 patches; a `resize` would show more."""
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


@dataclass
class _Job:
    """One decoded image on its way."""

    name: str
    """Output path without endings, relative to the output folder."""
    path: str
    picture: np.ndarray
    """uint8 (C, H, W), as decoded."""
    view: Tensor
    """uint8 (C, gh * patch, gw * patch), what the backbone sees before normalisation."""
    shrunk: bool
    """Whether the token limit made the view smaller."""


@dataclass
class _Drawing:
    """What to draw of each image."""

    output: Path
    formats: Sequence[str]
    threshold: float
    heads: str
    mode: Literal["nearest", "bilinear"]


def export_attention(
    backbone: Any,
    images: str | os.PathLike,
    output: str | os.PathLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    formats: Sequence[str] = ("overlay", "mask"),
    threshold: float = 0.6,
    heads: Literal["all", "mean", "heads"] = "all",
    resize: int | None = None,
    max_tokens: int = 4096,
    batch_size: int = 16,
    upsample: Literal["nearest", "bilinear"] = "nearest",
    device: torch.device | str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> ExportSummary:
    """Write what the CLS token of the last block looks at, for every image under `images` (a folder tree, or one file).

    backbone: anything with patch_size, heads, prefix_tokens and last_attention (vit_suite.models.backbone.Backbone).
    output: mirrors the tree: DIR/cat.jpg gives OUTPUT/cat_head0_overlay.png, ..., OUTPUT/cat_mean_mask.png, OUTPUT/cat_attention.npz
        with DIR's subfolders; where names differ in the extension alone, it stays (cat.jpg_head0_..., cat.png_head0_...).
    mean, std: of the backbone's channels, in 0..1; their number is the number of channels that files are converted to.
    formats: png (heat map), overlay, mask (top `threshold` of the mass), npz (raw attention, grid, sizes).
    heads: each head and the mean over heads (all), or one kind.
    resize: shorter side in pixels before the backbone, the image's own when None. Sides then go to the nearest multiple of the
        patch (the whole picture is seen, none cut off), and both shrink until there are at most `max_tokens` patches.
    upsample: nearest repeats patches as the DINO release does; bilinear interpolates, and masks are then taken pixel by pixel.
    device, precision: of the forward pass; the backbone's own device when None. workers: threads that decode, and that draw.

    Every picture written has the size of its file (EXIF rotation applied). Files that do not decode are skipped, returned and listed
    in OUTPUT/quarantine.txt. Raises UserError, before anything is written, for no images, an output folder that is not empty
    (unless `overwrite`: files are replaced, others stay), an unknown format, or a backbone without CLS token; later only when not one
    image decodes.
    """
    drawing = _Drawing(Path(output), tuple(dict.fromkeys(formats)), threshold, heads, upsample)
    _check(backbone, drawing, resize, max_tokens, batch_size)
    names = list_images(Path(images), drawing.output)
    _check_output(drawing.output, overwrite)
    device = torch.device(device) if device is not None else _device_of(backbone)
    threads = min(8, workers or cores())
    load = _loader(backbone.patch_size, len(mean), resize, max_tokens)
    summary, started = ExportSummary(drawing.output), time.monotonic()
    with _bar(len(names), progress) as bar, _Writer(threads, bar) as writer:
        jobs = _decoded(prefetch(load, names.items(), ahead=min(batch_size, 2 * threads), workers=threads), summary, bar)
        for batch in _batches(jobs, backbone, batch_size):
            attention = _forward(backbone, batch, mean, std, device, precision)
            for job, own in zip(batch, attention, strict=True):
                summary.images += 1
                summary.coarse += own[0].numel() < 16
                summary.shrunk += job.shrunk
                writer.submit(draw, drawing, job.name, job.path, job.picture, own)
    if not summary.images:
        raise UserError(f"none of the {len(names)} images under '{images}' decodes; the first: {summary.failures[0]}")
    summary.files = writer.written
    summary.seconds = time.monotonic() - started
    return _list_failures(summary, len(names))


def list_images(images: Path, output: Path) -> dict[str, str]:
    """{output name without endings: path} of every image under `images`, in sorted order; what lies in `output` is not input.

    UserError when there is none.
    """
    if images.is_file():
        return {images.stem: str(images)}
    if not images.is_dir():
        raise UserError(f"images '{images}' does not exist; expected a folder of images, or one image")
    if output.exists() and output.resolve() == images.resolve():
        raise UserError(f"output '{output}' is the images folder itself; name another, results must not mix with input")
    inside = os.path.relpath(output.resolve(), images.resolve()) + os.sep
    files = [name for name in walk_images(images) if not name.startswith(inside)]
    if not files:
        raise UserError(f"no images under '{images}': it holds {found_in(images)}")
    return {name: str(images / file) for name, file in zip(output_names(files), files, strict=True)}


def output_names(files: Sequence[str]) -> list[str]:
    """Relative paths of images -> distinct names without extension; those that would be alike keep theirs.

    Letter case does not distinguish: the output may lie on a disk that ignores it.
    """
    names = [os.path.splitext(file)[0] for file in files]
    while True:  # a kept extension can meet another name (a.jpg beside a.png and a.jpg.png), so look again
        seen = Counter(name.lower() for name in names)
        alike = [i for i, name in enumerate(names) if seen[name.lower()] > 1 and name != files[i]]
        if not alike:
            break
        for i in alike:
            names[i] = files[i]
    seen = Counter()
    for i, name in enumerate(names):  # A.jpg and a.jpg differ in case alone: number them
        seen[name.lower()] += 1
        if seen[name.lower()] > 1:
            names[i] = f"{name}~{seen[name.lower()]}"
    return names


def view_size(size: Sequence[int], patch: int, resize: int | None, max_tokens: int) -> tuple[int, int]:
    """(height, width) in pixels that the backbone sees of an image of `size`: multiples of `patch`, at most `max_tokens` patches."""
    height, width = size
    if resize is not None:
        factor = resize / min(height, width)
        height, width = height * factor, width * factor
    rows, columns = (max(1, int(side / patch + 0.5)) for side in (height, width))
    if rows * columns > max_tokens:
        factor = (max_tokens / (rows * columns)) ** 0.5
        rows = max(1, min(max_tokens, int(rows * factor)))
        columns = max(1, min(int(columns * factor), max_tokens // rows))
    return rows * patch, columns * patch


def draw(drawing: _Drawing, name: str, path: str, picture: np.ndarray, attention: Tensor) -> Counter:
    """Write the files of one image: picture uint8 (C, H, W), attention (h, gh, gw). Returns how many, by format."""
    size = picture.shape[1:]
    base = drawing.output / name
    shown = render.as_picture(picture)
    written: Counter = Counter()
    for label, heat, mask in _maps(drawing, attention, size):
        paths = {kind: base.with_name(f"{base.name}_{label}_{FORMATS[kind]}.png") for kind in ("png", "overlay", "mask")}
        pictures = {
            "png": lambda heat=heat: render.heat_map(heat),
            "overlay": lambda heat=heat, mask=mask: render.overlay(shown, heat, mask),
            "mask": lambda mask=mask: mask,
        }
        for kind in set(drawing.formats) - {"npz"}:
            render.write_png(paths[kind], pictures[kind]())
            written[kind] += 1
    if "npz" in drawing.formats:
        arrays = {"attention": attention.numpy(), "mean": attention.mean(0).numpy(), "grid": attention.shape[-2:]}
        arrays |= {"image_size": size, "threshold": drawing.threshold, "path": path}
        render.write_npz(base.with_name(f"{base.name}_{FORMATS['npz']}.npz"), **arrays)
        written["npz"] += 1
    return written


def _maps(drawing: _Drawing, attention: Tensor, size: Sequence[int]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(label, map, mask) at `size` of each map that is asked for, one after the other: at 12 megapixels they do not all fit."""
    chosen = [] if drawing.heads == "mean" else [(f"head{i}", head) for i, head in enumerate(attention)]
    if drawing.heads != "heads":
        chosen.append(("mean", maps.mean_map(attention[None])[0]))
    for label, small in chosen:
        heat = maps.upsample(small, tuple(size), drawing.mode)
        if drawing.mode == "nearest":
            mask = maps.upsample(maps.mass_mask(small, drawing.threshold), tuple(size))
        else:
            mask = maps.mass_mask(heat, drawing.threshold)
        yield label, heat.numpy(), mask.numpy()


def _check(backbone: Any, drawing: _Drawing, resize: int | None, max_tokens: int, batch_size: int) -> None:
    formats, threshold = drawing.formats, drawing.threshold
    chosen = (("format", formats, FORMATS), ("heads", [drawing.heads], HEADS), ("upsampling", [drawing.mode], UPSAMPLING))
    for kind, words, known in chosen:
        for word in words:
            if word not in known:
                raise unknown_name(kind, word, known)
    if not formats:
        raise UserError(f"no format to write; known: {', '.join(FORMATS)}")
    maps.require_cls(backbone)
    if not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold}; expected a share of the mass above 0, at most 1")
    for name, value in (("resize", resize), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected a whole number from 1 up")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file; expected a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(f"output '{output}' is not empty; name another folder, or give --overwrite to replace its files")
        (output / "quarantine.txt").unlink(missing_ok=True)  # of an earlier export


def _device_of(backbone: Any) -> torch.device:
    first = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


def _loader(patch: int, channels: int, resize: int | None, max_tokens: int) -> Callable[[tuple[str, str]], _Job | DecodeError]:
    """What the decoding threads run: (output name, path) -> a job, or the reason why there is none."""

    def load(item: tuple[str, str]) -> _Job | DecodeError:
        try:
            picture = decode(item[1], channels)
        except DecodeError as error:
            return error
        size = view_size(picture.shape[1:], patch, resize, max_tokens)
        shrunk = size != view_size(picture.shape[1:], patch, resize, 2**62)
        return _Job(*item, picture, _resized(picture, size), shrunk)

    return load


def _resized(picture: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (C, *size), bicubic and antialiased; untouched when it has that size."""
    image = torch.from_numpy(np.array(picture, order="C"))
    if tuple(image.shape[1:]) == size:
        return image
    return functional.interpolate(image[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]


def _bar(total: int, shown: bool):
    """Progress in images that are drawn (or skipped), and their number a second."""
    from tqdm import tqdm

    return tqdm(total=total, desc="attention", unit="image", disable=not shown)


def _decoded(jobs, summary: ExportSummary, bar) -> Iterator[_Job]:
    """The jobs that decoded; the others go to `summary.failures`."""
    for job in jobs:
        if isinstance(job, DecodeError):
            summary.failures.append(job)
            bar.update()
        else:
            yield job


def _batches(jobs: Iterator[_Job], backbone: Any, batch_size: int) -> Iterator[list[_Job]]:
    """Jobs of one view size together: as many as batch_size and the attention's memory allow, sooner when too many pictures wait."""
    waiting: dict[tuple[int, int], list[_Job]] = {}
    held = 0
    for job in jobs:
        size = tuple(job.view.shape[1:])
        waiting.setdefault(size, []).append(job)
        held += job.picture.nbytes
        tokens = backbone.prefix_tokens + size[0] * size[1] // backbone.patch_size**2
        full = max(1, min(batch_size, ATTENTION_BYTES // (4 * backbone.heads * tokens**2)))
        crowded = held > WAITING_BYTES or sum(map(len, waiting.values())) > 8 * batch_size
        if len(waiting[size]) >= full or crowded:
            fullest = size if len(waiting[size]) >= full else max(waiting, key=lambda key: len(waiting[key]))
            batch = waiting.pop(fullest)
            held -= sum(one.picture.nbytes for one in batch)
            yield batch
    yield from waiting.values()


def _forward(backbone, batch: list[_Job], mean, std, device: torch.device, precision) -> Tensor:
    """CLS attention (B, h, gh, gw) float32 on the CPU."""
    views = torch.stack([job.view for job in batch]).to(device).float().div_(255)
    with autocast(pick_precision(precision, device), device):
        return maps.attention_maps(backbone, normalise_(views, mean, std)).cpu()


def _list_failures(summary: ExportSummary, total: int) -> ExportSummary:
    if summary.failures:
        summary.quarantine = summary.output / "quarantine.txt"
        Quarantine(summary.quarantine, limit=1.0).report(summary.failures, "the images folder", total)
    return summary


class _Writer:
    """Runs `draw` in threads; `submit` waits when too much is queued, and raises what a thread raised."""

    def __init__(self, workers: int, bar) -> None:
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="draw")
        self.limit = 2 * workers
        self.bar = bar
        self.pending: deque[Future] = deque()
        self.written: Counter = Counter()

    def submit(self, function, *arguments) -> None:
        self.pending.append(self.pool.submit(function, *arguments))
        while len(self.pending) > self.limit:
            self._take()

    def _take(self) -> None:
        self.written += self.pending.popleft().result()
        self.bar.update()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            while self.pending and kind is None:
                self._take()
        finally:
            self.pool.shutdown(cancel_futures=True)
