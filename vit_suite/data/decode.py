"""A file, or its bytes -> uint8 pixels (C, H, W), and the list of files that do not decode.

Axes: C channels, H height, W width. What a file may be, and what becomes of it:

- 8-bit RGB, gray, palette, CMYK, YCbCr: Pillow's conversion to RGB, or to luma (ITU-R 601) for one channel.
- transparency (alpha channel or transparent palette entry): composited on white, because what lies under a transparent
  pixel is arbitrary (often black, so that dropping alpha draws silhouettes that nobody sees in a viewer).
- 16-bit gray: divided by 257. Floating point: 0..1 is stretched to 0..255; other values are refused, since a guess per
  file would give neighbouring files different scales.
- EXIF orientation is applied.
- N channels (not 1 or 3), and every .npy or .npz file: read as it is; N must match (else `UserError`: the option is
  wrong, not the file). An array is (H, W), (H, W, N) or (N, H, W); TIFF has up to 4 bands, or N gray pages; more bands
  need `tifffile`.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vit_suite.errors import UserError
from vit_suite.files import lock

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .npy .npz .jp2 .avif".split()
)
ARRAYS = (".npy", ".npz")
JPEG = (".jpg", ".jpeg")


class DecodeError(Exception):
    """The file at `path` holds no readable image; `reason` is one line."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = str(path), " ".join(str(reason).split())[:300]
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self):
        return DecodeError, (self.path, self.reason)


def is_image(name: str) -> bool:
    """Whether a file's extension is one of `EXTENSIONS` (any case)."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith("._")


def decode(path: str | os.PathLike, channels: int = 3, content: bytes | None = None) -> np.ndarray:
    """The image at `path` as uint8 (C, H, W); where `content` is given it is the file's bytes, and `path` its name
    alone.

    Raises DecodeError when it cannot be read, UserError when it is readable but has another number of channels than an
    N-channel set (N not 1 or 3) asks for.
    """
    path = os.fspath(path)
    try:
        if (os.path.getsize(path) if content is None else len(content)) == 0:
            raise DecodeError(path, "the file is empty (0 bytes)")
        if path.lower().endswith(ARRAYS):
            return _read_array(path, channels, content)
        if channels in (1, 3) and path.lower().endswith(JPEG) and (pixels := _jpeg(path, content)) is not None:
            return convert_channels(pixels, channels, path)
        with Image.open(_file(path, content)) as image:
            return _pixels(path, image, channels, content)
    except (UserError, DecodeError):
        raise
    except FileNotFoundError:
        raise DecodeError(path, "the file does not exist") from None
    except (
        Exception
    ) as error:  # Pillow's plugins raise almost anything on damaged input (OSError, SyntaxError, struct.error, ...)
        reason = re.sub(rf"{re.escape(repr(path))}|<_io\.BytesIO[^>]*>", "the file", str(error))
        raise DecodeError(path, f"{type(error).__name__}: {reason}") from None


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """(H, W) from the header alone, EXIF orientation applied; None when the header cannot be read (or the file is an
    array)."""
    if os.fspath(path).lower().endswith(ARRAYS):
        return None
    try:
        with Image.open(path) as image:
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:
        return None


def convert_channels(pixels: np.ndarray, channels: int, what: str) -> np.ndarray:
    """uint8 (..., C, H, W) -> (..., channels, H, W): luma for 3 -> 1, copies for 1 -> 3. UserError for any other
    change."""
    have = pixels.shape[-3]
    if have == channels:
        return pixels
    if have == 3 and channels == 1:  # Pillow's integer luma, so that arrays and files give the same gray
        red, green, blue = (pixels[..., i : i + 1, :, :].astype(np.uint32) for i in range(3))
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)
    if have == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-3)
    raise UserError(f"{what} has {have} channel{'s' * (have != 1)}, but data.channels is {channels}.")


def _file(path: str, content: bytes | None) -> str | io.BytesIO:
    return path if content is None else io.BytesIO(content)


def _jpeg(path: str, content: bytes | None) -> np.ndarray | None:
    """Plain JPEG through torchvision; None for whatever it does not take (damaged, CMYK, not a JPEG), which Pillow then
    settles.

    Twice as fast as Pillow on 32 px files, and it releases the GIL. Over 900 cut and 900 corrupted files and all EXIF
    orientations it gave Pillow's pixels to the bit, and accepted one damaged file that Pillow refused.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    try:
        encoded = read_file(path) if content is None else torch.frombuffer(bytearray(content), dtype=torch.uint8)
        pixels = decode_jpeg(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True).numpy()
    except RuntimeError:
        return None
    return pixels if len(pixels) in (1, 3) else None


def _pixels(path: str, image: Image.Image, channels: int, content: bytes | None) -> np.ndarray:
    if image.format == "TIFF" and channels not in (1, 3):
        return _read_tiff(path, image, channels, content)
    if image.format != "JPEG" or "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if channels not in (1, 3):
        return convert_channels(_channels_first(np.asarray(image)), channels, f"'{path}' (mode {image.mode})")
    if image.mode.startswith("I") or image.mode == "F":
        return convert_channels(_to_bytes(path, np.asarray(image))[None], channels, path)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    target = "RGB" if channels == 3 else "L"
    return _channels_first(np.asarray(image if image.mode == target else image.convert(target)))


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _to_bytes(path: str, array: np.ndarray) -> np.ndarray:
    """Integers and floats of any width -> uint8, by the rules of this file's docstring."""
    if array.size == 0:
        raise DecodeError(path, f"the array is empty (shape {array.shape})")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    least, most = array.min(), array.max()
    if array.dtype.kind in "iu" and 0 <= least and most <= 65535:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f" and 0 <= least and most <= 1:  # NaN fails both comparisons
        return (array * 255 + 0.5).astype(np.uint8)
    raise DecodeError(
        path, f"{array.dtype} values from {least} to {most}; expected 8 or 16 bit integers, or floats in 0..1"
    )


def _read_array(path: str, channels: int, content: bytes | None) -> np.ndarray:
    loaded = np.load(_file(path, content), allow_pickle=False)  # a pickle from a stranger must not run
    if isinstance(loaded, np.lib.npyio.NpzFile):
        with loaded:
            names = loaded.files
            if len(names) != 1 and "image" not in names:
                raise DecodeError(path, f"expected one array or one named 'image', found {names[:5]}")
            loaded = loaded["image" if "image" in names else names[0]]
    if loaded.ndim == 2:
        loaded = loaded[..., None]
    if loaded.ndim != 3:
        raise DecodeError(path, f"an array of shape {loaded.shape} is not an image (H, W), (H, W, N) or (N, H, W)")
    if loaded.shape[2] != channels and loaded.shape[0] != channels:
        raise UserError(f"'{path}' has shape {loaded.shape}: no axis of {channels} channels (data.channels).")
    last = loaded.shape[2] == channels
    return np.ascontiguousarray(_to_bytes(path, loaded.transpose(2, 0, 1) if last else loaded))


def _read_tiff(path: str, image: Image.Image, channels: int, content: bytes | None) -> np.ndarray:
    """Bands as they are, or gray pages stacked. Pillow drops bands after the fourth, so those go through `tifffile`."""
    bands = int(image.tag_v2.get(277, 1))  # SamplesPerPixel
    pages = getattr(image, "n_frames", 1)
    if bands == 1 and pages == channels:
        found = []
        for page in range(pages):
            image.seek(page)
            found.append(_to_bytes(path, np.array(image)))
        return np.stack(found)
    if bands != channels:
        raise UserError(f"'{path}' has {bands} bands in {pages} pages, but data.channels is {channels}.")
    if bands <= 4 and len(image.getbands()) == bands:
        return _channels_first(_to_bytes(path, np.asarray(image)))
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"'{path}' has {bands} bands: reading more than 4 needs tifffile (pip install tifffile)."
        ) from None
    array = tifffile.imread(_file(path, content))
    return _to_bytes(path, array if array.shape[0] == channels else np.moveaxis(array, -1, 0))


class Quarantine:
    """Files that did not decode: counted per set, listed once in a text file `path<TAB>reason`, and limited.

    `file` is `quarantine.txt` of the run directory (None: only counted); it and its folder come into being with the
    first entry. `limit` is the share of a set that may fail. Several ranks may write the same file: each entry is one
    appended line, written under a lock after reading what is there, so that neither ranks nor resumed runs repeat one.
    """

    def __init__(self, file: str | os.PathLike | None = None, limit: float = 0.01) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"data.max_corrupt is {limit}; expected a share from 0 to 1.")
        self.file = None if file is None else Path(file)
        self.limit = limit
        self.failures: dict[str, dict[str, str]] = {}  # set -> path -> reason
        self.totals: dict[str, int] = {}  # set -> its images

    def __len__(self) -> int:
        return len({path for found in self.failures.values() for path in found})

    def __bool__(self) -> bool:
        return True  # an empty one is still there: `quarantine or Quarantine()` must keep it

    def report(self, failures: list[DecodeError], what: str, total: int) -> None:
        """Record `failures` of the set `what` of `total` images. UserError when the set now has more than its share of
        them.

        Samples of a set report under its name: the largest total counts, lest a sample be charged with all of the set's
        failures.
        Each rank counts what it has met itself.
        """
        total = self.totals[what] = max(total, self.totals.get(what, 0))
        found = self.failures.setdefault(what, {})
        new = [failure for failure in failures if failure.path not in found]
        found.update((failure.path, failure.reason) for failure in new)
        if new:
            self._append(new)
        if found and len(found) > self.limit * total:
            path, reason = next(iter(found.items()))
            listed = f" All are listed in {self.file}." if self.file else ""
            raise UserError(
                f"{len(found)} of the {total} images of {what} do not decode ({len(found) / total:.1%};"
                f" data.max_corrupt allows {self.limit:.1%}). First: {path} ({reason}).{listed}"
            )

    def list_again(self) -> None:
        """Write what has been reported to `file` once more, where it was removed since (a run directory that starts
        anew)."""
        for found in filter(None, self.failures.values()):
            self._append([DecodeError(path, reason) for path, reason in found.items()])

    def _append(self, failures: list[DecodeError]) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b", buffering=0) as handle:
            lock(handle)
            handle.seek(0)
            text = handle.read()
            known = {line.split(b"\t")[0] for line in text.splitlines()}
            lines = {_escape(failure.path): failure.reason for failure in failures}
            fresh = b"".join(key + b"\t" + why.encode() + b"\n" for key, why in lines.items() if key not in known)
            if fresh:  # a line cut off by a crash must not swallow the next entry
                handle.write((b"\n" if text and not text.endswith(b"\n") else b"") + fresh)


def _escape(path: str) -> bytes:
    return os.fsencode(path.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r"))
