"""What an export reads: a folder tree, one image, a list of paths, a data set, or a video; and under which names its
files are written."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from vit_suite.attention.png import write_png
from vit_suite.data.decode import is_image
from vit_suite.data.listing import Listing, found_in
from vit_suite.data.source import FileSource, ImageSource
from vit_suite.errors import UserError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
LONGEST = 180
"""Bytes of a name in the output, before the parts that tell its files apart."""
FRAMES = "frames"
"""Folder in the output that a video's frames are cut into."""


@dataclass(frozen=True)
class Pictures:
    """Images by number."""

    names: Sequence[str]
    """Output names without endings, relative to the output folder."""
    files: Sequence[str]
    """Names with endings, relative to the images folder."""
    source: ImageSource
    """The images themselves."""

    def path(self, index: int) -> str:
        """The file, as messages and the manifest show it."""
        return self.source.path(index)

    def load(self, index: int) -> np.ndarray:
        """uint8 (C, H, W). DecodeError when the file holds no image."""
        return self.source.load(index).numpy()

    def __len__(self) -> int:
        return len(self.names)


def open_pictures(images: str | os.PathLike | ImageSource, output: Path, channels: int) -> Pictures:
    """The pictures of a folder (searched through, in sorted order; what lies in `output` is not input), an image, a
    list or a data set.

    UserError when there is none.
    """
    if isinstance(images, ImageSource):
        return _of_source(images)
    images = Path(images)
    if images.is_file():
        if is_image(images.name):
            return _of_files([images.stem], [images.name], [str(images)], channels)
        files = read_list(images)
        paths = [str(images.parent / file) for file in files]
        return _of_files(output_names(inside(files)), files, paths, channels)
    if not images.is_dir():
        raise UserError(
            f"images '{images}' does not exist; expected a folder of images, one image, a list of paths, or a video"
        )
    if output.exists() and output.resolve() == images.resolve():
        raise UserError(f"output '{output}' is the images folder itself; name another, results must not mix with input")
    within = os.path.relpath(output.resolve(), images.resolve()) + os.sep
    listing = Listing(images)
    files = [name for name in listing.walk() if not name.startswith(within)]
    listing.say(str(images))
    if not files:
        raise UserError(f"no images under '{images}': it holds {found_in(images)}")
    pictures = _of_files(output_names(files), files, [str(images / file) for file in files], channels)
    pictures.source.failures = listing.failures
    return pictures


def _of_files(names: Sequence[str], files: Sequence[str], paths: Sequence[str], channels: int) -> Pictures:
    return Pictures(names, files, FileSource("the images", "", "", paths, channels))


def _of_source(source: ImageSource) -> Pictures:
    if not len(source):
        raise UserError(f"{source.title} holds no images")
    digits = len(str(len(source) - 1))
    names = [f"{source.split}/{index:0{digits}}" for index in range(len(source))]
    return Pictures(names, names, source)


def read_list(file: Path) -> list[str]:
    """The paths in a text file, one a line (`path<TAB>label` too), each once; relative ones start from the folder of
    the file."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"images '{file}' is no image, no video and no UTF-8 list of paths ({type(error).__name__})"
        ) from None
    paths = dict.fromkeys(
        os.path.normpath(line.split("\t")[0].strip()) for line in lines if line.strip() and not line.startswith("#")
    )
    if not paths:
        raise UserError(f"the list '{file}' names no images: expected lines of `path`")
    return list(paths)


def inside(paths: Sequence[str]) -> list[str]:
    """Normalized paths, absolute or with leading `..`, as paths below the folder that they share: they must not leave
    the output."""
    if not any(os.path.isabs(path) or path.startswith("..") for path in paths):
        return list(paths)
    whole = [
        os.path.abspath(os.path.join(os.sep, "list", "of", "paths", path)) for path in paths
    ]  # any place: what they share goes
    top = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, top) for path in whole]


def fitting(file: str) -> str:
    """A path whose last part leaves room for `_head11_overlay.png` and the mark of an unfinished file in the 255 bytes
    of a name: a longer one is cut, and gets eight digits of its hash instead."""
    folder, name = os.path.split(file)
    stem, ending = os.path.splitext(name)
    if len(os.fsencode(name)) <= LONGEST:
        return file
    mark = f"~{hashlib.sha1(os.fsencode(name)).hexdigest()[:8]}"
    kept = os.fsencode(stem)[: LONGEST - len(mark) - len(os.fsencode(ending))].decode("utf-8", "ignore")
    return os.path.join(folder, kept + mark + ending)


def output_names(files: Sequence[str]) -> list[str]:
    """Relative paths of images -> distinct names without extension; those that would be alike keep theirs.

    Letter case does not distinguish: the output may lie on a disk that ignores it.
    """
    files = [fitting(file) for file in files]
    names = [os.path.splitext(file)[0] for file in files]
    while True:  # a kept extension can meet another name (a.jpg beside a.png and a.jpg.png), so look again
        seen = Counter(name.lower() for name in names)
        alike = [i for i, name in enumerate(names) if seen[name.lower()] > 1 and name != files[i]]
        if not alike:
            break
        for i in alike:
            names[i] = files[i]
    seen = Counter()
    for i, name in enumerate(names):  # A.jpg and a.jpg differ in case alone: number them
        seen[name.lower()] += 1
        if seen[name.lower()] > 1:
            names[i] = f"{name}~{seen[name.lower()]}"
    return names


# Videos
# ----------------------------------------------------------------------------------------------------------------------


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
        rate = 1000 / (image.info.get("duration") or 100)

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
            rate = float(container.streams.video[0].average_rate or 25)
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
