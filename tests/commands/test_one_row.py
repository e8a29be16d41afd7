"""Training on images of one row, `.npy` arrays (C, 1, W), with views and patches of two sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vit_suite.weights.checkpoint import load_backbone

from .test_bad_input import refused  # noqa: F401  # a fixture
from .test_sit import SIT

CHANNELS, WIDTH = 6, 64
ROWS = {
    "data__name": "folder",
    "data__image_size": None,
    "data__length": None,
    "data__test_length": None,
    "data__channels": CHANNELS,
    "data__mean": [0.5] * CHANNELS,
    "data__std": [0.2] * CHANNELS,
    "data__batch_size": 8,
    "backbone__patch_size": [1, 8],
    "views__global_size": [1, WIDTH],
    "views__local_size": [1, 32],
    "views__ratio": [WIDTH // 16, WIDTH],
    "views__jitter": 0,
    "views__gray": 0,
    "optim__warmup_epochs": 0,
    "trainer__max_epochs": 1,
}
METHODS = {
    "dino": {"method__warmup_teacher_temperature_epochs": 0, "snapshots__every_epochs": 1},
    "sit": SIT | {"method__rotation": False},
    "supervised": SIT
    | {
        "method__name": "supervised",
        "method__contrastive_dim": None,
        "method__sheet_every_epochs": None,
        "views__randaugment": 0,
    },
    "mae": SIT
    | {
        "method__name": "mae",
        "method__contrastive_dim": None,
        "method__decoder_dim": 16,
        "method__decoder_depth": 1,
        "method__decoder_heads": 2,
        "method__sheet_every_epochs": 1,
        "backbone__patch_size": 1,
        "views__jitter": None,
        "views__gray": None,
    },
}


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Two classes of 8 training and 4 test series, uint8 (6, 1, 64)."""
    root, random = tmp_path_factory.mktemp("series"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("calm", "loud"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                values = random.integers(0, 256, (CHANNELS, 1, WIDTH), dtype=np.uint8)
                np.save(root / split / label / f"{index}.npy", values)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_exports(method, pretrain, series, tmp_path):
    """Two steps from files; the exported backbone takes such images."""
    assert pretrain(**ROWS | METHODS[method], data__root=series).status == 0
    loaded = load_backbone(tmp_path / "run")
    assert loaded.image_size == [1, WIDTH]
    with torch.no_grad():
        tokens = loaded.backbone.tokens(loaded.transform(torch.rand(2, CHANNELS, 1, WIDTH)))
    patches = WIDTH if method == "mae" else WIDTH // 8
    assert tokens.grid == (1, patches) and tokens.patches.shape == (2, patches, 24) and tokens.cls.isfinite().all()


def test_bad_sides(refused, series):  # noqa: F811
    rows = ROWS | {"data__root": series}
    expected = "--views.global_size: expected int or list of int (at least 1, 2 of them), got "
    refused(rows | {"views__global_size": [1, 64, 3]}, f"{expected}['1', '64', '3']")
    refused(rows | {"views__global_size": [0, 64]}, expected)
    refused(rows | {"views__global_size": [1, 60]}, "views.global_size 1x60 is not divisible by the patch size 1x8")
    refused(rows | {"views__local_size": [1, 30]}, "views.local_size 1x30 is not divisible by the patch size 1x8")
    refused(
        rows | {"views__ratio": [0.75, 1.3]},
        "views.global_size 1x64 has width over height 64, and views.ratio 0.75 1.3 makes no crop of that shape",
        "views.ratio 4 64 makes some",
    )
    refused(rows | {"views__local_size": 16}, "views.local_size 16x16 has width over height 1, and views.ratio 4 64")
    refused(rows | SIT | {"method__rotation": True}, "views.global_size 1x64 is no square: set method.rotation false")
    dinov2 = {"method__name": "dinov2", "backbone__patch_size": 1, "method__warmup_teacher_temperature_epochs": 1}
    refused(rows | dinov2, "views.global_size 1x64 is no square: method dinov2 takes one side")
