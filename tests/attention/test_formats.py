"""Formats are rows of one table; large images are drawn smaller, with JPEG overlays; the size is told first."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.attention.exported import exported
from tests.attention.test_export import MEAN, STD, Backbone, files_of, picture, pixels_of
from vit_suite.attention import drawing, formats
from vit_suite.attention.drawing import Drawing
from vit_suite.attention.export_options import ExportOptions
from vit_suite.attention.formats import FORMATS, Format
from vit_suite.attention.manifest import read_manifest


def export(folder, output, **options):
    return exported(Backbone(), folder, output, mean=MEAN, std=STD, **options)


def test_a_new_format_is_a_writer_and_a_row(tmp_path, monkeypatch):
    """One of each kind: a picture of each map, a file of each image, a file about all."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        picture(16, 24, 1).save(tmp_path / "images" / f"{name}.png")

    def gather(export, records, kind):
        heights = [record["height"] for record in records.good()]
        (export.drawing.output / "heights.txt").write_text(f"{heights} {[record['path'] for record in records]}")
        return [{"kind": kind, "file": "heights.txt"}]

    rows = {
        "negative": Format("negative.png", paint=lambda shown, level, masks: 255 - level),
        "size": Format("size.txt", write=lambda path, seen: Path(path).write_text(f"{seen.size}") and None),
        "heights": Format(keep=lambda seen: {"path": Path(seen.path).name}, gather=gather),
    }
    monkeypatch.setattr(formats, "FORMATS", FORMATS)
    for name, row in rows.items():
        monkeypatch.setitem(FORMATS, name, row)
    summary = export(tmp_path / "images", tmp_path / "out", formats=list(rows), maps=["mean"])
    written = ["a_mean_negative.png", "a_size.txt", "b_mean_negative.png", "b_size.txt"]
    assert files_of(tmp_path / "out") == [*written, "heights.txt", "manifest.csv"]
    assert (tmp_path / "out" / "a_size.txt").read_text() == "(16, 24)"
    assert (tmp_path / "out" / "heights.txt").read_text() == "[16, 16] ['a.png', 'b.png']"
    assert [row["file"] for row in read_manifest(tmp_path / "out")] == [*written, "heights.txt"]
    assert summary.files == {"negative": 2, "size": 2, "heights": 1}


def test_large_images_are_drawn_smaller_but_masks_and_labels_are_not(tmp_path):
    (tmp_path / "images").mkdir()
    picture(60, 90, 1).save(tmp_path / "images" / "large.png")
    picture(20, 30, 2).save(tmp_path / "images" / "small.png")
    options = {"formats": ["png", "overlay", "mask", "labels", "npz", "coco", "gif"], "maps": ["mean"]}
    summary = export(tmp_path / "images", tmp_path / "out", **options, draw_side=45)
    sizes = {"heat": (30, 45, 3), "overlay": (30, 45, 3), "mask": (60, 90)}
    for kind, size in sizes.items():
        assert pixels_of(tmp_path / "out" / f"large_mean_{kind}.png").shape == size, kind
        assert pixels_of(tmp_path / "out" / f"small_mean_{kind}.png").shape[:2] == (20, 30), kind
    assert pixels_of(tmp_path / "out" / "large_labels.png").shape == (60, 90)
    with Image.open(tmp_path / "out" / "animation_mean.gif") as frames:
        assert frames.size == (45, 30)
    assert summary.reduced == 1
    # What does not depend on the drawn size is what an export without a limit writes, byte for byte.
    export(tmp_path / "images", tmp_path / "whole", **options, draw_side=90)
    same = ["large_mean_mask.png", "large_labels.png", "large_attention.npz", "coco.json", "small_mean_overlay.png"]
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(("chosen", "endings"), [("auto", "jp"), ("png", "pp"), ("jpeg", "jj")])
def test_overlays_are_jpegs_above_a_size_or_as_asked(tmp_path, monkeypatch, chosen, endings):
    monkeypatch.setattr(drawing, "JPEG_FROM", 40 * 50)
    (tmp_path / "images").mkdir()
    picture(56, 56, 1).save(tmp_path / "images" / "a.png")
    picture(40, 48, 2).save(tmp_path / "images" / "b.png")
    export(tmp_path / "images", tmp_path / "out", formats=["overlay"], maps=["mean"], overlay_format=chosen)
    ending = {"j": "jpg", "p": "png"}
    expected = [f"{name}_mean_overlay.{ending[end]}" for name, end in zip("ab", endings, strict=True)]
    assert files_of(tmp_path / "out") == [*expected, "manifest.csv"]
    assert [row["file"] for row in read_manifest(tmp_path / "out")] == expected
    for file in expected:
        with Image.open(tmp_path / "out" / file) as image:
            assert image.format == ("JPEG" if file.endswith("jpg") else "PNG")
    export(tmp_path / "images", tmp_path / "lossless", formats=["overlay"], maps=["mean"], overlay_format="png")
    for name, file in zip("ab", expected, strict=True):
        exact = pixels_of(tmp_path / "lossless" / f"{name}_mean_overlay.png")
        assert np.abs(pixels_of(tmp_path / "out" / file).astype(int) - exact).mean() < 6  # blocks of random colors


def test_drawn_sizes_keep_the_shape():
    options = Drawing.of(Path(), ExportOptions(draw_side=2048))
    assert options.drawn_size((3000, 4000)) == (1536, 2048) and options.drawn_size((4000, 3000)) == (2048, 1536)
    assert options.drawn_size((2048, 2048)) == (2048, 2048) and options.drawn_size((1, 100_000)) == (1, 2048)
    assert options.overlay_ending((3000, 4000)) == ".jpg" and options.overlay_ending((1000, 1000)) == ".png"


def test_the_estimate_counts_the_files_and_warns_of_a_full_disk(tmp_path, caplog, monkeypatch):
    (tmp_path / "images").mkdir()
    for number in range(20):
        picture(40, 50, number).save(tmp_path / "images" / f"{number:02}.png")
    (tmp_path / "images" / "07.png").write_bytes(b"no image")
    usage = type("Usage", (), {"free": 30_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    options = {"formats": ["overlay", "mask", "npz"], "maps": ["heads", "mean"], "draw_side": 30, "progress": True}
    with caplog.at_level(logging.INFO, "vit_suite"):
        summary = export(tmp_path / "images", tmp_path / "out", **options)
    assert sum(summary.files.values()) == 19 * 7
    said = "20 images: about 140 files, 1 MB; overlays and heat maps are drawn at 30 pixels at most (draw_side)"
    assert caplog.messages[0].startswith(said)
    assert caplog.messages[0].endswith(f"the disk of '{tmp_path / 'out'}' has only 1 MB left")
