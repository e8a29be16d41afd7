"""A small set as loose files and as shards."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_suite.config import DataConfig
from vit_suite.data.registry import open_split

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_shards.py"
REAL = os.environ.get("VIT_SUITE_DATA")
IMAGES = 24  # a class to train on


@pytest.fixture(scope="session")
def script():
    spec = importlib.util.spec_from_file_location("make_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def made(script, loose, tmp_path_factory):
    """The same as shards: 9 of 8 images to train on, 3 to score."""
    output = tmp_path_factory.mktemp("made") / "photos"
    assert script.main(["--name", "folder", "--root", str(loose), "--output", str(output), "--shard-images", "8"]) == 0
    return output


@pytest.fixture
def shards(made, tmp_path):
    """A copy of `made` to spoil."""
    return Path(shutil.copytree(made, tmp_path / "photos"))
