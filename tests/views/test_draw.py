"""The numbers of a place in the global batch: the same for any division into ranks, uniform, and cheap to reach."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from vit_suite.views.draw import SLICE, Draw, alone


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (8,)])
@pytest.mark.parametrize("cuts", [[4], [1, 2, 5], [3]])
def test_parts_draw_what_the_whole_draws(shape, cuts):
    """Also where a part begins in the middle of a value of the counter."""
    whole = alone(9, seed=1, epoch=2, step=3).uniform(*shape, purpose="a")
    assert whole.shape == (9, *shape) and whole.dtype == torch.float32
    edges = [0, *cuts, 9]
    parts = [Draw(1, 2, 3, slice(a, b), 9).uniform(*shape, purpose="a") for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_last_rows_of_a_huge_batch_cost_what_the_first_do():
    total = 10**12
    start = time.perf_counter()
    found = Draw(0, 0, 0, slice(total - 4, total), total).uniform(10, purpose="a")
    assert time.perf_counter() - start < 1 and found.shape == (4, 10)
    assert len(found.unique()) == 40


def test_numbers_are_uniform_and_those_of_other_places_differ():
    count = 20_000
    places = [Draw(seed, epoch, step, slice(0, count), count) for seed in (0, 1) for epoch in (0, 1) for step in (0, 1)]
    drawn = [place.uniform(purpose=purpose) for place in places for purpose in ("a", "b")]
    drawn.append(Draw(0, 0, 0, slice(count, 2 * count), 2 * count).uniform(purpose="a"))
    for numbers in drawn:
        assert 0 <= numbers.min() and numbers.max() < 1
        largest_gap = (numbers.sort().values - (torch.arange(count) + 0.5) / count).abs().max()
        assert largest_gap < 2.2 / count**0.5  # Kolmogorov-Smirnov: by chance once in 8,000 draws
    correlation = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / count**0.5  # in standard deviations


def test_slices_are_those_of_the_global_batch():
    half = SLICE // 2
    draw = Draw(0, 0, 0, slice(half, 2 * SLICE + 2), 4 * SLICE)
    assert list(draw.slices()) == [
        (slice(0, half), "slice 0"),
        (slice(half, half + SLICE), "slice 1"),
        (slice(half + SLICE, half + SLICE + 2), "slice 2"),
    ]
    assert SLICE % 2 == 0, "partners would be cut"
