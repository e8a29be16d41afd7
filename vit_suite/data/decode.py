"""A file, or its bytes -> uint8 pixels (C, H, W).

Axes: C channels, H height, W width. What a file may be, and what becomes of it:

- 8-bit RGB, gray, palette, CMYK, YCbCr: Pillow's conversion to RGB, or to luma (ITU-R 601) for one channel.
- Transparency (alpha channel or transparent color): composited on white. What lies under a transparent pixel is
  arbitrary, often black, and dropping alpha would draw silhouettes that nobody sees in a viewer.
- Values wider than 8 bits, in PNG, TIFF, NumPy arrays and DICOM: `data.value_range`, see `pixels.py`.
- EXIF orientation is applied; a damaged EXIF block is ignored, and so is an orientation in XMP, as in OpenCV and
  libvips.
- N channels (not 1 or 3): bands as they are; N must match. An array is (H, W), (H, W, N) or (N, H, W).
- Several pages or frames: the one that `data.frame` names, or all of them where they are as many gray ones as there
  are channels and `data.frame` is 0. Which one is taken is logged once a set (`ranges.py`).

The size is read from the header first: one limit of pixels holds for every format, before memory is taken.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vit_suite.data.jpeg import read_jpeg
from vit_suite.data.messages import Listening
from vit_suite.data.orientation import orientation, upright
from vit_suite.data.pixels import MAX_PIXELS, READING, Reading, Unfit, Wide, check_frame, convert_channels, finish
from vit_suite.data.science import DICOM, frames_of_dicom, read_array, read_dicom, read_tiff
from vit_suite.data.tiff import needs_tifffile, wide_tiff
from vit_suite.errors import UserError

EXTENSIONS = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .tga"
        " .jp2 .j2k .j2c .jpx .jpf .avif .heic .heif .hif .npy .npz .dcm .dicom"
    ).split()
)
ARRAYS = (".npy", ".npz")
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif")
ROOTS = (".tif", ".tiff")
HEIF = (".heic", ".heif", ".hif")
INSTALL_HEIF = "pip install 'vit-suite[heif]'"
FRAMES = (*ROOTS, *DICOM, *HEIF, ".gif", ".png", ".apng", ".webp", ".avif")
"""Endings of files that may hold several pages or frames."""
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
"""Bytes 8 to 12 of a HEIC file, after `ftyp`."""
PROGRAMS = ("EPS",)
"""Pillow's names of formats that it gives to another program (Ghostscript), which would run what the file says."""


class DecodeError(Exception):
    """The file at `path` gives no image; `reason` is one line."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = str(path), " ".join(str(reason).split())[:300]
        super().__init__(f"{self.path}: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return DecodeError, (self.path, self.reason)


def is_image(name: str) -> bool:
    """Whether a file's extension is one of `EXTENSIONS` (any case), and it is none of macOS's `._` files."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith("._")


def decode(
    path: str | os.PathLike,
    channels: int = 3,
    content: bytes | None = None,
    reading: Reading = READING,
) -> np.ndarray:
    """The image at `path` as uint8 (channels, H, W); where `content` is given it is the file's bytes, and `path` only
    its name. DecodeError, with one line, for whatever is wrong with this file."""
    path = os.fspath(path)
    return _guarded(path, lambda: _narrow(read_raw(path, channels, content, reading), channels, reading))


def from_pillow(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 (C, H, W) of an image that Pillow has opened, as `decode` converts its file. UserError for one that has
    other bands."""
    try:
        return _narrow(_pixels(image, channels, only_wide=False, frame=0), channels, READING)
    except Unfit as error:
        raise UserError(f"a Pillow image of mode {image.mode}: {error}") from None


def _narrow(found: np.ndarray | Wide | None, channels: int, reading: Reading) -> np.ndarray:
    """What a reader found, as uint8 (C, H, W)."""
    if isinstance(found, Wide):
        return finish(found, channels, reading.value_range, "it")
    assert found is not None  # only with only_wide
    return convert_channels(found, channels, "it")


def may_be_wide(path: str) -> bool:
    """Whether a file of this name can hold values wider than 8 bits."""
    return os.path.splitext(path)[1].lower() not in (*JPEG, *HEIF, ".gif", ".webp", ".bmp", ".avif", ".tga", ".pbm")


def count_frames(path: str, content: bytes | None) -> int:
    """Pages or frames of a file, from its header; 1 when nothing says so."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FRAMES:
        return 1
    try:
        _check_file(path, content)
        if suffix in DICOM:
            return frames_of_dicom(_file(path, content))
        _need_heif(suffix)
        with Image.open(_file(path, content)) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # the decoder says what is wrong with the file
        return 1


def _need_heif(suffix: str) -> None:
    """Teach Pillow to read HEIC, where the file is one. Unfit without the package that does it."""
    if suffix not in HEIF:
        return
    try:
        import pillow_heif
    except ImportError:
        raise Unfit(f"HEIC is read by pillow-heif: {INSTALL_HEIF}") from None
    pillow_heif.register_heif_opener()


def read_wide(path: str, content: bytes | None, channels: int, reading: Reading) -> Wide | None:
    """What a file holds whose values are wider than 8 bits; None for every other file. DecodeError as `decode`."""
    found = _guarded(path, lambda: read_raw(path, channels, content, reading, only_wide=True))
    return found if isinstance(found, Wide) and found.values.dtype not in (np.uint8, np.bool_) else None


def image_size(path: str | os.PathLike, frame: int = 0) -> tuple[int, int] | None:
    """(H, W) from the header alone, EXIF orientation applied; None when Pillow cannot read the header, or when the file
    does not hold so many frames."""
    path = os.fspath(path)
    if path.lower().endswith((*ARRAYS, *DICOM)):
        return None
    try:
        if not os.path.isfile(path):
            return None
        _need_heif(os.path.splitext(path)[1].lower())
        with Image.open(path) as image:
            image.seek(frame)
            turned = orientation(image) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # Pillow's plugins raise almost anything
        return None


def _guarded(path: str, work: Callable[[], Any]) -> Any:
    """`work()`. Whatever it raises for a bad file becomes a DecodeError of one line."""
    try:
        with Listening(path):
            return work()
    except DecodeError:
        raise
    except (Unfit, UserError) as error:
        raise DecodeError(path, str(error)) from None
    except FileNotFoundError:
        raise DecodeError(path, "the file does not exist") from None
    except PermissionError:
        raise DecodeError(path, "no permission to read the file") from None
    except Exception as error:  # Pillow's plugins, numpy, tifffile and pydicom raise almost anything on damaged input
        reason = re.sub(rf"{re.escape(repr(path))}|<_io\.BytesIO[^>]*>", "the file", str(error))
        raise DecodeError(path, f"{type(error).__name__}: {reason}") from None


def read_raw(
    path: str, channels: int, content: bytes | None, reading: Reading, only_wide: bool = False
) -> np.ndarray | Wide | None:
    """uint8 (C, H, W), or a `Wide` for values of more than 8 bits.

    only_wide: return None as soon as the header says 8 bits. Raises whatever the readers raise.
    """
    _check_file(path, content)
    max_pixels, frame = reading.max_pixels, reading.frame

    def check(height: int, width: int) -> None:
        if height * width > max_pixels:
            raise Unfit(
                f"{width} x {height} pixels are more than the {max_pixels:,} allowed; data.max_pixels raises the limit"
            )

    suffix = os.path.splitext(path)[1].lower()
    _need_heif(suffix)
    if suffix in ARRAYS:
        check_frame(frame, 1)
        return read_array(_file(path, content), channels, check)
    if suffix in DICOM:
        return read_dicom(_file(path, content), channels, check, frame)
    if suffix in JPEG and channels in (1, 3) and not only_wide and not frame:
        if content is None:
            with open(path, "rb") as file:
                content = file.read()
        if (pixels := read_jpeg(content, check)) is not None:
            return pixels
    if max_pixels > MAX_PIXELS:  # the user has asked for more than Pillow itself allows
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        with opened(path, content) as image:
            check(image.height, image.width)
            _seek(image, frame)
            check(image.height, image.width)
            if image.format == "TIFF" and needs_tifffile(image, channels, frame):
                return wide_tiff(image, _file(path, content), channels, check, frame)
            if image.format == "PNG" and not frame and _is_16_bit(image):
                return _png16(image, path, content)
            return _pixels(image, channels, only_wide, frame)
    except Image.DecompressionBombError:
        raise Unfit(f"more than the {max_pixels:,} pixels allowed; data.max_pixels raises the limit") from None
    except (Unfit, UserError):
        raise
    except Exception as error:
        if suffix not in ROOTS:
            raise
        try:
            return read_tiff(_file(path, content), channels, check, frame)
        except Unfit:  # it understood the file, and says more
            raise
        except Exception:  # neither Pillow nor tifffile reads it: Pillow's reason is the shorter one
            raise error from None


def _check_file(path: str, content: bytes | None) -> None:
    if content is not None:
        size = len(content)
    else:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for a writer
            raise Unfit("is no regular file")
        size = status.st_size
    if size == 0:
        raise Unfit("the file is empty (0 bytes)")


def _file(path: str, content: bytes | None) -> str | io.BytesIO:
    return path if content is None else io.BytesIO(content)


def opened(path: str, content: bytes | None = None) -> Image.Image:
    """The file as Pillow opens it. Unfit for one that Pillow would give to another program."""
    try:
        image = Image.open(_file(path, content))
    except Image.UnidentifiedImageError:
        start = content
        if start is None:
            with open(path, "rb") as file:
                start = file.read(12)
        if start[4:8] != b"ftyp" or start[8:12] not in HEIF_BRANDS:
            raise
        _need_heif(HEIF[0])  # a HEIC with another ending
        image = Image.open(_file(path, content))
    if image.format in PROGRAMS:
        image.close()
        raise Unfit(f"it is {image.format}, a program that draws: save it as a picture")
    return image


def _seek(image: Image.Image, frame: int) -> None:
    """Go to a frame. Unfit if there are not so many."""
    if not frame:
        return
    count = int(getattr(image, "n_frames", 1))
    check_frame(frame, count)
    image.seek(frame)


# -- What Pillow opens -------------------------------------------------------------------------------------------------


def _pixels(image: Image.Image, channels: int, only_wide: bool, frame: int) -> np.ndarray | Wide | None:
    if image.mode.startswith("I") or image.mode == "F":
        return Wide(np.asarray(upright(image))[..., None])
    if only_wide:
        return None
    box = None if frame else _frame_box(image)
    image = upright(image)
    if channels not in (1, 3):
        return _channels_first(np.asarray(image))
    if image.mode == "La":  # premultiplied: Pillow's only way out of it
        image = image.convert("LA")
    if image.format in ("BMP", "DIB") and image.mode == "RGBA" and image.getextrema()[-1] == (0, 0):
        image = image.convert("RGB")  # writers leave the fourth byte 0 and mean no transparency
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info or box:
        image = image.convert("RGBA")
        if box:  # pixels of a GIF outside of its first frame are transparent
            inner = Image.new("RGBA", image.size)
            inner.paste(image.crop(box), box)
            image = inner
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        image = _from_lab(image)
    target = "RGB" if channels == 3 else "L"
    return _channels_first(np.asarray(image if image.mode == target else image.convert(target)))


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _frame_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """(left, upper, right, lower) of a GIF's first frame, if it does not fill the canvas."""
    tile: Any = getattr(image, "tile", None)
    if image.format != "GIF" or not tile:
        return None
    box = tuple(tile[0][1])
    return box if box != (0, 0, *image.size) else None


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    assert converted is not None  # only in place
    return converted


def _is_16_bit(image: Image.Image) -> bool:
    tile: Any = getattr(image, "tile", None)
    return bool(tile) and "16B" in str(tile[0][3])


def _png16(image: Image.Image, path: str, content: bytes | None) -> Wide:
    """All 16 bits of a PNG. Pillow keeps them for gray images only."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    if content is None:
        with open(path, "rb") as file:
            content = file.read()
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    values = decode_png(encoded, ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0)
    clear = image.info.get("transparency")
    if values.shape[2] in (2, 4):
        return Wide(values[..., :-1], values[..., -1].astype(np.float32) / 65535)
    if clear is None or isinstance(clear, bytes):
        return Wide(values)
    return Wide(values, (values != np.array(clear).reshape(1, 1, -1)).any(-1).astype(np.float32))
