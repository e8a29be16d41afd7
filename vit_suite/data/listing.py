"""What lies in a folder: its images in order, and what was left out and why, said once.

A walk goes through a tree of any size without opening a file. A folder that cannot be listed (no permission, a link to
itself) does not stop it: it becomes a failure, reported like a file that does not decode. Every file with the ending of
an image is listed, even a broken one; the decoder says what is wrong with it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, features

from vit_suite.data.decode import HEIF, INSTALL_HEIF, DecodeError, is_image
from vit_suite.data.science import DICOM, INSTALL
from vit_suite.errors import short
from vit_suite.files import printable

log = logging.getLogger("vit_suite")

PICTURES = frozenset(
    ".jxl .exr .hdr .psd .svg .eps .ico .icns .raw .cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .pcx .sgi"
    " .nii .mha .nrrd .czi .nd2 .lif .svs .fits".split()
)
"""Endings of pictures that are not read. Another ending is named only if Pillow recognizes one of its files."""
DICOM_MARK = 128, b"DICM"
"""Place and bytes by which a DICOM file is told; scanners often write it without an ending."""
MANIFEST = "image,height,width,kind,head,file,threshold,status"
"""First line of the manifest.csv of an attention export."""
SHOWN = 5
"""Names in a message."""

_said: set[str] = set()


def say_once(text: str) -> None:
    """Log a warning unless this process has logged the same text already: several parts of a command open a set."""
    if text not in _said:
        _said.add(text)
        log.warning("%s", text)


class Listing:
    """Finds the images below `root`, and counts what else lies there."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = os.fspath(root)
        self.real = os.path.realpath(self.root)
        self.seen: set[tuple[int, int]] = set()
        """Folders that were walked through: (device, inode)."""
        self.endings: Counter[str] = Counter()
        """Endings of the images."""
        self.others: Counter[str] = Counter()
        """Endings of other files."""
        self.example: dict[str, str] = {}
        self.failures: list[DecodeError] = []
        """What could not be listed."""
        self.twice: list[str] = []
        """Links to folders that are walked through elsewhere."""
        self.outputs: list[str] = []
        """Folders that this suite wrote: run directories and exports."""

    def walk(self, below: str = "") -> Iterator[str]:
        """Paths of image files under `root`/`below`, relative to `root`, in sorted order. Hidden files and folders are
        left out; links to folders are followed, but no folder is walked through twice."""
        here = os.path.join(self.root, below)
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in self.seen:  # a link to a parent, or to a folder that was seen
                self.twice.append(below)
                return
            self.seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            if not below:
                raise
            self.failures.append(DecodeError(here, f"the folder cannot be listed: {error.strerror}"))
            return
        if below and is_output(here, {entry.name for entry in entries}):
            self.outputs.append(below)
            return
        for entry in entries:
            path = os.path.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            if self._is_folder(entry):
                if entry.is_symlink() and self._leads_back(entry.path):
                    self.twice.append(path)
                else:
                    yield from self.walk(path)
            elif is_image(entry.name):
                self.endings[os.path.splitext(entry.name)[1].lower()] += 1
                yield path
            else:
                ending = os.path.splitext(entry.name)[1].lower()
                self.others[ending] += 1
                self.example.setdefault(ending, entry.path)

    def _is_folder(self, entry: os.DirEntry) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    def _leads_back(self, link: str) -> bool:
        """Whether a linked folder lies below `root`, where the walk meets it under its own name, or holds `root`."""
        parts = os.path.relpath(os.path.realpath(link), self.real).split(os.sep)
        return set(parts) <= {".", ".."} or not any(part.startswith(".") for part in parts)

    def say(self, title: str) -> None:
        """One line for each kind of thing that was left out, and for listed files that this machine cannot decode."""
        parts = [
            f"{count} {ending or 'without an ending'}{hint}"
            for ending, count in self.others.most_common()
            if (hint := self._hint(ending)) is not None
        ]
        if parts:
            say_once(f"{title}: files left out because of their ending: {'; '.join(parts)}")
        for ending, count in sorted(self.endings.items()):
            if why := undecodable(ending):
                say_once(f"{title}: {count} {ending} files cannot be decoded here: {why}")
        if self.twice:
            say_once(
                f"{title}: {len(self.twice)} linked folders are also met elsewhere, and count once: {_few(self.twice)}"
            )
        if self.outputs:
            say_once(f"{title}: {len(self.outputs)} folders that vit-suite wrote are left out: {_few(self.outputs)}")
        if self.failures:
            say_once(f"{title}: {len(self.failures)} folders cannot be listed: {_few([f.path for f in self.failures])}")

    def _hint(self, ending: str) -> str | None:
        """What to say of an ending that is not listed; None if its files are no pictures."""
        if ending in PICTURES:
            return ""
        if not os.path.isfile(self.example[ending]):  # opening a pipe would wait for a writer
            return None
        try:
            with open(self.example[ending], "rb") as file:
                if file.read(DICOM_MARK[0] + 4).endswith(DICOM_MARK[1]):
                    return f" (looks like DICOM; call such files {DICOM[0]})"
            with Image.open(self.example[ending]) as image:
                return f" (looks like {image.format}; give such files an ending that is read)"
        except Exception:  # no picture, or none that Pillow knows
            return None


def _few(names: list[str]) -> str:
    return ", ".join(short(printable(name)) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def undecodable(ending: str) -> str | None:
    """Why files of a listed ending cannot be decoded on this machine; None where they can."""
    if ending in DICOM and importlib.util.find_spec("pydicom") is None:
        return INSTALL
    if ending in HEIF and importlib.util.find_spec("pillow_heif") is None:
        return INSTALL_HEIF
    feature = {".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}.get(ending)
    if feature is not None and not features.check(feature):
        return f"this Pillow was built without {feature}"
    return None


def is_output(folder: str, names: set[str]) -> bool:
    """Whether `folder`, which holds `names`, is a run directory or an attention export of this suite."""
    if "config.yaml" in names and names & {"checkpoints", "metrics.csv", "status.json", "backbone.safetensors"}:
        return True
    manifest = os.path.join(folder, "manifest.csv")
    if "manifest.csv" not in names or not os.path.isfile(manifest):
        return False
    try:
        with open(manifest, encoding="utf-8", errors="replace") as file:
            return file.readline().strip() == MANIFEST
    except OSError:
        return False


def walk_images(root: str | os.PathLike, below: str = "") -> Iterator[str]:
    """`Listing(root).walk(below)`, for callers that do not report what was left out."""
    return Listing(root).walk(below)


def subfolders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; hidden ones left out."""
    if not root.is_dir():
        return []
    found = []
    for entry in os.scandir(root):
        try:
            if entry.is_dir() and not entry.name.startswith("."):
                found.append(entry.name)
        except OSError:  # a link to itself
            continue
    return sorted(found)


def found_in(root: Path, shown: int = 4) -> str:
    """What a folder holds, for messages: "3 folders (a, b, c) and 12 files (x.txt, ...)"."""
    if not root.exists():
        return "nothing (it does not exist)"
    if root.is_file():
        return "a file"
    try:
        entries = sorted(entry.name for entry in os.scandir(root))
    except OSError as error:
        return f"nothing that can be listed ({error.strerror})"
    folders = set(subfolders(root)) | {name for name in entries if name.startswith(".") and (root / name).is_dir()}
    parts = []
    for kind, names in (
        ("folder", [name for name in entries if name in folders]),
        ("file", [name for name in entries if name not in folders]),
    ):
        if names:
            more = ", ..." if len(names) > shown else ""
            listed = ", ".join(map(printable, names[:shown]))
            parts.append(f"{len(names)} {kind}{'s' * (len(names) > 1)} ({listed}{more})")
    return " and ".join(parts) or "nothing (it is empty)"
