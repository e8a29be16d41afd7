"""How EXIF says that an image is to be turned."""

from __future__ import annotations

from PIL import Image

ORIENTATION = 0x0112
"""EXIF and TIFF tag: how the image is turned, 1 to 8."""


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or where the EXIF block is damaged: the pixels may be good."""
    try:
        if image.format == "TIFF":
            return int(image.getexif().get(ORIENTATION, 1))
        exif = Image.Exif()
        if "exif" in image.info:
            exif.load(image.info["exif"])
        elif "Raw profile type exif" in image.info:
            exif.load(bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:])))
        return int(exif.get(ORIENTATION, 1))
    except Exception:
        return 1


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what shows the image upright."""


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation shows it."""
    if image.format == "TIFF":
        image.load()  # Pillow turns it here by itself, and forgets the tag
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info, turned.format = image.info, image.format
    return turned
