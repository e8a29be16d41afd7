"""A backbone that was read from a file, and how weights are put into a network: every key accounted for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vit_suite.config import BackboneConfig
from vit_suite.data.decode import from_pillow
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.lora import merged
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.families import IMAGENET
from vit_suite.weights.report import KeyReport, compare

log = logging.getLogger("vit_suite")


@dataclass
class LoadedBackbone:
    """A backbone and what belongs to it."""

    backbone: Backbone
    mean: list[float]
    """Channel means in 0..1 that its images are normalized with."""
    std: list[float]
    image_size: list[int]
    """[height, width] in pixels that it was trained at: the crop of an evaluation."""
    sha256: str
    """Of the weights, by name: the same numbers give the same value whatever file they came from."""
    source: str
    """The path or name that was asked for."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Everything else the file said (method, data set, epoch, ...)."""
    family: str = "vit-suite"
    """Name of its row in `weights/families.py`, `timm`, or `vit-suite`."""
    report: KeyReport | None = None
    """Which keys were taken."""

    @property
    def license(self) -> str:
        """Of these weights, or of those that their training started from."""
        if said := self.meta.get("license") or self.meta.get("start_license"):
            return str(said)
        trained_here = self.family == "vit-suite" and "method" in self.meta
        return "none, trained from random weights" if trained_here else "not said"

    def transform(self, images: Tensor | Image.Image | Sequence[Tensor | Image.Image]) -> Tensor:
        """The view that scores and exports see: (B, C, h, w), normalized, h x w = `image_size`.

        images: uint8 or float in 0..1, (B, C, H, W); or a list of (C, H_i, W_i) of different sizes; or a Pillow image,
            or a list of them, of any mode. Pillow opens PNGs of three 16-bit channels with 8 bits.
        """
        channels = self.backbone.cfg.channels
        if isinstance(images, Image.Image):
            images = [images]
        pixels = images if isinstance(images, Tensor) else [as_pixels(image, channels) for image in images]
        return eval_view(pixels, (self.image_size[0], self.image_size[-1]), self.mean, self.std)

    def untrained(self, seed: int = 0) -> LoadedBackbone:
        """The same architecture with fresh weights: the baseline that a score is read beside."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = Backbone(BackboneConfig(**{**asdict(self.backbone.cfg), "pretrained": False}))
        digest = weights_sha256(fresh.vit.state_dict())
        return LoadedBackbone(
            fresh.eval(), self.mean, self.std, self.image_size, digest, f"untrained:{self.source}", dict(self.meta)
        )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, types and numbers of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fill(
    options: Mapping[str, Any], state: Mapping[str, Tensor], left_out: list[str], source: str, partial: bool = False
) -> tuple[Backbone, KeyReport]:
    """(a backbone of `options` with the weights `state`, which have timm's names; the report of their keys).

    The network is built without memory first, so a description that does not fit the weights costs none.

    Raises:
        UserError: options that no network has; or how many keys are missing, unexpected or of another shape, and the
            first of them. With `partial` those stay as they were drawn.
    """
    with torch.device("meta"):
        empty = build(options, source)
    report = compare(empty.vit.state_dict(), state, left_out)
    if not report.complete and not (partial and report.matched):
        raise UserError(
            f"checkpoint '{source}' does not fit the architecture ({_describe(empty)}): {report.faults()}."
            " --allow_partial takes the keys that fit and leaves the others as they were drawn."
        )
    backbone = build(options, source)
    backbone.vit.load_state_dict({name: state[name] for name in report.matched}, strict=False)
    if not report.complete:
        log.warning("%s: only %s; the rest is UNTRAINED", source, report)
    return backbone, report


def _describe(backbone: Backbone) -> str:
    cfg = backbone.cfg
    return f"{cfg.name}, patch {cfg.patch_size}, dim {cfg.dim}, depth {cfg.depth}, heads {cfg.heads}"


def build(options: Mapping[str, Any], source: str) -> Backbone:
    try:
        return Backbone(BackboneConfig(**{**options, "pretrained": False}))
    except TypeError as error:
        raise UserError(f"checkpoint '{source}' describes a backbone with unknown options ({error}).") from None
    except UserError as error:
        raise UserError(f"checkpoint '{source}' describes a backbone that cannot be: {error}") from None


def finish(backbone: Backbone, description: Mapping[str, Any], source: str, **more: Any) -> LoadedBackbone:
    known = {"backbone", "mean", "std", "image_size", "sha256"}
    backbone = merged(backbone)  # a run's own checkpoint has LoRA's pairs apart
    mean, std = statistics((description.get("mean"), description.get("std")), backbone.cfg.channels)
    return LoadedBackbone(
        backbone.eval(),
        mean,
        std,
        list(description.get("image_size") or backbone.cfg.image_size or []),
        weights_sha256(backbone.vit.state_dict()),
        source,
        {key: value for key, value in description.items() if key not in known},
        **more,
    )


def statistics(given: tuple[Any, Any], channels: int) -> tuple[list[float], list[float]]:
    """(mean, std) for `channels`. Without given ones, ImageNet's; if their number is not `channels`, each channel gets
    their average."""
    pair = [list(values or default) for values, default in zip(given, IMAGENET, strict=True)]
    mean, std = (values if len(values) == channels else [sum(values) / len(values)] * channels for values in pair)
    return mean, std


def as_pixels(image: Tensor | Image.Image, channels: int) -> Tensor:
    """A Pillow image as uint8 (C, H, W); anything else as it is."""
    return torch.from_numpy(from_pillow(image, channels).copy()) if isinstance(image, Image.Image) else image
