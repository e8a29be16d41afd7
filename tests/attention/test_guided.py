from __future__ import annotations

import pytest
import torch

from vit_suite.attention.guided import box_mean, guided_filter


@pytest.mark.parametrize("radius", [1, 2, 9])
def test_box_mean_is_the_mean_of_the_window_that_lies_inside(radius):
    values = torch.rand(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = box_mean(values, radius)
    for y, x in ((0, 0), (3, 4), (5, 6), (2, 0)):
        window = values[:, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        torch.testing.assert_close(means[:, y, x], window.mean((1, 2)))


def test_a_flat_picture_blurs_and_an_edge_cuts():
    guide = torch.zeros(40, 40)
    guide[:, 22:] = 1.0  # the object's edge
    coarse = torch.zeros(1, 40, 40)
    coarse[:, :, 16:] = 1.0  # the map's, six pixels off
    flat = guided_filter(coarse, torch.full((40, 40), 0.5), 6, 1e-4)[0, 20]
    assert (flat.diff() >= -1e-5).all() and 0.2 < flat[15] < 0.8  # twice the window's mean
    drawn = guided_filter(coarse, guide, 6, 1e-4)[0, 20]
    steps = drawn.diff().sort(descending=True)
    assert steps.indices[0] == 21 and steps.values[0] > 2 * steps.values[1]  # the step is where the picture's is
    torch.testing.assert_close(guided_filter(guide[None], guide, 6, 1e-6)[0], guide, atol=1e-3, rtol=0)


def test_large_eps_forgets_the_picture_and_nothing_is_negative():
    guide = torch.rand(30, 20, generator=torch.Generator().manual_seed(0))
    maps = torch.rand(3, 30, 20, generator=torch.Generator().manual_seed(1))
    blurred = box_mean(box_mean(maps.double(), 4), 4).float()
    torch.testing.assert_close(guided_filter(maps, guide, 4, 1e6), blurred, atol=1e-5, rtol=0)
    assert guided_filter(maps * (maps > 0.9), guide, 4, 1e-9).min() >= 0


def test_large_windows_are_fitted_on_a_smaller_picture():
    """Against the exact filter, which a radius below 8 runs, on the picture at half the size."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(1, 1, 12, 15, generator=generator)
    guide = (torch.nn.functional.interpolate(small, size=(120, 150), mode="nearest")[0, 0] > 0.5).float()
    maps = torch.nn.functional.interpolate(
        torch.rand(1, 2, 6, 8, generator=generator), size=(120, 150), mode="bilinear"
    )[0]
    fast = guided_filter(maps, guide, 14, 1e-3)
    exact = guided_filter(maps[:, ::2, ::2], guide[::2, ::2], 7, 1e-3)
    assert fast.shape == (2, 120, 150)
    assert (fast[:, ::2, ::2] - exact).abs().mean() < 0.01 < (maps[:, ::2, ::2] - exact).abs().mean()
