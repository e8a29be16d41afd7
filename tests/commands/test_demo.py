"""`vit-suite demo`, small: everything once, and every number it prints on disk."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.commands.conftest import results
from vit_suite.weights.checkpoint import load_backbone


@pytest.mark.slow
def test_demo(vit_suite, tmp_path):
    words = ["--images", 256, "--test_images", 64, "--epochs", 1, "--progress", "false", "--output", tmp_path / "demo"]
    said = vit_suite("demo", *words)
    assert said.status == 0, said.err
    pretrain, knn, masks = results(tmp_path / "demo")
    assert [entry["task"] for entry in (pretrain, knn, masks)] == ["finetune", "knn", "localize"]
    assert pretrain["metrics"]["steps"] == 2
    digest = load_backbone(tmp_path / "demo").sha256
    assert all(entry["sha256"] == digest and entry["protocol"] and entry["command"] for entry in (pretrain, knn, masks))

    printed = [line.split() for line in said.out.splitlines()]
    for name in ("trained here", "untrained", "raw pixels", "shipped"):
        scores = [knn["metrics"][name][f"k{k}"]["top1"] for k in (10, 20, 100, 200)]
        assert all(0 < score < 100 for score in scores)
        assert [*name.split(), *(f"{score:.2f}" for score in scores)] in printed
    assert ["chance", *["10.00"] * 4] in printed

    found = masks["metrics"]
    rows = {
        f"{name}: {row}": found[name][row] for name in found if "_" not in name for row in ("fixed head", "mean map")
    }
    rows |= {"center box": found["center_box"], "whole image": found["whole_image"]}
    assert len(rows) == 8 and rows["trained here: fixed head"]["head"] in range(3)
    for name, metrics in rows.items():
        scores = [metrics["jaccard"], metrics["pointing"]]
        assert 0 < scores[0] < 100 and 0 < scores[1] <= 100  # it points at nearly every object
        assert any(
            words[: len(name.split()) + 2] == [*name.split(), *(f"{score:.2f}" for score in scores)]
            for words in printed
        ), name

    with Image.open(tmp_path / "demo" / "overview.png") as image:
        assert image.width > 8 * 128 and image.height > 4 * 128 and np.asarray(image).std() > 0
    assert (tmp_path / "demo" / "attention" / "index.html").is_file()
    pictures = sorted((tmp_path / "demo" / "images").glob("*.png"))
    assert len(pictures) == 16
    for picture in pictures:
        for kind in ("overlay", "mask"):
            with Image.open(tmp_path / "demo" / "attention" / f"{picture.stem}_mean_{kind}.png") as image:
                assert image.size == (192, 192) and np.asarray(image).std() > 0

    for command in ("vit-suite pretrain --config sit/own_cpu", "vit-suite attention --checkpoint runs/mine"):
        assert command in said.out
    again = vit_suite("demo", *words)
    assert again.status == 0 and "is complete: 2 steps" in again.log
    assert [entry["task"] for entry in results(tmp_path / "demo")] == ["finetune", "knn", "localize", "knn", "localize"]


def test_output_that_is_not_a_run(vit_suite, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    said = vit_suite("demo", "--images", 256, "--output", tmp_path)
    assert said.status == 2 and "is not empty and no run directory" in said.err and said.err.count("\n") == 1
