"""`vit-suite localize`: numbers by hand, truth from data sets and from files, the baselines, and what cannot be
scored."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import results, save_pictures
from vit_suite.attention.maps import attention_maps, mass_mask
from vit_suite.config import BackboneConfig
from vit_suite.data.shapes import ShapesSource
from vit_suite.data.source import stable_seed
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import load_backbone, save_backbone

COUNT = 24
SHAPES = ["--data.name", "shapes", "--data.image_size", 32, "--data.test_length", COUNT]
FAST = ["--precision", "fp32", "--accelerator", "cpu"]
BOXED = ("box_iou", "corloc", "pointing")


@pytest.fixture
def localize(vit_suite, tiny_run, tmp_path):
    """Scores the tiny run into scores.json; the entry of the last call is `localize.entry()`."""

    def call(*words, checkpoint=tiny_run):
        return vit_suite("localize", "--checkpoint", checkpoint, "--output", tmp_path / "scores.json", *FAST, *words)

    call.entry = lambda: results(tmp_path / "scores.json")[-1]
    return call


@pytest.fixture
def shapes(tmp_path):
    """The scored images of SHAPES as files, images/0003.png with masks/0003.png."""
    source = ShapesSource("test", COUNT, (32, 32))
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(COUNT):
        Image.fromarray(source.load(index).permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{index:04d}.png")
        Image.fromarray(source.mask(index).numpy()).save(tmp_path / "masks" / f"{index:04d}.png")
    return source


def mask_boxes(source) -> list[list[int]]:
    """x0, y0, x1, y1 (exclusive) of every object."""
    boxes = []
    for index in range(len(source)):
        rows, columns = np.nonzero(source.mask(index).numpy())
        boxes.append([int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])
    return boxes


def test_table_and_entry(localize, tiny_run):
    said = localize(
        *SHAPES, "--threshold", 0.4, 0.6, "--seed", 1
    )  # with 0 the untrained one is where the tiny run began, and ended
    assert said.status == 0
    entry = localize.entry()
    metrics, protocol = entry["metrics"], entry["protocol"]
    assert entry["task"] == "localize" and entry["sha256"] == load_backbone(tiny_run).sha256
    assert protocol["truth"] == "masks of shapes test" and (protocol["images"], protocol["scored"]) == (
        COUNT,
        COUNT // 2,
    )
    assert protocol["thresholds"] == [0.4, 0.6] and protocol["methods"] == ["attention", "lost", "tokencut"]
    assert protocol["trained_on"]["method"] == "dino" and protocol["options"]["seed"] == 1
    assert said.out.startswith(
        f"masks of shapes test: {COUNT // 2} images scored, {COUNT // 2} others chose thresholds and heads\n"
    )
    own = ["best head", "fixed head", "mean map", "LOST", "TokenCut"]
    assert list(metrics["checkpoint"]) == list(metrics["untrained"]) == own
    assert metrics["checkpoint"] != metrics["untrained"]
    found = metrics["checkpoint"] | {f"untrained: {name}": row for name, row in metrics["untrained"].items()}
    found |= {"center box": metrics["center_box"], "whole image": metrics["whole_image"]}
    lines = said.out.splitlines()
    for name, row in found.items():
        shown = rf"^{name} +{row['jaccard']:.2f} +{row['pointing']:.2f}\b"
        assert sum(bool(re.search(shown, line)) for line in lines) == 1, name
        if "sweep" in row:
            assert any(re.search(rf"^{name} +{row['sweep'][0]:.2f} +{row['sweep'][1]:.2f}$", line) for line in lines), (
                name
            )
            assert row["jaccard"] == row["sweep"][[0.4, 0.6].index(row["threshold"])]
    best, fixed, mean = (metrics["checkpoint"][name] for name in own[:3])
    assert fixed["head"] in range(3) and "head" not in best and "head" not in mean
    assert best["sweep"][0] >= fixed["sweep"][0] and "threshold" not in metrics["checkpoint"]["LOST"]


def test_numbers_by_hand(localize, tiny_run):
    """The mean map at one threshold, pixel by pixel; the whole image; the pointing game."""
    assert localize(*SHAPES, "--threshold", 0.5, "--method", "attention", "--seed", 3).status == 0
    loaded, source = load_backbone(tiny_run), ShapesSource("test", COUNT, (32, 32), seed=3)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(stable_seed("localize", 3)))
    scored = sorted(order[COUNT // 2 :].tolist())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    jaccard, hits, whole, pointed = [], [], [], []
    for index in scored:
        heads = attention_maps(loaded.backbone, ((source.load(index).float() / 255 - mean) / std)[None])[0]
        heat, truth = heads.mean(0), source.mask(index)
        mask = mass_mask(heat, 0.5).repeat_interleave(8, 0).repeat_interleave(8, 1)
        jaccard.append(float((mask & truth).sum() / (mask | truth).sum()))
        whole.append(float(truth.double().mean()))
        row, column = divmod(int(heat.argmax()), 4)
        hits.append(bool(truth[8 * row + 4, 8 * column + 4]))
        pointed.append(bool(truth[16, 16]))
    metrics = localize.entry()["metrics"]
    row = metrics["checkpoint"]["mean map"]
    assert row["jaccard"] == pytest.approx(100 * np.mean(jaccard)) and row["pointing"] == pytest.approx(
        100 * np.mean(hits)
    )
    assert (
        metrics["whole_image"]["jaccard"] == pytest.approx(100 * np.mean(whole)) == metrics["whole_image"]["pointing"]
    )
    assert metrics["center_box"]["pointing"] == pytest.approx(100 * np.mean(pointed))
    assert metrics["center_box"]["jaccard"] >= metrics["whole_image"]["jaccard"]


def test_a_folder_of_masks_gives_the_numbers_of_the_data_set(localize, shapes, tmp_path):
    assert localize(*SHAPES).status == 0
    expected = localize.entry()["metrics"]
    said = localize("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert said.status == 0 and said.out.startswith(f"masks in {tmp_path}/masks: 12 images scored")
    assert localize.entry()["metrics"] == expected


def test_boxes_of_every_format_give_the_same_numbers(localize, shapes, tmp_path):
    boxes = mask_boxes(shapes)
    content = {"images": [], "annotations": []}
    (tmp_path / "xml").mkdir()
    lines = []
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        content["images"].append({"id": index, "file_name": f"{index:04d}.png", "width": 32, "height": 32})
        content["annotations"].append({"image_id": index, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        ends = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        (tmp_path / "xml" / f"{index:04d}.xml").write_text(
            f"<annotation><object><bndbox>{ends}</bndbox></object></annotation>"
        )
        lines.append(f"{index:04d}.png\tn01\t{x0}\t{y0}\t{x1 - 1}\t{y1 - 1}")
    (tmp_path / "coco.json").write_text(json.dumps(content))
    (tmp_path / "val_annotations.txt").write_text("\n".join(lines))
    found = []
    for truth in ("xml", "coco.json", "val_annotations.txt"):
        said = localize("--images", tmp_path / "images", "--truth", tmp_path / truth)
        assert said.status == 0, said.err
        header = said.out.splitlines()[1].split("  ")
        assert [word.strip() for word in header if word.strip()][:3] == ["box IoU %", "CorLoc %", "pointing %"]
        found.append(localize.entry()["metrics"])
    assert found[0] == found[1] == found[2]
    row = found[0]["checkpoint"]["LOST"]
    assert set(row) == set(BOXED) and all(0 <= row[name] <= 100 for name in BOXED)
    assert found[0]["center_box"]["corloc"] >= found[0]["whole_image"]["corloc"]
    assert set(found[0]["center_box"]["size"]) == {"overlap", "found"}


def test_boxes_by_hand(localize, tiny_run, shapes, tmp_path):
    """CorLoc and IoU of TokenCut's own boxes."""
    from vit_suite.attention.discovery import last_keys, tokencut

    boxes = mask_boxes(shapes)
    (tmp_path / "x_boxes.txt").write_text(
        "\n".join(f"{i:04d}.png {x} {y} {u - 1} {v - 1}" for i, (x, y, u, v) in enumerate(boxes))
    )
    assert (
        localize("--images", tmp_path / "images", "--truth", tmp_path / "x_boxes.txt", "--method", "tokencut").status
        == 0
    )
    loaded = load_backbone(tiny_run)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(stable_seed("localize", 0)))
    scores = []
    for index in order[COUNT // 2 :].tolist():
        keys = last_keys(loaded.backbone, ((shapes.load(index).float() / 255 - mean) / std)[None])
        rows, columns = np.nonzero(tokencut(keys, (4, 4)).masks[0].numpy())
        x0, y0, x1, y1 = 8 * columns.min(), 8 * rows.min(), 8 * columns.max() + 8, 8 * rows.max() + 8
        a0, b0, a1, b1 = boxes[index]
        shared = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
        scores.append(shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared))
    row = localize.entry()["metrics"]["checkpoint"]["TokenCut"]
    assert row["box_iou"] == pytest.approx(100 * np.mean(scores))
    assert row["corloc"] == pytest.approx(100 * np.mean(np.array(scores) >= 0.5))


def test_photographs_of_many_sizes(localize, tmp_path):
    """Sizes that are no multiple of the patch, a file that is broken, an image without an object; the grid follows
    image_size."""
    save_pictures(tmp_path / "images", 10)
    lines = [f"{index:03d}.jpg 4 4 20 20" for index in range(10)]
    (tmp_path / "images" / "009.jpg").write_bytes(b"no image")
    (tmp_path / "x.txt").write_text("\n".join(lines))
    words = ["--images", tmp_path / "images", "--truth", tmp_path / "x.txt", "--data.max_corrupt", 0.2]
    said = localize(*words)
    assert said.status == 0 and "1 images or truths cannot be used" in said.log
    assert "5 images scored, 4 others chose" in said.out
    protocol = localize.entry()["protocol"]
    assert (protocol["images"], protocol["scored"], protocol["shorter_side"]) == (9, 5, "own")
    assert protocol["left_out"] == {"without_object": 0, "not_decoded": 1}
    own = localize.entry()["metrics"]["checkpoint"]
    assert localize(*words, "--batch_size", 2).status == 0  # other batches of one size, in another order, the same rows
    assert localize.entry()["metrics"]["checkpoint"] == own
    assert localize(*words, "--image_size", 64).status == 0
    assert localize.entry()["protocol"]["shorter_side"] == 64 and localize.entry()["metrics"]["checkpoint"] != own
    said = localize(*words[:-1], 0)
    assert said.status == 2 and "1 of the 10 images" in said.err and "data.max_corrupt" in said.err


def test_images_without_an_object_are_left_out(localize, shapes, tmp_path):
    for index in (0, 7):
        Image.new("1", (32, 32), 0).save(tmp_path / "masks" / f"{index:04d}.png")
    said = localize("--images", tmp_path / "images", "--truth", tmp_path / "masks")
    assert said.status == 0 and "2 images without an object are left out" in said.out
    assert localize.entry()["protocol"]["left_out"]["without_object"] == 2


@pytest.fixture
def without_cls(tmp_path):
    torch.manual_seed(0)
    cfg = BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[32, 32], class_token=False, pool="mean")
    save_backbone(Backbone(cfg), tmp_path / "no_cls", [0.5] * 3, [0.25] * 3)
    return tmp_path / "no_cls"


def refused(said, *parts):
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1, said
    for part in parts:
        assert part in said.err


def test_a_backbone_without_cls_token(localize, without_cls):
    refused(localize(*SHAPES, checkpoint=without_cls), f"'{without_cls}' has no CLS token", "--method lost tokencut")
    assert localize(*SHAPES, "--method", "lost", "tokencut", checkpoint=without_cls).status == 0
    assert list(localize.entry()["metrics"]["checkpoint"]) == ["LOST", "TokenCut"]


def test_what_cannot_be_scored(localize, shapes, tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    refused(localize(), "nothing to score", "--images DIR --truth DIR_OR_FILE", "tiny_imagenet or shapes")
    refused(localize("--images", images), "images need a truth", "--truth")
    refused(localize("--truth", masks), "truth is given without images")
    refused(localize("--images", images, "--truth", masks, *SHAPES), "both images and data.name shapes")
    refused(localize("--images", images, "--truth", tmp_path / "none"), f"truth '{tmp_path}/none' does not exist")
    refused(localize(*SHAPES, "--method", "los"), "got 'los'", "Did you mean 'lost'?")
    refused(localize(*SHAPES, "--threshold", 0), "threshold")
    refused(localize(*SHAPES[:4], "--data.test_length", 1), "only 1 image shows an object")
    save_pictures(tmp_path / "flat", 3)
    refused(
        localize("--data.name", "flat", "--data.root", tmp_path / "flat"),
        "has neither masks nor boxes",
        "tiny_imagenet or shapes",
    )
    Image.new("1", (32, 31), 1).save(masks / "0003.png")
    refused(
        localize("--images", images, "--truth", masks, "--data.max_corrupt", 0),
        "0003.png is 32x32, its truth in 0003.png 32x31",
    )
    (tmp_path / "scores.json").unlink(missing_ok=True)
    (tmp_path / "scores.json").mkdir()
    refused(localize(*SHAPES), "is a folder")


def test_markdown(localize, tmp_path):
    assert localize(*SHAPES, "--image_size", 48).status == 0
    script = Path(__file__).parents[2] / "scripts" / "localize_table.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "scores.json"], capture_output=True, text=True, check=True
    )
    metrics = localize.entry()["metrics"]
    own, untrained = (metrics[name]["LOST"] for name in ("checkpoint", "untrained"))
    lines = done.stdout.splitlines()
    assert (
        lines[0].endswith("masks of shapes test: 12 images at 48 px")
        and lines[2] == "| (untrained) | Jaccard % | pointing % |"
    )
    assert (
        "| LOST | " + " | ".join(f"{own[name]:.1f} ({untrained[name]:.1f})" for name in ("jaccard", "pointing")) + " |"
        in lines
    )
    assert (
        f"| whole image | {metrics['whole_image']['jaccard']:.1f} | {metrics['whole_image']['pointing']:.1f} |"
        == lines[-1]
    )
