from __future__ import annotations

import pytest
import torch

from vit_suite.evaluation.localization import (
    baseline_scores,
    best_center_box,
    center_box,
    choose_head,
    jaccard,
    score_masks,
)


def box(top, bottom, left, right, size=(8, 8)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_jaccard_of_known_overlaps():
    truth = box(0, 4, 0, 4)
    masks = torch.stack([truth, box(0, 4, 2, 6), box(4, 8, 4, 8), box(0, 8, 0, 8), box(0, 0, 0, 0)])
    assert jaccard(masks, truth).tolist() == pytest.approx([1, 8 / 24, 0, 16 / 64, 0])
    assert float(jaccard(box(0, 0, 0, 0), box(0, 0, 0, 0))) == 1


def test_jaccard_refuses_bytes_and_other_sizes():
    with pytest.raises(ValueError, match="bool"):
        jaccard(box(0, 4, 0, 4).byte() * 255, box(0, 4, 0, 4))
    with pytest.raises(ValueError, match="pixels"):
        jaccard(box(0, 4, 0, 4), box(0, 4, 0, 4, (8, 4)))


def test_best_head_is_per_image_and_the_fixed_head_is_not():
    truth = torch.stack([box(0, 4, 0, 4), box(4, 8, 4, 8)])
    half = box(0, 4, 0, 2), box(4, 8, 4, 6)
    nothing = box(0, 0, 0, 0)
    # head 0 is right on image 0 alone, head 1 on image 1 alone, head 2 is half right on both
    masks = torch.stack([torch.stack([truth[0], nothing, half[0]]), torch.stack([nothing, truth[1], half[1]])])
    scores = score_masks(masks, truth, mean_masks=torch.stack(half), head=2)
    assert scores.best_head == 100
    assert scores.heads == pytest.approx((50, 50, 50))
    assert scores.fixed_head == pytest.approx(50) and scores.mean_map == pytest.approx(50)
    assert dict(scores.items()) == {"best_head": 100.0, "fixed_head": scores.fixed_head, "mean_map": scores.mean_map}
    assert choose_head(masks[1:], truth[1:]) == 1
    assert score_masks(masks, truth).fixed_head is None


def test_center_box_and_its_choice():
    assert center_box((8, 6), (1, 1)).all()
    assert center_box((8, 8), (0.5, 0.25)).equal(box(2, 6, 3, 5))
    truth = torch.stack([center_box((40, 60), (0.5, 0.3))] * 3)
    assert best_center_box(truth) == (0.5, 0.3)
    assert baseline_scores(truth, (0.5, 0.3)) == pytest.approx({"whole_image": 15, "center_box": 100})


def test_best_center_box_equals_brute_force():
    torch.manual_seed(0)
    spans = torch.randint(0, 11, (20, 2, 2)).sort(-1).values.tolist()
    truth = torch.stack([box(*rows, *columns, (12, 10)) for rows, columns in spans])
    truth[:, 5:7, 4:6] = True
    shares = [(row / 5, column / 5) for row in range(1, 6) for column in range(1, 6)]
    scores = [float(jaccard(center_box((12, 10), share), truth).mean()) for share in shares]
    assert best_center_box(truth, steps=5) == shares[scores.index(max(scores))]
