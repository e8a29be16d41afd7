"""Formats `gif` and `mp4`: the pictures (the frames of a video, say) as an animation of overlays, one for each map.

Colors are fixed: a value has the same color in all frames, and a GIF has one palette. So nothing flickers but the
attention itself.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_suite.attention import render
from vit_suite.attention.drawing import Export, Seen, resized
from vit_suite.attention.manifest import Records, column
from vit_suite.attention.video import need_av
from vit_suite.data.reading import prefetch
from vit_suite.files import write_atomically

Frames = Callable[[Sequence[int]], Iterator[np.ndarray]]
"""Draws the frames of these numbers in order: uint8 (H, W, 3), all of one size."""
BRIGHTEST = 0.995
"""Quantile of the values of all frames that gets the brightest color. At the very largest value, one bright patch in
one frame would darken all others."""
SAMPLED = 16
"""Frames, evenly spaced, whose colors make the palette of a GIF."""
SHORTEST = 20
"""Milliseconds of a GIF's frame: browsers slow down shorter ones."""
LARGEST_RATE = 1001
"""Largest denominator of a frame rate: 30000/1001 is NTSC's."""
H264_QUALITY = "18"
"""Constant rate factor: visually lossless."""


def keep_maps(seen: Seen) -> dict[str, Any]:
    """The maps of a picture, for its record."""
    return {"maps": packed(seen.small)}


def gather_animations(export: Export, records: Records, kind: str) -> list[dict[str, Any]]:
    """Write animation_LABEL.gif or .mp4 for each map, the pictures as frames; returns their lines of the manifest."""
    drawing = export.drawing
    kept = [(record["index"], unpacked(record["maps"])) for record in records.good()]
    first = next(records.good())
    size = drawing.drawn_size((first["height"], first["width"]))
    lines = []
    for place, label in enumerate(drawing.labels(export.heads)):
        maps = [(index, small[place]) for index, small in kept]
        name = f"animation_{label}.{kind}"
        write_animation(drawing.output / name, _frames(export, maps, size), len(maps), export.rate)
        lines.append({"kind": kind, "head": column(label), "file": name, "threshold": drawing.threshold})
    return lines


def _frames(export: Export, maps: list[tuple[int, Tensor]], size: tuple[int, int]) -> Frames:
    """Overlays of pictures, given as (number of the picture, its map). Pictures of another size are resized to `size`
    (H, W)."""
    values = np.concatenate([small.numpy().ravel() for _, small in maps])
    limits = float(values.min()), float(np.quantile(values, BRIGHTEST))

    def overlay(number: int) -> np.ndarray:
        index, small = maps[number]
        picture = export.pictures.load(index)
        picture = picture if picture.shape[1:] == size else resized(picture, size)
        with torch.no_grad():
            level, mask = export.drawing.shades(small[None], picture, limits)
        return render.overlay(render.as_picture(picture), level[0], mask[0])

    return lambda numbers: prefetch(overlay, numbers, ahead=2 * export.threads, workers=export.threads)


def packed(maps: Tensor) -> dict[str, Any]:
    """float32 maps as JSON that `unpacked` reads."""
    return {"shape": list(maps.shape), "data": base64.b64encode(maps.contiguous().numpy().tobytes()).decode()}


def unpacked(stored: dict[str, Any]) -> Tensor:
    """The maps that `packed` was given."""
    return torch.frombuffer(bytearray(base64.b64decode(stored["data"])), dtype=torch.float32).view(stored["shape"])


def write_animation(path: Path, frames: Frames, count: int, rate: float) -> None:
    """Write `count` frames at `rate` a second; the ending of `path` names the format. UserError for an MP4 without
    PyAV."""
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    write_atomically(path, lambda temporary: write(temporary, frames, count, rate))


def _write_gif(path: Path, frames: Frames, count: int, rate: float) -> None:
    sample = sorted({round(place) for place in np.linspace(0, count - 1, min(count, SAMPLED))})
    palette = Image.fromarray(np.concatenate(list(frames(sample)))).quantize(256, Image.Quantize.MEDIANCUT)
    # Without dithering: its noise would differ from frame to frame.
    drawn = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames(range(count))
    )
    duration = max(SHORTEST, round(1000 / rate))
    next(drawn).save(path, format="GIF", save_all=True, append_images=drawn, duration=duration, loop=0)


def _write_mp4(path: Path, frames: Frames, count: int, rate: float) -> None:
    av = need_av("format mp4")
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream: Any = None
        for frame in frames(range(count)):
            odd = ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0))
            frame = np.pad(frame, odd, mode="edge")  # H.264 takes even sides
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(LARGEST_RATE))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.options = "yuv420p", {"crf": H264_QUALITY}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
