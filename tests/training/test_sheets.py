"""Reconstruction sheets of a SiT run: when they are written, what they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import words
from vit_suite.training.sheets import draw_sheet


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    from vit_suite import cli

    folder = tmp_path_factory.mktemp("sheets") / "run"
    options = {
        "method__name": "sit",
        "method__sheet_every_epochs": 2,
        "trainer__max_epochs": 3,
        "evaluate__every_epochs": 0,
    }
    dino_only = ["hidden_dim", "out_dim", "bottleneck_dim", "warmup_teacher_temperature_epochs"]
    gone = {f"method__{name}": None for name in dino_only} | {"views__local_size": None, "views__local_crops": None}
    assert cli.main(["pretrain", *words(run__output=folder, **options, **gone)]) == 0
    return folder / "reconstructions"


def test_every_so_many_epochs_and_the_last(sheets):
    assert sorted(path.name for path in sheets.iterdir()) == ["epoch_0002.png", "epoch_0003.png"]


def test_rows_are_clean_corrupted_and_reconstructed(sheets):
    first, last = (np.asarray(Image.open(path)) for path in sorted(sheets.iterdir()))
    assert first.shape == (3 * 66 + 2, 8 * 66 + 2, 3)  # 8 images of 32 px at twice their size, with a margin of 2
    clean, corrupted, made = (first[2 + 66 * row : 66 * (row + 1)] for row in range(3))
    assert np.array_equal(clean, last[2:66]) and np.array_equal(
        corrupted, last[68:132]
    )  # the same images, the same corruption
    assert not np.array_equal(made, last[134:198])  # by another network
    assert 0.05 < (clean != corrupted).mean() < 0.95
    columns = [clean[:, 2 + 66 * index : 66 * (index + 1)] for index in range(8)]
    assert len({column.tobytes() for column in columns}) == 8


def test_pixels_are_denormalized_and_clamped():
    row = torch.tensor([0.0, 1.0, 100.0]).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    picture = np.asarray(draw_sheet([row], [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]))
    assert [picture[32, 2 + 32 + 66 * index, 0] for index in range(3)] == [128, 191, 255]
    assert (
        np.asarray(draw_sheet([torch.zeros(2, 5, 64, 64)], [0.5] * 5, [1.0] * 5)).shape[-1] == 3
    )  # five channels: the first
