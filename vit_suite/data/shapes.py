"""`shapes`: images generated offline, a dark textured object on a lighter cluttered background, with the class label
and the object's mask.

The class sets the outline of the object and nothing else. Drawn independently of the class are: hue, brightness,
texture, area, position, rotation, stretch and phase of the object; hue, brightness and texture of the background; and
the clutter (line segments and blobs). So neither colors nor texture nor background tell the class.

Every object is darker than its background, covers 6 to 16% of the image, and lies anywhere within it: a box in the
center is a poor guess of where it is.

Image i of a split is a function of (seed, split, i, height, width) alone. Any order, any subset and any worker gives
the same pixels. Axes: H height, W width; x grows to the right, y downwards, in pixels from the center.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from colorsys import hsv_to_rgb

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from vit_suite.data.pixels import convert_channels
from vit_suite.data.source import ImageSource, stable_seed
from vit_suite.errors import UserError

SMALLEST = 16  # pixels: below that outlines blur into each other
AREA = (0.06, 0.16)  # of the image, before stretching and cropping
ROTATION = 1.2  # radians, both ways
TEXTURES = 6
HUE_GAP = 0.25  # turns: the least distance between the object's hue and the background's
CLUTTER = 10  # line segments and blobs, in turn
DRAWS = 22


def _circle(x: ndarray, y: ndarray) -> ndarray:
    return np.hypot(x, y) - 1


def _square(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 1


def _triangle(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(0.8660254 * np.abs(x) - 0.5 * y, y) - 0.5


def _star(x: ndarray, y: ndarray) -> ndarray:
    # Five tips at radius 1 and five notches at 0.42: the distance to the edge between a tip and a notch, folded into
    # one half tip.
    angle = np.abs(np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    edge = math.hypot(notch_y, 1 - notch_x)
    return (notch_y * (radius * np.cos(angle) - 1) + (1 - notch_x) * radius * np.sin(angle)) / edge


def _ring(x: ndarray, y: ndarray) -> ndarray:
    return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _cross(x: ndarray, y: ndarray) -> ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.3)


def _crescent(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))


def _bar(x: ndarray, y: ndarray) -> ndarray:
    return np.maximum(np.abs(x) - 1, np.abs(y) - 0.36)


def _heart(x: ndarray, y: ndarray) -> ndarray:
    x, y = np.abs(x), -y
    return np.minimum((x + np.abs(y) - 0.8) * 0.7071068, np.hypot(x - 0.4, y - 0.4) - 0.5656854)


def _chevron(x: ndarray, y: ndarray) -> ndarray:
    x = np.abs(x)
    return np.maximum(np.abs(y - x + 0.35) * 0.7071068 - 0.3, x - 0.9)


OUTLINES: dict[str, Callable[[ndarray, ndarray], ndarray]] = {
    "bar": _bar,
    "chevron": _chevron,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
"""Class -> signed distance (about) to its outline in units of the object's radius, negative inside."""

CLASSES = list(OUTLINES)


def _unit_extent() -> dict[str, tuple[float, float]]:
    """Class -> (area, radius of the enclosing circle) of its outline at radius 1."""
    side = np.linspace(-1.6, 1.6, 321, dtype=np.float32)
    x, y = np.meshgrid(side, side)
    inside = {name: outline(x, y) < 0 for name, outline in OUTLINES.items()}
    return {name: (float(m.mean()) * 3.2**2, float(np.hypot(x, y)[m].max())) for name, m in inside.items()}


EXTENT = _unit_extent()


class ShapesSource(ImageSource):
    """`length` generated images of (height, width); label = index modulo the number of classes, so every class is
    equally frequent.

    UserError when a side is under 16 pixels. `channels` 1 gives luma, 3 RGB.
    """

    has_masks = True
    labels: Tensor
    image_size: tuple[int, int]

    def __init__(self, split: str, length: int, size: tuple[int, int], channels: int = 3, seed: int = 0) -> None:
        if min(size) < SMALLEST:
            raise UserError(
                f"data.image_size {min(size)} is too small for generated shapes; expected at least {SMALLEST}."
            )
        if channels not in (1, 3):
            raise UserError(f"data.channels is {channels}; generated shapes have 1 or 3.")
        self.name, self.split, self.classes, self.channels = "shapes", split, list(CLASSES), channels
        self.image_size, self.seed = (int(size[0]), int(size[1])), seed
        self.labels = torch.arange(length) % len(CLASSES)
        height, width = self.image_size
        self._y = (np.arange(height, dtype=np.float32) - (height - 1) / 2)[:, None]
        self._x = (np.arange(width, dtype=np.float32) - (width - 1) / 2)[None, :]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Tensor:
        pixels, _ = self.render(index)
        return torch.from_numpy(np.ascontiguousarray(convert_channels(pixels, self.channels, self.name)))

    def mask(self, index: int) -> Tensor:
        random = self._random(index)
        return torch.from_numpy(self._coverage(random.random(DRAWS, dtype=np.float32).tolist(), index) > 0.5)

    def render(self, index: int) -> tuple[ndarray, ndarray]:
        """Pixels uint8 (3, H, W) and object mask bool (H, W) of image `index`."""
        random = self._random(index)
        u = random.random(DRAWS, dtype=np.float32).tolist()  # every scalar draw of the image, in fixed places
        coverage = self._coverage(u, index)
        unit = float(min(self.image_size))
        x, y = self._x / unit, self._y / unit
        back, front = _colors(u[13:])
        canvas = _blend(back, _texture(x, y, u[5:9], random))
        self._clutter(canvas, random, unit)
        canvas += coverage * (_blend(front, _texture(x, y, u[9:13], random)) - canvas)
        canvas += random.standard_normal(self.image_size, dtype=np.float32) * (0.01 + 0.04 * u[21])
        np.minimum(np.maximum(canvas, 0, out=canvas), 1, out=canvas)
        canvas *= 255
        canvas += 0.5
        return canvas.astype(np.uint8), coverage > 0.5

    def _random(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(stable_seed("shapes", self.seed, self.split, index)))

    def _coverage(self, u: list[float], index: int) -> ndarray:
        """Share of each pixel (H, W) that the object covers: float32 in 0..1, soft over one pixel at the outline."""
        name = CLASSES[index % len(CLASSES)]
        area, extent = EXTENT[name]
        height, width = self.image_size
        # The enclosing circle of the largest object fits into the image. Thin outlines reach that limit below AREA[1]:
        # their range of areas starts lower, so that their size varies too.
        most = min(AREA[1], area / extent**2 * 0.25 * min(height, width) / max(height, width))
        share = min(AREA[0], 0.7 * most) + u[0] * (most - min(AREA[0], 0.7 * most))
        radius = math.sqrt(share * height * width / area)
        stretch = math.exp(0.3 * (u[1] - 0.5))  # up to 16% longer one way, shorter the other: the area stays
        room = radius * extent * 0.95
        x = self._x - (2 * u[2] - 1) * max(0.0, width / 2 - room)
        y = self._y - (2 * u[3] - 1) * max(0.0, height / 2 - room)
        angle = ROTATION * (2 * u[4] - 1)
        cos, sin = math.cos(angle), math.sin(angle)
        across, along = (cos * x + sin * y) * (stretch / radius), (cos * y - sin * x) / (stretch * radius)
        return _clip(0.5 - OUTLINES[name](across, along) * radius)

    def _clutter(self, canvas: ndarray, random: np.random.Generator, unit: float) -> None:
        """Draw line segments and blobs onto the canvas (3, H, W), each within its own bounding box."""
        height, width = self.image_size
        for k, (u0, u1, u2, u3, *color) in enumerate(random.random((CLUTTER, 7), dtype=np.float32).tolist()):
            segment = k % 2 == 0
            thick = (0.01 if segment else 0.025) * (1 + 1.5 * u2) * unit
            half = 0.18 * unit if segment else 0.0
            cx, cy = u0 * width, u1 * height
            reach = int(half + thick) + 1
            top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
            bottom, right = int(cy) + reach + 2, int(cx) + reach + 2
            x = self._x[:, left:right] + ((width - 1) / 2 - cx)
            y = self._y[top:bottom] + ((height - 1) / 2 - cy)
            if segment:
                cos, sin = math.cos(math.pi * u3), math.sin(math.pi * u3)
                x, y = np.maximum(np.abs(cos * x + sin * y) - half, 0), cos * y - sin * x
            cover = np.minimum(np.maximum(0.5 + thick - np.sqrt(x * x + y * y), 0), 0.8)
            part = canvas[:, top:bottom, left:right]
            part += cover * (np.array(color, dtype=np.float32)[:, None, None] - part)


def _clip(values: ndarray) -> ndarray:
    return np.minimum(np.maximum(values, 0), 1)  # np.clip costs more in Python than these two on a small image


def _blend(colors: ndarray, share: ndarray) -> ndarray:
    return colors[0, :, None, None] + share * (colors[1] - colors[0])[:, None, None]  # (3, H, W)


def _colors(u: list[float]) -> tuple[ndarray, ndarray]:
    """Two light colors of neighbouring hues for the background, and two dark ones of another hue for the object: (2, 3)
    each, RGB in 0..1.

    `u`: eight uniform draws in 0..1.
    """
    value, contrast = 0.65 + 0.25 * u[2], 0.09 * u[3]
    back = [
        hsv_to_rgb((u[0] + turn) % 1, 0.6 * u[1], value + sign * contrast) for turn, sign in ((0.04, 1), (-0.04, -1))
    ]
    hue = (u[0] + HUE_GAP + (1 - 2 * HUE_GAP) * u[4]) % 1
    front = [hsv_to_rgb(hue, 0.6 + 0.4 * u[5], light) for light in (0.1 + 0.2 * u[6], 0.35 + 0.2 * u[7])]
    return np.array(back, dtype=np.float32), np.array(front, dtype=np.float32)


def _texture(x: ndarray, y: ndarray, u: list[float], random: np.random.Generator) -> ndarray:
    """A pattern (H, W) in 0..1: stripes, checks, dots, smooth noise, a gradient, or plain. x (1, W), y (H, 1) in image
    sides."""
    kind = int(u[0] * TEXTURES)
    angle = 2 * np.pi * u[1]
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = cos * x + sin * y, cos * y - sin * x
    frequency = 2 * np.pi * (4 + 6 * u[2])  # 4 to 10 periods a side
    phase = 2 * np.pi * u[3]
    if kind == 0:
        return _clip(0.5 + 1.5 * np.sin(frequency * along + phase))
    if kind == 1:
        return _clip(0.5 + 2 * np.sin(frequency * along + phase) * np.sin(frequency * across))
    if kind == 2:
        return _clip(np.cos(frequency * along + phase) + np.cos(frequency * across) - 0.4)
    if kind == 3:
        return _noise(x, y, 4 + int(6 * u[2]), random)
    if kind == 4:
        return _clip(0.5 + along)
    return np.full(np.broadcast_shapes(x.shape, y.shape), 0.3, dtype=np.float32)


def _noise(x: ndarray, y: ndarray, cells: int, random: np.random.Generator) -> ndarray:
    """Random values on a (cells, cells) grid, interpolated linearly to (H, W)."""
    grid = random.random((cells, cells), dtype=np.float32)
    centers = np.arange(cells, dtype=np.float32)
    rows = np.clip((y / np.ptp(y) + 0.5) * (cells - 1), 0, cells - 1)  # (H, 1)
    columns = np.clip((x / np.ptp(x) + 0.5) * (cells - 1), 0, cells - 1)  # (1, W)
    return np.maximum(1 - np.abs(rows - centers), 0) @ grid @ np.maximum(1 - np.abs(columns - centers[:, None]), 0)
