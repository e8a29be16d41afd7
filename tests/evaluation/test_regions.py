from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from vit_suite.evaluation.regions import largest_region, mask_boxes, region_at, regions


def snake(side: int) -> torch.Tensor:
    """One region that runs through every other row: as many turns as a grid can hold."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


def draws(side: int, share: float, count: int = 20) -> torch.Tensor:
    return torch.rand(count, side, side + 3, generator=torch.Generator().manual_seed(side)) < share


@pytest.mark.parametrize(
    "masks", [draws(4, 0.5), draws(9, 0.6), draws(30, 0.59), draws(5, 0.0), draws(5, 1.0), snake(25)[None]]
)
def test_regions_are_those_of_scipy(masks):
    numbers = regions(masks)
    for mask, own in zip(masks, numbers, strict=True):
        labeled, count = ndimage.label(mask.numpy())
        assert own[~mask].eq(-1).all()
        pairs = set(zip(labeled[mask.numpy()].tolist(), own[mask].tolist(), strict=True))
        assert len(pairs) == count == len({number for _, number in pairs})  # one number a label, one label a number
        for label, number in pairs:  # a region is called after its first cell
            assert np.flatnonzero(labeled.ravel() == label)[0] == number


def test_leading_axes_change_nothing():
    masks = draws(7, 0.5, 12)
    assert regions(masks.view(2, 3, 2, 7, 10)).view(12, 7, 10).equal(regions(masks))
    assert largest_region(masks.view(2, 3, 2, 7, 10)).view(12, 7, 10).equal(largest_region(masks))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_largest_region(share):
    for mask in draws(12, share):
        labeled, count = ndimage.label(mask.numpy())
        sizes = np.bincount(labeled.ravel())[1:]
        assert largest_region(mask).numpy().tolist() == (labeled == 1 + sizes.argmax()).tolist()
    assert not largest_region(torch.zeros(2, 3, 3, dtype=torch.bool)).any()


def test_region_at_a_cell():
    for mask in draws(8, 0.5):
        labeled, _ = ndimage.label(mask.numpy())
        for cell in (0, 17, 87):
            here = labeled.ravel()[cell]
            expected = (labeled == here) & (here > 0)
            assert region_at(mask[None], torch.tensor([cell]))[0].numpy().tolist() == expected.tolist()


def test_mask_boxes():
    masks = draws(6, 0.05, 40)
    for mask, box in zip(masks, mask_boxes(masks).tolist(), strict=True):
        rows, columns = np.nonzero(mask.numpy())
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box == expected
