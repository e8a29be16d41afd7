from __future__ import annotations

import pytest
import torch

from vit_suite.attention.maps import upsample
from vit_suite.evaluation.localization import (
    Found,
    baselines,
    center_overlaps,
    covered,
    jaccard,
    on_object,
    overlap,
    score,
)


def box(top, bottom, left, right, size=(8, 8)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_jaccard_of_known_overlaps():
    truth = box(0, 4, 0, 4).to(torch.int8)
    masks = torch.stack([box(0, 4, 0, 4), box(0, 4, 2, 6), box(4, 8, 4, 8), box(0, 8, 0, 8), box(0, 0, 0, 0)])
    assert jaccard(masks, truth).tolist() == pytest.approx([1, 8 / 24, 0, 16 / 64, 0])
    assert float(jaccard(box(0, 0, 0, 0), box(0, 0, 0, 0).to(torch.int8))) == 1
    truth[:, 4:] = -1  # left out: what a mask does there counts for nothing
    assert jaccard(masks, truth).tolist() == pytest.approx([1, 8 / 16, 0, 16 / 32, 0])
    with pytest.raises(ValueError, match="bool"):
        jaccard(masks.byte() * 255, truth)


@pytest.mark.parametrize("grid", [(4, 6), (7, 3), (11, 13), (30, 40)])
def test_jaccard_of_cells_is_that_of_pixels(grid):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 2, (23, 31), generator=generator, dtype=torch.int8)
    masks = torch.rand(2, 5, *grid, generator=generator) < 0.4
    fine = upsample(masks, (23, 31)) & (truth >= 0)
    shared, either = ((pixels.sum((-2, -1))).double() for pixels in (fine & (truth == 1), fine | (truth == 1)))
    torch.testing.assert_close(jaccard(masks, truth), shared / either)


def test_overlap_with_boxes_is_that_of_the_largest_region_and_the_best_box():
    mask = box(1, 3, 0, 2, (4, 4)) | box(0, 1, 3, 4, (4, 4))
    size = (40, 80)  # a cell is 10 pixels high, 20 wide: the region is the box 0 10 40 30
    truth = torch.tensor([[0.0, 10, 40, 30], [60, 0, 80, 10]])
    assert overlap(mask, truth, size).tolist() == 1
    assert overlap(mask, truth[1:], size).tolist() == 0
    shifted = torch.tensor([[20.0, 10, 60, 30], [0, 0, 80, 40]])
    assert overlap(mask[None, None], shifted, size).tolist() == [[pytest.approx(max(400 / 1200, 800 / 3200))]]
    assert overlap(torch.zeros(4, 4, dtype=torch.bool), truth, size).tolist() == 0


def test_pointing():
    # a grid of 2 x 4 over 20 x 40 pixels: centers at y 5, 15 and x 5, 15, 25, 35
    boxes = torch.tensor([[0.0, 0, 15, 10], [30, 10, 40, 20]])
    assert on_object(torch.arange(8), (2, 4), boxes, (20, 40)).tolist() == [
        True,
        False,
        False,
        False,
        False,
        False,
        False,
        True,
    ]
    truth = torch.full((20, 40), -1, dtype=torch.int8)
    truth[5, 15] = 1
    truth[15, 25] = 0
    assert on_object(torch.arange(8).view(2, 4), (2, 4), truth, (20, 40)).tolist() == [
        [False, True, False, False],
        [False] * 4,
    ]
    assert covered(boxes, (20, 40)) == pytest.approx((150 + 100) / 800)
    assert covered(torch.tensor([[0.0, 0, 20, 20], [10, 0, 30, 20]]), (20, 40)) == pytest.approx(
        30 / 40
    )  # the union, not the sum
    truth[:10] = 1
    assert covered(truth, (20, 40)) == pytest.approx(400 / 401)


def test_center_overlaps_of_masks_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 2, (12, 10), generator=generator, dtype=torch.int8)
    found = center_overlaps(truth, (12, 10), steps=5)
    for row in range(5):
        for column in range(5):
            height, width = round(12 * (row + 1) / 5), 2 * (column + 1)
            top, left = (12 - height) // 2, (10 - width) // 2
            expected = jaccard(box(top, top + height, left, left + width, (12, 10)), truth)
            assert float(found[row, column]) == pytest.approx(float(expected)), (row, column)
    assert float(found[-1, -1]) == pytest.approx(covered(truth, (12, 10)))


def test_center_overlaps_of_boxes():
    found = center_overlaps(torch.tensor([[20.0, 5, 60, 15], [0, 0, 80, 20]]), (20, 80), steps=4)
    assert float(found[1, 1]) == 1  # half the height, half the width: the first box
    assert float(found[3, 3]) == 1  # everything: the second
    assert float(found[3, 1]) == pytest.approx(0.5) and float(found[0, 0]) == pytest.approx(0.25)
    assert float(center_overlaps(torch.tensor([[0.0, 0, 20, 20]]), (20, 80), steps=4)[3, 3]) == pytest.approx(0.25)


def test_baselines_choose_a_size_for_each_score():
    overlaps = torch.zeros(4, 2, 2, dtype=torch.float64)
    overlaps[:, 0, 1] = torch.tensor([0.9, 0.9, 0.4, 0.4])  # the best mean
    overlaps[:, 1, 0] = torch.tensor([0.5, 0.5, 0.5, 0.0])  # finds most
    overlaps[:, 1, 1] = 0.3  # the whole image
    found = baselines(overlaps, torch.tensor([True, False, False, False]), torch.tensor([0.1, 0.1, 0.1, 0.5]).double())
    assert (found.center_box.overlap, found.center_box.found, found.center_box.pointing) == pytest.approx((65, 75, 25))
    assert found.sizes == {"overlap": (0.5, 1.0), "found": (1.0, 0.5)}
    assert (found.whole_image.overlap, found.whole_image.found, found.whole_image.pointing) == pytest.approx(
        (30, 0, 20)
    )


CHOOSING = torch.tensor([True, True, False, False])


def heads(overlaps, hits) -> Found:
    """overlaps (N, M, T) and hits (N, M), the last map being the mean."""
    return Found(
        torch.tensor(overlaps, dtype=torch.float64), torch.tensor(hits, dtype=torch.bool), (0.4, 0.6), heads=True
    )


def test_best_head_is_per_image_and_the_fixed_head_is_chosen_on_other_images():
    found = heads(
        [  # head 0, head 1, mean; at two thresholds
            [[0.1, 0.8], [0.7, 0.2], [0.3, 0.2]],
            [[0.1, 0.8], [0.5, 0.2], [0.3, 0.2]],
            [[0.6, 0.1], [0.3, 0.9], [0.8, 0.0]],  # scored: here head 1 would have been better
            [[0.4, 0.3], [0.2, 0.7], [0.2, 0.0]],
        ],
        [[True, False, False], [True, False, True], [False, True, True], [True, False, False]],
    )
    rows = score(found, CHOOSING)
    best, fixed, mean = rows["best head"], rows["fixed head"], rows["mean map"]
    assert list(rows) == ["best head", "fixed head", "mean map"]
    # choosing images: best head 0.6 at 0.4 and 0.8 at 0.6; so it is scored at 0.6
    assert best.threshold == 0.6 and best.overlap == pytest.approx(80) and best.found == 100 and best.pointing == 100
    assert best.sweep == pytest.approx((50, 80)) and best.head is None
    # at 0.4 head 1 is chosen (0.6 against 0.1), at 0.6 head 0; 0.6 is the better of the two
    assert (fixed.threshold, fixed.head, fixed.pointing_head) == (0.6, 0, 0)
    assert fixed.overlap == pytest.approx(20) and fixed.found == 0 and fixed.pointing == 50
    assert fixed.sweep == pytest.approx((25, 20))
    assert mean.threshold == 0.4 and mean.overlap == pytest.approx(50) and mean.found == 50 and mean.pointing == 50


def test_the_scored_images_choose_nothing():
    """Whatever they are, threshold and head stay."""
    generator = torch.Generator().manual_seed(0)
    overlaps, hits = torch.rand(40, 4, 3, generator=generator).double(), torch.rand(40, 4, generator=generator) < 0.5
    choosing = torch.arange(40) % 2 == 0
    chosen = []
    for _ in range(10):
        overlaps[~choosing] = torch.rand(20, 4, 3, generator=generator).double()
        hits[~choosing] = torch.rand(20, 4, generator=generator) < 0.5
        rows = score(Found(overlaps, hits, (0.1, 0.2, 0.3), heads=True), choosing)
        chosen.append([(row.threshold, row.head, row.pointing_head) for row in rows.values()])
    assert all(one == chosen[0] for one in chosen)


def test_a_method_without_heads_is_one_row():
    found = Found(
        torch.tensor([[[0.1]], [[0.2]], [[0.5]], [[0.3]]]).double(), torch.tensor([[False], [False], [True], [False]])
    )
    (name, row), *others = score(found, CHOOSING).items()
    assert name == "" and not others and row.sweep is None and row.threshold is None
    assert (row.overlap, row.found, row.pointing) == pytest.approx((40, 50, 50))
    assert row.named("boxes") == pytest.approx({"box_iou": 40.0, "pointing": 50.0, "corloc": 50.0})
    assert row.named("masks") == pytest.approx({"jaccard": 40.0, "pointing": 50.0})
    for choosing in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="cannot be split"):
            score(found, choosing)
