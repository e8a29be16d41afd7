"""`vit-suite demo`, small: everything once, and every number it prints on disk."""

from __future__ import annotations

import re

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
    assert [entry["task"] for entry in (pretrain, knn, masks)] == ["pretrain", "knn", "localize"]
    assert pretrain["metrics"]["steps"] == 2
    digest = load_backbone(tmp_path / "demo").sha256
    assert all(entry["sha256"] == digest and entry["protocol"] and entry["command"] for entry in (pretrain, knn, masks))

    rows = {
        line.rsplit(maxsplit=4)[0]: line.split()[-4:]
        for line in said.out.splitlines()
        if re.match("(trained|untrained|raw)", line)
    }
    printed = [line.split() for line in said.out.splitlines()]
    for name in ("trained", "untrained", "raw pixels"):
        scores = [knn["metrics"][name][f"k{k}"]["top1"] for k in (10, 20, 100, 200)]
        assert all(0 < score < 100 for score in scores)
        assert [*name.split(), *(f"{score:.2f}" for score in scores)] in printed, rows
    found = masks["metrics"]
    rows = {
        f"{prefix}{row}": one
        for name, prefix in (("trained", ""), ("untrained", "untrained: "))
        for row, one in found[name].items()
    }
    rows |= {"center box": found["center_box"], "whole image": found["whole_image"]}
    assert len(rows) == 8 and rows["fixed head"]["head"] in range(3)
    for name, metrics in rows.items():
        scores = [metrics["jaccard"], metrics["pointing"]]
        assert all(0 < score < 100 for score in scores)
        assert any(
            words[: len(name.split()) + 2] == [*name.split(), *(f"{score:.2f}" for score in scores)]
            for words in printed
        ), name

    pictures = sorted((tmp_path / "demo" / "images").glob("*.png"))
    assert len(pictures) == 16
    for picture in pictures:
        for kind in ("overlay", "mask"):
            with Image.open(tmp_path / "demo" / "attention" / f"{picture.stem}_mean_{kind}.png") as image:
                assert image.size == (48, 48) and np.asarray(image).std() > 0

    for command in ("vit-suite pretrain --config configs/dino/", f"vit-suite attention --checkpoint {tmp_path}/demo"):
        assert command in said.out
    again = vit_suite("demo", *words)
    assert again.status == 0 and "is complete: 2 steps" in again.log
    assert [entry["task"] for entry in results(tmp_path / "demo")] == ["pretrain", "knn", "localize", "knn", "localize"]


def test_output_that_is_not_a_run(vit_suite, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    said = vit_suite("demo", "--images", 256, "--output", tmp_path)
    assert said.status == 2 and "is not empty and no run directory" in said.err and said.err.count("\n") == 1
