"""Color operations against torchvision's functionals and Pillow's filters."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as reference

from vit_suite.views import color
from vit_suite.views.draw import ViewParameters
from vit_suite.views.planes import Planes
from vit_suite.views.planes_color import recolor_planes_

PEERS = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
TOLERANCE = 1e-3
"""torchvision's own float arithmetic differs from ours by rounding; the luma weights are the same."""


def pictures(count: int, channels: int = 3, side: int = 24, seed: int = 0) -> torch.Tensor:
    """Random colors with flat gray, black, white and pure patches among them, in 0..1."""
    x = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
    x[:, :, :2], x[:, :, 2:4], x[:, :, 4:6] = 0.0, 1.0, 0.4
    x[:, 0, 6:8], x[:, 1:, 6:8] = 1.0, 0.0
    return x


@pytest.mark.parametrize("operation", range(4))
def test_each_jitter_operation_is_torchvisions(operation):
    x = pictures(30)
    factors = torch.linspace(-0.5, 0.5, 30) if operation == color.HUE else torch.linspace(0, 2, 30)
    expected = torch.stack([PEERS[operation](image, factor) for image, factor in zip(x, factors.tolist(), strict=True)])
    ours = color.JITTER[operation](x.clone().view(30, 3, -1), factors).view_as(x)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    assert (ours - x).abs().max() > 0.3  # it did something


def jitter_as_a_gpu(x, factors, order, apply):
    none = torch.zeros_like(apply)
    drawn = ViewParameters(torch.zeros(1, 1, 4), none[None], apply, factors, order, none, none, factors[:, 0], none)
    planes = Planes.of(x)
    recolor_planes_(planes, [drawn])
    return next(planes.groups()).squeeze(1).transpose(0, 1)


@pytest.mark.parametrize("jitter", [color.jitter_, jitter_as_a_gpu])
def test_jitter_runs_each_sample_in_its_own_order(jitter):
    orders = torch.tensor(list(itertools.permutations(range(4))) * 2)  # each twice
    count = len(orders)
    generator = torch.Generator().manual_seed(1)
    shuffle = torch.randperm(count, generator=generator)
    orders = orders[shuffle]
    x = pictures(count)
    factors = torch.rand(count, 4, generator=generator) * 0.8 + 0.6
    factors[:, 3] = (torch.rand(count, generator=generator) - 0.5) * 0.4
    apply = torch.rand(count, generator=generator) < 0.7
    expected = x.clone()
    for index in apply.nonzero().flatten().tolist():
        for operation in orders[index].tolist():
            expected[index] = PEERS[operation](expected[index], float(factors[index, operation]))
    ours = jitter(x.clone(), factors, orders, apply)
    torch.testing.assert_close(ours, expected, atol=2 * TOLERANCE, rtol=0)
    assert torch.equal(ours[~apply], x[~apply])


def test_order_matters():
    x = pictures(2)[:1].expand(2, -1, -1, -1).clone()
    factors = torch.tensor([[1.4, 0.6, 0.8, 0.1]] * 2)
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    one, two = color.jitter_(x, factors, orders, torch.ones(2, dtype=torch.bool))
    assert (one - two).abs().max() > 0.05


def test_grayscale_is_torchvisions_and_touches_only_its_samples():
    x, apply = pictures(6), torch.tensor([True, False, True, False, False, True])
    ours = color.grayscale_(x.clone(), apply)
    torch.testing.assert_close(ours[apply], reference.rgb_to_grayscale(x[apply], 3), atol=TOLERANCE, rtol=0)
    assert torch.equal(ours[~apply], x[~apply])


def test_solarize_is_exact():
    values = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256).contiguous()
    apply = torch.tensor([True, False])
    ours = color.solarize_(values / 255, apply)
    expected = ImageOps.solarize(Image.fromarray(values[0].permute(1, 2, 0).numpy()), 128)
    assert torch.equal((ours[0] * 255).round().to(torch.uint8), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert torch.equal(ours[0], reference.solarize(values[0] / 255, 0.5))
    assert torch.equal(ours[1], values[1] / 255)


SIGMAS = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.5, 1.7, 2.0])


@pytest.mark.parametrize("side", [16, 32, 96])  # products up to 88, shifted sums above
def test_blur_is_pillows(side):
    """White noise, the worst image. Pillow rounds to 8 bits after each of its six passes: measured 2.97 / 255 apart at
    most."""
    pixels = torch.randint(
        0, 256, (len(SIGMAS), 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    ours = color.blur_(pixels / 255, SIGMAS, torch.ones(len(SIGMAS), dtype=torch.bool)) * 255
    for blurred, image, sigma in zip(ours, pixels, SIGMAS.tolist(), strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius=sigma))
        torch.testing.assert_close(
            blurred, torch.from_numpy(np.array(picture)).permute(2, 0, 1).float(), atol=3, rtol=0
        )


def test_blur_kernel_has_the_gaussians_variance():
    taps = color.box_taps(SIGMAS)
    distance = torch.arange(taps.shape[1])
    torch.testing.assert_close(2 * taps.sum(-1) - taps[:, 0], torch.ones(len(SIGMAS)))
    torch.testing.assert_close(3 * 2 * (taps * distance.square()).sum(-1), SIGMAS.square(), atol=1e-5, rtol=1e-5)


def test_blur_of_non_square_views_and_by_both_ways():
    x = torch.rand(3, 3, 90, 110, generator=torch.Generator().manual_seed(0))
    sigma, apply = torch.tensor([0.4, 1.1, 2.0]), torch.tensor([True, False, True])
    shifted = color.blur_(x.clone(), sigma, apply)
    products = color._blur_by_matrix(x, color.box_taps(sigma))
    torch.testing.assert_close(shifted[apply], products[apply], atol=1e-5, rtol=0)
    assert torch.equal(shifted[1], x[1])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts(channels):
    x = pictures(6, channels)
    on = torch.ones(6, dtype=torch.bool)
    assert torch.equal(color.grayscale_(x.clone(), on), x)
    neutral = torch.tensor([[1.0, 1.0, 0.3, 0.3]]).expand(6, 4)  # saturation and hue are not defined: nothing happens
    order = torch.tensor([[3, 2, 1, 0]]).expand(6, 4)
    torch.testing.assert_close(color.jitter_(x.clone(), neutral, order, on), x, atol=1e-6, rtol=0)
    factors, order = torch.tensor([[1.2, 0.5, 1.0, 0.0]]).expand(6, 4), torch.arange(4).expand(6, 4)
    changed = color.jitter_(x.clone(), factors, order, on)
    bright = (x * 1.2).clamp(0, 1)
    torch.testing.assert_close(changed, 0.5 * bright + 0.5 * bright.mean((1, 2, 3), keepdim=True), atol=1e-6, rtol=0)
    assert color.blur_(x.clone(), torch.full((6,), 1.0), on).shape == x.shape


def test_nothing_to_do_changes_nothing():
    x, off = pictures(4), torch.zeros(4, dtype=torch.bool)
    y = x.clone()
    color.jitter_(y, torch.ones(4, 4), torch.arange(4).expand(4, 4), off)
    color.grayscale_(y, off)
    color.blur_(y, torch.ones(4), off)
    color.solarize_(y, off)
    assert torch.equal(x, y)
