"""Crop, resize and flip a batch, each image by its own box: two batched products with antialiased weights.

A separable resize is linear along each axis. So a crop, a resize and a mirror of one image are `Wy @ image @ Wx.T`, and
a batch with a box for each image is two `bmm`. The weights are Pillow's (Resample.c): the Catmull-Rom kernel (a =
-0.5), stretched by the scale factor if the resize shrinks, and normalized over the taps inside the crop box, because a
resize after a crop sees nothing outside. As in Pillow the horizontal pass comes first, and its result is clamped before
the vertical pass: without that clamp pixels beside hard edges move by up to 10 / 255.

This is the code for a CPU. On a GPU, and for lists of images by products, `planes.py` does the same in fewer operators.

Deviations: Pillow rounds to 8 bits after each pass, and here values stay float; the tests hold the two within 2 / 255.
Products run without autocast, because the 8 bits of bf16's mantissa would move pixels more than that. Pillow 13 runs
the vertical pass first for some shapes (seen where the height shrinks and the width grows); here, as in torchvision, it
comes second.

Axes: B images, V boxes an image, C channels, H x W pixels of the image, h x w of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.config.limits import pair
from vit_suite.errors import UserError
from vit_suite.hardware import full_precision
from vit_suite.views.kernels import Kernel, kernel_, stretch_of
from vit_suite.views.planes import Group, crop_planes

Method = Literal["auto", "dense", "single"]
Size = int | Sequence[int]

CPU_CHUNK = 1 << 19
"""Numbers of weights and intermediates that a chunk of images may hold (2 MiB of fp32). Microseconds an image of 32 px
(2 x 32 + 8 x 16, one core) at 2^16, 2^17 .. 2^20: 249, 143, 100, 85, 88. In smaller chunks calls cost more than
arithmetic."""
ROUNDING = 1e-3
"""How far floats may lie outside 0..1: a resize in half precision overshoots by about so much."""


def check_pixels(images: Tensor | Sequence[Tensor]) -> None:
    """UserError unless every image is uint8, or floating point in 0..1.

    Other values would be clamped without a warning: normalized images would lose their dark half, and integers of
    0..255 would turn white. Float images on a GPU make the host wait for their extremes; uint8 images, which the
    suite's own loaders give, do not.
    """
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise UserError(f"an image is a {type(batch).__name__}; views take tensors (C, H, W).")
        if batch.dtype == torch.uint8 or not batch.numel():
            continue
        least, most = (float(extreme) for extreme in batch.aminmax())
        if not (batch.is_floating_point() and least >= -ROUNDING and most <= 1 + ROUNDING):
            raise UserError(
                f"images are {str(batch.dtype).removeprefix('torch.')} with values from {least:g} to {most:g}; views"
                " take uint8 (0..255), or floats in 0..1, and normalize them themselves."
            )


def axis_weights(
    start: Tensor, length: Tensor, out: int, size: int, flip: Tensor | None = None, kernel: Kernel = "bicubic"
) -> Tensor:
    """Weights (..., out, size) that resample the span [start, start + length) of an axis of `size` pixels to `out`
    pixels.

    start, length: (...) in pixels. flip: (...) bool, mirrors the output. Rows sum to 1; taps outside the span are 0.
    """
    start, length = start.to(torch.float32).unsqueeze(-1), length.to(torch.float32).unsqueeze(-1)
    scale = length / out
    place = torch.arange(out, device=start.device, dtype=torch.float32) + 0.5
    if flip is not None:
        place = torch.where(flip.unsqueeze(-1), out - place, place)
    inverse = stretch_of(scale, kernel).reciprocal_()
    center = (start + place * scale).mul_(inverse).unsqueeze(-1)  # (..., out, 1)
    pixels = torch.arange(size, device=start.device, dtype=torch.float32)
    taps = (pixels + 0.5) * inverse  # (..., size)
    inside = (pixels >= start.floor()) & (pixels < (start + length).ceil())
    taps = torch.where(inside, taps, 1e9)  # far away: the kernel gives exactly 0
    weights = kernel_(taps.unsqueeze(-2) - center, kernel)
    return weights.div_(weights.sum(-1, keepdim=True))


def _dense(images: Tensor, boxes: Tensor, flip: Tensor | None, size: tuple[int, int], kernel: Kernel) -> Tensor:
    """(V, B, C, h, w) from images (B, C, H, W) and boxes (B, V, 4), in chunks of images that fit the cache."""
    count, channels, height, width = images.shape
    views, (h, w) = boxes.shape[1], size
    out = torch.empty(views, count, channels, h, w, device=images.device)
    each = channels * height * (width + w) + views * (h * height + w * width) + channels * h * w
    step = max(1, CPU_CHUNK // each)
    top, left, tall, wide = boxes.transpose(0, 1).unbind(-1)  # each (V, B)
    mirror = None if flip is None else flip.transpose(0, 1)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        # (b, H, C, W): the result of the first product is then (b, H, C * w), as the second one takes it.
        pixels = images[part].permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
        rows = pixels.reshape(-1, height * channels, width)
        across = axis_weights(
            left[:, part], wide[:, part], w, width, None if mirror is None else mirror[:, part], kernel
        )
        if images.dtype == torch.uint8:
            across.mul_(1 / 255)
        down = axis_weights(top[:, part], tall[:, part], h, height, None, kernel)
        for view in range(views):
            middle = torch.bmm(rows, across[view].transpose(1, 2)).clamp_(0, 1)
            result = torch.bmm(down[view], middle.view(-1, height, channels * w))
            torch.clamp(result.view(-1, h, channels, w).permute(0, 2, 1, 3), 0, 1, out=out[view, part])
    return out


def resize(images: Tensor, size: tuple[int, int], kernel: Kernel = "bicubic") -> Tensor:
    """Resize of whole images (B, C, H, W) by PyTorch's own sparse kernels, antialiased (but for `bilinear_plain`) and
    clamped between the passes as in Pillow.

    uint8 stays uint8 on a CPU; PyTorch resizes 8 bits there only. All other images become float in 0..1.
    """
    if images.dtype == torch.uint8 and images.device.type == "cpu" and kernel != "bilinear_plain":
        return functional.interpolate(images, size=size, mode=kernel, antialias=True, align_corners=False)
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    if kernel == "bilinear_plain":
        return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    for step in ((images.shape[-2], size[1]), size):
        images = functional.interpolate(images, size=step, mode=kernel, antialias=True, align_corners=False).clamp_(
            0, 1
        )
    return images


def _single(
    image: Tensor, boxes: list[list[int]], flip: list[bool], size: tuple[int, int], kernel: Kernel, out: Tensor
) -> None:
    """Write the crops of one image (C, H, W) to out (V, C, h, w)."""
    for view, (top, left, tall, wide) in enumerate(boxes):
        crop = image[None, :, top : top + tall, left : left + wide]
        if crop.shape[-2:] != size:
            crop = resize(crop, size, kernel)
        crop = crop[0].flip(-1) if flip[view] else crop[0]
        torch.mul(crop, 1 / 255 if crop.dtype == torch.uint8 else 1.0, out=out[view])


def _one_by_one(
    images: Sequence[Tensor], boxes: Tensor, flip: Tensor | None, size: tuple[int, int], kernel: Kernel
) -> Tensor:
    """(V, B, C, h, w) image by image; boxes hold whole pixels."""
    views = boxes.shape[1]
    out = torch.empty(views, len(images), images[0].shape[0], *size, device=images[0].device)
    mirrored = [[False] * views] * len(images) if flip is None else flip.tolist()
    for index, (image, spans) in enumerate(zip(images, boxes.tolist(), strict=True)):
        _single(image, spans, mirrored[index], size, kernel, out[:, index])
    return out


SPARSE_AREA = 48 * 48
"""Pixels of an image above which a CPU resizes image by image. Dense products take time with the area of the image
times the side of the output, and almost all of their weights are zeros. Microseconds an image for 2 global and 8 local
crops, dense products / sparse kernels image by image, one core with AVX-512 of a busy machine:

- 32 px (to 32 and 16): 134 / 334
- 48 px (to 48 and 24): 327 / 364
- 64 px: 479 / 417
- 96 px: 1,120 / 566
- 500x375 (to 224 and 96): 43,100 / 6,190
"""


def _sparse_is_faster(images: Tensor | Sequence[Tensor], boxes: Tensor) -> bool:
    """Whether PyTorch's resize, image by image, is faster than the dense products."""
    if images[0].device.type != "cpu" or boxes.is_floating_point():
        return False
    several = images[:1] if isinstance(images, Tensor) else images
    return max(image.shape[-2] * image.shape[-1] for image in several) > SPARSE_AREA


def crop_resize_views(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor,
    flip: Tensor | None,
    size: Size,
    kernel: Kernel = "bicubic",
    method: Method = "auto",
) -> Tensor:
    """V crops of every image, resized and mirrored: (V, B, C, h, w) fp32 in 0..1 on the images' device.

    images: uint8, or float in 0..1, (B, C, H, W); or a list of such (C, H_i, W_i).
    boxes: (B, V, 4) of top, left, height, width in pixels, inside the image; whole (int) or fractional (float).
    flip: (B, V) bool or None. Boxes and flips are on the CPU, and the images on any device.
    method: `dense` products, or `single` images through `interpolate` (CPU, whole boxes only); `auto` takes the one
    that was faster where it was measured (SPARSE_AREA).
    """
    sides = pair(size)
    check_pixels(images)
    if method == "single" or (method == "auto" and _sparse_is_faster(images, boxes)):
        if boxes.is_floating_point():
            raise ValueError("fractional boxes need the dense products, method='dense'")
        return _one_by_one(list(images), boxes, flip, sides, kernel)
    if not isinstance(images, Tensor) and len({image.shape for image in images}) == 1:
        images = torch.stack(list(images))
    if isinstance(images, Tensor) and images.device.type == "cpu":
        with full_precision(images.device):
            return _dense(images, boxes, flip, sides, kernel)
    views = next(crop_planes(images, [Group(boxes, flip, sides)], kernel).groups())
    return views.permute(1, 2, 0, 3, 4).contiguous()
