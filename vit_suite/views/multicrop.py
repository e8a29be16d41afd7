"""Random crops of a batch, drawn per sample, made in batches: DINO's multi-crop, SiT's two views, one view for
supervised training.

Order of a view as in DINO (arXiv 2104.14294 section 3.2; main_dino.py DataAugmentationDINO): crop-resize, flip, jitter,
gray, blur, solarize, normalize. draw.py says where the random numbers come from.

Axes: B images, V = G + L views (global, then local), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vit_suite.config import CropConfig, ViewsConfig
from vit_suite.config.limits import pair
from vit_suite.data.order import Batch
from vit_suite.errors import UserError
from vit_suite.hardware import send
from vit_suite.views import color
from vit_suite.views.draw import Draw, ViewParameters
from vit_suite.views.planes import Group, Planes, crop_planes
from vit_suite.views.planes_color import normalized, recolor_planes_
from vit_suite.views.resample import check_pixels, crop_resize_views

ATTEMPTS = 10
"""Random areas that torchvision's RandomResizedCrop tries before it takes the center of the image."""
DRAWS = 2 * ATTEMPTS + 16
"""Uniform numbers that a view needs: area and ratio of each attempt, place (2), flip, jitter, factors of the jitter (4)
and their order (4), gray, blur, sigma, solarize."""


def draw_boxes(uniform: Tensor, height: Tensor, width: Tensor, scale: Tensor, ratio: Sequence[float]) -> Tensor:
    """Whole-pixel boxes (..., 4) by the rule of torchvision's RandomResizedCrop, from uniform (..., 22) numbers.

    The first of 10 (area, log ratio) pairs that fits is taken, else the largest centered box within the ratio.

    Args:
        height, width: (...) of the images.
        scale: (..., 2) least and most area, as a share of the image.
        ratio: least and most width over height.
    """
    uniform, height, width = uniform.double(), height.double(), width.double()
    low, high = scale.double().unbind(-1)
    area = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), uniform[..., :ATTEMPTS]) * (height * width).unsqueeze(-1)
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    aspect = (uniform[..., ATTEMPTS : 2 * ATTEMPTS] * (log_high - log_low) + log_low).exp()
    wide, tall = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide > 0) & (wide <= width.unsqueeze(-1)) & (tall > 0) & (tall <= height.unsqueeze(-1))
    first = fits.to(torch.uint8).argmax(-1, keepdim=True)
    wide, tall, found = wide.gather(-1, first)[..., 0], tall.gather(-1, first)[..., 0], fits.any(-1)
    shape = width / height
    whole_wide = torch.where(shape > ratio[1], (height * ratio[1]).round(), width)
    whole_tall = torch.where(shape < ratio[0], (width / ratio[0]).round(), height)
    wide, tall = torch.where(found, wide, whole_wide), torch.where(found, tall, whole_tall)
    place = uniform[..., 2 * ATTEMPTS :]
    top = torch.where(found, (place[..., 0] * (height - tall + 1)).floor(), ((height - tall) / 2).floor())
    left = torch.where(found, (place[..., 1] * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
    return torch.stack([top, left, tall, wide], -1).long()


def _per_view(cfg: CropConfig, values: Sequence[float]) -> Tensor:
    """(V,) values of a setting that lists one value for each global crop, and a last one for all local crops."""
    return torch.tensor([*values[: cfg.global_crops], *[values[-1]] * cfg.local_crops], dtype=torch.float32)


def draw_views(cfg: Any, sizes: Tensor, draw: Draw) -> ViewParameters:
    """Random parameters of the views of the images of `draw`. sizes: (B, 2) their heights and widths, on the CPU."""
    views = cfg.global_crops + cfg.local_crops
    uniform = draw.uniform(views, DRAWS, purpose="views")
    if len(uniform) != len(sizes):
        raise ValueError(f"rows select {len(uniform)} of {draw.total} samples for {len(sizes)} images")
    scales = [cfg.global_scale] * cfg.global_crops + ([cfg.local_scale] * cfg.local_crops if cfg.local_crops else [])
    scale = torch.tensor(scales).expand(len(sizes), views, 2)
    height, width = sizes[:, :1].expand(-1, views), sizes[:, 1:].expand(-1, views)
    boxes = draw_boxes(uniform[..., : 2 * ATTEMPTS + 2], height, width, scale, cfg.ratio)
    rest = uniform[..., 2 * ATTEMPTS + 2 :]
    strength = torch.tensor(cfg.jitter_strength)
    low, high = 1 - strength, 1 + strength
    low[:3].clamp_(min=0)
    low[3], high[3] = -strength[3], strength[3]
    return ViewParameters(
        boxes=boxes,
        flip=rest[..., 0] < cfg.flip,
        jitter=rest[..., 1] < cfg.jitter,
        factors=low + rest[..., 2:6] * (high - low),
        order=rest[..., 6:10].argsort(-1),
        gray=rest[..., 10] < cfg.gray,
        blur=rest[..., 11] < _per_view(cfg, cfg.blur),
        sigma=cfg.blur_sigma[0] + rest[..., 12] * (cfg.blur_sigma[1] - cfg.blur_sigma[0]),
        solarize=rest[..., 13] < _per_view(cfg, cfg.solarize),
    )


def image_sizes(images: Tensor | Sequence[Tensor]) -> Tensor:
    """(B, 2) int64 height and width of a batch or a list of images, on the CPU."""
    if isinstance(images, Tensor):
        return torch.tensor(images.shape[-2:]).expand(len(images), 2)
    return torch.tensor([image.shape[-2:] for image in images])


class MultiCrop:
    """The views of every image of a batch, augmented and normalized, on the images' device.

    mean, std: C floats in 0..1.
    """

    def __init__(self, cfg: CropConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        validate_views(cfg)
        self.cfg = cfg
        self.mean, self.std = list(mean), list(std)

    def __call__(self, images: Tensor | Sequence[Tensor], draw: Draw) -> list[Tensor]:
        """[global1, .., local1 .. localL], each (B, C, S, S) fp32.

        images: uint8 or float 0..1 (B, C, H, W), or a list of (C, H_i, W_i): the images of `draw`.
        """
        return self.apply(images, draw_views(self.cfg, image_sizes(images), draw))

    def apply(self, images: Tensor | Sequence[Tensor], parameters: ViewParameters) -> list[Tensor]:
        """The views by `parameters`, which `draw_views` drew."""
        return self.groups(images, self.sizes(parameters))

    def sizes(self, parameters: ViewParameters) -> list[tuple[ViewParameters, tuple[int, int]]]:
        """The parameters of the views of each size (`ViewParameters.views`), and their (height, width) in pixels."""
        count = self.cfg.global_crops
        found = [(parameters.views(slice(0, count)), pair(self.cfg.global_size))]
        if self.cfg.local_crops:
            local: Any = self.cfg
            found.append((parameters.views(slice(count, None)), pair(local.local_size)))
        return found

    def groups(
        self, images: Tensor | Sequence[Tensor], sizes: Sequence[tuple[ViewParameters, tuple[int, int]]]
    ) -> list[Tensor]:
        """The views of each (parameters, (height, width)) in turn. A GPU makes those of all sizes together."""
        check_pixels(images)
        if images[0].device.type == "cpu":
            return [view for drawn, size in sizes for view in self._on_cpu(images, drawn, size)]
        check_channels(images[0].shape[0], self.mean, self.std)
        groups = [Group(drawn.boxes, drawn.flip, size) for drawn, size in sizes]
        planes = crop_planes(images, groups)
        recolor_planes_(planes, [drawn for drawn, _ in sizes])
        return [view for views in normalized(planes, self.mean, self.std) for view in views.unbind(0)]

    def _on_cpu(self, images: Tensor | Sequence[Tensor], drawn: ViewParameters, size: tuple[int, int]) -> list[Tensor]:
        views = crop_resize_views(images, drawn.boxes, drawn.flip, size)
        x = views.flatten(0, 1)  # (V * B, C, S, S)
        recolor_(x, drawn)
        normalize_(x, self.mean, self.std)
        return list(views.unbind(0))


def recolor_(x: Tensor, drawn: ViewParameters) -> None:
    """Jitter, gray, blur and solarize x (N, C, S, S) in 0..1, in place; `drawn` has first axes N."""
    if x.device.type != "cpu":
        planes = Planes.of(x)
        recolor_planes_(planes, [drawn])
        x.copy_(next(planes.groups()).squeeze(1).transpose(0, 1))
        return
    color.jitter_(x, drawn.factors, drawn.order, drawn.jitter)
    color.grayscale_(x, drawn.gray)
    color.blur_(x, drawn.sigma, drawn.blur)
    color.solarize_(x, drawn.solarize)


def check_channels(channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """UserError unless there is a mean and a deviation for each channel."""
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"the images have {channels} channels but data.mean has {len(mean)} and data.std {len(std)} values."
        )


def normalize_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel of (N, C, H, W), in place."""
    check_channels(x.shape[1], mean, std)
    gain = torch.tensor([1 / value for value in std])
    shift = -torch.tensor(list(mean)) * gain
    gain, shift = (send(values.view(-1, 1, 1), x.device) for values in (gain, shift))
    return x.mul_(gain).add_(shift)


class ViewsInWorkers:
    """Makes the views of a micro-batch in the loader worker that decoded it, as a picklable `transform` of the loader.

    The random numbers are those that the device would draw, so both make the same views.

    Args:
        views: `(images, draw) -> list of views`.
        total: images of a global batch.
    """

    def __init__(self, views: Callable[[Sequence[Tensor], Draw], list[Tensor]], seed: int, total: int) -> None:
        self.views, self.seed, self.total = views, seed, total

    def __call__(self, images: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """The views, each (B, C, S, S) fp32, of a list of uint8 (C, H_i, W_i)."""
        return self.views(images, Draw(self.seed, batch.epoch, batch.step, batch.rows, self.total))


def _share(cfg: CropConfig, key: str, least: float, most: float, length: int | None) -> None:
    values = getattr(cfg, key)
    listed = values if length else [values]
    if length and len(listed) != length:
        raise UserError(f"views.{key}: expected {length} numbers, got {len(listed)}: {values}.")
    for value in listed:
        if not least <= value <= most:
            raise UserError(f"views.{key}: expected numbers from {least:g} to {most:g}, got {values}.")


def _span(cfg: CropConfig, key: str, most: float) -> None:
    values = getattr(cfg, key)
    if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
        limit = f" and at most {most:g}" if most != float("inf") else ""
        raise UserError(f"views.{key}: expected [least, most], both above 0{limit}, least first; got {values}.")


def _shapes(cfg: CropConfig, kinds: Sequence[str]) -> None:
    """UserError where some view has two different sides, and views.ratio does not hold the shape of every view.

    Crops of other shapes would be stretched. Of an image of one row, those of the default ratio are single pixels.
    """
    sides = {kind: pair(getattr(cfg, f"{kind}_size")) for kind in kinds}
    if all(height == width for height, width in sides.values()):
        return
    for kind, (height, width) in sides.items():
        shape = width / height
        if not cfg.ratio[0] <= shape <= cfg.ratio[1]:
            low, high = (shape / 16, shape) if height == 1 else (bound * shape for bound in CropConfig().ratio)
            mend = f"views.ratio {low:.3g} {high:.3g} makes some" if height != width else "give two sides here, too"
            raise UserError(
                f"views.{kind}_size {height}x{width} has width over height {shape:g}, and views.ratio"
                f" {cfg.ratio[0]:.3g} {cfg.ratio[1]:.3g} makes no crop of that shape: {mend}."
            )


def validate_views(cfg: CropConfig) -> None:
    """UserError that names the first impossible setting."""
    kinds = ("global", "local") if cfg.local_crops else ("global",)
    if cfg.local_crops < 0:
        raise UserError(f"views.local_crops: expected 0 or more, got {cfg.local_crops}.")
    for kind in kinds:
        sides = getattr(cfg, f"{kind}_size")
        if min(pair(sides)) < 1:
            raise UserError(f"views.{kind}_size: expected a side of at least 1 pixel, got {sides}.")
        _span(cfg, f"{kind}_scale", 1.0)
    for key in ("ratio", "blur_sigma"):
        _span(cfg, key, float("inf"))
    if getattr(cfg, "crop", "random") != "padded":
        _shapes(cfg, kinds)
    for key in ("flip", "jitter", "gray"):
        _share(cfg, key, 0, 1, None)
    for key in ("blur", "solarize"):
        _share(cfg, key, 0, 1, 3 if isinstance(cfg, ViewsConfig) else cfg.global_crops)
    _share(cfg, "jitter_strength", 0, float("inf"), 4)
    if cfg.jitter_strength[3] > 0.5:
        raise UserError(
            f"views.jitter_strength: the hue change (fourth) is in turns, at most 0.5; got {cfg.jitter_strength}."
        )
    if cfg.backend not in ("auto", "device", "workers"):
        raise UserError(f"views.backend: expected auto, device or workers, got {cfg.backend!r}.")


def pick_backend(cfg: CropConfig, device_type: str, ragged: bool) -> Literal["device", "workers"]:
    """Where views are made: `cfg.backend`; for `auto` the faster place.

    ragged: the images come from files and differ in size.

    scripts/bench_views.py, one core with AVX-512 of a busy machine, images/s (in brackets beside DINO's PIL code):

    | views | PIL | batched | batches of one |
    |---|---|---|---|
    | 32 px in memory, 2 x 32 + 8 x 16 | 246 | 3,657 (14.9x; 18.0x in another run) | 225 (0.9x) |
    | 500x375 photographs, 2 x 224 + 8 x 96 | 48.4 | 131 (2.7x) | 103 (2.1x) |

    Both places make the views of a whole micro-batch at once. On a CPU, photographs cost the same in both. There the
    loader workers make them, because they run on every core beside the training process. A GPU makes its own views (not
    measured): by these figures 16 worker cores give 1,500 images/s, before decoding.
    """
    if cfg.backend != "auto":
        return cfg.backend
    return "workers" if ragged and device_type == "cpu" else "device"
