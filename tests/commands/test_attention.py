"""`vit-suite attention` on a folder as people have them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import picture, save_pictures
from vit_suite.attention.manifest import read_manifest


@pytest.fixture
def odd(tmp_path):
    """Gray, alpha, wide, one broken, unicode names, folders in folders, a file that is no image."""
    root = tmp_path / "images"
    (root / "deep" / "er still").mkdir(parents=True)
    picture(0, 64, 48).save(root / "plain.jpg")
    picture(1, 40, 40).convert("L").save(root / "gray.png")
    picture(2, 50, 33).convert("RGBA").save(root / "alpha.png")
    picture(3, 30, 200).save(root / "deep" / "wide.webp")
    picture(4, 45, 45).save(root / "deep" / "er still" / "猫 ähnlich.png")
    whole = (root / "plain.jpg").read_bytes()
    (root / "broken.jpg").write_bytes(whole[:300])
    (root / "notes.txt").write_text("no image")
    return root


SIZES = {
    "plain": (64, 48),
    "gray": (40, 40),
    "alpha": (50, 33),
    "deep/wide": (30, 200),
    "deep/er still/猫 ähnlich": (45, 45),
}
LABELS = ["head0", "head1", "head2", "mean"]


def test_odd_images(vit_suite, tiny_run, odd, tmp_path):
    words = ["--images", odd, "--output", tmp_path / "maps", "--formats", "png", "overlay", "mask", "npz"]
    said = vit_suite("attention", "--checkpoint", tiny_run, *words)
    assert said.status == 0
    expected = {
        f"{name}_{label}_{kind}.png" for name in SIZES for label in LABELS for kind in ("heat", "overlay", "mask")
    }
    expected |= {f"{name}_attention.npz" for name in SIZES} | {"quarantine.txt", "manifest.csv"}
    found = {str(path.relative_to(tmp_path / "maps")) for path in (tmp_path / "maps").rglob("*") if path.is_file()}
    assert found == expected
    for name, (height, width) in SIZES.items():
        with Image.open(tmp_path / "maps" / f"{name}_head1_overlay.png") as image:
            assert (image.height, image.width) == (height, width)
        numbers = np.load(tmp_path / "maps" / f"{name}_attention.npz")
        grid = tuple(numbers["grid"])
        assert grid == tuple(int(side / 8 + 0.5) for side in (height, width)) and numbers["attention"].shape == (
            3,
            *grid,
        )
        assert np.all(numbers["attention"] >= 0) and np.all(
            numbers["attention"].sum((1, 2)) < 1
        )  # the rest is on the CLS token
        np.testing.assert_allclose(numbers["mean"], numbers["attention"].mean(0), atol=1e-6)
    (line,) = (tmp_path / "maps" / "quarantine.txt").read_text().splitlines()
    assert line.startswith(f"{odd}/broken.jpg\t")


def test_what_is_said(vit_suite, tiny_run, odd, tmp_path):
    said = vit_suite(
        "attention", "--checkpoint", tiny_run, "--images", odd, "--output", tmp_path / "maps", "--max_tokens", 20
    )
    first, *others = said.out.splitlines()
    assert first.startswith("5 images (") and f"20 mask, 20 overlay in {tmp_path}/maps, listed in manifest.csv" in first
    assert said.log.startswith("6 images: about 48 files, 1 MB")
    assert "a second" in first and "% of the time in the model" in first
    assert "image/s" not in said.err  # a bar is for terminals, and a log hears of jobs that take longer
    assert f"files that do not decode: 1, listed in {tmp_path}/maps/quarantine.txt" in others
    assert any("were shrunk" in line and "--max_tokens" in line for line in others)


def test_masks_hold_the_top_mass(vit_suite, tiny_run, odd, tmp_path):
    words = ["--formats", "mask", "npz", "--maps", "mean", "--threshold", 0.4]
    assert (
        vit_suite(
            "attention", "--checkpoint", tiny_run, "--images", odd / "gray.png", "--output", tmp_path / "maps", *words
        ).status
        == 0
    )
    mean = np.load(tmp_path / "maps" / "gray_attention.npz")["mean"]
    with Image.open(tmp_path / "maps" / "gray_mean_mask.png") as image:
        mask = np.asarray(image.convert("L"))[4::8, 4::8] > 127  # the middle of each of 5 x 5 patches
    share = mean[mask].sum() / mean.sum()
    least = mean[mask].min()
    assert 0.4 - least / mean.sum() <= share <= 0.4 + 1e-5 or 0.4 <= share <= 0.4 + least / mean.sum() + 1e-5
    assert least >= mean[~mask].max()


def refused(said, *parts):
    assert said.status == 2 and said.out == "" and said.err.count("\n") == 1
    for part in parts:
        assert part in said.err


def test_images_that_are_none_and_output_that_is_taken(vit_suite, tiny_run, odd, tmp_path):
    def attention(images, output=tmp_path / "maps", *words):
        return vit_suite("attention", "--checkpoint", tiny_run, "--images", images, "--output", output, *words)

    (tmp_path / "words").mkdir()
    refused(attention(tmp_path / "words"), f"no images under '{tmp_path}/words'", "nothing (it is empty)")
    (tmp_path / "words" / "a.txt").write_text("x")
    refused(attention(tmp_path / "words"), f"no images under '{tmp_path}/words'", "1 file (a.txt)")
    refused(attention(tmp_path / "none"), f"images '{tmp_path}/none' does not exist")
    refused(attention(odd, tmp_path / "words"), f"output '{tmp_path}/words' is not empty", "--overwrite")
    assert [path.name for path in (tmp_path / "words").iterdir()] == ["a.txt"]
    refused(attention(odd, tmp_path / "words" / "a.txt"), "is a file")
    refused(attention(odd, odd), "is the images folder itself")
    refused(attention(odd, tmp_path / "maps", "--formats", "pngg"), "got 'pngg'. Did you mean 'png'?")
    refused(attention(odd, tmp_path / "maps", "--threshold", 0), "--threshold: expected float (above 0, at most 1)")
    refused(attention(odd, tmp_path / "maps", "--maps", "maxx"), "got 'maxx'. Did you mean 'max'?")
    refused(attention(odd, tmp_path / "maps", "--clip_artifacts", 1), "expected float (above 1)")
    refused(
        vit_suite("attention", "--checkpoint", tiny_run, "--output", tmp_path / "maps"),
        "no images",
        "--images FOLDER",
        "--data.name",
    )
    assert not (tmp_path / "maps").exists()
    assert attention(odd, tmp_path / "words", "--overwrite").status == 0
    assert (tmp_path / "words" / "a.txt").exists()


def test_a_data_set(vit_suite, tiny_run, tmp_path):
    words = [
        "--data.name",
        "shapes",
        "--data.image_size",
        32,
        "--data.test_length",
        12,
        "--formats",
        "mask",
        "coco",
        "--maps",
        "max",
    ]
    said = vit_suite("attention", "--checkpoint", tiny_run, "--output", tmp_path / "maps", *words)
    assert said.status == 0 and "12 images" in said.out
    rows = read_manifest(tmp_path / "maps")
    assert [row["file"] for row in rows] == [*(f"test/{i:02}_max_mask.png" for i in range(12)), "coco.json"]


@pytest.fixture(scope="session")
def without_cls(tmp_path_factory):
    """Weights of a backbone with registers and no CLS token."""
    from vit_suite.config import BackboneConfig
    from vit_suite.models.backbone import Backbone
    from vit_suite.weights.checkpoint import save_backbone

    cfg = BackboneConfig(
        patch_size=8, dim=24, depth=2, heads=3, registers=2, class_token=False, pool="mean", image_size=[32, 32]
    )
    folder = tmp_path_factory.mktemp("no_cls")
    save_backbone(Backbone(cfg), folder, [0.5] * 3, [0.2] * 3)
    return folder / "backbone.safetensors"


def test_a_backbone_without_cls_says_what_to_use(vit_suite, without_cls, odd, tmp_path):
    said = vit_suite("attention", "--checkpoint", without_cls, "--images", odd, "--output", tmp_path / "maps")
    refused(said, "no CLS token", "vit-suite localize", "use a model with one")
    assert not (tmp_path / "maps").exists()


def test_snapshots_of_a_training(pretrain, tmp_path):
    assert pretrain(snapshots__every_epochs=2, snapshots__images=3, trainer__max_epochs=3).status == 0
    found = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert found == ["epoch_0000.png", "epoch_0002.png", "epoch_0003.png", "epochs.png"]


def test_two_ranks_write_the_files_of_one_byte_for_byte(vit_suite, tiny_run, odd, tmp_path):
    save_pictures(odd / "more", 40, sizes=((40, 56), (64, 33), (56, 56)))
    words = [
        "attention",
        "--checkpoint",
        tiny_run,
        "--images",
        odd,
        "--upsample",
        "bilinear",
        "--maps",
        "heads",
        "mean",
        "max",
        "rollout",
    ]
    words += [
        "--clip_artifacts",
        1.05,
        "--batch_size",
        4,
        "--formats",
        "png",
        "overlay",
        "mask",
        "labels",
        "pca",
        "npz",
        "coco",
        "gif",
    ]
    words = [str(word) for word in words]
    alone = vit_suite(*words, "--output", tmp_path / "one")
    assert alone.status == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "vit_suite",
    ]
    said = subprocess.run(
        [*launcher, *words, "--output", tmp_path / "two"], capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr
    found = {}
    for name in ("one", "two"):
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found[name] = {os.path.relpath(path, tmp_path / name): path.read_bytes() for path in files}
    assert list(found["one"]) == list(found["two"]) and len(found["one"]) > 45 * 21
    assert [name for name in found["one"] if found["one"][name] != found["two"][name]] == []
    (line,) = [line for line in said.stdout.splitlines() if "images (" in line]  # rank 0 speaks for all
    assert line.startswith("45 images (") and line.endswith(f"in {tmp_path}/two, listed in manifest.csv")
    assert line.partition("model): ")[2].partition(" in ")[0] == alone.out.partition("model): ")[2].partition(" in ")[0]


def test_gallery(vit_suite, tiny_run, odd, tmp_path):
    """Of files and of a data set whose images have none; a page from disk names each image once."""
    said = vit_suite(
        "attention", "--checkpoint", tiny_run, "--images", odd, "--output", tmp_path / "maps", "--gallery", "true"
    )
    assert said.status == 0 and f"gallery: {tmp_path}/maps/index.html" in said.out
    page = (tmp_path / "maps" / "index.html").read_text()
    assert all(page.count(f'"name": {json.dumps(name)}') == 1 for name in SIZES)
    words = ["--data.name", "shapes", "--data.image_size", 48, "--data.test_length", 3, "--formats", "mask"]
    said = vit_suite(
        "attention", "--checkpoint", tiny_run, *words, "--output", tmp_path / "shapes", "--gallery", "true"
    )
    page = (tmp_path / "shapes" / "index.html").read_text()
    assert said.status == 0 and page.count('"name": ') == 3 == len(
        set(re.findall('data:image/png;base64,([^"]{100,})', page))
    )
