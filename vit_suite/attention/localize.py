"""What a backbone finds in images whose objects are known: attention, LOST and TokenCut, image by image, against truth.

Images are seen whole, at their own size or with a given shorter side. Images of one patch grid in a block of neighbours
share a forward pass. Ranks take blocks in turn, and every rank gets the numbers of all images. The list of images alone
decides what is computed together, so the numbers are the same, bit for bit, on any number of ranks. Nothing is kept of
an image but its numbers.

Axes: B images of a pass, N images, M maps, T thresholds, gh x gw patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.attention import grids
from vit_suite.attention.discovery import DISCOVERERS, last_keys
from vit_suite.attention.grids import attention_bytes, cut, in_batches, view_of
from vit_suite.attention.maps import attention_maps, mass_mask, mean_map, require_cls
from vit_suite.config import LocalizeConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import read
from vit_suite.data.registry import open_test, set_reading
from vit_suite.data.source import ImageSource
from vit_suite.data.truth import Truths, open_truths, source_truths
from vit_suite.errors import UserError
from vit_suite.evaluation.localization import Baselines, Found, baselines, center_overlaps, covered, on_object, overlap
from vit_suite.hardware import autocast, pick_precision
from vit_suite.logs import progress_bar
from vit_suite.models.backbone import Backbone
from vit_suite.views.multicrop import normalize_

METHODS = ("attention", *DISCOVERERS)
WAITING_BYTES = 256 * 2**20
"""Limit of the views and masks that wait for others of their grid. Above it the fullest group runs as it is."""
AHEAD = 32
"""Images that are decoded before they are needed."""


@dataclass
class Looked:
    """What a pass over the images left behind."""

    found: dict[str, Found] = field(default_factory=dict)
    """By method."""
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Image of the source -> its (H, W), in the order of the rows of `found`."""
    empty: int = 0
    """Number of images without an object; they are left out."""
    failures: list[DecodeError] = field(default_factory=list)
    """Images that do not decode."""


@dataclass
class Localizer:
    """Looks with one backbone after another at the same images under the same protocol."""

    source: ImageSource
    truths: Truths
    methods: Sequence[str] = METHODS
    thresholds: Sequence[float] = (0.6,)
    """Shares of the attention's mass that a mask keeps."""
    shorter: int | None = None
    """Length in pixels of the shorter side that the backbone sees; the image's own when None."""
    max_tokens: int = 4096
    batch_size: int = 64
    device: torch.device | str = "cpu"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    progress: bool = False

    def look(self, backbone: Backbone, mean: Sequence[float], std: Sequence[float]) -> Looked:
        """What each method finds with this backbone. Called on every rank.

        mean, std: of the backbone's channels, in 0..1. UserError for attention without a CLS token, and when no image
        is left.
        """
        if "attention" in self.methods:
            require_cls(backbone)
        looked = Looked()
        failures: dict[int, DecodeError] = {}
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {method: [] for method in self.methods}
        for own in distributed.gather_objects(self._own(backbone, mean, std)):
            looked.sizes |= own.sizes
            looked.empty += own.empty
            failures |= own.failures
            for method, rows in own.parts.items():
                parts[method] += rows
        if not looked.sizes:
            unusable = [*self.source.failures, *failures.values()]
            first = f" The first that cannot be used: {unusable[0]}" if unusable else ""
            raise UserError(
                f"none of the {len(self.source)} images of {self.source.title} decodes and shows an object.{first}"
            )
        looked.failures = [failures[index] for index in sorted(failures)]
        order = torch.tensor(list(looked.sizes)).argsort()  # grouped by grid, batches come in another order
        looked.sizes = dict(sorted(looked.sizes.items()))
        for method, rows in parts.items():
            overlaps, hits = (torch.stack(column)[order] for column in zip(*rows, strict=True))
            heads = method == "attention"
            looked.found[method] = Found(overlaps, hits, tuple(self.thresholds) if heads else None, heads)
        return looked

    def _own(self, backbone: Backbone, mean: Sequence[float], std: Sequence[float]) -> _Share:
        """What this rank finds in its blocks."""
        own = _Share({}, 0, {}, {method: [] for method in self.methods})
        device = torch.device(self.device)
        for batch in self._batches(backbone, own):
            views = torch.stack([job.view for job in batch]).to(device).float().div_(255)
            with autocast(pick_precision(self.precision, device), device):
                for method, (masks, cells) in self._masks(backbone, normalize_(views, mean, std)).items():
                    grid = masks.shape[-2], masks.shape[-1]
                    for job, own_masks, own_cells in zip(batch, masks, cells, strict=True):
                        overlaps = overlap(own_masks, job.truth, job.size)
                        own.parts[method].append((overlaps, on_object(own_cells, grid, job.truth, job.size)))
            own.sizes.update((job.index, job.size) for job in batch)
        return own

    def _masks(self, backbone: Backbone, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{method: (masks bool (B, M, T, gh, gw), cells (B, M) that the maps point at)}, on the CPU."""
        found = {}
        if "attention" in self.methods:
            heads = attention_maps(backbone, images).cpu()
            maps = torch.cat((heads, mean_map(heads).unsqueeze(1)), 1)  # (B, M, gh, gw)
            found["attention"] = (
                torch.stack([mass_mask(maps, share) for share in self.thresholds], 2),
                maps.flatten(2).argmax(-1),
            )
        others = [method for method in self.methods if method != "attention"]
        if others:
            keys = last_keys(backbone, images)
            grid = backbone.grid_of(images)
            with torch.autocast(images.device.type, enabled=False):
                for method in others:
                    masks, _, seeds = (part.cpu() for part in DISCOVERERS[method](keys, grid))
                    found[method] = masks[:, None, None], seeds[:, None]
        return found

    def _batches(self, backbone: Backbone, own: _Share) -> Iterator[list[_Job]]:
        """Batches of this rank's images that show an object. Images of one view size in a block go together, as many as
        `batch_size` and the memory of their attention matrices allow. The other images are counted in `own`.
        """
        blocks = cut(len(self.source), self.batch_size)[distributed.rank() :: distributed.world_size()]
        indices = [index for block in blocks for index in block]
        jobs = iter(read(self.source, indices, ahead=AHEAD, block=1, then=partial(self._job, backbone.patch)))
        shown = self.progress and distributed.rank() == 0
        bar = progress_bar(len(indices), "localize", "image", shown)

        def most(size: tuple[int, int]) -> int:
            return min(self.batch_size, grids.ATTENTION_BYTES // attention_bytes(backbone, size, backbone.heads))

        for block in blocks:
            yield from in_batches(own.counted(islice(jobs, len(block))), most, WAITING_BYTES)
            bar.update(len(block))
        bar.close()

    def _job(self, patch: tuple[int, int], index: int, image: Tensor) -> _Job | None:
        """None for an image without an object."""
        truth = self.truths.load(index)
        if not (len(truth) if truth.is_floating_point() else bool((truth == 1).any())):
            return None
        return _Job(
            index, view_of(image, patch, self.shorter, self.max_tokens), truth, (image.shape[1], image.shape[2])
        )


def open_scored(cfg: LocalizeConfig, channels: int) -> tuple[ImageSource, Truths]:
    """The images to score and where their objects are; UserError when there is no truth."""
    if cfg.images is not None:
        if cfg.truth is None:
            raise UserError(
                "images need a truth to be scored against: give --truth, a folder of masks or a file of boxes."
            )
        if cfg.data.name:
            raise UserError(
                f"both images and data.name {cfg.data.name} are given; expected a folder with its truth, or a data set."
            )
        source, truths = open_truths(cfg.images, cfg.truth, cfg.mask_values, channels, cfg.box_origin)
        return set_reading(source, cfg.data), truths
    if cfg.truth is not None:
        raise UserError("truth is given without images; data sets bring their own.")
    if not cfg.data.name:
        raise UserError(
            "nothing to score: give --images DIR --truth DIR_OR_FILE, or a data set with --data.name tiny_imagenet or"
            " shapes."
        )
    found = open_test(cfg.data.whole(channels), cfg.seed)
    brought = source_truths(found)
    if brought is None:
        raise UserError(
            f"{found.name} has neither masks nor boxes: use tiny_imagenet or shapes, or --images DIR --truth"
            " DIR_OR_FILE."
        )
    return found, brought


def without_model(truths: Truths, sizes: Mapping[int, tuple[int, int]]) -> Baselines:
    """Scores of a centered box and of the whole image. `sizes`: image of the source -> its (H, W). Called on every
    rank.
    """

    def row(index: int) -> tuple[Tensor, Tensor, Tensor]:
        truth, size = truths.load(index), sizes[index]
        center = on_object(torch.zeros(1, dtype=torch.long), (1, 1), truth, size)[0]
        return center_overlaps(truth, size), center, torch.tensor(covered(truth, size), dtype=torch.float64)

    rows = distributed.map_over_ranks(row, list(sizes))
    return baselines(*(torch.stack(column) for column in zip(*rows, strict=True)))


@dataclass
class _Share:
    """What one rank finds; indices are of the source."""

    sizes: dict[int, tuple[int, int]]
    empty: int
    failures: dict[int, DecodeError]
    parts: dict[str, list[tuple[Tensor, Tensor]]]
    """By method: (overlaps, hits) of each image, in the order of `sizes`."""

    def counted(self, jobs: Iterable[tuple[int, _Job | DecodeError | None]]) -> Iterator[_Job]:
        """The images to look at. Images that do not decode or show no object are counted and left out."""
        for index, job in jobs:
            if isinstance(job, DecodeError):
                self.failures[index] = job
            elif job is None:
                self.empty += 1
            else:
                yield job


@dataclass
class _Job:
    """An image to look at."""

    index: int
    view: Tensor
    """uint8 (C, gh * patch, gw * patch)."""
    truth: Any
    size: tuple[int, int]
    """(H, W) of the image."""

    @property
    def bytes(self) -> int:
        return self.view.nbytes + self.truth.nbytes
