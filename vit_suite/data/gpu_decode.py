"""JPEG files decoded together on a GPU (nvJPEG, through torchvision).

Workers only read these files. They decode the files that nvJPEG would decode differently (see `is_plain`). nvJPEG's
pixels may differ from the CPU's by a few of 255 levels, because it rounds and enlarges the color channels in another
way. The device is an argument: on a CPU the same steps give the pixels of `decode.py` to the bit.
"""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from vit_suite.data.decode import JPEG
from vit_suite.data.orientation import ORIENTATION
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError


def read_file(source: ImageSource, index: int) -> Tensor:
    """Image `index` as the bytes of its file, uint8 (n,), if a GPU can decode it; else as pixels, uint8 (C, H, W).
    Raises what `source.load` raises."""
    content = source.content(index) if source.path(index).lower().endswith(JPEG) else None
    if content is None or not is_plain(content):
        return source.load(index)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def is_plain(content: bytes) -> bool:
    """Whether this is a whole JPEG of gray or YCbCr pixels that stand upright.

    nvJPEG ignores the EXIF orientation. Files that are cut off, and CMYK or RGB in a JPEG, go to the CPU's decoder too:
    its pixels are the reference for them.
    """
    if not (content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9")):
        return False
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = image.getexif().get(ORIENTATION, 1) == 1
            return upright and image.mode in ("L", "RGB") and image.info.get("adobe_transform", 1) == 1
    except Exception:  # as in decode.py: plugins raise almost anything
        return False


def check_decoder(device: torch.device) -> None:
    """UserError if `device` does not decode a good file: torchvision has no nvJPEG, or the driver does not fit."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # deprecated in 0.29, for torchcodec

        decode_jpeg([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], ImageReadMode.RGB, device=device)
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.decode is gpu, but torchvision decodes no JPEG on {device} ({reason}): use data.decode cpu."
        ) from None


def decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """JPEG files, uint8 (n_i,) on the host -> RGB pixels (3, H_i, W_i) on `device`; None for a file that its decoder
    refuses.

    All are decoded together. An error does not say which file caused it, so after one they are decoded one by one.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    if not files:
        return []
    try:
        return decode_jpeg(files, ImageReadMode.RGB, device=device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # no fault of a file
        raise
    except RuntimeError:
        return [None] if len(files) == 1 else [decode_jpegs([file], device)[0] for file in files]
