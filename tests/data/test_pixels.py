"""Values wider than 8 bits: by file, by set, by what the user says; in files of every kind."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.make import config
from vit_suite.data import ranges
from vit_suite.data.decode import MAX_PIXELS, DecodeError, decode
from vit_suite.data.jpeg import jpeg_size
from vit_suite.data.pixels import Reading, ValueRange, parse_range
from vit_suite.data.registry import open_test, open_train
from vit_suite.errors import UserError

RAMP = np.tile(np.arange(0, 256, 4), (16, 1))  # 64 levels, 0..252


def read(path, channels=1, **options):
    return decode(path, channels, **options)


def save(path, values):
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)
    return path


def png16(values, clear=b""):
    """A PNG of 16 bits by the standard: (H, W) gray, or (H, W, 2 to 4)."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy", "rgb.png"])
def test_integers_by_the_bits_they_use(tmp_path, bits, name):
    values = (RAMP * (257 if bits == 16 else 2 ** (bits - 8))).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    if name == "rgb.png":  # of colors Pillow itself keeps 8 of 16 bits
        (tmp_path / name).write_bytes(png16(np.dstack([values] * 3)))
        assert (read(tmp_path / name, 3)[:, 1] == RAMP[1]).all()
    else:
        save(tmp_path / name, values)
        assert (read(tmp_path / name)[0, 1] == RAMP[1]).all() and read(tmp_path / name)[0, 0, 0] == 255


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.uint64])
def test_wide_integers_of_0_to_255_are_8_bits(tmp_path, kind):
    save(tmp_path / "a.npy", RAMP.astype(kind))
    assert (read(tmp_path / "a.npy")[0] == RAMP).all()


def test_signed_and_float_values_need_a_range(tmp_path):
    ramp = np.linspace(-1, 1, 64 * 48).reshape(48, 64)
    wanted = ((ramp + 1) * 127.5 + 0.5).astype(np.uint8)
    for name, values, least in (("a.tif", (ramp * 3.14).astype(np.float32), -3.14), ("b.tif", ramp * 5000, -5000)):
        path = save(tmp_path / name, values if name == "a.tif" else values.round().astype(np.int32))
        with pytest.raises(DecodeError, match=r"values from -\d.*data\.value_range minmax, or two numbers"):
            read(path)
        for given in ("minmax", (least, -least)):
            assert np.abs(read(path, reading=Reading(parse_range(given)))[0].astype(int) - wanted).max() <= 1
    save(tmp_path / "c.npy", (RAMP - 128).astype(np.int8))
    assert (read(tmp_path / "c.npy")[0] == RAMP).all()  # signed bytes have one range


def test_two_numbers_cut_what_lies_beyond_and_leave_8_bits_alone(tmp_path):
    half = Reading(parse_range([0.25, 0.75]))
    save(tmp_path / "f.npy", np.array([[0, 0.25, 0.5, 0.75, 1, np.nan]], np.float32))
    assert read(tmp_path / "f.npy", reading=half)[0].tolist() == [[0, 0, 128, 255, 255, 0]]
    save(tmp_path / "g.png", RAMP.astype(np.uint8))
    assert (read(tmp_path / "g.png", reading=half)[0] == RAMP).all()
    save(tmp_path / "flat.npy", np.full((3, 3), 7.0))
    assert (read(tmp_path / "flat.npy", reading=Reading(parse_range("minmax"))) == 0).all()
    for wrong in ("maxmin", [5, 1], [1, 1], [1]):
        with pytest.raises(UserError, match="data.value_range is .*expected auto, minmax, or two numbers"):
            parse_range(wrong)


def gray_set(root, bits, most=1.0):
    """Train files reach the full depth, test files a tenth of it."""
    for split, share in (("train", most), ("test", most / 10)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                values = (RAMP / 252 * share * (2**bits - 1)).astype(np.uint16)
                save(root / split / name / f"{i}.png", values)
    return root


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_a_set_has_one_range_and_says_which(tmp_path, caplog, bits):
    root, cfg = gray_set(tmp_path / "gray", bits), {"channels": 1}
    with caplog.at_level(logging.WARNING, "vit_suite"):
        train, test = (open_one(config("folder", root, **cfg)) for open_one in (open_train, open_test))
    assert train.reading.value_range == test.reading.value_range == ValueRange("auto", 0, 2**bits - 1)
    assert int(train.load(0).max()) == 255 and 24 <= int(test.load(0).max()) <= 26  # dark pictures stay dark
    said = [record.message for record in caplog.records]
    if bits < 16:
        assert len(said) == 1 and f"read as {bits} bits, 0 to {2**bits - 1}" in said[0]
    else:
        assert not said  # nothing unusual
    asked = open_train(config("folder", root, value_range=[0, 65535], **cfg))
    assert int(asked.load(0).max()) == round((2**bits - 1) / 257)


def test_a_file_beyond_the_range_of_the_set_is_refused_not_cut(tmp_path, monkeypatch):
    root = gray_set(tmp_path / "gray", 10)
    monkeypatch.setattr(ranges, "FIRST", 1)
    monkeypatch.setattr(ranges, "PROBES", 1)
    save(root / "train" / "b" / "3.png", np.full((4, 4), 4000, np.uint16))
    train = open_train(config("folder", root, channels=1))
    with pytest.raises(DecodeError, match="4000, but the set is read as 0 to 1023"):
        train.load(7)


def test_transparency_of_wide_files(tmp_path):
    gray = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    gray[:, :32] = 0
    clear = struct.pack(">I", 2) + b"tRNS\0\0" + struct.pack(">I", zlib.crc32(b"tRNS\0\0"))
    (tmp_path / "t.png").write_bytes(png16(gray, clear))
    pixels = read(tmp_path / "t.png", 3)
    assert (pixels[:, :, :32] == 255).all() and (pixels[0, 0, 33:] == (gray[0, 33:].astype(int) + 128) // 257).all()
    alpha = np.dstack([np.zeros((4, 4)), np.full((4, 4), 65535 // 5)]).astype(np.uint16)
    (tmp_path / "la.png").write_bytes(png16(alpha))
    assert (read(tmp_path / "la.png") == 204).all()


def test_arrays_of_every_shape(tmp_path):
    rgba = np.dstack([np.full((4, 5), 90), np.full((4, 5), 20), np.full((4, 5), 10), np.full((4, 5), 51)])
    for name, values, wanted in (
        ("gray", np.full((4, 5), 7), [7, 7, 7]),
        ("one", np.full((4, 5, 1), 7), [7, 7, 7]),
        ("first", np.full((1, 4, 5), 7), [7, 7, 7]),
        ("rgba", rgba, [222, 208, 206]),  # a fifth of the color on white
        ("rgba first", rgba.transpose(2, 0, 1), [222, 208, 206]),
    ):
        save(tmp_path / f"{name}.npy", values.astype(np.uint8))
        pixels = read(tmp_path / f"{name}.npy", 3)
        assert pixels.shape == (3, 4, 5) and pixels[:, 0, 0].tolist() == wanted, name
    for name, values, words in (
        ("line", np.zeros(5), "is not an image"),
        ("six", np.zeros((7, 5, 6)), "no axis of 3 channels"),
        ("words", np.array([["a"]]), "holds no pixels"),
        ("complex", np.zeros((2, 2), complex), "holds no pixels"),
    ):
        save(tmp_path / f"{name}.npy", values)
        with pytest.raises(DecodeError, match=words):
            read(tmp_path / f"{name}.npy", 3)


# One limit of pixels
# ----------------------------------------------------------------------------------------------------------------------


def claims(kind, side=20_000):
    """A few hundred bytes that claim side x side pixels."""
    buffer = io.BytesIO()
    if kind == "npy":
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({side}, {side})}}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    if kind == "npz":
        import zipfile

        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("image.npy", claims("npy", side))
        return buffer.getvalue()
    Image.new("RGB", (64, 64)).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()))
    content = bytearray(buffer.getvalue())
    if kind == "jpg":
        place = content.find(b"\xff\xc0")
        content[place + 5 : place + 9] = struct.pack(">HH", side, side)
    elif kind == "png":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "gif":
        content[6:10] = struct.pack("<HH", side, side)
    elif kind == "bmp":
        content[18:26] = struct.pack("<ii", side, side)
    elif kind == "tif":
        for tag in (256, 257):
            place = content.find(struct.pack("<HHI", tag, 4, 1))
            content[place + 8 : place + 12] = struct.pack("<I", side)
    return bytes(content)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "bmp", "tif", "npy", "npz"])
def test_one_limit_of_pixels_for_every_format(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(claims(kind))
    for content in (None, path.read_bytes()):
        with pytest.raises(DecodeError, match="pixels.*allowed; data.max_pixels raises the limit"):
            decode(path, 3, content)
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    with pytest.raises(DecodeError, match="30 x 20 pixels are more than the 599 allowed"):
        decode(tmp_path / "b.png", 3, reading=Reading(max_pixels=599))
    assert decode(tmp_path / "b.png", 3, reading=Reading(max_pixels=600)).shape == (3, 20, 30)
    assert MAX_PIXELS > 20_000 * 8_000


def test_size_of_a_jpeg_from_its_header(tmp_path):
    for options in ({}, {"progressive": True}, {"comment": b"x" * 70, "exif": b"Exif\0\0" + bytes(300)}):
        Image.new("RGB", (33, 21)).save(tmp_path / "a.jpg", **options)
        assert jpeg_size((tmp_path / "a.jpg").read_bytes()) == (21, 33)
    assert jpeg_size(b"\xff\xd8\xff\xe0") is None and jpeg_size(b"no") is None


# Oddities of formats
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_damaged_exif_does_not_cost_the_pixels(tmp_path, suffix):
    Image.new("RGB", (8, 6), (90, 90, 90)).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0LoremIpsum")
    assert np.abs(decode(tmp_path / f"a.{suffix}").astype(int) - 90).max() < 4


def test_what_a_gif_frame_does_not_cover_is_white(tmp_path):
    def block(values):
        return bytes([len(values)]) + bytes(values)

    # 4 x 2 canvas; one frame of 2 x 2 at (1, 0), all color 1 (red)
    frame = b"," + struct.pack("<HHHHB", 1, 0, 2, 2, 0) + b"\x02" + block([0x8C, 0x2D, 0x05]) + b"\0"
    gif = b"GIF89a" + struct.pack("<HHBBB", 4, 2, 0x80, 0, 0) + bytes([0, 0, 255, 255, 0, 0]) + frame + b";"
    (tmp_path / "a.gif").write_bytes(gif)
    pixels = decode(tmp_path / "a.gif").transpose(1, 2, 0)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 3].tolist() == [255, 255, 255]


def test_a_bitmap_whose_alpha_is_0_everywhere_is_opaque(tmp_path):
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    header = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 32, 3, 64, 2835, 2835, 0, 0) + masks
    start = 14 + len(header)
    pixels = bytes([30, 20, 10, 0]) * 16
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHI", start + 64, 0, 0, start) + header + pixels)
    with Image.open(tmp_path / "a.bmp") as image:
        assert image.mode == "RGBA"
    assert decode(tmp_path / "a.bmp")[:, 0, 0].tolist() == [10, 20, 30]


def test_a_named_pipe_is_refused_at_once(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(DecodeError, match="is no regular file"):
        decode(tmp_path / "x.jpg")
