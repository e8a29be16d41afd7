"""TIFF of every kind through tifffile, DICOM through pydicom; the right value of each."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from vit_suite.config import DataConfig
from vit_suite.data import science
from vit_suite.data.decode import DecodeError, decode, image_size
from vit_suite.data.listing import undecodable
from vit_suite.data.pixels import Reading, parse_range
from vit_suite.data.registry import open_train

tifffile = pytest.importorskip("tifffile")
pydicom = pytest.importorskip("pydicom")

RAMP = np.tile(np.arange(0, 256, 4), (16, 1)).astype(np.uint8)  # (16, 64)
RGB = np.dstack([RAMP, RAMP[:, ::-1], RAMP // 2])


def tiff(path, values, **options):
    tifffile.imwrite(path, values, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"planarconfig": "separate"}, {"bigtiff": True}, {"byteorder": ">"}])
@pytest.mark.parametrize("compression", [None, "zlib", "zstd", "lzw"])
def test_16_bit_colors_however_they_lie(tmp_path, options, compression):
    path = (
        tiff(
            tmp_path / "a.tif",
            RGB.astype(np.uint16) * 257,
            photometric="rgb",
            compression=compression,
            **({"planarconfig": "contig"} | options if "planarconfig" not in options else options),
        )
        if options.get("planarconfig") != "separate"
        else tiff(
            tmp_path / "a.tif",
            np.moveaxis(RGB.astype(np.uint16) * 257, -1, 0),
            photometric="rgb",
            compression=compression,
            **options,
        )
    )
    assert (decode(path) == RGB.transpose(2, 0, 1)).all()
    assert (decode(path, 3, path.read_bytes()) == RGB.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int16, np.int32])
def test_signed_and_float_types(tmp_path, kind):
    values = (RAMP.astype(np.float64) - 128).astype(kind)
    path = tiff(tmp_path / "a.tif", values)
    with pytest.raises(DecodeError, match="data.value_range"):
        decode(path, 1)
    found = decode(path, 1, reading=Reading(parse_range([-128, 127])))
    assert np.abs(found[0].astype(int) - RAMP).max() <= 1
    stretched = decode(path, 1, reading=Reading(parse_range("minmax")))
    assert stretched.min() == 0 and stretched.max() == 255


def test_other_kinds(tmp_path):
    white = tiff(tmp_path / "white.tif", 65535 - RAMP.astype(np.uint16) * 257, photometric="miniswhite")
    assert (decode(white, 1)[0] == RAMP).all()
    webp = tiff(tmp_path / "webp.tif", RGB, photometric="rgb", compression="webp", compressionargs={"lossless": True})
    assert (decode(webp) == RGB.transpose(2, 0, 1)).all()
    six = np.dstack([RAMP] * 6)
    bands = tiff(tmp_path / "six.tif", six.astype(np.uint16) * 257, photometric="minisblack", planarconfig="contig")
    assert (decode(bands, 6) == six.transpose(2, 0, 1)).all()
    with pytest.raises(DecodeError, match="has 6 bands, but data.channels is 3"):
        decode(bands)
    ink = tiff(
        tmp_path / "cmyk.tif",
        np.dstack([RAMP * 0, RAMP, RAMP, RAMP * 0]).astype(np.uint16) * 257,
        photometric="separated",
        extrasamples=(),
    )
    assert np.abs(decode(ink)[1].astype(int) - (255 - RAMP)).max() <= 1 and (decode(ink)[0] == 255).all()
    alpha = np.dstack([RGB, np.full_like(RAMP, 255)]).astype(np.uint16) * 257
    path = tiff(tmp_path / "alpha.tif", alpha, photometric="rgb", extrasamples=["unassalpha"])
    assert (decode(path) == RGB.transpose(2, 0, 1)).all()


def test_orientation_and_pages(tmp_path):
    turned = tiff(
        tmp_path / "turned.tif", RGB.astype(np.uint16) * 257, photometric="rgb", extratags=[(274, 3, 1, 6, True)]
    )
    assert decode(turned).shape == (3, 64, 16)
    assert (decode(turned) == np.rot90(RGB, -1).transpose(2, 0, 1)).all()
    pages = tiff(tmp_path / "pages.tif", np.stack([RAMP, RAMP // 2]).astype(np.uint16) * 257, photometric="minisblack")
    assert (decode(pages, 1)[0] == RAMP).all()  # the first
    assert (decode(pages, 2) == np.stack([RAMP, RAMP // 2])).all()


def test_without_tifffile_the_way_out_is_named(tmp_path, monkeypatch):
    import builtins

    path = tiff(tmp_path / "a.tif", RGB.astype(np.uint16) * 257, photometric="rgb")
    gray = tiff(tmp_path / "g.tif", RAMP.astype(np.uint16) * 257)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DecodeError, match=r"read by tifffile: pip install 'vit-suite\[science\]'"):
        decode(path)
    assert (decode(gray, 1)[0] == RAMP).all()  # Pillow reads gray ones rightly


def dicom(path, stored, **tags):
    """A file of little-endian words, (H, W), (frames, H, W) or (H, W, 3)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    color = stored.ndim == 3 and stored.shape[2] == 3
    data.Rows, data.Columns = stored.shape[:2] if color else stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
    if color:
        data.PlanarConfiguration = 0
    elif stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored = data.BitsAllocated
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    data.HighBit = data.BitsStored - 1
    data.PixelData = stored.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom_window_slope_and_inversion(tmp_path):
    stored = RAMP.astype(np.int16) * 4  # 0..1008
    units = {"RescaleSlope": 2, "RescaleIntercept": -1000}  # -1000..1016
    # black at 40 - 0.5 - 99.5 = -60, white at 139
    path = dicom(tmp_path / "ct.dcm", stored, WindowCenter=40, WindowWidth=200, **units)
    wanted = ((stored * 2.0 - 1000 + 60) * 255 / 199).clip(0, 255)
    assert np.abs(decode(path, 1)[0] - wanted).max() <= 1
    assert (decode(path, 3)[2] == decode(path, 1)[0]).all()
    asked = decode(path, 1, reading=Reading(parse_range([-1000, 1016])))
    assert np.abs(asked[0] - (stored * 2.0) * 255 / 2016).max() <= 1
    inverted = dicom(
        tmp_path / "xray.dcm",
        stored,
        WindowCenter=40,
        WindowWidth=200,
        PhotometricInterpretation="MONOCHROME1",
        **units,
    )
    assert np.abs(decode(inverted, 1)[0].astype(int) - (255 - decode(path, 1)[0])).max() <= 1


def test_dicom_bits_frames_and_colors(tmp_path):
    twelve = dicom(tmp_path / "a.dcm", RAMP.astype(np.uint16) * 16, BitsStored=12)
    assert (decode(twelve, 1)[0] == RAMP).all()
    frames = np.stack([RAMP, RAMP // 2, RAMP // 4, RAMP // 8]).astype(np.uint8)
    several = dicom(tmp_path / "b.dcm", frames)
    assert (decode(several, 1)[0] == RAMP).all()  # the first
    assert (decode(several, 4) == frames).all()  # as many as channels
    color = dicom(tmp_path / "c.dcm", RGB.copy())
    assert (decode(color) == RGB.transpose(2, 0, 1)).all()
    assert (decode(color, 3, color.read_bytes()) == RGB.transpose(2, 0, 1)).all()


def test_dicom_that_is_none(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"nothing" * 40)
    with pytest.raises(DecodeError):
        decode(tmp_path / "a.dcm")
    path = dicom(tmp_path / "b.dcm", RAMP)
    with pytest.raises(DecodeError, match="data.max_pixels"):
        decode(path, reading=Reading(max_pixels=100))
    assert science.DICOM == (".dcm", ".dicom")


def test_logluv_is_refused_with_a_way_out(tmp_path):
    """A TIFF that says it holds logarithms of luminance."""
    path = tmp_path / "sky.tif"
    tifffile.imwrite(path, RGB.astype(np.float32), photometric="rgb")
    whole = bytearray(path.read_bytes())
    place = whole.index(struct.pack("<HHIH", 262, 3, 1, 2))  # PhotometricInterpretation, one short, RGB
    whole[place + 8 : place + 10] = struct.pack("<H", 32845)
    path.write_bytes(whole)
    with pytest.raises(DecodeError, match="a LogLuv TIFF .* is not read: save it as a TIFF of 32-bit floats"):
        decode(path)


def test_that_only_the_first_frame_is_read_is_said(tmp_path, caplog):
    dicom(tmp_path / "scan.dcm", np.stack([RAMP] * 5).astype(np.uint8))
    pages = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(RGB).save(tmp_path / "one.tif")
    open_train(DataConfig(name="flat", root=str(tmp_path)), 0)
    said = [line for line in caplog.messages if "frames" in line]
    assert len(said) == 1 and "2 of the 3 files looked at hold several pages or frames" in said[0]
    assert "pages.tif has 2" in said[0] or "scan.dcm has 5" in said[0]


def test_one_frame_of_several(tmp_path, caplog):
    """`data.frame 1` in every format that holds frames, from a file and from its bytes."""
    frames = [np.ascontiguousarray(RGB[:, ::-1]), RGB, 255 - RGB]
    gray = np.stack([RAMP, RAMP // 2, RAMP // 4])
    pictures = [Image.fromarray(frame) for frame in frames]
    for name in ("a.tif", "a.png", "a.gif", "a.webp", "a.mpo"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
    tiff(tmp_path / "wide.tif", gray.astype(np.uint16) * 257, photometric="minisblack")
    dicom(tmp_path / "scan.dcm", gray)
    for path in sorted(tmp_path.iterdir()):
        for content in (None, path.read_bytes()):
            found = decode(path, 3, content, Reading(frame=1)).astype(int)
            wanted = RAMP[None] // 2 if path.stem in ("scan", "wide") else RGB.transpose(2, 0, 1)
            lossy = 12 if path.suffix in (".webp", ".mpo", ".gif") else 0
            assert np.abs(found - wanted).mean() <= lossy, path.name
            with pytest.raises(DecodeError, match="holds 3 frames; data.frame 3 counts from 0"):
                decode(path, 3, content, Reading(frame=3))
    assert (decode(tmp_path / "scan.dcm", 3, None, Reading(frame=0)) == RAMP).all()
    for name, write in (("b.jpg", Image.fromarray(RGB).save), ("b.npy", lambda path: np.save(path, RGB))):
        write(tmp_path / name)
        with pytest.raises(DecodeError, match="holds 1 frame; data.frame 1 counts"):
            decode(tmp_path / name, 3, None, Reading(frame=1))
    source = open_train(DataConfig(name="flat", root=str(tmp_path), frame=1), 0)
    assert (source.load(len(source) - 2) == RAMP // 2).all()  # scan.dcm
    assert any("frame 1 of each is read (data.frame)" in line for line in caplog.messages)


def test_pages_of_two_sizes(tmp_path):
    """A small preview before the picture itself."""
    pages = [Image.fromarray(RGB[:8, :8].copy()), Image.fromarray(RGB)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert decode(tmp_path / "a.tif", 3, None, Reading(frame=1)).shape == (3, *RAMP.shape)
    assert image_size(tmp_path / "a.tif") == (8, 8) and image_size(tmp_path / "a.tif", 1) == RAMP.shape
    with pytest.raises(DecodeError, match="data.max_pixels"):
        decode(tmp_path / "a.tif", 3, None, Reading(max_pixels=64, frame=1))


def test_a_dicom_palette_gives_colors(tmp_path):
    tables = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 7)]).astype(np.uint16) * 257
    names = ("Red", "Green", "Blue")
    tags = {f"{name}PaletteColorLookupTableData": table.tobytes() for name, table in zip(names, tables, strict=True)}
    tags |= {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in names}
    path = dicom(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="PALETTE COLOR", **tags)
    assert (decode(path) == np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)])).all()
    with pytest.raises(DecodeError):  # a palette that is missing is not read as gray
        decode(dicom(tmp_path / "b.dcm", RAMP, PhotometricInterpretation="PALETTE COLOR"))


def test_a_volume_in_one_page_is_refused_in_words(tmp_path):
    planes = np.zeros((4, 32, 32), np.uint16)
    path = tiff(tmp_path / "a.tif", planes, photometric="minisblack", volumetric=True, tile=(4, 16, 16))
    with pytest.raises(DecodeError, match="a volume of 4 planes"):
        decode(path)


def test_heic(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif", reason="writes a file (extra: heif)")
    pillow_heif.register_heif_opener()
    path = tmp_path / "phone.heic"
    Image.new("RGB", (24, 16), (200, 40, 90)).save(path, quality=95)
    pixels = decode(path).astype(int)
    assert pixels.shape == (3, 16, 24) and np.abs(pixels - np.array([200, 40, 90])[:, None, None]).max() <= 6
    assert image_size(path) == (16, 24) and undecodable(".heic") is None
    renamed = path.with_suffix(".jpg")
    renamed.write_bytes(path.read_bytes())
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])  # as before the first .heic
    assert np.array_equal(decode(renamed), decode(path))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DecodeError, match=r"HEIC is read by pillow-heif: pip install 'vit-suite\[heif\]'"):
        decode(path)
