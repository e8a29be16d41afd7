"""Features of a whole image set, written down: `vit-suite embed`.

The list of images and the batch size alone decide how images are cut into parts, and parts into batches. Ranks take
parts in turn; the threads of a rank take batches, and each tensor operation has one thread. The last bits of a matrix
product depend on its shape and its threads, so the bytes of the file are the same on any number of ranks and threads.

A part is written when it is done, into `OUTPUT.parts`. A run that was stopped goes on with the parts that are missing.
Rank 0 joins them into the output file and removes the folder.

Axes: N images that decode, D width of a feature, gh x gw patches, C channels, H x W pixels of a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vit_suite import distributed
from vit_suite.config import EmbedConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import MOST_THREADS, prefetch, try_load
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.evaluation.embedding_files import FORMATS, Columns, PatchFiles, Writer, is_patch_output
from vit_suite.evaluation.features import frozen
from vit_suite.files import write_atomically
from vit_suite.hardware import autocast, cores, one_thread, pick_precision, rank_device
from vit_suite.logs import progress_bar
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import check_image_size
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.checkpoint import LoadedBackbone

Kind = Literal["cls", "mean", "both", "patches"]
PART = 2048
"""Images of a part at most: what a kill costs on one rank."""
PARTS = 32
"""Parts that a small set is cut into, so that all ranks have work."""
PLAN = "plan.json"
TOKENS = "tokens"


@dataclass(frozen=True)
class EmbedOptions:
    """What is taken from an image, and how."""

    kind: Kind
    """cls: (D,) CLS token; mean: (D,) mean patch token; both: (2 D,) one after the other; patches: (gh, gw, D)."""
    normalize: bool
    """L2-normalize each feature (each token of `patches`)."""
    size: tuple[int, int]
    """(height, width) in pixels of the view."""
    batch_size: int
    precision: Literal["bf16", "fp32"]
    workers: int | None = None
    """Threads; the cores, at most 8, when None."""


@dataclass
class EmbedSummary:
    """What was done: on rank 0 everything, on other ranks their share."""

    output: Path
    images: int = 0
    resumed: int = 0
    """Images of parts that an earlier start had done."""
    failures: list[DecodeError] = field(default_factory=list)
    seconds: float = 0.0
    model_share: float = 0.0
    """Share of the threads' time that the forward pass took."""

    @property
    def images_per_second(self) -> float:
        return (self.images - self.resumed) / self.seconds if self.seconds else 0.0


def kind_of(backbone: Backbone, asked: Literal["auto", "cls", "mean", "both", "patches"], what: str) -> Kind:
    """`asked`, or for auto the backbone's own representation. UserError when it has no CLS token to give."""
    kind: Kind = backbone.cfg.pool if asked == "auto" else asked
    if kind in ("cls", "both") and not backbone.has_cls:
        raise UserError(f"features {kind}: the backbone of '{what}' has no CLS token; take mean or patches.")
    return kind


def make_embedder(cfg: EmbedConfig, loaded: LoadedBackbone) -> Embedder:
    """The backbone of `cfg.checkpoint` on this rank's device, with the options that decide its features."""
    device = rank_device(cfg.accelerator)
    size = [cfg.image_size, cfg.image_size] if cfg.image_size else loaded.image_size
    check_image_size(size, loaded.backbone.patch, "image_size")
    options = EmbedOptions(
        kind_of(loaded.backbone, cfg.features, cfg.checkpoint),
        cfg.normalize,
        (size[0], size[1]),
        cfg.batch_size,
        pick_precision(cfg.precision, device),
        cfg.workers,
    )
    return Embedder(loaded.backbone.to(device), loaded.mean, loaded.std, options)


class Embedder:
    """Images -> features of one backbone; safe to call from several threads."""

    def __init__(self, backbone: Backbone, mean: Sequence[float], std: Sequence[float], options: EmbedOptions) -> None:
        self.backbone, self.mean, self.std, self.options = backbone, mean, std, options
        self.device = next(backbone.parameters()).device
        self.busy = nullcontext() if self.device.type == "cpu" else threading.Lock()  # one pass at a time on a GPU
        self.lock = threading.Lock()
        self.seconds = 0.0

    @property
    def token_shape(self) -> tuple[int, int, int]:
        """(gh, gw, D) of the patch tokens of one image."""
        (height, width), (rows, columns) = self.options.size, self.backbone.patch
        return height // rows, width // columns, self.backbone.dim

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 (C, H_i, W_i) each -> float32 (B, D), or (B, gh, gw, D), on the CPU. UserError for features that are
        not finite."""
        views = eval_view(list(images), self.options.size, self.mean, self.std)
        with torch.no_grad(), self.busy:
            started = time.perf_counter()
            with autocast(self.options.precision, self.device):
                found = self._features(views.to(self.device)).float().cpu()
            with self.lock:
                self.seconds += time.perf_counter() - started
        if not torch.isfinite(found).all():
            raise UserError("the backbone's features are not finite: its training has diverged.")
        return functional.normalize(found, dim=-1) if self.options.normalize else found

    def _features(self, views: Tensor) -> Tensor:
        kind = self.options.kind
        if kind == self.backbone.cfg.pool:
            return self.backbone(views)
        tokens = self.backbone.tokens(views)
        if kind == "patches":
            return tokens.patches.unflatten(1, tokens.grid)
        mean = tokens.patches.float().mean(1)
        if tokens.cls is None or kind == "mean":
            return mean
        return tokens.cls if kind == "cls" else torch.cat([tokens.cls.float(), mean], dim=1)


@dataclass
class _Batch:
    """What a thread made of a batch of images."""

    part: int
    size: int
    """Images, those that failed included."""
    rows: np.ndarray
    """float32 (n, D); (n, 0) where tokens went to files."""
    index: list[int]
    sizes: list[tuple[int, int]]
    failures: list[DecodeError]


def embed(
    embedder: Embedder, source: ImageSource, output: Path, protocol: dict[str, Any], progress: bool = False
) -> EmbedSummary:
    """Write the features of all images of `source` to `output`; its ending names the format (`embedding_files`).

    `protocol`: what the numbers depend on (sha256 of the weights, ...); it is stored in the file, and a stopped run
    goes on only where it is the same. All ranks call this together.

    Raises UserError when no image decodes, features are not finite, or the output cannot be written; then nothing is
    left behind. An output that exists is replaced: callers ask first.
    """
    started = time.perf_counter()
    options, folder = embedder.options, Path(f"{output}.parts")
    parts = cut(len(source), options.batch_size)
    patches = None
    if options.kind == "patches":
        patches = PatchFiles(folder / TOKENS, output.suffix, len(source), embedder.token_shape)
    done = _prepare(folder, source, parts, protocol, patches)
    mine = [number for number in range(len(parts)) if number not in done][
        distributed.rank() :: distributed.world_size()
    ]
    threads = options.workers or min(MOST_THREADS, cores())
    error: str | None = None
    try:
        with one_thread() if embedder.device.type == "cpu" else nullcontext(), frozen(embedder.backbone):
            _run(embedder, source, {number: parts[number] for number in mine}, folder, patches, threads, progress)
    except UserError as found:
        error = str(found)
    for message in distributed.gather_objects(error):
        if message is not None:
            _discard(folder)
            raise UserError(message)
    summary = EmbedSummary(output, resumed=sum(len(sum_of(parts[number])) for number in done))
    busy = (time.perf_counter() - started) * max(1, min(threads, len(mine)))
    summary.model_share = min(1.0, embedder.seconds / busy)
    try:
        if distributed.rank() == 0:
            _join(summary, folder, len(parts), source, output, protocol, patches)
    except (UserError, OSError):
        _discard(folder)
        raise
    distributed.barrier()
    summary.seconds = time.perf_counter() - started
    return summary


def cut(images: int, batch_size: int) -> list[list[range]]:
    """Batches of each part, in the order of the images."""
    batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
    each = max(1, min(PART // batch_size, len(batches) // PARTS))
    return [batches[start : start + each] for start in range(0, len(batches), each)]


def sum_of(batches: Sequence[range]) -> range:
    """All images of neighbouring batches."""
    return range(batches[0].start, batches[-1].stop)


def _run(
    embedder: Embedder,
    source: ImageSource,
    parts: dict[int, list[range]],
    folder: Path,
    patches: PatchFiles | None,
    threads: int,
    progress: bool,
) -> None:
    """Compute and write these parts. (Seven parameters: four say what a part is made from, three say how.)"""

    def batch(item: tuple[int, range]) -> _Batch:
        number, indices = item
        loaded = [(index, try_load(source.load, index)) for index in indices]
        good = [(index, image) for index, image in loaded if not isinstance(image, DecodeError)]
        failures = [image for _, image in loaded if isinstance(image, DecodeError)]
        rows = np.empty((0, 0), np.float32)
        if good:
            rows = embedder([image for _, image in good]).numpy()
            if patches is not None:
                for (index, _), tokens in zip(good, rows, strict=True):
                    patches.write(index, tokens)
                rows = rows.reshape(len(good), -1)[:, :0]
        sizes = [(image.shape[1], image.shape[2]) for _, image in good]
        return _Batch(number, len(indices), rows, [index for index, _ in good], sizes, failures)

    items = [(number, indices) for number, batches in parts.items() for indices in batches]
    waiting: list[_Batch] = []
    total = sum(len(indices) for _, indices in items)
    ranks = distributed.world_size()
    name = "embed" if ranks == 1 else f"embed (rank 0 of {ranks})"
    with progress_bar(total, name, "image", shown=progress and distributed.rank() == 0, leave=True) as bar:
        for found in prefetch(batch, items, ahead=2 * threads, workers=threads):
            bar.update(found.size)
            waiting.append(found)
            if len(waiting) == len(parts[found.part]):
                _write_part(folder, waiting)
                waiting = []


def _write_part(folder: Path, batches: list[_Batch]) -> None:
    rows = [batch.rows for batch in batches if batch.index]
    arrays = {
        "rows": np.concatenate(rows) if rows else np.empty((0, 0), np.float32),
        "index": np.array([index for batch in batches for index in batch.index], np.int64),
        "sizes": np.array([size for batch in batches for size in batch.sizes], np.int32).reshape(-1, 2),
    }
    failures = [[failure.path, failure.reason] for batch in batches for failure in batch.failures]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, failures=np.array(json.dumps(failures)), **arrays)  # type: ignore[arg-type]

    write_atomically(folder / f"{batches[0].part:06d}.npz", write)


def _prepare(
    folder: Path, source: ImageSource, parts: list[list[range]], protocol: dict[str, Any], patches: PatchFiles | None
) -> set[int]:
    """Make the folder of parts, on rank 0, and say which parts it holds already. UserError where it cannot be made."""
    names = hashlib.sha256("\n".join(source.path(index) for index in range(len(source))).encode("utf-8", "replace"))
    plan = json.dumps({"protocol": protocol, "images": len(source), "paths": names.hexdigest()}, sort_keys=True)
    error: str | None = None
    done: set[int] = set()
    if distributed.rank() == 0:
        try:
            if folder.exists() and (not (folder / PLAN).is_file() or (folder / PLAN).read_text() != plan):
                _discard(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / PLAN, lambda path: path.write_text(plan))
            done = {int(path.stem) for path in folder.glob("[0-9]*.npz")} & set(range(len(parts)))
            if patches is not None:
                patches.prepare()
        except OSError as found:
            error = f"output '{folder.with_suffix('')}' cannot be written ({found.strerror})."
    for message, held in distributed.gather_objects((error, done)):
        if message is not None:
            raise UserError(message)
        done |= held
    if patches is not None:
        patches.open()
    return done


def _join(
    summary: EmbedSummary,
    folder: Path,
    count: int,
    source: ImageSource,
    output: Path,
    protocol: dict[str, Any],
    patches: PatchFiles | None,
) -> None:
    """Rank 0: one file of all parts. (Seven parameters: what to join, where to, and what to say about it.)"""

    def arrays() -> Iterator[Any]:
        for number in range(count):
            with np.load(folder / f"{number:06d}.npz") as part:
                yield part

    index, sizes, width = [], [], 0
    for part in arrays():
        index.append(part["index"])
        sizes.append(part["sizes"])
        summary.failures += [DecodeError(*entry) for entry in json.loads(str(part["failures"]))]
        if len(index[-1]) and not width and patches is None:
            width = part["rows"].shape[1]
    numbers = np.concatenate(index)
    summary.images = len(numbers)
    if not len(numbers):
        raise UserError(f"none of the {len(source)} images decodes; the first: {summary.failures[0]}")
    labels = np.full(len(numbers), -1, np.int64) if source.labels is None else source.labels.cpu().numpy()[numbers]
    columns = Columns(
        [source.path(int(number)) for number in numbers],
        labels,
        ["" if label < 0 or label >= len(source.classes) else source.classes[label] for label in labels],
        np.concatenate(sizes),
    )
    if patches is not None:
        patches.finish(output, numbers, columns, protocol)
    else:
        rows = (part["rows"] for part in arrays() if len(part["index"]))
        Writer(output, columns, protocol).write(rows, width)
    _discard(folder)


def _discard(folder: Path) -> None:
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def protocol_of(embedder: Embedder, source: ImageSource, sha256: str, checkpoint: str) -> dict[str, Any]:
    """What the features of `source` depend on, as the file says it."""
    options = asdict(embedder.options)
    del options["workers"]
    return options | {
        "size": list(embedder.options.size),
        "checkpoint": os.fspath(checkpoint),
        "sha256": sha256,
        "mean": list(embedder.mean),
        "std": list(embedder.std),
        "value_range": list(source.reading.value_range),
        "max_pixels": source.reading.max_pixels,
        "frame": source.reading.frame,
        "device": embedder.device.type,
    }


def check_output(output: Path, kind: Kind, overwrite: bool) -> None:
    """UserError when the ending is no format, does not go with what is asked for, or something is there already."""
    if kind == "patches" and not is_patch_output(output):
        raise UserError(f"output '{output}': patch tokens go into a folder (no ending: a .npz an image) or a .zarr.")
    if kind != "patches" and output.suffix.lower() not in FORMATS:
        raise UserError(f"output '{output}': expected the ending .parquet, .npz, .npy or .csv, not '{output.suffix}'.")
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise UserError(f"output '{output}' exists; name another, or give --overwrite to replace it.")
    if output.is_dir() and kind != "patches":
        raise UserError(f"output '{output}' is a folder; expected a file.")
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir():
        raise UserError(f"output '{output}' cannot be written: '{parent}' is a file.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output '{output}' cannot be written: no permission in '{parent}'.")
