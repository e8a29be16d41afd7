"""The confusion matrix: a table of counts, a picture whose cells are the shares."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from vit_suite.reports.confusion import BLUE, colored, confusion_picture, save_confusion, shortened

COUNTS = torch.tensor([[8, 2, 0], [0, 5, 5], [0, 0, 0]])


def cell(picture: Image.Image, row: int, column: int, count: int) -> np.ndarray:
    """The color of a corner of a cell, found by the gray frame."""
    pixels = np.asarray(picture).astype(int)
    frame = (pixels == 128).all(-1)
    rows, columns = frame.sum(1).argsort()[-2:], frame.sum(0).argsort()[-2:]
    top, left, size = min(rows) + 1, min(columns) + 1, (max(rows) - min(rows) - 1) // count
    return pixels[top + row * size + 2, left + column * size + 2]


def test_files(tmp_path):
    save_confusion(tmp_path, COUNTS, ["cat", "dog", "owl"], "three classes")
    table = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert table == [
        ["true \\ predicted", "cat", "dog", "owl"],
        ["cat", "8", "2", "0"],
        ["dog", "0", "5", "5"],
        ["owl", "0", "0", "0"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.csv", "confusion.png"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"


def test_cells_are_shares_of_their_row():
    picture = confusion_picture(COUNTS, ["cat", "dog", "owl"], "three classes")
    shares = np.array([[0.8, 0.2, 0], [0, 0.5, 0.5], [0, 0, 0]])  # an empty row stays empty
    expected = colored(shares)
    for row in range(3):
        for column in range(3):
            assert np.abs(cell(picture, row, column, 3) - expected[row, column]).max() <= 1, (row, column)
    assert colored(np.array([[0.0, 1.0]])).tolist() == [[BLUE[0].tolist(), BLUE[2].tolist()]]


@pytest.mark.parametrize("count", [2, 10, 50, 51, 200, 1000])
def test_any_number_of_classes(count):
    names = [f"a class with a long name {index}" for index in range(count)]
    picture = confusion_picture(torch.eye(count, dtype=torch.int64) * 3, names, "many")
    assert 150 < picture.width < 2400 and 150 < picture.height < 2400
    assert np.abs(cell(picture, count - 1, count - 1, count) - BLUE[2]).max() <= 1 or count > 200


def test_names_are_cut():
    assert shortened("cat") == "cat" and shortened("x" * 30) == "x" * 17 + "…"
