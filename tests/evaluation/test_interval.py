"""Intervals and chance levels beside scores."""

from __future__ import annotations

import pytest
import torch

from vit_suite.evaluation.interval import bank_remarks, chance, wilson


@pytest.mark.parametrize(
    ("hits", "images", "low", "high"),
    [  # 100 x scipy.stats.binomtest(hits, images).proportion_ci(method="wilson")
        (0, 10, 0.0, 27.7533),
        (10, 10, 72.2467, 100.0),
        (8, 10, 49.0162, 94.3318),
        (81, 150, 46.0238, 61.7764),
        (6120, 10000, 60.2408, 62.1506),
    ],
)
def test_wilson_interval(hits, images, low, high):
    assert wilson(100 * hits / images, images) == pytest.approx((low, high), abs=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    truth, images = 0.7, 60
    generator = torch.Generator().manual_seed(0)
    hits = (torch.rand(4000, images, generator=generator) < truth).sum(1).tolist()
    held = sum(low <= 100 * truth <= high for low, high in (wilson(100 * hit / images, images) for hit in hits))
    assert 0.93 < held / 4000 < 0.97


def test_chance_is_one_class_or_the_largest():
    even, uneven = torch.arange(10).repeat(3), torch.tensor([0] * 6 + [1] * 2)
    assert str(chance(even, 10)) == "chance is 10.00% (10 classes)"
    assert str(chance(uneven, 4)) == "chance is 25.00% (4 classes); the largest class alone gives 75.00%"
    assert chance(uneven, 4).as_dict() == {"uniform": 25.0, "largest_class": 75.0}


def test_small_banks_are_named():
    labels = torch.arange(3).repeat(10)
    assert bank_remarks([10, 20], labels) == []
    above, crowded = bank_remarks([20, 21, 200], labels)
    assert above.startswith("k 200: the bank has only 30 images")
    assert crowded.startswith("k 21: no class has more than 10")
