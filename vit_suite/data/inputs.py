"""The images that a command is pointed at (`--images`): a folder tree, one image, a list of paths, or a data set.

Each image also gets a name for the files that are made of it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_suite.config import ImagesConfig
from vit_suite.data.decode import is_image
from vit_suite.data.listing import Listing, found_in
from vit_suite.data.lists import read_list
from vit_suite.data.registry import open_test, set_reading
from vit_suite.data.source import FileSource, ImageSource
from vit_suite.errors import UserError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
LONGEST = 180
"""Bytes of a name in the output, before the parts that tell its files apart. File systems take 255."""


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


def open_images(
    images: str | None, data: ImagesConfig, output: Path, channels: int, seed: int, purpose: str = "embed"
) -> ImageSource:
    """The images of `--images`, or without it the split of `data` to score, decoded to `channels` channels.

    UserError when neither is given, when there is no image, and for a video. `purpose` completes the message
    "no images to ...".
    """
    if images:
        if Path(images).suffix.lower() in VIDEOS:
            raise UserError(f"images '{images}' is a video; expected a folder of images, an image or a list.")
        return set_reading(open_pictures(images, output, channels).source, data)
    if not data.name:
        raise UserError(f"no images to {purpose}: give --images FOLDER, or a data set with --data.name")
    return open_test(data.whole(channels), seed)


def open_pictures(images: str | os.PathLike | ImageSource, output: Path, channels: int) -> Pictures:
    """The pictures of a folder, an image, a list or a data set. UserError when there is none.

    A folder is searched through, in sorted order; what lies in `output` is not input. `channels` are those of the
    decoded images.
    """
    if isinstance(images, ImageSource):
        return _of_source(images)
    images = Path(images)
    if images.is_file():
        if is_image(images.name):
            return _of_files([images.stem], [images.name], [str(images)], channels)
        files = list(dict.fromkeys(map(os.path.normpath, read_list(images)[0])))
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


def inside(paths: Sequence[str]) -> list[str]:
    """Normalized paths, made relative to the folder that they share where one is absolute or begins with `..`.

    Names of output files are made of them, and these must not leave the output folder.
    """
    if not any(os.path.isabs(path) or path.startswith("..") for path in paths):
        return list(paths)
    # Relative paths start from a folder that does not exist: what all paths share is cut off again.
    whole = [os.path.abspath(os.path.join(os.sep, "list", "of", "paths", path)) for path in paths]
    top = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, top) for path in whole]


def fitting(file: str) -> str:
    """The path, with its last part cut to `LONGEST` bytes and eight digits of its hash at the cut.

    So `_head11_overlay.png` and the mark of an unfinished file still fit into the 255 bytes of a name.
    """
    folder, name = os.path.split(file)
    stem, ending = os.path.splitext(name)
    if len(os.fsencode(name)) <= LONGEST:
        return file
    mark = f"~{hashlib.sha1(os.fsencode(name)).hexdigest()[:8]}"
    kept = os.fsencode(stem)[: LONGEST - len(mark) - len(os.fsencode(ending))].decode("utf-8", "ignore")
    return os.path.join(folder, kept + mark + ending)


def output_names(files: Sequence[str]) -> list[str]:
    """Relative paths of images -> distinct names without extension. Names that would be alike keep their extension.

    Two names that differ in letter case alone count as alike, because the output may lie on a disk that ignores case.
    """
    files = [fitting(file) for file in files]
    names = [os.path.splitext(file)[0] for file in files]
    while True:  # again, because a kept extension can meet another name: a.jpg beside a.png and a.jpg.png
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
