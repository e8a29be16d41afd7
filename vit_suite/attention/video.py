"""Videos: their frames as images. A GIF with several frames counts as one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from vit_suite.attention.png import write_png
from vit_suite.data.inputs import VIDEOS
from vit_suite.errors import UserError

FRAMES = "frames"
"""Folder in the output that a video's frames are cut into."""
DEFAULT_RATE = 25
"""Frames a second of a video that does not say: the rate of PAL."""
GIF_FRAME = 100
"""Milliseconds that browsers show a GIF's frame that does not say."""


def is_video(images: object) -> bool:
    """Whether `images` names a video: by its ending, or a GIF of more than one frame."""
    if not isinstance(images, (str, os.PathLike)) or not Path(images).is_file():
        return False
    if Path(images).suffix.lower() != ".gif":
        return Path(images).suffix.lower() in VIDEOS
    try:
        with Image.open(images) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # damaged, or a bomb: what is wrong with it, the decoder says
        return False


def need_av(purpose: str):
    """The PyAV module; UserError when it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError(f"{purpose} needs PyAV: pip install 'vit-suite[video]'") from None
    return av


def cut_frames(video: Path, folder: Path) -> float:
    """Write the frames of `video` into `folder` (emptied first) as STEM_000000.png, ...; returns frames a second."""
    shutil.rmtree(folder, ignore_errors=True)
    rate, frames = _read_gif(video) if video.suffix.lower() == ".gif" else _read_video(video)
    stem, number = re.sub(r"[^\w.-]", "_", video.stem), -1
    for number, frame in enumerate(frames):
        write_png(folder / f"{stem}_{number:06}.png", frame)
    if number < 0:
        raise UserError(f"the video '{video}' holds no frame that decodes")
    return rate


def _read_gif(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    with Image.open(path) as image:
        rate = 1000 / (image.info.get("duration") or GIF_FRAME)

    def frames() -> Iterator[np.ndarray]:
        with Image.open(path) as image:
            try:
                for frame in ImageSequence.Iterator(image):
                    yield np.asarray(frame.convert("RGB"))
            except Exception:  # a file that was cut off: what came before it counts
                return

    return rate, frames()


def _read_video(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    av = need_av(f"reading the video '{path}'")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            rate = float(container.streams.video[0].average_rate or DEFAULT_RATE)
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"the video '{path}' cannot be read ({error})") from None

    def frames() -> Iterator[np.ndarray]:
        with av.open(str(path), metadata_errors="replace") as container:
            try:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
            except av.FFmpegError:  # a file that was cut off: what came before it counts
                return

    return rate, frames()
