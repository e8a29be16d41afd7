"""Masks of patches: which rows they depend on, their bound, and MAE's sorted noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vit_suite.views.draw import Draw, alone
from vit_suite.views.masks import GROUP, Spread, draw_block_masks, random_patches

CPU = torch.device("cpu")
GRID = (6, 5)


def masks(draw: Draw, spread: Spread = Spread()):  # noqa: B008 (frozen)
    return draw_block_masks(draw, 2, GRID, spread, CPU)


@pytest.mark.parametrize("total, parts", [(16, 2), (16, 4), (24, 8), (20, 4), (12, 12)])
def test_ranks_and_micro_batches_have_the_masks_of_the_whole_batch(total, parts):
    whole = Draw(3, 1, 7, slice(0, total), total)
    expected = masks(whole)
    size = total // parts
    found = [masks(replace(whole, rows=slice(start, start + size))) for start in range(0, total, size)]
    assert torch.equal(torch.cat([part.hidden for part in found], dim=1), expected.hidden)
    assert expected.hidden.shape == (2, total, 30)
    for part in found:
        assert int(part.hidden.sum()) <= part.most


def test_the_bound_holds_and_is_not_far_above():
    """Half of the crops have a mask of 10% to 50% of 30 patches: about 9 each."""
    bounds, counts = [], []
    for step in range(50):
        found = masks(Draw(0, 0, step, slice(0, 2 * GROUP), 2 * GROUP))
        bounds.append(found.most)
        counts.append(int(found.hidden.sum()))
    assert len(set(bounds)) == 1, "the bound may not depend on what was drawn"
    assert max(counts) <= bounds[0] <= 1.35 * sum(counts) / len(counts)


def test_half_of_the_crops_of_each_group_are_masked():
    draw = Draw(0, 2, 5, slice(0, 3 * GROUP), 3 * GROUP)
    masked = draw_block_masks(draw, 2, (14, 14), Spread(), CPU).hidden.any(-1)  # (2, B)
    assert masked.unflatten(1, (3, GROUP)).sum((0, 2)).tolist() == [GROUP] * 3
    assert not torch.equal(masked[:, :GROUP], masked[:, GROUP : 2 * GROUP])


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.3, 0.9])
def test_as_many_crops_of_a_batch_are_masked_as_in_the_official_code(probability):
    """int(crops x probability), also where a group's share is below one crop."""
    found = draw_block_masks(Draw(0, 0, 3, slice(0, 64), 64), 2, (14, 14), Spread(probability), CPU).hidden
    assert int(found.any(-1).sum()) == int(128 * probability)


@pytest.mark.parametrize("ratio, side", [(0.35, 10), (0.7, 20), (0.9, 10)])
def test_rounding_puts_no_patch_beyond_the_bound(ratio, side):
    for step in range(4):
        found = draw_block_masks(Draw(0, 0, step, slice(0, 8), 8), 2, (side, side), Spread(1.0, ratio, ratio), CPU)
        assert int(found.hidden.sum()) <= found.most <= 16 * round(ratio * side * side)


def test_steps_and_seeds_draw_anew():
    draw = Draw(0, 0, 0, slice(0, 8), 8)
    first = masks(draw).hidden
    assert torch.equal(first, masks(draw).hidden)
    for other in (replace(draw, step=1), replace(draw, epoch=1), replace(draw, seed=1)):
        assert not torch.equal(first, masks(other).hidden)


def test_extremes():
    draw = Draw(0, 0, 0, slice(0, 8), 8)
    none = masks(draw, Spread(probability=0.0))
    assert none.most == 0 and not none.hidden.any()
    every = draw_block_masks(draw, 2, (14, 14), Spread(1.0, 0.3, 0.3), CPU)
    assert every.hidden.any(-1).all() and every.most == 16 * int(196 * 0.3)


def test_the_smallest_noise_is_visible_and_the_largest_is_predicted():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4]])
    split = random_patches(noise, 0.75)
    assert split.visible.tolist() == [[1, 5]]
    assert split.predicted.tolist() == [[True, False, True, True, True, False, True, True]]
    assert split.order[0, split.visible[0]].tolist() == [0, 1]
    part = random_patches(noise, 0.75, 0.25)
    assert part.visible.tolist() == [[1, 5]]
    assert part.predicted.nonzero()[:, 1].tolist() == part.asked[0].tolist() == [0, 6]


def test_masks_that_are_shifted_around_the_edges():
    """As torch.roll would shift each, by numbers of its own; the patches of a mask stay as many."""
    draw, grid = alone(16), (5, 7)
    plain = draw_block_masks(draw, 2, grid, Spread(), torch.device("cpu"))
    moved = draw_block_masks(draw, 2, grid, Spread(shift=True), torch.device("cpu"))
    assert moved.most == plain.most and torch.equal(moved.hidden.sum(-1), plain.hidden.sum(-1))
    shifts = (draw.uniform(2, 2, purpose="mask shift") * torch.tensor(grid)).long()  # (B, V, 2)
    assert len(shifts.flatten(0, 1).unique(dim=0)) > 10
    for view in range(2):
        for image in range(16):
            mask = plain.hidden[view, image].view(grid)
            expected = torch.roll(mask, tuple(shifts[image, view].tolist()), (0, 1))
            assert torch.equal(moved.hidden[view, image].view(grid), expected)
