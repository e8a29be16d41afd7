"""A small set as loose files and as shards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_suite import cli
from vit_suite.config import DataConfig
from vit_suite.data.registry import open_split

REAL = os.environ.get("VIT_SUITE_DATA")
IMAGES = 24  # a class to train on


def make_shards(root: Path, output: Path, *words: str, name: str = "folder") -> int:
    """`vit-suite make_shards` of the set at `root`; the exit status."""
    return cli.main(["make_shards", "--data.name", name, "--data.root", str(root), "--output", str(output), *words])


@pytest.fixture(scope="session")
def loose(tmp_path_factory):
    """{train,val}/CLASS/*.JPEG, 3 classes of 24 and 8 images of 64 x 64."""
    root = tmp_path_factory.mktemp("loose") / "photos"
    random = np.random.default_rng(0)
    real = open_split(DataConfig(name="tiny_imagenet"), "train") if REAL else None
    for label, name in enumerate(("ant", "bee", "cat")):
        for place in range(IMAGES + 8):
            path = root / ("train" if place < IMAGES else "val") / name / f"{name}.{place}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            if real is not None:
                shutil.copy(real.path(int((real.labels == label).nonzero()[place])), path)
            else:
                coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
                coarse.resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=80)
    return root


@pytest.fixture(scope="session")
def made(loose, tmp_path_factory):
    """The same as shards: 9 of 8 images to train on, 3 to score."""
    output = tmp_path_factory.mktemp("made") / "photos"
    assert make_shards(loose, output, "--shard_images", "8") == 0
    return output


@pytest.fixture
def shards(made, tmp_path):
    """A copy of `made` to spoil."""
    return Path(shutil.copytree(made, tmp_path / "photos"))
