"""The view of supervised training: padded crops, erasing, order, and the same view wherever it is made."""

from __future__ import annotations

import pickle

import pytest
import torch

from vit_suite.config import SupervisedViewsConfig
from vit_suite.errors import UserError
from vit_suite.views.draw import Draw, alone
from vit_suite.views.supervised import SupervisedViews, bordered, erase_, shifted_boxes

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]


def plain(**options) -> SupervisedViewsConfig:
    """No augmentation but what is asked for."""
    return SupervisedViewsConfig(
        **({"global_size": 32, "crop": "padded", "flip": 0.0, "randaugment": 0, "erase": 0.0} | options)
    )


def pictures(count: int = 64, side: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def pixels(view: torch.Tensor) -> torch.Tensor:
    """A view as values 0..1 again."""
    return view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_padded_crops_are_shifts_of_the_image():
    images = pictures(200)
    (view,) = SupervisedViews(plain(), MEAN, STD)(images, alone(200))
    uniform = alone(200).uniform(2, purpose="shift")
    boxes = shifted_boxes(torch.tensor([[32, 32]]).expand(200, 2), uniform)
    tops, lefts = boxes[:, 0], boxes[:, 1]
    assert set(tops.tolist()) == set(lefts.tolist()) == set(range(9))  # 4 pixels of border on each side
    canvas = torch.zeros(200, 3, 40, 40)
    canvas[:, :, 4:36, 4:36] = images / 255
    for index in range(200):
        expected = canvas[index, :, tops[index] : tops[index] + 32, lefts[index] : lefts[index] + 32]
        torch.testing.assert_close(pixels(view[index]), expected, atol=1e-5, rtol=0)


def test_shifts_are_even():
    boxes = shifted_boxes(torch.tensor([[32, 32]]).expand(9000, 2), alone(9000).uniform(2, purpose="shift"))
    counts = torch.bincount(boxes[:, 0], minlength=9)
    assert ((counts - 1000).abs() < 130).all()


def test_padded_crops_flip_and_resize():
    images = pictures(64, 24)
    (view,) = SupervisedViews(plain(flip=1.0, global_size=24), MEAN, STD)(images, alone(64))
    (same,) = SupervisedViews(plain(global_size=24), MEAN, STD)(images, alone(64))
    torch.testing.assert_close(view, same.flip(-1), atol=1e-5, rtol=0)
    (larger,) = SupervisedViews(plain(global_size=48), MEAN, STD)(images, alone(64))
    assert larger.shape == (64, 3, 48, 48)


def test_borders_of_images_of_many_sizes():
    ragged = [pictures(1, 16)[0], pictures(1, 40)[0][:, :24]]
    assert [tuple(image.shape) for image in bordered(ragged)] == [(3, 20, 20), (3, 30, 50)]
    (view,) = SupervisedViews(plain(), MEAN, STD)(ragged, alone(2))
    assert view.shape == (2, 3, 32, 32) and bool(torch.isfinite(view).all())


def test_erasing_has_its_share_its_areas_and_unit_noise():
    x = torch.full((2000, 3, 32, 32), 9.0)
    draw = alone(2000)
    out = erase_(x.clone(), draw, 0.25, [0.02, 1 / 3])
    gone = out != 9
    assert torch.equal(gone[:, 0], gone[:, 1]) and torch.equal(gone[:, 0], gone[:, 2])
    areas = gone[:, 0].flatten(1).float().mean(1)
    hit = areas > 0
    assert abs(hit.float().mean() - 0.25) < 0.03
    assert areas[hit].min() > 0.01 and areas[hit].max() < 0.36
    assert abs(areas[hit].mean() - (0.02 + 1 / 3) / 2) < 0.02  # evenly drawn; the widest do not fit as often
    for image in gone[hit][:50, 0]:
        rows, columns = image.any(1), image.any(0)
        assert int(image.sum()) == int(rows.sum()) * int(columns.sum())  # a filled rectangle
        assert 0.2 < int(rows.sum()) / int(columns.sum()) < 5  # 0.3 to 3.3, in whole pixels
    everywhere = torch.cat(
        [erase_(torch.zeros(1, 3, 32, 32), alone(1, step=step), 1.0, [1.0, 1.0]).flatten() for step in range(20)]
    )
    assert abs(everywhere.mean()) < 0.02 and abs(everywhere.std() - 1) < 0.02


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_ranks_make_the_views_that_one_process_makes(crop):
    """All of it, in the middle of a run."""
    views = SupervisedViews(
        SupervisedViewsConfig(global_size=32, crop=crop, jitter=0.5, blur=[0.3], erase=0.6), MEAN, STD
    )
    images = pictures()
    (whole,) = views(images, Draw(5, 2, 7, slice(0, 64), 64))
    parts = [views(images[part], Draw(5, 2, 7, part, 64))[0] for part in (slice(0, 16), slice(16, 64))]
    torch.testing.assert_close(torch.cat(parts), whole)
    again = pickle.loads(pickle.dumps(views))(images, Draw(5, 2, 7, slice(0, 64), 64))[0]
    assert torch.equal(again, whole)
    assert not torch.allclose(views(images, Draw(5, 2, 8, slice(0, 64), 64))[0], whole)


def test_float_images_give_the_views_of_their_bytes():
    views = SupervisedViews(SupervisedViewsConfig(global_size=32), MEAN, STD)
    images = pictures()
    torch.testing.assert_close(views(images / 255, alone(64))[0], views(images, alone(64))[0], atol=2e-2, rtol=0)


def test_no_augmentation_normalizes():
    (view,) = SupervisedViews(plain(crop="resized", global_scale=[1.0, 1.0], ratio=[1.0, 1.0]), MEAN, STD)(
        pictures(), alone(64)
    )
    torch.testing.assert_close(pixels(view), pictures() / 255, atol=1e-5, rtol=0)


def test_what_cannot_be():
    with pytest.raises(UserError, match="views.erase_area: expected .least, most., both above 0"):
        SupervisedViews(plain(erase_area=[0.5, 0.2]), MEAN, STD)
    with pytest.raises(UserError, match="views.randaugment works on 1 or 3 channels, not 2"):
        SupervisedViews(SupervisedViewsConfig(), [0.5, 0.5], [0.2, 0.2])
