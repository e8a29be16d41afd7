"""The one picture of images, maps, masks and truth."""

import numpy as np
import torch

from vit_suite.attention.overview import GAP, MARGIN, Shown, overview, tiles


def corner(side: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[rows, columns] = True
    return mask


def test_the_mask_lies_where_the_heat_is():
    heat = torch.full((4, 4), 0.01)
    heat[0, 3] = 1.0  # the upper right patch
    truth = corner(32, slice(16, 32), slice(0, 16))  # the object is at the lower left
    image, drawn, mask, object_ = tiles(Shown(np.full((32, 32, 3), 200, np.uint8), heat, truth), 0.6, 128)
    assert image.shape == drawn.shape == (128, 128, 3) and (image == 200).all()
    assert drawn[8, 120].sum() > drawn[120, 8].sum()  # hot where the heat is
    assert (mask[4, 124] == 200).all() and (mask[124, 4] == 50).all()  # kept in the mask, dimmed outside of it
    assert (object_[124, 4] == 200).all() and (object_[4, 124] == 50).all()


def test_a_column_for_each_image_and_a_row_for_each_tile():
    shown = [
        Shown(np.full((16, 16, 3), level, np.uint8), torch.rand(2, 2), corner(16, slice(4), slice(4)))
        for level in (80, 160)
    ]
    sheet = np.asarray(overview(shown, 0.6, side=32))
    assert sheet.shape == (4 * (32 + GAP), MARGIN + 2 * (32 + GAP), 3)
    assert (sheet[16, MARGIN + 16] == 80).all() and (sheet[16, MARGIN + 32 + GAP + 16] == 160).all()
    assert (sheet[:, :MARGIN] < 128).any()  # the names of the rows
