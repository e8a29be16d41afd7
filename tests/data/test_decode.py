"""Decoding against known pixels, odd files made here, and the quarantine."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_suite.data.decode import DecodeError, decode, image_size, is_image
from vit_suite.data.pixels import convert_channels

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def quadrants(mode: str = "RGB", size: tuple[int, int] = (8, 4)) -> Image.Image:
    """Width x height, left half red, right half blue, top left pixel green."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, size[0], size[1]))
    image.putpixel((0, 0), GREEN)
    return image.convert(mode)


def test_rgb_pixels_and_axes(tmp_path):
    quadrants().save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 8) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert tuple(pixels[:, 0, 0]) == GREEN and tuple(pixels[:, 3, 0]) == RED and tuple(pixels[:, 3, 7]) == BLUE


def test_gray_file_and_gray_output(tmp_path):
    Image.new("L", (5, 3), 77).save(tmp_path / "g.png")
    assert (decode(tmp_path / "g.png") == 77).all() and decode(tmp_path / "g.png").shape == (3, 3, 5)
    quadrants().save(tmp_path / "c.png")
    gray = decode(tmp_path / "c.png", 1)
    assert gray.shape == (1, 4, 8)
    assert (gray[0, 0, 0], gray[0, 3, 0], gray[0, 3, 7]) == (150, 76, 29)  # ITU-R 601 of green, red, blue
    assert (convert_channels(decode(tmp_path / "c.png"), 1, "x") == gray).all()  # arrays get the same luma as files


def test_alpha_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png")[:, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]
    Image.new("LA", (1, 1), (0, 51)).save(tmp_path / "la.png")
    assert decode(tmp_path / "la.png", 1).item() == 204  # 255 * (1 - 51/255)


def test_palette_with_and_without_transparency(tmp_path):
    image = quadrants().quantize(4)
    image.save(tmp_path / "p.gif")
    assert tuple(decode(tmp_path / "p.gif")[:, 3, 7]) == BLUE
    image.save(tmp_path / "t.png", transparency=image.getpixel((7, 3)))
    assert tuple(decode(tmp_path / "t.png")[:, 3, 7]) == (255, 255, 255)


def test_16_bit_1_bit_and_float(tmp_path):
    values = np.array([[0, 257, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "d.png")
    Image.fromarray(values).save(tmp_path / "d.tif")
    for name in ("d.png", "d.tif"):
        assert decode(tmp_path / name, 1).tolist() == [[[0, 1, 128, 255]]]
        assert decode(tmp_path / name, 3)[2].tolist() == [[0, 1, 128, 255]]
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert decode(tmp_path / "f.tif", 1).tolist() == [[[0, 128, 255]]]
    Image.fromarray(np.array([[0.0, 300.0]], dtype=np.float32)).save(tmp_path / "bad.tif")
    with pytest.raises(DecodeError, match="floats in 0..1"):
        decode(tmp_path / "bad.tif", 1)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png", 1).tolist() == [[[255, 0]]]


def test_cmyk_jpeg_is_close_to_its_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    pixels = decode(tmp_path / "c.jpg").astype(int)
    assert pixels.shape == (3, 16, 16) and np.abs(pixels.mean((1, 2)) - RED).max() < 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to view
    path = tmp_path / f"e.{suffix}"
    quadrants(size=(64, 32)).save(path, exif=exif)
    pixels = decode(path).astype(int)
    assert pixels.shape == (3, 64, 32)
    assert np.abs(pixels[:, 60, 16] - BLUE).max() < 40 and np.abs(pixels[:, 10, 16] - RED).max() < 40  # left went up
    assert image_size(path) == (64, 32) or suffix != "jpg"


def test_jpeg_paths_agree_with_pillow_to_the_bit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for name, image, options in (
        ("a.jpg", Image.fromarray(noise), {}),
        ("b.JPEG", Image.fromarray(noise), {"progressive": True, "subsampling": 0}),
        ("c.jpg", Image.fromarray(noise[..., 0]), {}),
    ):
        image.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as read:
            assert (decode(tmp_path / name).transpose(1, 2, 0) == np.asarray(read.convert("RGB"))).all()
            assert (
                decode(tmp_path / name, 1)[0]
                == np.asarray(read.convert("L") if name == "c.jpg" else read.convert("RGB").convert("L"))
            ).all()


def test_one_pixel_and_odd_names(tmp_path):
    folder = tmp_path / "mit Leerzeichen" / "日本語"
    folder.mkdir(parents=True)
    Image.new("RGB", (1, 1), RED).save(folder / "ein bild ü.png")
    assert decode(folder / "ein bild ü.png").reshape(-1).tolist() == list(RED)


def broken_files(folder):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    png = buffer.getvalue()
    files = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:30],
        "empty.jpg": b"",
        "text.jpg": b"this is not an image\n" * 20,
        "cut.png": png[: len(png) // 2],
        "crc.png": png[:60] + bytes(8) + png[68:],
        "noise.tif": b"II*\x00" + bytes(range(200)),
        "cut.gif": b"GIF89a\x10\x00",
        "object.npy": _pickled(),
        "text.npz": b"PK nothing",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return list(files)


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_broken_files_raise_decode_error_with_one_line(tmp_path):
    for name in [*broken_files(tmp_path), "missing.jpg"]:
        with pytest.raises(DecodeError) as caught:
            decode(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
        assert caught.value.reason and "\n" not in caught.value.reason and "\t" not in caught.value.reason
        assert image_size(tmp_path / name) is None or name.startswith(("cut", "crc"))


def test_n_channel_files(tmp_path):
    cube = np.random.default_rng(0).integers(0, 256, (6, 7, 5), dtype=np.uint8)  # H 6, W 7, 5 channels
    np.save(tmp_path / "last.npy", cube)
    np.save(tmp_path / "first.npy", cube.transpose(2, 0, 1))
    np.savez(tmp_path / "z.npz", image=cube, other=cube[0])
    np.save(tmp_path / "deep.npy", cube.astype(np.uint16) * 257)
    np.save(tmp_path / "unit.npy", cube / 255.0)
    pages = [Image.fromarray(np.ascontiguousarray(cube[..., c])) for c in range(5)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name in ("last.npy", "first.npy", "z.npz", "deep.npy", "unit.npy", "pages.tif"):
        assert (decode(tmp_path / name, 5) == cube.transpose(2, 0, 1)).all(), name
    with pytest.raises(DecodeError, match=r"no axis of 4 channels"):
        decode(tmp_path / "last.npy", 4)
    with pytest.raises(DecodeError, match="data.channels is 4"):
        decode(tmp_path / "pages.tif", 4)
    Image.fromarray(cube[..., :4], "RGBA").save(tmp_path / "four.tif")
    assert (decode(tmp_path / "four.tif", 4) == cube[..., :4].transpose(2, 0, 1)).all()  # alpha kept: read as it is
    quadrants().save(tmp_path / "rgb.png")
    with pytest.raises(DecodeError, match="has 3 channels, but data.channels is 2"):
        decode(tmp_path / "rgb.png", 2)
    np.save(tmp_path / "nan.npy", np.full((4, 4, 5), np.nan))
    with pytest.raises(DecodeError, match="floats in 0..1"):
        decode(tmp_path / "nan.npy", 5)


def test_image_names():
    assert (
        is_image("a/b/C.JPEG")
        and is_image("x.tif")
        and not is_image("a.txt")
        and not is_image("._a.jpg")
        and not is_image("jpg")
    )


def test_a_program_that_draws_is_not_run(tmp_path):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", "EPS")
    for content in (None, (tmp_path / "a.jpg").read_bytes()):
        with pytest.raises(DecodeError, match="it is EPS, a program that draws"):
            decode(tmp_path / "a.jpg", 3, content)
