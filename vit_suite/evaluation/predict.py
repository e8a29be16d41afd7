"""The class of every image of a set, by the head of a supervised or fine-tuned run: `vit-suite predict`.

The list of images and the batch size alone decide which images share a forward pass, and on a CPU each tensor operation
has one thread. So the file is the same, byte for byte, on any number of ranks and threads.

Axes: N images that decode, K classes, k classes that are named of each image.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vit_suite import distributed
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import MOST_THREADS, prefetch, try_load
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.evaluation.embedding import Embedder
from vit_suite.evaluation.features import frozen
from vit_suite.files import safe_cell, write_atomically
from vit_suite.hardware import cores, one_thread
from vit_suite.logs import progress_bar
from vit_suite.weights.checkpoint import LoadedBackbone
from vit_suite.weights.head import NAME, load_head

DIGITS = 6
"""Digits of a probability behind the point."""


@dataclass(frozen=True)
class Head:
    """A linear head and the names of its K classes."""

    layer: nn.Linear
    classes: list[str]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image."""

    index: int
    """Its number in the source."""
    numbers: list[int]
    """(k,): classes, the most probable first; of equals the lower number."""
    probabilities: list[float]
    """(k,): 0..1."""


def open_head(checkpoint: str, loaded: LoadedBackbone) -> Head:
    """The head beside the backbone of a run directory. UserError when there is none, or it belongs to other weights."""
    folder = Path(checkpoint)
    if not (folder / NAME).is_file():
        raise UserError(
            f"'{checkpoint}' holds no head ({NAME}), so nothing names classes: give the run directory of `vit-suite"
            f" finetune --checkpoint {checkpoint} --data.root CLASSES`, or of another supervised run."
        )
    layer, classes, sha256 = load_head(folder)
    if sha256 != loaded.sha256:
        raise UserError(
            f"the head of '{checkpoint}' was trained on other weights than its backbone.safetensors (their sha256"
            " differ): give the run directory as the training left it."
        )
    return Head(layer, classes)


def predict(
    embedder: Embedder, head: Head, source: ImageSource, top: int = 1, progress: bool = False
) -> tuple[list[Prediction], list[DecodeError]]:
    """The `top` classes of every image of `source`, in its order, and the files that do not decode.

    `embedder` must give the backbone's own representation, not normalized. Ranks share the images; all call this, and
    all get all predictions. UserError when no image decodes or the features are not finite.
    """
    options = embedder.options
    count = min(top, len(head.classes))

    def batch(indices: range) -> tuple[list[Prediction], list[DecodeError]]:
        loaded = [(index, try_load(source.load, index)) for index in indices]
        good = [(index, image) for index, image in loaded if not isinstance(image, DecodeError)]
        failures = [image for _, image in loaded if isinstance(image, DecodeError)]
        if not good:
            return [], failures
        with torch.no_grad():  # each thread has its own switch
            shares = head.layer(embedder([image for _, image in good])).double().softmax(1)  # (B, K)
        values, numbers = shares.sort(dim=1, descending=True, stable=True)
        rows = zip(good, numbers[:, :count].tolist(), values[:, :count].tolist(), strict=True)
        return [Prediction(index, numbers, values) for (index, _), numbers, values in rows], failures

    size = options.batch_size
    batches = [range(start, min(start + size, len(source))) for start in range(0, len(source), size)]
    mine = batches[distributed.rank() :: distributed.world_size()]
    found: list[Prediction] = []
    failures: list[DecodeError] = []
    error: str | None = None
    try:
        alone = one_thread() if embedder.device.type == "cpu" else nullcontext()
        with alone, frozen(embedder.backbone), _bar(sum(map(len, mine)), progress) as bar:
            threads = options.workers or min(MOST_THREADS, cores())
            for predictions, failed in prefetch(batch, mine, ahead=2 * threads, workers=threads):
                found += predictions
                failures += failed
                bar.update(len(predictions) + len(failed))
    except UserError as caught:  # raised below, on all ranks
        error = str(caught)
    parts = distributed.gather_objects((found, failures, error))
    if errors := [message for _, _, message in parts if message is not None]:
        raise UserError(errors[0])
    everything = sorted((one for part, _, _ in parts for one in part), key=lambda one: one.index)
    failures = sorted((one for _, part, _ in parts for one in part), key=lambda one: one.path)
    if not everything:
        raise UserError(f"none of the {len(source)} images of {source.title} decodes; the first: {failures[0]}")
    return everything, failures


def write_predictions(path: Path, predictions: Sequence[Prediction], source: ImageSource, classes: list[str]) -> None:
    """Write a CSV file with a row for each image: path, class, number, probability, then class_2, number_2, ... of
    further classes. Cells that a spreadsheet would take for a formula are quoted (`files.safe_cell`)."""
    count = len(predictions[0].numbers)
    marks = ["" if place == 0 else f"_{place + 1}" for place in range(count)]
    header = ["path", *(f"{name}{mark}" for mark in marks for name in ("class", "number", "probability"))]

    def rows() -> Iterator[list[object]]:
        for one in predictions:
            cells: list[object] = [safe_cell(source.path(one.index))]
            for number, share in zip(one.numbers, one.probabilities, strict=True):
                cells += [safe_cell(classes[number]), str(number), f"{share:.{DIGITS}f}"]
            yield cells

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows())

    write_atomically(path, write)


def check_table(path: Path, overwrite: bool) -> None:
    """UserError when `path` is no name of a CSV file, or something stands there already."""
    if path.suffix.lower() != ".csv":
        raise UserError(f"output '{path}': expected the ending .csv, not '{path.suffix}'.")
    if path.exists() and not overwrite:
        raise UserError(f"output '{path}' exists; name another, or give --overwrite to replace it.")


def _bar(total: int, shown: bool):
    ranks = distributed.world_size()
    name = "predict" if ranks == 1 else f"predict (rank 0 of {ranks})"
    return progress_bar(total, name, "image", shown=shown and distributed.rank() == 0, leave=True)
