"""Generated images: determinism, statistics, and that the class is in the outline alone."""

import numpy as np
import pytest
import torch

from vit_suite.config import DataConfig
from vit_suite.data.registry import open_split, open_test, open_train, statistics
from vit_suite.data.resident import decode_all
from vit_suite.data.shapes import CLASSES, ShapesSource
from vit_suite.errors import UserError

FINGERPRINT = [187.07, 159.65, 138.21]


def test_an_image_depends_on_seed_split_and_index_alone():
    one, two = ShapesSource("train", 40, (32, 32), seed=3), ShapesSource("train", 400, (32, 32), seed=3)
    backwards = [two.load(i) for i in reversed(range(40))][::-1]
    assert all(torch.equal(one.load(i), backwards[i]) for i in range(40))
    for other in (ShapesSource("test", 40, (32, 32), seed=3), ShapesSource("train", 40, (32, 32), seed=4)):
        assert not any(torch.equal(one.load(i), other.load(i)) for i in range(40))


def test_pixels_are_those_of_earlier_releases():
    # A changed generator would silently change every score on `shapes`; a few gray levels may differ between
    # processors.
    image = ShapesSource("train", 10, (32, 32), seed=0).load(7).float()
    assert image.shape == (3, 32, 32)
    assert torch.allclose(image.mean((1, 2)), torch.tensor(FINGERPRINT), atol=0.5)


def test_classes_are_balanced_and_masks_salient():
    source = ShapesSource("train", 1000, (32, 32))
    assert torch.bincount(source.labels).tolist() == [100] * 10 and len(source.classes) == 10
    area = torch.stack([source.mask(i) for i in range(1000)]).double().mean((1, 2))
    assert area.min() > 0.04 and area.max() < 0.18
    by_class = area.view(100, 10).mean(0)
    assert by_class.min() > 0.09 and by_class.max() < 0.13  # no class is told by its size


def test_mask_is_where_the_object_is():
    # The same background with and without the object cannot be had, but inside and outside must differ in mean color.
    source = ShapesSource("train", 200, (48, 48))
    gaps = []
    for i in range(200):
        image, mask = source.load(i).double() / 255, source.mask(i)
        gaps.append((image[:, mask].mean(1) - image[:, ~mask].mean(1)).norm())
    assert np.quantile(gaps, 0.05) > 0.2
    pixels, mask = source.render(5)
    assert (source.mask(5).numpy() == mask).all() and mask.dtype == bool


def test_colors_say_nothing_of_the_class():
    source = ShapesSource("train", 3000, (32, 32))
    images, _, _ = decode_all(source, (32, 32))
    masks = torch.stack([source.mask(i) for i in range(3000)])
    pixels = images.double() / 255

    def hits(features: torch.Tensor) -> float:
        nearest = torch.cdist(features[2000:], features[:2000]).argmin(1)
        return float((source.labels[:2000][nearest] == source.labels[2000:]).double().mean())

    inside, outside = (
        torch.stack([image[:, m].mean(1) for image, m in zip(pixels, part, strict=True)]) for part in (masks, ~masks)
    )
    assert hits(outside) < 0.14  # chance is 0.1, standard error 0.01
    assert hits(inside) < 0.14
    assert hits(torch.nn.functional.normalize(pixels.flatten(1) - 0.5)) < 0.4  # raw pixels: they see some outlines


def test_the_object_is_darker_and_off_center():
    source = ShapesSource("train", 300, (48, 48))
    masks = torch.stack([source.mask(i) for i in range(300)])
    gray = torch.stack([source.load(i).double().mean(0) / 255 for i in range(300)])
    darker = [image[~mask].mean() - image[mask].mean() for image, mask in zip(gray, masks, strict=True)]
    assert np.quantile(darker, 0.02) > 0.1
    middle = torch.zeros(48, 48, dtype=torch.bool)
    middle[12:36, 12:36] = True
    overlap = (masks & middle).sum((1, 2)) / (masks | middle).sum((1, 2))
    assert overlap.mean() < 0.3


def test_masks_tell_the_class():
    source = ShapesSource("train", 2000, (32, 32))
    masks = torch.stack([source.mask(i) for i in range(2000)])
    crops = []
    for mask in masks:  # cut out and scale, so that position and size do not hide the outline
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float()
        crops.append(torch.nn.functional.interpolate(box[None, None], (16, 16), mode="bilinear")[0, 0])
    flat = torch.stack(crops).flatten(1)
    hits = (
        (source.labels[:1500][torch.cdist(flat[1500:], flat[:1500]).argmin(1)] == source.labels[1500:]).double().mean()
    )
    assert hits > 0.8


@pytest.mark.parametrize("size", [(16, 16), (32, 64), (100, 40)])
def test_any_size(size):
    source = ShapesSource("test", 30, size)
    areas = [float(source.mask(i).double().mean()) for i in range(30)]
    assert (
        source.load(3).shape == (3, *size) and source.mask(3).shape == size and min(areas) > 0.03 and max(areas) < 0.45
    )


def test_through_the_registry():
    cfg = DataConfig(name="shapes", length=30, test_length=20, image_size=40, channels=1)
    train, test = open_train(cfg, 5), open_test(cfg, 5)
    assert (len(train), len(test), train.split, test.split) == (30, 20, "train", "test") and train.load(0).shape == (
        1,
        40,
        40,
    )
    assert len(open_train(DataConfig(name="shapes"))) == 10_000
    with pytest.raises(UserError, match="no split 'trian'"):
        open_split(cfg, "trian")
    with pytest.raises(UserError, match="too small"):
        open_train(DataConfig(name="shapes", image_size=8))
    with pytest.raises(UserError, match="1 or 3"):
        open_train(DataConfig(name="shapes", channels=5))


def test_published_statistics_hold():
    images, _, _ = decode_all(ShapesSource("train", 1000, (32, 32)), (32, 32))
    mean, std = statistics(DataConfig(name="shapes"))
    assert torch.allclose(images.double().mean((0, 2, 3)) / 255, torch.tensor(mean).double(), atol=0.02)
    assert torch.allclose(
        images.double().flatten(2).transpose(0, 1).flatten(1).std(1) / 255, torch.tensor(std).double(), atol=0.02
    )


def test_no_permission_is_a_user_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a").mkdir()
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match="no permission to read"):
        open_train(DataConfig(name="folder", root=str(tmp_path)))


def test_statistics_of_channels():
    mean, std = statistics(DataConfig(name="cifar10", channels=1))
    assert mean == pytest.approx([0.4809], abs=1e-3) and std == pytest.approx([0.2465], abs=1e-3)
    assert statistics(DataConfig(name="folder"))[0] == [0.485, 0.456, 0.406]
    assert statistics(DataConfig(name="folder", channels=5, mean=[0.5], std=[0.2] * 5)) == ([0.5] * 5, [0.2] * 5)
    for more, words in (
        ({"channels": 5}, "no published statistics"),
        ({"channels": 0}, "data.channels is 0"),
        ({"mean": [0.5, 0.5]}, "2 values, but data.channels is 3"),
        ({"std": [0.0]}, "above 0"),
        ({"mean": [123.7, 116.3, 103.5]}, "not 0..255"),
    ):
        with pytest.raises(UserError, match=words):
            statistics(DataConfig(name="cifar10", **more))
    assert len(CLASSES) == 10


def test_the_texture_says_nothing_of_the_class():
    """The contrast within the object is drawn from one distribution for all classes."""
    source = ShapesSource("train", 2000, (64, 64))
    contrast = torch.stack([source.load(i).double().mean(0)[source.mask(i)].std() for i in range(2000)])
    medians = contrast.view(-1, len(CLASSES)).median(0).values
    assert medians.max() / medians.min() < 1.5
