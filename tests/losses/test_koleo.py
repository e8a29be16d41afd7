"""KoLeo against its definition, row by row."""

from __future__ import annotations

import math

import torch

from vit_suite.losses.koleo import koleo_loss


def test_definition():
    torch.manual_seed(0)
    features = torch.randn(7, 5)
    unit = features / features.norm(dim=-1, keepdim=True)
    expected = 0.0
    for i in range(7):
        expected -= math.log(min(float((unit[i] - unit[j]).norm()) for j in range(7) if j != i)) / 7
    assert abs(koleo_loss(features).item() - expected) < 1e-5


def test_pushes_the_nearest_pair_apart():
    features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    koleo_loss(features).backward()
    step = -features.grad
    assert step[0, 1] > 0 > step[1, 1]  # downhill, the two neighbours part
    torch.testing.assert_close(
        koleo_loss(3 * features.detach()), koleo_loss(features.detach())
    )  # only directions count


def test_equal_rows_are_finite():
    assert torch.isfinite(koleo_loss(torch.ones(4, 3)))


def test_the_mean_over_ranks_is_the_loss_of_all_rows():
    whole = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    expected = koleo_loss(whole)
    parts = torch.stack([koleo_loss(whole, slice(start, start + 2)) for start in range(0, 8, 2)]).mean()
    torch.testing.assert_close(parts, expected)
    for ours, theirs in zip(torch.autograd.grad(parts, whole), torch.autograd.grad(expected, whole), strict=True):
        torch.testing.assert_close(ours, theirs)
