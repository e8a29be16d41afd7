"""RandAugment of a batch (Cubuk et al. 2020, arXiv 1909.13719), by torchvision's operations, in two sets:

- `increasing`: timm's `rand-mM-mstdS-inc1`, as in DeiT. It has 15 operations, and each changes an image more if its
  strength is larger.
- `original`: the TensorFlow code's, as in Beyer et al. (arXiv 2205.01580). It has Cutout too. At full strength
  posterizing keeps 4 bits and solarizing changes nothing; brightness, contrast, color and sharpness only rise.

Ranges, and the mean color behind moved images, are timm's. Deviations, of both sets:

- torchvision's operations take one strength for all images. So images of the same operation and direction are changed
  together, and the noise on the strength is drawn for each such group of a slice of 128 rows of the global batch
  (`Draw.slices`), not for each image. Over slices and steps it has timm's distribution.
- Values stay float between operations (equalize works on 256 levels), where Pillow rounds to 8 bits after each.
- Posterizing keeps at least one bit. timm's keeps none at full strength, and newer versions of Pillow refuse that.
- Moved images are interpolated bilinearly; timm picks bilinear or bicubic at random, TensorFlow the nearest pixel.

Axes: N images that share an operation, B images of the micro-batch, C channels (1 or 3), side S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from vit_suite.config import SupervisedViewsConfig
from vit_suite.hardware import full_precision, send
from vit_suite.views.draw import Draw

MOST = 10.0
"""The strength at which an operation has its full range."""
CUTOUT = 80 / 224
"""Side of Cutout's square at full strength, as a share of the image's (2 x 40 pixels of 224)."""


class _NoWait(TorchFunctionMode):
    """Makes `torch.tensor(..., device=GPU)` on the host and sends it. torchvision makes matrices and kernels in that
    way, and each would make the host wait."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return send(torch.tensor(*args, **kwargs | {"device": "cpu"}), kwargs["device"])
        return func(*args, **kwargs)


class Context(NamedTuple):
    """Further arguments of some operations."""

    fill: list[float]
    """Color of C values in 0..1 behind what moves."""
    place: Tensor
    """(N, 2) uniform numbers in 0..1: where Cutout's square is."""


Operation = Callable[[Tensor, float, Context], Tensor]
"""(x (N, C, S, S) in 0..1, strength 0..1 or, with a direction, -1..1, context) -> the same shape."""


def _moved(
    x: Tensor, fill: list[float], angle: float = 0.0, shift: Sequence[float] = (0, 0), shear: Sequence[float] = (0, 0)
) -> Tensor:
    """Turned (degrees, about the center), shifted (pixels) or sheared (tangents, about the top left corner, as Pillow
    does)."""
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    center = [0.0, 0.0] if any(shear) else None
    return functional.affine(x, angle, list(shift), 1.0, degrees, InterpolationMode.BILINEAR, fill, center)


def _solarize(x: Tensor, least: int) -> Tensor:
    """Invert levels from `least` (0..256) on: at 256 none, which torchvision does not take."""
    return functional.solarize(x, least / 255) if least < 256 else x


def _solarize_add(x: Tensor, add: int) -> Tensor:
    """Brighten the dark half of the range by `add` / 255."""
    return torch.where(x < 128 / 255, (x + add / 255).clamp(max=1), x)


def _cutout(x: Tensor, level: float, place: Tensor) -> Tensor:
    """Squares of middle gray, cut off at the edges."""
    half = level * CUTOUT / 2
    near = [((torch.arange(side, device=x.device) + 0.5) / side - at.unsqueeze(1)).abs() <= half
            for side, at in zip(x.shape[-2:], place.unbind(1), strict=True)]  # fmt: skip
    return x.masked_fill(near[0][:, None, :, None] & near[1][:, None, None, :], 128 / 255)


def _both_ways(level: float) -> float:
    """Factor of a blend with the flat, gray or blurred image: 1 changes nothing, -1..1 reaches 0.1..1.9."""
    return max(0.1, 1 + 0.9 * level)


def _upwards(level: float) -> float:
    return 0.1 + 1.8 * level


def _blends(factor: Callable[[float], float]) -> dict[str, Operation]:
    return {
        "color": lambda x, level, _: functional.adjust_saturation(x, factor(level)),
        "contrast": lambda x, level, _: functional.adjust_contrast(x, factor(level)),
        "brightness": lambda x, level, _: functional.adjust_brightness(x, factor(level)),
        "sharpness": lambda x, level, _: functional.adjust_sharpness(x, factor(level)),
    }


FLAT: dict[str, Operation] = {
    "autocontrast": lambda x, level, _: functional.autocontrast(x),
    "equalize": lambda x, level, _: functional.equalize(x),
    "invert": lambda x, level, _: functional.invert(x),
    "solarize_add": lambda x, level, _: _solarize_add(x, int(110 * level)),
}
MOVES: dict[str, Operation] = {
    "rotate": lambda x, level, context: _moved(x, context.fill, angle=-30 * level),
    "shear_x": lambda x, level, context: _moved(x, context.fill, shear=(0.3 * level, 0)),
    "shear_y": lambda x, level, context: _moved(x, context.fill, shear=(0, 0.3 * level)),
    "translate_x": lambda x, level, context: _moved(x, context.fill, shift=(-0.45 * level * x.shape[-1], 0)),
    "translate_y": lambda x, level, context: _moved(x, context.fill, shift=(0, -0.45 * level * x.shape[-2])),
}


class Operations(NamedTuple):
    """A set: operations without a direction, and those with one, which is drawn."""

    plain: dict[str, Operation]
    directed: dict[str, Operation]


SETS = {
    "increasing": Operations(
        FLAT
        | {
            "posterize": lambda x, level, _: functional.posterize(x, max(1, 4 - int(4 * level))),
            "solarize": lambda x, level, _: _solarize(x, 256 - int(256 * level)),
        },
        MOVES | _blends(_both_ways),
    ),
    "original": Operations(
        FLAT
        | _blends(_upwards)
        | {
            "posterize": lambda x, level, _: functional.posterize(x, max(1, int(4 * level))),
            "solarize": lambda x, level, _: _solarize(x, int(256 * level)),
            "cutout": lambda x, level, context: _cutout(x, level, context.place),
        },
        MOVES,
    ),
}


def randaugment_(x: Tensor, draw: Draw, cfg: SupervisedViewsConfig, fill: Sequence[float]) -> Tensor:
    """`cfg.randaugment` operations on each image of x (B, C, S, S) fp32 in 0..1, in place; each drawn evenly from
    `cfg.randaugment_set` and applied with `cfg.randaugment_probability`. fill: C values in 0..1."""
    plain, directed = SETS[cfg.randaugment_set]
    operations = [*plain.values(), *directed.values()]
    uniform = draw.uniform(cfg.randaugment, 5, purpose="randaugment")  # operation, direction, whether at all, place (2)
    with full_precision(x.device), nullcontext() if x.device.type == "cpu" else _NoWait():
        for rows, name in draw.slices():
            noise = torch.randn(
                cfg.randaugment, len(operations), 2, generator=draw.generator(f"randaugment strength {name}")
            )
            levels = (cfg.magnitude + cfg.magnitude_std * noise).clamp(0, MOST) / MOST
            for layer in range(cfg.randaugment):
                drawn = uniform[rows, layer]
                operation = (drawn[:, 0] * len(operations)).long()
                back = (drawn[:, 1] < 0.5) & (operation >= len(plain))
                group = torch.where(drawn[:, 2] < cfg.randaugment_probability, 2 * operation + back, -1)
                _apply(x[rows], group, levels[layer].flatten().tolist(), operations, list(fill), drawn[:, 3:])
    return x


def _apply(
    x: Tensor,
    group: Tensor,
    levels: list[float],
    operations: list[Operation],
    fill: list[float],
    place: Tensor,
) -> None:
    """One operation on each image of x (n, C, S, S), in place. group (n,): 2 x the operation's number, + 1 for
    backwards, or -1 for none; levels: strength 0..1 of each group; place (n, 2): Cutout's."""
    for code in group[group >= 0].unique().tolist():
        members = (group == code).nonzero().squeeze(1)
        rows = send(members, x.device)
        context = Context(fill, send(place[members], x.device))
        level = -levels[code] if code % 2 else levels[code]
        x.index_copy_(0, rows, operations[code // 2](x.index_select(0, rows), level, context))
