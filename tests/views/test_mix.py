"""Mixup, CutMix and smoothed labels: timm's formulas, their statistics, and the same mixture on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup

from vit_suite.config import SupervisedConfig
from vit_suite.views.draw import Draw, alone
from vit_suite.views.mix import cut_box, mix, smoothed

LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
IMAGES = torch.randn(8, 3, 20, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_targets_are_timms(smoothing):
    torch.testing.assert_close(smoothed(LABELS, 5, smoothing), timm_mixup.mixup_target(LABELS, 5, 1.0, smoothing))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_follow_what_is_in_the_images(name):
    """Recover lambda from the pixels: constant images, each of its own value."""
    cfg = SupervisedConfig(**({"mixup": 0.8, "cutmix": 1.0} | {name: 1.0, ({"mixup", "cutmix"} - {name}).pop(): 0.0}))
    values = torch.arange(8.0)
    shares = []
    for step in range(20):
        draw = alone(8, step=step)
        mixed, targets = mix(values.view(8, 1, 1, 1).expand(8, 3, 20, 24).clone(), LABELS, draw, cfg, 5)
        share = (mixed.mean((1, 2, 3)) - values[draw.partners()]) / (
            values - values[draw.partners()]
        )  # of the image itself
        lam = share[0].item()
        torch.testing.assert_close(share, torch.full((8,), lam))
        torch.testing.assert_close(
            targets,
            lam * timm_mixup.mixup_target(LABELS, 5, 1.0, 0.1)
            + (1 - lam) * timm_mixup.mixup_target(LABELS[draw.partners()], 5, 1.0, 0.1),
        )
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert len(mixed[0].unique()) == (1 if name == "mixup" else 2) or lam in (0.0, 1.0)
        shares.append(lam)
    assert len(set(shares)) > 10


def test_pairs_in_reverse_are_timms_mixture(monkeypatch):
    """With timm's partners, and its lambda, the targets are timm's to the digit."""
    monkeypatch.setattr(Draw, "partners", lambda self, device="cpu": torch.arange(8).flip(0))
    mixed, targets = mix(IMAGES, LABELS, alone(8), SupervisedConfig(mixup=0.8, cutmix=0.0), 5)
    lam = ((mixed - IMAGES.flip(0)) / (IMAGES - IMAGES.flip(0))).median().item()
    torch.testing.assert_close(targets, timm_mixup.mixup_target(LABELS, 5, lam, 0.1), atol=1e-5, rtol=0)


def test_box_is_timms(monkeypatch):
    random = np.random.default_rng(0)
    for lam, y, x in random.random((50, 3)):
        places = iter([int(20 * y), int(24 * x)])
        monkeypatch.setattr(timm_mixup.np.random, "randint", lambda *_, size=None, places=places: next(places))
        assert cut_box(20, 24, lam, y, x) == timm_mixup.rand_bbox((8, 3, 20, 24), lam)


def kinds(cfg: SupervisedConfig, steps: int = 300) -> list[str]:
    """What each step did to images of ones and zeros."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 64, 64)
    found = []
    for step in range(steps):
        mixed, _ = mix(images, torch.tensor([0, 1]), alone(2, step=step), cfg, 2)
        inner = (mixed > 0) & (mixed < 1)
        found.append("none" if torch.equal(mixed, images) else "mixup" if inner.any() else "cutmix")
    return found


def test_how_often_each():
    found = kinds(SupervisedConfig(mix_probability=0.6, cutmix_share=0.25))
    assert abs(found.count("none") / 300 - 0.4) < 0.09
    assert abs(found.count("mixup") / 300 - 0.45) < 0.09
    assert set(kinds(SupervisedConfig(mixup=0.0, cutmix=0.0), 5)) == {"none"}
    assert "cutmix" not in kinds(SupervisedConfig(cutmix=0.0), 40) and "mixup" not in kinds(
        SupervisedConfig(mixup=0.0), 40
    )


def test_lambda_is_betas():
    """Variance of Beta(a, a) is 1 / (4 (2 a + 1)): 1/12 at 1, 0.179 at 0.2."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    for alpha, variance in ((1.0, 1 / 12), (0.2, 0.1786)):
        cfg = SupervisedConfig(mixup=alpha, cutmix=0.0)
        shares = torch.stack(
            [mix(images, torch.tensor([0, 1]), alone(2, step=step), cfg, 2)[0][1, 0, 0, 0] for step in range(600)]
        )
        assert abs(shares.mean() - 0.5) < 0.05 and abs(shares.var() - variance) < 0.015


def test_two_ranks_mix_as_one_does():
    cfg = SupervisedConfig()
    for step in range(6):
        whole = mix(IMAGES, LABELS, Draw(3, 1, step, slice(0, 8), 8), cfg, 5)
        halves = [
            mix(IMAGES[part], LABELS[part], Draw(3, 1, step, part, 8), cfg, 5) for part in (slice(0, 4), slice(4, 8))
        ]
        for index in range(2):
            torch.testing.assert_close(torch.cat([half[index] for half in halves]), whole[index])


def test_each_slice_of_the_global_batch_has_its_own_mixture():
    """Ranks of 96 images, whose rows lie in one or two slices of 128, mix as one rank with all 288 does."""
    images = torch.arange(288.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    labels, cfg = torch.arange(288) % 5, SupervisedConfig(mixup=1.0, cutmix=0.0)
    whole, targets = mix(images, labels, alone(288), cfg, 5)
    parts = [slice(start, start + 96) for start in (0, 96, 192)]
    mixed = [mix(images[part], labels[part], Draw(0, 0, 0, part, 288), cfg, 5) for part in parts]
    torch.testing.assert_close(torch.cat([part for part, _ in mixed]), whole)
    torch.testing.assert_close(torch.cat([part for _, part in mixed]), targets)
    moved = (whole - images)[:, 0, 0, 0].abs()  # a neighbour is 1 away, so this is 1 - lambda
    slices = moved.split(128)
    assert all(torch.allclose(part, part[:1], atol=1e-4) for part in slices)
    assert len({round(float(part[0]), 3) for part in slices}) == 3


def test_arguments_stay():
    images, labels = IMAGES.clone(), LABELS.clone()
    for step in range(6):
        mix(images, labels, alone(8, step=step), SupervisedConfig(), 5)
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
