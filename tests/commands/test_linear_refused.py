"""`vit-suite linear` refuses what cannot be probed, in one line and with status 2."""

from __future__ import annotations

from tests.commands.conftest import refused, save_pictures
from vit_suite.config import BackboneConfig
from vit_suite.data.source import FileSource
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import save_backbone


def test_wrong_options(probe):
    refused(
        probe("--pool", "tokens"),
        "pool tokens: the backbone of",
        "has no registers besides its CLS token; it has tokens for cls, ",
    )
    refused(probe("--blocks", 4), "blocks 4: the backbone of", "has 2")
    refused(probe("--pool", "clss"), "--pool: expected any of cls, mean, cls_mean, tokens", "'clss'")
    refused(probe("--lr", 0), "--lr: expected list of float (above 0)", "got '0'")
    refused(probe("--protocol", "dinov2"), "--protocol: expected one of sweep, dino, sit, got 'dinov2'")
    refused(probe("--validation_share", 0), "--validation_share: expected float", "got '0'")
    refused(probe("--image_size", 30), "image_size 30x30 is not divisible by the patch size 8")
    refused(
        probe("--shots", 2, "--augment", "true"),
        "few-shot heads train on features that are extracted once; add --augment false",
    )


def test_a_class_with_fewer_images_than_shots(probe, vit_suite, tiny_run, tmp_path):
    for label, count in (("ant", 12), ("bee", 4)):
        save_pictures(tmp_path / "few" / "train" / label, count)
        save_pictures(tmp_path / "few" / "test" / label, 3, seed=50)
    data = ["--data.name", "folder", "--data.root", tmp_path / "few"]
    refused(
        probe("--shots", 1, 5, data=data),
        "shots 5 is more than class 'bee' has labeled training images besides those held out: 4",
    )
    words = ["--checkpoint", tiny_run, *data, "--shots", 5, "--output", tmp_path / "scores.json"]
    said = vit_suite("knn", *words)
    assert said.status == 2 and "shots 5 is more than class 'bee' has labeled training images: 4." in said.err
    assert not (tmp_path / "scores.json").exists()


def test_labels_that_are_missing(probe, photographs, tmp_path):
    refused(
        probe(data=["--data.name", "flat", "--data.root", photographs / "train"]),
        "no labels, and linear evaluation needs some",
    )
    folder = tmp_path / "lists"
    folder.mkdir()
    paths = sorted(photographs.rglob("*.jpg"))
    (folder / "train.txt").write_text("".join(f"{path}\t{path.parent.name}\n" for path in paths))
    (folder / "test.txt").write_text("".join(f"{path}\n" for path in paths))
    refused(
        probe(data=["--data.name", "list", "--data.root", folder]), "has no labels to score against", "data.test_split"
    )
    refused(probe("--data.test_split", "train"), "would be scored on the images that it learns from, split 'train'")


def test_features_that_do_not_fit_into_memory(probe, monkeypatch):
    monkeypatch.setattr(FileSource, "load", None)
    refused(
        probe("--memory_gb", 1e-6),
        "features of 100 training images x 4 x 24 numbers take 1.79e-05 GiB",
        "--augment true",
    )


def test_a_view_that_is_not_square_has_no_crops(probe, tmp_path):
    backbone = Backbone(BackboneConfig(patch_size=8, dim=24, depth=1, heads=3, image_size=[16, 32]))
    save_backbone(backbone, tmp_path / "wide", [0.5] * 3, [0.25] * 3)
    refused(
        probe("--augment", "true", checkpoint=tmp_path / "wide"),
        "crops are square, and the view is 16x32",
        "--augment false",
    )
