"""Attention over the frames of a video as an animated GIF or an MP4.

The colors are fixed: the caller gives a value one color in all frames, and a GIF has one palette, so that nothing
flickers but the
attention itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit_suite.attention.video import need_av
from vit_suite.files import write_atomically

SAMPLED = 16
"""Frames, evenly spaced, whose colors make the palette of a GIF."""


def write_animation(
    path: Path, frames: Callable[[Sequence[int]], Iterator[np.ndarray]], count: int, rate: float
) -> None:
    """Write `count` frames, uint8 (H, W, 3) of one size, at `rate` a second, as the ending of `path` says.

    frames: draws those of the given numbers, in order. UserError for an MP4 without PyAV.
    """
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    write_atomically(path, lambda temporary: write(temporary, frames, count, rate))


def _write_gif(path: Path, frames: Callable[[Sequence[int]], Iterator[np.ndarray]], count: int, rate: float) -> None:
    sample = sorted({round(place) for place in np.linspace(0, count - 1, min(count, SAMPLED))})
    palette = Image.fromarray(np.concatenate(list(frames(sample)))).quantize(256, Image.Quantize.MEDIANCUT)
    # Without dithering: its noise would differ from frame to frame.
    drawn = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames(range(count))
    )
    # Browsers slow down frames of less than 20 ms.
    duration = max(20, round(1000 / rate))
    next(drawn).save(path, format="GIF", save_all=True, append_images=drawn, duration=duration, loop=0)


def _write_mp4(path: Path, frames: Callable[[Sequence[int]], Iterator[np.ndarray]], count: int, rate: float) -> None:
    av = need_av("format mp4")
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream: Any = None
        for frame in frames(range(count)):
            frame = np.pad(
                frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge"
            )  # H.264 wants even sides
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
