"""Files of numbers: NumPy arrays, and what microscopes, satellites and scanners write (TIFF of any kind, DICOM).

Pillow reads 8-bit TIFF, and gray TIFF of 16 and 32 bits. Everything else goes through `tifffile`, and compressions
beyond the usual ones through `imagecodecs`; DICOM through `pydicom`: pip install 'vit-suite[science]'.

Every reader takes a path, or the bytes of the file, and gives `pixels.Wide`, (H, W, C) of any type; it checks the
number of pixels in the header before it reads them.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vit_suite.data.orientation import ORIENTATION
from vit_suite.data.pixels import Unfit, Wide, by_channels, channel_axis, check_frame, unit

INSTALL = "pip install 'vit-suite[science]'"
DICOM = (".dcm", ".dicom")
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339
"""TIFF tags."""
LOGLUV = (32844, 32845)
"""Values of the TIFF tag PhotometricInterpretation: gray and colors as logarithms."""
UNSIGNED, UNDEFINED = 1, 4
"""Values of the TIFF tag SampleFormat."""

Check = Callable[[int, int], None]
"""(height, width) -> nothing, or Unfit where there are too many pixels."""


# -- Arrays ------------------------------------------------------------------------------------------------------------


def read_array(file: str | io.BytesIO, channels: int, check: Check) -> Wide:
    """An .npy, or the only array of an .npz, or the one called `image` in it. Objects are refused: a pickle from a
    stranger must not run."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if len(names) != 1 and "image" not in names:
                raise Unfit(f"expected one array or one named 'image', found {names[:5]}")
            name = "image" if "image" in names else names[0]
            member = archive.namelist()[names.index(name)]
            with archive.open(member) as stream:
                _check_header(stream, channels, check)
            with archive.open(member) as stream:
                return by_channels(np.lib.format.read_array(stream, allow_pickle=False), channels)
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getvalue()) as stream:
        _check_header(stream, channels, check)
        stream.seek(0)
        return by_channels(np.lib.format.read_array(stream, allow_pickle=False), channels)


def _check_header(stream: Any, channels: int, check: Check) -> None:
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
    shape, _, kind = reader(stream)
    if kind.hasobject or kind.kind not in "biuf":
        raise Unfit(f"an array of {kind} holds no pixels")
    axis = channel_axis(shape, channels)
    check(*(size for place, size in enumerate(shape) if axis is None or place != axis % 3))


# -- TIFF --------------------------------------------------------------------------------------------------------------


def is_plain(tags: Any) -> bool:
    """Whether Pillow reads a TIFF with these tags correctly: unsigned values of at most 8 bits."""
    bits, formats = tags.get(BITS_PER_SAMPLE, (1,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))
    bits = bits if isinstance(bits, tuple) else (bits,)
    formats = formats if isinstance(formats, tuple) else (formats,)
    return max(bits) <= 8 and set(formats) <= {UNSIGNED, UNDEFINED}


def read_tiff(file: str | io.BytesIO, channels: int, check: Check, frame: int = 0) -> Wide:
    """The page `frame`; or, for 0, as many gray pages as there should be channels."""
    try:
        import tifffile
    except ImportError:
        raise Unfit(f"this kind of TIFF is read by tifffile: {INSTALL}") from None
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        if frame:
            check_frame(frame, len(tiff.pages))
        page: Any = tiff.pages.first if not frame else tiff.pages[frame]
        if int(page.photometric) in LOGLUV:
            raise Unfit("a LogLuv TIFF (SGI's high dynamic range) is not read: save it as a TIFF of 32-bit floats")
        check(page.imagelength, page.imagewidth)
        if page.imagedepth > 1:
            raise Unfit(f"a TIFF whose page is a volume of {page.imagedepth} planes: save the planes as pages")
        bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
        if not frame and channels not in (1, 3) and page.samplesperpixel == 1 and len(tiff.pages) == channels:
            pages = [_decoded(tiff.pages[number]) for number in range(channels)]
            return Wide(np.concatenate([_dark_is_zero(one, page, bits) for one in pages], 2), bits=_odd(bits))
        values = _decoded(page)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
            values, bits = np.moveaxis(page.colormap, 0, -1)[values[..., 0]], 16
        values = _dark_is_zero(values, page, bits)
        values = _turned(values, int(getattr(page.tags.get(ORIENTATION), "value", 1) or 1))
        return _bands(values, page, channels, _odd(bits), tifffile)


def _decoded(page: Any) -> np.ndarray:
    """(H, W, bands) in the byte order of the machine."""
    try:
        values = page.asarray()
    except ValueError as error:
        hint = f": {INSTALL}" if "imagecodecs" in str(error) else ""
        raise Unfit(f"{error}{hint}") from None
    values = values.reshape(page.shaped[-4:]) if values.ndim > 3 else values
    if values.ndim == 4:
        raise Unfit(f"a TIFF of shape {values.shape} is a volume")
    if values.ndim == 2:
        values = values[..., None]
    elif page.planarconfig == 2:
        values = np.moveaxis(values, 0, -1)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _odd(bits: int) -> int | None:
    """`bits` of a value if they do not fill the type that holds it (10, 12, 14); else None."""
    return None if bits in (1, 8, 16, 32, 64) else bits


def _dark_is_zero(values: np.ndarray, page: Any, bits: int) -> np.ndarray:
    """Invert where the file stores white as zero."""
    if int(page.photometric) != 0 or values.dtype.kind not in "ub":
        return values
    return ~values if values.dtype == np.bool_ else (2**bits - 1 - values).astype(values.dtype)


def _turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) turned upright; `orientation` is TIFF's and EXIF's, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def _bands(values: np.ndarray, page: Any, channels: int, bits: int | None, tifffile: Any) -> Wide:
    """The bands as an image: all of them, or color and alpha."""
    count = values.shape[2]
    if count == channels and not (count == 3 and page.photometric == tifffile.PHOTOMETRIC.CIELAB):
        return Wide(values, bits=bits)
    if channels not in (1, 3):
        raise Unfit(f"has {count} bands in {len(page.parent.pages)} pages, but data.channels is {channels}")
    photometric = page.photometric
    if photometric == tifffile.PHOTOMETRIC.SEPARATED and count == 4:
        return Wide(_cmyk(values, bits))
    color = 3 if photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.PALETTE) or count == 3 else 1
    if count not in (color, color + 1):
        raise Unfit(f"has {count} bands, but data.channels is {channels}")
    if count == color + 1:
        kinds = [int(kind) for kind in page.extrasamples] or [0]
        if kinds[0] in (1, 2):
            alpha = unit(values[..., -1])
            return Wide(_straight(values[..., :color], alpha) if kinds[0] == 1 else values[..., :color], alpha, bits)
    return Wide(values[..., :color], bits=bits)


def _straight(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Undo the multiplication by alpha (0..1) with which a file stores its colors."""
    share = np.where(alpha > 0, alpha, 1)[..., None]
    most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    return (values / share).clip(0, most).astype(values.dtype)


def _cmyk(values: np.ndarray, bits: int | None) -> np.ndarray:
    """uint8 RGB of CMYK of any depth, by Pillow's formula."""
    ink = unit(values) if bits is None else (values.astype(np.float32) / (2**bits - 1)).clip(0, 1)
    cmyk = Image.fromarray((ink * 255 + 0.5).astype(np.uint8), "CMYK")
    return np.asarray(cmyk.convert("RGB"))


# -- DICOM -------------------------------------------------------------------------------------------------------------


def read_dicom(file: str | io.BytesIO, channels: int, check: Check, frame: int = 0) -> Wide:
    """Values after slope and intercept (Hounsfield units of a CT), with the window that the file names.

    MONOCHROME1 (white is zero) is inverted, a palette gives its colors. Of several frames `frame` is taken; or, for 0,
    all of them where there are as many as channels.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ImportError:
        raise Unfit(f"DICOM is read by pydicom: {INSTALL}") from None
    data = pydicom.dcmread(file)
    if "PixelData" not in data:
        raise Unfit("a DICOM file without pixels")
    check(int(data.Rows), int(data.Columns))
    samples, frames = int(data.get("SamplesPerPixel", 1)), int(data.get("NumberOfFrames", 1) or 1)
    check_frame(frame, frames)
    stacked = not frame and channels not in (1, 3) and samples == 1 and frames == channels
    numbers = range(channels) if stacked else (frame,)
    found = [pixel_array(data, index=number) for number in numbers]
    if data.get("PhotometricInterpretation") == "PALETTE COLOR":
        return Wide(apply_color_lut(found[0], data))
    if samples > 1:
        return by_channels(found[0], channels)
    stored = np.stack(found, -1)
    values = apply_modality_lut(stored, data)
    low, high = _window(data) or _stored_range(data, values, stored)
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        values, low, high = -values.astype(np.float64), -high, -low
    return Wide(values, window=(low, high))


def frames_of_dicom(file: str | io.BytesIO) -> int:
    """Frames that the header of a DICOM file claims."""
    import pydicom

    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
    return int(header.get("NumberOfFrames", 1) or 1)


def _window(data: Any) -> tuple[float, float] | None:
    """(black, white) by the standard's linear function, PS3.3 C.11.2.1.2; the first window where there are several."""
    center, width = data.get("WindowCenter"), data.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return None
    center, width = (float(one[0] if hasattr(one, "__len__") else one) for one in (center, width))
    return (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2) if width > 1 else None


def _stored_range(data: Any, values: np.ndarray, stored: np.ndarray) -> tuple[float, float]:
    """(least, largest) value that the bits of a file can hold, after slope and intercept."""
    bits = int(data.get("BitsStored", 8 * stored.dtype.itemsize))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if data.get("PixelRepresentation") else (0, 2**bits - 1)
    if "ModalityLUTSequence" in data:
        return float(values.min()), float(values.max())
    slope, intercept = float(data.get("RescaleSlope", 1) or 1), float(data.get("RescaleIntercept", 0) or 0)
    return min(low * slope, high * slope) + intercept, max(low * slope, high * slope) + intercept
