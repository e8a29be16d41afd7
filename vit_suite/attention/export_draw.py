"""The files of one picture: which there are, and how they are drawn.

Axes: n maps of a picture, h heads, gh x gw patches, H x W pixels.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vit_suite.attention import render
from vit_suite.attention.coco import annotation
from vit_suite.attention.export_options import ANIMATED, MAPS, ExportOptions
from vit_suite.attention.guided import guided_filter
from vit_suite.attention.maps import mass_mask, upsample, winning_head
from vit_suite.attention.palette import head_colors
from vit_suite.attention.png import write_png

Painter = Callable[[np.ndarray, np.ndarray, np.ndarray], Iterable[np.ndarray]]
"""(picture uint8 (H, W, 3), levels of color uint8 (n, H, W), masks of the top mass bool (n, H, W)) -> n pictures."""
MAPPED: dict[str, tuple[str, Painter]] = {
    "png": ("heat.png", lambda shown, level, masks: render.heat_map(level)),
    "overlay": ("overlay.png", render.overlay),
    "mask": ("mask.png", lambda shown, level, masks: masks),
}
"""Formats with a PNG file for each map -> last part of its name, and what is drawn. A new one is one row here, and its
word in AttentionConfig."""
FORMATS = {name: suffix for name, (suffix, _) in MAPPED.items()} | {
    "labels": "labels.png",
    "pca": "pca.png",
    "npz": "attention.npz",
    "coco": "",
    "gif": "",
    "mp4": "",
}
"""Format -> last part of the file name; none where one file holds all pictures."""
PIXELS = 2**21
"""Pixels of maps that are drawn together; at 12 megapixels not even two would fit."""


@dataclass(frozen=True)
class Drawing:
    """What to draw of each picture."""

    output: Path
    formats: Sequence[str]
    maps: Sequence[str]
    threshold: float
    mode: Literal["nearest", "bilinear", "guided"]
    guided_radius: int | None
    guided_eps: float

    @staticmethod
    def of(output: Path, options: ExportOptions) -> Drawing:
        """The part of the options that decides what a picture's files look like; each format and map once."""
        formats, maps = tuple(dict.fromkeys(options.formats)), tuple(dict.fromkeys(options.maps))
        looks = options.threshold, options.upsample, options.guided_radius, options.guided_eps
        return Drawing(output, formats, maps, *looks)

    @property
    def attentive(self) -> bool:
        """Whether anything but the features is drawn."""
        return set(self.formats) != {"pca"}

    def labels(self, heads: int) -> list[str]:
        """The maps of a picture by the name they have in file names: head0, ..., mean, max, rollout."""
        chosen = [f"head{i}" for i in range(heads)] if "heads" in self.maps else []
        return chosen + [name for name in MAPS[1:] if name in self.maps]

    def fine(self, small: Tensor, picture: np.ndarray) -> Tensor:
        """Maps (n, gh, gw) of a picture uint8 (C, H, W) at its size: (n, H, W)."""
        size = tuple(picture.shape[1:])
        if self.mode == "nearest":
            return upsample(small, size)
        heat = upsample(small, size, "bilinear")
        if self.mode == "bilinear":
            return heat
        radius = self.guided_radius or max(1, round(size[0] / small.shape[-2]))
        return guided_filter(heat, torch.from_numpy(picture.mean(0, dtype=np.float32) / 255), radius, self.guided_eps)

    def shades(
        self, small: Tensor, picture: np.ndarray, limits: render.Limits | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of maps (n, gh, gw) the levels of color, uint8 (n, H, W), and the masks of the top mass, bool (n, H, W).

        Of patches where each is one color, else of pixels.
        """
        if self.mode == "nearest":  # a patch is 64 pixels and more, so that it pays to enlarge what is ready
            level = torch.from_numpy(render.levels(small.numpy(), limits))
            both = upsample(
                torch.cat([level, mass_mask(small, self.threshold).byte()]), tuple(picture.shape[1:])
            ).numpy()
            return both[: len(small)], both[len(small) :].view(bool)
        fine = self.fine(small, picture)
        return render.levels(fine.numpy(), limits), mass_mask(fine, self.threshold).numpy()


class File(NamedTuple):
    """A file of one picture."""

    kind: str
    label: str
    """Of its map; empty when it is about all."""
    name: str
    """Relative to the output folder."""


def files_of(drawing: Drawing, name: str, heads: int) -> Iterator[File]:
    """The files of the picture `name`, as `draw` writes them."""
    for label in drawing.labels(heads):
        for kind in MAPPED:
            if kind in drawing.formats:
                yield File(kind, label, f"{name}_{label}_{FORMATS[kind]}")
    for kind in ("labels", "pca", "npz"):
        if kind in drawing.formats:
            yield File(kind, "", f"{name}_{FORMATS[kind]}")


@dataclass(frozen=True)
class Found:
    """What the backbone sees in one picture."""

    heads: Tensor
    """(h, gh, gw): attention of all heads; no head where the features alone are drawn."""
    small: Tensor
    """(n, gh, gw): the maps of `Drawing.labels`."""
    extra: dict[str, Any]
    """Further arrays for the npz."""
    colors: Tensor | None = None
    """(3, gh, gw): principal components of the patch features, 0..1 from dark to bright."""
    front: Tensor | None = None
    """(gh, gw): above 0 where they are shown; everywhere when None."""


def draw(drawing: Drawing, name: str, path: str, picture: np.ndarray, found: Found) -> dict[str, Any]:
    """Write the files of one picture, uint8 (C, H, W).

    Returns what files about all pictures will need: COCO annotations and the maps of an animation.
    """
    heads, small = found.heads, found.small
    if found.colors is not None:
        write_png(os.path.join(drawing.output, f"{name}_{FORMATS['pca']}"), components(drawing, found, picture))
    if not drawing.attentive:
        return {}
    labels = drawing.labels(len(heads))
    paths = {
        (kind, label): os.path.join(drawing.output, file) for kind, label, file in files_of(drawing, name, len(heads))
    }
    shown = render.as_picture(picture)
    step = max(1, PIXELS // (picture.shape[1] * picture.shape[2]))
    needs_maps, annotations = {*MAPPED, "coco"} & set(drawing.formats), list[dict[str, Any]]()
    for start in range(0, len(labels), step) if needs_maps else ():
        part, here = slice(start, start + step), labels[start : start + step]
        level, masks = drawing.shades(small[part], picture)
        for kind in needs_maps - {"coco"}:
            for label, pixels in zip(here, MAPPED[kind][1](shown, level, masks), strict=True):
                write_png(paths[kind, label], pixels)
        if "coco" in drawing.formats:
            annotations += [{"head": column(label)} | annotation(mask) for label, mask in zip(here, masks, strict=True)]
    if "labels" in drawing.formats:
        write_png(paths["labels", ""], _winners(drawing, heads, picture), head_colors(len(heads)))
    if "npz" in drawing.formats:
        named = {label: one.numpy() for label, one in zip(labels, small, strict=True) if not label.startswith("head")}
        sizes = {
            "grid": heads.shape[-2:],
            "image_size": picture.shape[1:],
            "threshold": drawing.threshold,
            "path": path,
        }
        render.write_npz(paths["npz", ""], attention=heads.numpy(), **named, **found.extra, **sizes)
    kept: dict[str, Any] = {"annotations": annotations} if "coco" in drawing.formats else {}
    return kept | ({"maps": packed(small)} if set(ANIMATED) & set(drawing.formats) else {})


def components(drawing: Drawing, found: Found, picture: np.ndarray) -> np.ndarray:
    """The principal components of a picture's patches at its size: uint8 (H, W, 3), black outside the foreground."""
    assert found.colors is not None
    fine = drawing.fine(found.colors, picture).clamp(0, 1)
    if found.front is not None:
        fine = fine * (drawing.fine(found.front[None], picture) > 0)
    return (fine * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def column(label: str) -> str:
    """A label as manifest and COCO file show it: a head is its number."""
    return label.removeprefix("head")


def packed(maps: Tensor) -> dict[str, Any]:
    """float32 maps as JSON that `unpacked` reads."""
    return {"shape": list(maps.shape), "data": base64.b64encode(maps.contiguous().numpy().tobytes()).decode()}


def unpacked(stored: dict[str, Any]) -> Tensor:
    """What `packed` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(stored["data"])), dtype=torch.float32).view(stored["shape"])


def _winners(drawing: Drawing, heads: Tensor, picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W): the head that wins each pixel."""
    if drawing.mode == "nearest":
        return upsample(winning_head(heads), tuple(picture.shape[1:])).numpy().astype(np.uint8)
    most = torch.full(picture.shape[1:], -1.0)
    winner = np.zeros(picture.shape[1:], np.uint8)
    for index, head in enumerate(heads):  # one after the other, as memory for a photograph goes
        fine = drawing.fine(head[None], picture)[0]
        share = fine / fine.sum().clamp_min(torch.finfo(fine.dtype).tiny)
        winner[(share > most).numpy()] = index
        most = torch.maximum(most, share)
    return winner
