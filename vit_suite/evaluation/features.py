"""Features of a whole image set: the CLS token after the final norm, L2-normalized, as DINO's eval_knn.py takes it.

With several ranks, call these functions on every rank. Ranks take batches in turn, and all get the rows in the order of
the images. The last bits of a matrix product depend on its shape, so the list of images alone decides what is in a
batch. Then the features are the same, bit for bit, on any number of ranks (with the same number of threads, or the same
GPU).

Axes: N images that decode, D feature width, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite import distributed
from vit_suite.config.limits import pair
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import read
from vit_suite.errors import UserError
from vit_suite.hardware import AskedPrecision, autocast, pick_precision
from vit_suite.logs import progress_bar
from vit_suite.views.evaluate import eval_view

TILE = 256
"""Rows of a bank that a rank takes at a time where ranks share it, in turn."""
FREE_SHARE = 0.5
"""Share of a GPU's free memory that features may take."""


class Features(NamedTuple):
    """`features, labels = result[:2]`; all on the CPU, in the order of the source."""

    features: Tensor
    """float32 (N, D), rows of length 1."""
    labels: Tensor
    """int64 (N,), -1 for an image without a label."""
    indices: Tensor
    """int64 (N,): which image of the source each row is; shorter than the source when files did not decode."""
    failures: list[DecodeError]
    """The files that did not decode; also reported to the source's quarantine where it has one."""
    rows: Tensor | None = None
    """int64 (n,): which rows of the whole `features` (n, D) holds, where ranks share them (`own_rows`); None where it
    holds all."""


@dataclass(frozen=True)
class FeatureOptions:
    """How features are computed."""

    batch_size: int = 256
    """Images in a forward pass; the last bits of a feature depend on it."""
    device: torch.device | str | None = None
    """Where the forward pass runs; the backbone's own device when None."""
    precision: AskedPrecision = "auto"
    workers: int | None = None
    """Threads that decode, at most two batches ahead; the cores, at most 8, when None."""
    title: str | None = None
    """Of a progress bar; none is shown when None."""
    unit: bool = True
    """L2-normalize the features. Without it they are what the backbone returns, in fp32."""
    shared: bool = False
    """Each rank keeps its share of the rows (`Features.rows`) instead of all."""


def extract_features(
    backbone: nn.Module,
    source: Any,
    image_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    options: FeatureOptions | None = None,
) -> Features:
    """What `backbone` (any module, a classifier too) returns for every image of `source` (an ImageSource) under the
    deterministic evaluation view.

    The backbone runs in eval mode without gradients, and every module gets its own mode back afterwards. Images held in
    one tensor are sliced; others decode in threads beside the forward pass.

    Files that do not decode are left out and returned in `failures`. UserError when the source is empty or nothing
    decodes, or when the source's quarantine has more than its limit.
    """
    options = options or FeatureOptions()
    device = torch.device(options.device) if options.device is not None else next(backbone.parameters()).device
    precision = pick_precision(options.precision, device)

    def forward(images: Tensor) -> Tensor:
        with autocast(precision, device):
            features = backbone(images.to(device)).float()
        return functional.normalize(features, dim=1) if options.unit else features

    with frozen(backbone):
        return collect(source, (image_size, mean, std), forward, replace(options, device=device))


def raw_pixel_features(
    source: Any,
    image_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    options: FeatureOptions | None = None,
) -> Features:
    """The normalized pixels of the evaluation view, (N, C * H * W), L2-normalized: a baseline that training must beat.

    They are made on the CPU.
    """

    def flatten(images: Tensor) -> Tensor:
        return functional.normalize(images.float().flatten(1), dim=1)

    return collect(source, (image_size, mean, std), flatten, replace(options or FeatureOptions(), device="cpu"))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it, `module` is in eval mode without gradients. Afterwards every submodule gets its own mode back, so a
    frozen part of a model in training stays frozen."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


View = tuple[int | Sequence[int], Sequence[float], Sequence[float]]
"""Size (side, or height and width, in pixels), mean and std of the evaluation view."""


def collect(source: Any, view: View, embed: Callable[[Tensor], Tensor], options: FeatureOptions) -> Features:
    """Run `embed`, (B, C, H, W) -> (B, ...), over every batch of evaluation views on `options.device`.

    Images that do not decode are dropped and reported. Rows keep the shape and type that `embed` gives them;
    `options.unit` and `options.precision` are not used here. A UserError of one rank is raised on all ranks.
    """
    if len(source) == 0:
        raise UserError(f"{_title(source)} holds no images")
    device, batch_size, shared = torch.device(options.device or "cpu"), options.batch_size, options.shared
    size, mean, std = pair(view[0]), view[1], view[2]
    count, world = -(-len(source) // batch_size), distributed.world_size()
    batches = _batches(source, batch_size, range(distributed.rank(), count, world), options.workers)
    rows: Tensor | None = None
    indices: list[int] = []
    failures: list[DecodeError] = []
    kept = 0
    bar = _bar(len(source), options.title)

    def next_part() -> tuple[list[int], Tensor | UserError | None, list[DecodeError]]:
        """(numbers, rows, failures) of this rank's next batch; in place of the rows an error, which all ranks raise."""
        try:
            numbers, images, bad = next(batches, ([], [], []))
            return numbers, embed(eval_view(_on(images, device), size, mean, std)).cpu() if numbers else None, bad
        except UserError as error:
            return [], error, []

    for _ in range(-(-count // world)):  # as many rounds on each rank; in the last one some ranks have no batch
        for found, part, failed in distributed.gather_objects(next_part()):
            if isinstance(part, UserError):
                raise part
            if part is not None:
                if rows is None:  # memory for the whole set: joining batches at the end would hold the set twice
                    rows = torch.empty(
                        len(own_rows(len(source))) if shared else len(source), *part.shape[1:], dtype=part.dtype
                    )
                part = part[is_own(torch.arange(len(found)) + len(indices))] if shared else part
                rows[kept : kept + len(part)] = part
                kept += len(part)
            indices.extend(found)
            failures.extend(failed)
            bar.update(len(found) + len(failed))
    bar.close()
    quarantine = getattr(source, "quarantine", None)
    if failures and quarantine is not None:
        quarantine.report(failures, _title(source), len(source))
    if rows is None:
        raise UserError(f"none of the {len(source)} images of {_title(source)} decodes; the first: {failures[0]}")
    index = torch.tensor(indices, dtype=torch.int64)
    labels = torch.full_like(index, -1) if source.labels is None else source.labels.cpu()[index].long()
    return Features(rows[:kept], labels, index, failures, own_rows(len(index)) if shared and world > 1 else None)


def moved(rows: Tensor, device: torch.device) -> Tensor:
    """`rows` on `device` where they take at most half of its free memory; otherwise where they are, and callers copy
    them part by part."""
    if device.type == "cuda" and rows.device != device:
        if rows.numel() * rows.element_size() > FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return rows
    return rows.to(device)


def is_own(rows: Tensor) -> Tensor:
    """Whether this rank keeps these rows of a whole that ranks share."""
    return rows // TILE % distributed.world_size() == distributed.rank()


def own_rows(total: int) -> Tensor:
    """The rows that this rank keeps, ascending, of `total` rows that ranks share. Ranks take whole tiles in turn, so
    each of N ranks keeps 1/N of the rows, to within a tile."""
    rows = torch.arange(total)
    return rows[is_own(rows)]


def pick_rows(features: Features, rows: Tensor) -> Features:
    """Only these rows of the whole, renumbered from 0; shared among ranks if `features` are."""
    chosen = features._replace(labels=features.labels[rows], indices=features.indices[rows])
    if features.rows is None:
        return chosen._replace(features=features.features[rows])
    held = torch.full((len(features.labels),), -1)
    held[features.rows] = torch.arange(len(features.rows))
    places = held[rows]
    here = (places >= 0).nonzero().squeeze(1)
    whole = torch.empty(len(rows), *features.features.shape[1:], dtype=features.features.dtype)
    for where, part in distributed.gather_objects((here, features.features[places[here]])):
        whole[where] = part
    own = own_rows(len(rows))
    return chosen._replace(features=whole[own], rows=own)


def _on(images: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return images.to(device) if isinstance(images, Tensor) else [image.to(device) for image in images]


def _batches(
    source, batch_size: int, which: range, workers: int | None
) -> Iterator[tuple[list[int], Any, list[DecodeError]]]:
    """(indices, images, failures) of these batches in order. Images are uint8: a tensor (B, C, H, W), or a list of
    (C, H_i, W_i)."""
    spans = [range(number * batch_size, min((number + 1) * batch_size, len(source))) for number in which]
    held = getattr(source, "images", None)
    if isinstance(held, Tensor):
        for span in spans:
            yield list(span), held[span.start : span.stop], []
        return

    loaded = read(source, chain.from_iterable(spans), workers=workers, ahead=2 * batch_size)
    for span in spans:
        images = list(islice(loaded, len(span)))
        good = [(index, image) for index, image in images if not isinstance(image, DecodeError)]
        failed = [image for _, image in images if isinstance(image, DecodeError)]
        yield [index for index, _ in good], _stacked([image for _, image in good]), failed


def _stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    """One tensor when all sizes agree, because the view of a batch is far faster than the views of single images."""
    return torch.stack(images) if images and len({image.shape for image in images}) == 1 else images


def _title(source) -> str:
    return getattr(source, "title", None) or getattr(source, "name", None) or type(source).__name__


def _bar(total: int, desc: str | None):
    return progress_bar(total, desc, "image", shown=desc is not None and distributed.rank() == 0)
