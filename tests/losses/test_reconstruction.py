"""L1 over the pixels that count, PSNR, and learned weights."""

from __future__ import annotations

import math

import pytest
import torch

from vit_suite.losses.reconstruction import psnr, reconstruction_l1
from vit_suite.losses.uncertainty import uncertainty_sum, uncertainty_weights


def test_only_pixels_that_count_count():
    clean, output = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4)
    output[0, 0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    output[0, 1] = 100
    counted = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    counted[0, 0, 0, :2] = True
    assert reconstruction_l1(output, clean, counted).item() == 1.0  # (1 + 2 + 3 + 0 + 0 + 0) / 6
    assert reconstruction_l1(output, clean, counted & False).item() == 0.0
    # two ranks with an image each: the mean of their losses is the loss of both
    pixels = counted.sum() / 2
    parts = [
        reconstruction_l1(output[:, i : i + 1], clean[:, i : i + 1], counted[:, i : i + 1], pixels).item()
        for i in range(2)
    ]
    assert sum(parts) / 2 == 1.0
    assert reconstruction_l1(output, clean).item() == pytest.approx((6 + 100 * 48) / 96)


def test_psnr_is_in_the_units_of_pixels():
    clean = torch.randn(2, 3, 8, 8)
    std = torch.tensor([0.1, 0.2, 0.4])
    output = clean + 0.05 / std.view(3, 1, 1)  # 0.05 of the peak everywhere
    assert psnr(output, clean, std).item() == pytest.approx(-20 * math.log10(0.05), abs=1e-3)


def test_the_best_factor_of_a_loss_is_found_by_its_gradient():
    """At the minimum over s, july's factor of a loss L with a = 1 is 1 / (2 L)."""
    losses, a = torch.tensor([0.25, 4.0]), torch.ones(2)
    s = torch.zeros(2, requires_grad=True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(uncertainty_sum(losses, s, a, "july"), s)
        s.data -= 0.05 * gradient
    torch.testing.assert_close(uncertainty_weights(s.detach(), a, "july"), 1 / (2 * losses), rtol=1e-3, atol=0)
    assert uncertainty_weights(torch.tensor(1.0), torch.tensor(0.5), "april").item() == pytest.approx(0.5 / math.e)
    assert uncertainty_weights(torch.tensor(1.0), torch.tensor(0.5), "july").item() == pytest.approx(math.exp(-0.5))
