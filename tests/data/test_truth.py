"""Masks and boxes as people have them, and what does not fit the images."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from vit_suite.data.shapes import ShapesSource
from vit_suite.data.truth import open_truths, read_mask, source_truths
from vit_suite.errors import UserError

PIXELS = np.array([[0, 3, 3, 255], [0, 15, 0, 255]], dtype=np.uint8)
TRINARY = [[0, 1, 1, -1], [0, 1, 0, -1]]


@pytest.fixture
def images(tmp_path):
    """a.jpg, deep/b.png and c.jpg, 4 x 2 pixels."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.png", "c.jpg"):
        Image.new("RGB", (4, 2), "red").save(folder / name)
    return folder


def palette(path, pixels=PIXELS):
    image = Image.fromarray(pixels, mode="P")
    colors = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    colors[0], colors[255] = 0, (224, 224, 192)
    image.putpalette(colors.tobytes())
    image.save(path)
    return image


def test_masks_of_every_kind(tmp_path):
    image = palette(tmp_path / "voc.png")
    assert read_mask(tmp_path / "voc.png").tolist() == TRINARY
    image.convert("RGB").save(tmp_path / "color.png")
    assert read_mask(tmp_path / "color.png").tolist() == TRINARY
    Image.fromarray(PIXELS).save(tmp_path / "numbers.png")
    assert read_mask(tmp_path / "numbers.png", "index").tolist() == TRINARY
    assert read_mask(tmp_path / "numbers.png", "gray").tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    np.save(tmp_path / "array.npy", PIXELS)
    assert read_mask(tmp_path / "array.npy", "index").tolist() == TRINARY
    object_ = PIXELS == 3
    for name, pixels in (
        ("bool", object_),
        ("one", object_.astype(np.uint8)),
        ("white", object_.astype(np.uint8) * 255),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        Image.fromarray(pixels).convert("RGB").save(tmp_path / f"{name}_rgb.png")
        for file in (f"{name}.png", f"{name}_rgb.png"):
            mask = read_mask(tmp_path / file)
            assert mask.dtype == torch.int8 and mask.tolist() == object_.astype(int).tolist(), file


def test_masks_that_could_be_two_things_are_not_guessed(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "numbers.png")
    with pytest.raises(UserError, match=r"numbers.png' holds 4 values \(0, 3, 15, 255\).*mask_values.*index.*gray"):
        read_mask(tmp_path / "numbers.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="text.png' cannot be read"):
        read_mask(tmp_path / "text.png")
    np.save(tmp_path / "four.npy", np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match="shape"):
        read_mask(tmp_path / "four.npy")


def mask_folder(tmp_path, names=("a.png", "deep/b.png", "c.png"), size=(4, 2)):
    for name in names:
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("1", size, 1).save(tmp_path / "masks" / name)
    return tmp_path / "masks"


def test_masks_meet_images_by_path_or_by_name(images, tmp_path):
    folder = mask_folder(tmp_path)
    Image.fromarray(np.array([[0, 0, 0, 0], [0, 0, 255, 255]], dtype=np.uint8)).save(folder / "deep" / "b.png")
    source, truths = open_truths(images, folder)
    assert [source.path(i) for i in range(3)] == [str(images / name) for name in ("a.jpg", "c.jpg", "deep/b.png")]
    assert truths.kind == "masks" and truths.load(2).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]] and truths.load(1).all()
    source, truths = open_truths(images / "deep", folder / "deep")
    assert len(source) == 1
    flat = mask_folder(tmp_path / "flat", ("b.png",))  # no path fits, the name does
    source, truths = open_truths(images / "deep", flat)
    assert source.path(0).endswith("deep/b.png")
    source, _ = open_truths(images, mask_folder(tmp_path / "other", ("x/a.png", "x/b.png", "x/c.png")))
    assert len(source) == 3


def test_what_has_no_partner_is_named(images, tmp_path, caplog):
    folder = mask_folder(tmp_path, ("a.png", "zebra.png"))
    with caplog.at_level(logging.WARNING, "vit_suite"):
        source, _ = open_truths(images, folder)
    assert len(source) == 1
    assert "2 of 3 images" in caplog.text and "c.jpg, deep/b.png" in caplog.text and "zebra" in caplog.text
    with pytest.raises(
        UserError, match=r"no truth in .*masks' has the name of an image.*called x, images a.jpg, c.jpg, deep/b.png"
    ):
        open_truths(images, mask_folder(tmp_path / "none", ("x.png",)))
    wrong = mask_folder(tmp_path / "wrong", ("a.png", "c.png"), (2, 4))
    mask_folder(tmp_path / "wrong", ("deep/b.png",))
    source, _ = open_truths(images, wrong)
    assert len(source) == 1 and [one.reason for one in source.failures] == [
        "a.jpg is 4x2, its truth in a.png 2x4",
        "c.jpg is 4x2, its truth in c.png 2x4",
    ]


def test_folders_that_are_none(images, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_truths(tmp_path / "nothing", images)
    with pytest.raises(UserError, match="truth .* does not exist"):
        open_truths(images, tmp_path / "nothing")
    with pytest.raises(UserError, match="is the images folder itself"):
        open_truths(images, images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images under"):
        open_truths(tmp_path / "empty", images)
    with pytest.raises(UserError, match="it is empty.*expected a folder of masks or VOC XML"):
        open_truths(images, tmp_path / "empty")
    with pytest.raises(UserError, match="is one image; expected the folder"):
        open_truths(images, images / "a.jpg")


XML = "<annotation><size><width>{}</width><height>{}</height></size>{}</annotation>"
OBJECT = (
    "<object><difficult>{}</difficult><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def test_voc(images, tmp_path):
    folder = tmp_path / "Annotations"
    folder.mkdir()
    (folder / "a.xml").write_text(XML.format(4, 2, OBJECT.format(0, 1, 1, 4, 2) + OBJECT.format(1, 2, 1, 2, 1)))
    (folder / "c.xml").write_text(XML.format(4, 2, ""))
    source, truths = open_truths(images, folder)
    assert truths.kind == "boxes" and len(source) == 2
    assert truths.load(0).tolist() == [
        [0, 0, 4, 2],
        [1, 0, 2, 1],
    ]  # counted from 1, the last pixel named: xmin 1, xmax W is everything
    assert truths.load(1).shape == (0, 4)
    (folder / "c.xml").write_text(XML.format(40, 20, OBJECT.format(0, 1, 1, 4, 2)))
    source, _ = open_truths(images, folder)
    assert len(source) == 1 and source.failures[0].reason == "c.jpg is 4x2, its truth in Annotations 40x20"
    (folder / "c.xml").write_text(XML.format(4, 2, OBJECT.format(0, 1, 1, 9, 2)))
    source, truths = open_truths(images, folder)
    assert "lie outside of the image are left out: [[0.0, 0.0, 9.0, 2.0]]" in source.failures[0].reason
    assert truths.load(1).shape == (0, 4)
    for text in (
        "<annotation",
        XML.format(4, 2, OBJECT.format(0, "one", 1, 9, 2)),
        "<a><object><bndbox></bndbox></object></a>",
    ):
        (folder / "c.xml").write_text(text)
        source, _ = open_truths(images, folder)
        assert "expected object/bndbox with xmin" in source.failures[0].reason and source.path(0).endswith("a.jpg")


def test_coco(images, tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "deep/b.png", "width": 4, "height": 2}, {"id": 9, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": 7, "bbox": [1, 0, 2.5, 2], "iscrowd": 0},
            {"image_id": 7, "bbox": [0, 0, 4, 2], "iscrowd": 1},
            {"image_id": 9, "bbox": [0, 0, 1, 1]},
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    source, truths = open_truths(images, file)
    assert [source.path(i) for i in range(2)] == [str(images / "a.jpg"), str(images / "deep" / "b.png")]
    assert truths.load(0).tolist() == [[0, 0, 1, 1]] and truths.load(1).tolist() == [[1, 0, 3.5, 2]]
    for broken in ("{", "[]", json.dumps({"images": [{"id": 1}], "annotations": []}), json.dumps({"images": []})):
        file.write_text(broken)
        with pytest.raises(UserError, match="instances.json' is no COCO annotation"):
            open_truths(images, file)


def test_text_of_tiny_imagenet(images, tmp_path):
    for name, lines in (
        ("val_annotations.txt", "a.jpg\tn01\t0\t0\t3\t1\nc.jpg\tn02\t1\t1\t2\t1\n"),
        ("n01_boxes.txt", "a.jpg 0 0 3 1\n"),
    ):
        (tmp_path / name).write_text(lines)
    source, truths = open_truths(images, tmp_path / "val_annotations.txt")
    assert truths.load(0).tolist() == [[0, 0, 4, 2]] and truths.load(1).tolist() == [[1, 1, 3, 2]]
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    (tmp_path / "n01_boxes.txt").rename(boxes / "n01_boxes.txt")
    source, truths = open_truths(images, boxes)
    assert len(source) == 1 and truths.load(0).tolist() == [[0, 0, 4, 2]]
    (boxes / "n01_boxes.txt").write_text("\ufeffa.jpg 0 0 3 1\nc.jpg 0 0 3\n")
    source, _ = open_truths(images, boxes)
    assert len(source) == 1 and source.failures[0].path.endswith("n01_boxes.txt:2")
    assert source.failures[0].reason.startswith("expected `name [WNID] x0 y0 x1 y1`, found 'c.jpg 0 0 3'")
    (boxes / "n01_boxes.txt").write_text("a.jpg 3 0.5 0.5 0.25 1\n")
    with pytest.raises(UserError, match="n01_boxes.txt' has shares of the image, as YOLO writes them; expected pixels"):
        open_truths(images, boxes)


def test_data_sets_bring_their_own():
    shapes = ShapesSource("test", 4, (32, 32))
    truths = source_truths(shapes)
    assert truths.kind == "masks" and truths.load(2).dtype == torch.int8 and truths.load(2).bool().equal(shapes.mask(2))
    shapes.has_masks = False
    assert source_truths(shapes) is None
    shapes.boxes = torch.tensor([[0.0, 0, 1, 1], [float("nan")] * 4])
    truths = source_truths(shapes)
    assert truths.kind == "boxes" and truths.load(0).tolist() == [[0, 0, 1, 1]] and truths.load(1).shape == (0, 4)


# What real folders hold
# ----------------------------------------------------------------------------------------------------------------------


def test_masks_by_color_alpha_and_jpeg(tmp_path):
    object_ = np.zeros((40, 60), np.uint8)
    object_[:10] = 255
    colors = np.dstack([object_] * 3)
    Image.fromarray(colors).quantize(2).save(tmp_path / "palette.png")  # whichever entry comes first
    Image.fromarray(np.dstack([np.full_like(colors, 90), object_])).save(tmp_path / "alpha.png")
    Image.fromarray(np.dstack([object_, object_ * 0, object_ * 0])).save(tmp_path / "red.jpg", quality=75)
    Image.fromarray(object_).save(tmp_path / "gray.jpg", quality=60)
    Image.fromarray(np.dstack([colors, np.full_like(object_, 255)])).save(tmp_path / "opaque.png")
    for name in ("palette.png", "alpha.png", "red.jpg", "gray.jpg", "opaque.png"):
        mask = read_mask(tmp_path / name)
        assert abs((mask == 1).float().mean().item() - 0.25) < 0.02, name
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(object_[::-1].copy()).save(tmp_path / "turned.png", exif=exif)
    assert (read_mask(tmp_path / "turned.png").numpy() == object_ // 255).all()


def test_a_photograph_is_no_mask(images, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match="looks like a photograph"):
        read_mask(tmp_path / "photo.jpg")
    colors = np.full((4, 4, 3), 200, np.uint8)
    colors[0] = 90, 20, 20
    Image.fromarray(colors).save(tmp_path / "bright.png")
    with pytest.raises(UserError, match="none is black: say with mask_values index"):
        read_mask(tmp_path / "bright.png")
    (tmp_path / "copies").mkdir()
    for name in ("a.jpg", "c.jpg"):
        (tmp_path / "copies" / name).write_bytes((images / name).read_bytes())
    with pytest.raises(UserError, match="2 of 2 masks are the photographs themselves"):
        open_truths(images, tmp_path / "copies")


def test_boxes_of_a_root_that_holds_the_photographs_too(tmp_path, caplog):
    root = tmp_path / "VOC"
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for i in range(3):
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / "JPEGImages" / f"{i}.jpg")
        (root / "Annotations" / f"{i}.xml").write_text(XML.format(60, 40, OBJECT.format(0, 5, 5, 15, 15)))
    with caplog.at_level(logging.INFO, "vit_suite"):
        source, truths = open_truths(root / "JPEGImages", root)
    assert truths.kind == "boxes" and len(source) == 3 and truths.load(0).tolist() == [[4, 4, 15, 15]]
    assert "truth: boxes (VOC XML) in" in caplog.text and "3 of 3 images have one, 0 truths belong to no" in caplog.text
    for file in (root / "Annotations").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="expected a folder of masks or VOC XML"):  # and not the photographs
        open_truths(root / "JPEGImages", root)
    mask_folder(root, ("0.png",), (60, 40))
    assert open_truths(root / "JPEGImages", root)[1].load(0).all()


def test_xml_as_labeling_tools_leave_it(tmp_path, caplog):
    for i in range(3):
        (tmp_path / "i").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "i" / f"IMG.{i}.jpg")
    box = OBJECT.format(0, 0, 1, 60, 40)
    (tmp_path / "i" / "IMG.0.XML").write_text(XML.format("60.0", "40", box))  # beside the images, any case, a float
    (tmp_path / "i" / "._IMG.0.xml").write_bytes(b"\0\5\x16\7")
    (tmp_path / "i" / "IMG.1.xml").write_text(XML.format(60, 40, OBJECT.format(0, 1, 1, 63, 40) + box))
    with caplog.at_level(logging.WARNING, "vit_suite"):
        source, truths = open_truths(tmp_path / "i", tmp_path / "i")
    assert len(source) == 2 and truths.load(0).tolist() == [[-1, 0, 60, 40]]
    assert len(source.failures) == 1 and len(truths.load(1)) == 1  # the box outside is listed, the other one scored
    assert "2 boxes in" in caplog.text and "--box_origin 0" in caplog.text
    assert open_truths(tmp_path / "i", tmp_path / "i", origin=0)[1].load(0).tolist() == [[0, 1, 61, 41]]


def test_coco_names_keep_their_endings_and_bad_rows_are_listed(tmp_path):
    (tmp_path / "i").mkdir()
    for name in ("a.jpg", "a.png", "b.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / "i" / name)
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(("a.jpg", "a.png", "b.jpg", "b.jpg"))],
        "annotations": [
            {"image_id": 0, "bbox": [0, 0, 10, 10]},
            {"image_id": 1, "bbox": [30, 20, 10, 10]},
            {"image_id": 2, "bbox": ["1", "1", "5", "5"]},
            {"image_id": 3, "bbox": [7, 7, 2, 2]},  # the same file again: its boxes are joined
            {"image_id": 0, "bbox": None},
            {"image_id": 99, "bbox": [0, 0, 1, 1]},
            {"image_id": 1, "bbox": [3, 3, 0, 5]},
        ],
    }
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    source, truths = open_truths(tmp_path / "i", tmp_path / "c.json")
    boxes = {source.path(i)[-5:]: truths.load(i).tolist() for i in range(3)}
    assert boxes["a.jpg"] == [[0, 0, 10, 10]] and boxes["a.png"] == [[30, 20, 40, 30]]
    assert boxes["b.jpg"] == [[1, 1, 6, 6], [7, 7, 9, 9]]
    assert [one.reason[:12] for one in source.failures] == ["annotation 4", "annotation 5", "boxes that a"]
    content["images"] = content["images"][:1]
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert len(open_truths(tmp_path / "i", tmp_path / "c.json")[0]) == 1  # a.png does not get a.jpg's boxes


def test_masks_as_arrays_and_floats(tmp_path):
    """(H, W, 1), one array of an .npz, floats in 0..1; NaN, programs and too many pixels are refused in words."""
    shape = PIXELS == 3
    np.save(tmp_path / "deep.npy", shape[..., None])
    np.savez(tmp_path / "one.npz", mask=shape)
    Image.fromarray(shape.astype(np.float32)).save(tmp_path / "unit.tif")
    for name in ("deep.npy", "one.npz", "unit.tif"):
        assert read_mask(tmp_path / name).tolist() == shape.astype(int).tolist(), name
    holes = np.where(shape, np.nan, 0).astype(np.float32)
    np.save(tmp_path / "nan.npy", holes)
    Image.fromarray(holes).save(tmp_path / "nan.tif")
    Image.new("RGB", (4, 2)).save(tmp_path / "program.png", "EPS")
    np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.uint8, shape=(2**14, 2**14)).flush()
    for name, words in (
        ("nan.npy", "NaN"),
        ("nan.tif", "NaN"),
        ("program.png", "EPS"),
        ("large.npy", "pixels are more"),
    ):
        with pytest.raises(UserError, match=f"mask '.*{name}' cannot be read .*{words}"):
            read_mask(tmp_path / name)


def test_boxes_are_told_by_what_is_in_the_file(images, tmp_path, caplog):
    """COCO called .txt; VOC files with names of their own, whose <filename> is the image's."""
    entry = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "c.jpg"}]}
    entry["annotations"] = [{"image_id": 1, "bbox": [0, 0, 2, 2]}, {"image_id": 1, "bbox": [0, 0, 10**400, 1]}]
    entry["annotations"] += [{"image_id": "2", "bbox": [0, 0, 2, 2]}]
    (tmp_path / "boxes.txt").write_text(json.dumps(entry), encoding="utf-8-sig")
    source, truths = open_truths(images, tmp_path / "boxes.txt")
    assert truths.load(0).tolist() == [[0, 0, 2, 2]] and len(truths.load(1)) == 0
    assert ["OverflowError" in str(source.failures[0]), "annotation 2" in str(source.failures[1])] == [True, True]
    (tmp_path / "voc").mkdir()
    for number, name in enumerate(("a.jpg", "c.jpg")):
        box = f"<xmin>{number + 1}</xmin><ymin>1</ymin><xmax>3</xmax><ymax>2</ymax>"
        (tmp_path / "voc" / f"label{number}.xml").write_text(
            f"<annotation><filename>{name}</filename><object><bndbox>{box}</bndbox></object></annotation>"
        )
    source, truths = open_truths(images, tmp_path / "voc")
    assert [truths.load(index).tolist() for index in range(2)] == [[[0, 0, 3, 2]], [[1, 0, 3, 2]]]
    assert "no VOC file has the name of an image" in caplog.text
