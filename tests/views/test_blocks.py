"""Blocks: enough are drawn, and those used are the ones a plain loop takes. Their laws: test_corruption.py."""

import torch

from vit_suite.views import blocks


def test_slots_are_enough():
    """Blocks run out for hardly any view, even where each has to cover the most."""
    generator = torch.Generator().manual_seed(0)
    for align, area in ((1, 0.5), (4, 0.75), (8, 0.5)):
        plane = blocks.plane_of_gmml(32, 32, align)
        assert blocks.slots_of_union(plane, area * 1024) < 150  # nor are they far too many
        budget = torch.full((4000,), area * 1024)
        uniform = torch.rand(4000, blocks.slots_of_union(plane, area * 1024), 4, generator=generator)
        assert (blocks.mask_of_union(plane, uniform, budget).sum((1, 2)) < budget).sum() <= 2
    for side in ((0.05, 0.25), (0.2, 0.4), (0.0, 0.1)):
        plane = blocks.plane_of_many(32, 32, side)
        uniform = torch.rand(4000, blocks.slots_of_sum(plane, 0.3 * 1024), 4, generator=generator)
        top, bottom, left, right = plane.drawn(uniform)
        assert (((bottom - top) * (right - left)).sum(1) < 0.3 * 1024).sum() <= 1


def test_union_stops_at_the_block_that_reaches_the_budget():
    """Beside a loop over the same blocks, to the pixel."""
    plane, generator = blocks.plane_of_gmml(32, 48, 1), torch.Generator().manual_seed(0)
    uniform, budget = torch.rand(50, 64, 4, generator=generator), torch.rand(50, generator=generator) * 1536
    masks = blocks.mask_of_union(plane, uniform, budget)
    total = blocks.mask_of_sum(plane, uniform, budget)
    for index in range(50):
        union, added, area = torch.zeros(32, 48, dtype=torch.bool), torch.zeros(32, 48, dtype=torch.bool), 0
        for top, bottom, left, right in zip(
            *(edge[index].int().tolist() for edge in plane.drawn(uniform)), strict=True
        ):
            if union.sum() < budget[index]:
                union[top:bottom, left:right] = True
            if area < budget[index]:
                added[top:bottom, left:right] = True
                area += (bottom - top) * (right - left)
        assert torch.equal(masks[index], union) and torch.equal(total[index], added)


def test_whole_numbers_never_reach_their_upper_limit():
    top = torch.tensor([0.0, 1 - 2**-24])  # the largest that torch.rand gives
    for count in [*range(1, 3000), 3 * 3 * 224 * 224 + 1]:
        assert blocks.integers(top, 0, count).tolist() == [0, count - 1]
    assert blocks.integers(torch.tensor([0.5]), 4, 4).tolist() == [4]
