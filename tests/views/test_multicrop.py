"""Multi-crop: promised statistics of the draws, determinism, rows of a global batch, and what it refuses."""

import dataclasses
import itertools
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from vit_suite.config import ViewsConfig
from vit_suite.data.order import Batch
from vit_suite.errors import UserError
from vit_suite.views.draw import Draw, alone
from vit_suite.views.multicrop import MultiCrop, ViewsInWorkers, draw_views, pick_backend, validate_views

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SMALL = ViewsConfig(global_size=32, local_size=16, local_crops=4)
PLAIN = ViewsConfig(
    global_size=32, local_size=16, local_crops=2, flip=0, jitter=0, gray=0, blur=[0, 0, 0], solarize=[0, 0, 0]
)


def noise(count: int, channels: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def parameters(cfg: ViewsConfig, count: int, height: int, width: int, seed: int = 0):
    return draw_views(cfg, torch.tensor([[height, width]]).expand(count, 2), alone(count, seed))


def uniform_within(values: torch.Tensor, low: float, high: float, sigmas: float = 4.5) -> None:
    """Kolmogorov-Smirnov distance from the uniform law below what 4.5 standard deviations allow, and the whole range
    reached."""
    values = values.double().flatten().sort().values
    count = len(values)
    assert low - 1e-6 <= values[0] and values[-1] <= high + 1e-6
    law = (values - low) / (high - low)
    gap = (law - (torch.arange(count) + 0.5) / count).abs().max()
    assert gap < 0.45 * sigmas / math.sqrt(count), f"distance {gap:.4f} of {count} values from uniform on {low}..{high}"


def share_is(flags: torch.Tensor, probability: float) -> None:
    tolerance = 4.5 * math.sqrt(probability * (1 - probability) / flags.numel())
    assert abs(flags.double().mean().item() - probability) <= tolerance


def test_areas_and_ratios_have_the_promised_laws():
    """A box of area at most 3/4 of a large square always fits at the first try, so nothing is rejected and the laws are
    exact."""
    cfg = dataclasses.replace(SMALL, global_scale=[0.25, 0.7], local_scale=[0.05, 0.4])
    side = 4000
    boxes = parameters(cfg, 8000, side, side).boxes.double()
    area, ratio = boxes[..., 2] * boxes[..., 3] / side**2, boxes[..., 3] / boxes[..., 2]
    uniform_within(area[:, :2].clamp(0.25, 0.7), 0.25, 0.7)
    uniform_within(area[:, 2:].clamp(0.05, 0.4), 0.05, 0.4)
    uniform_within(ratio.log().clamp(math.log(3 / 4), math.log(4 / 3)), math.log(3 / 4), math.log(4 / 3))
    room = side - boxes[..., 2:]
    uniform_within(boxes[..., 0] / room[..., 0], 0, 1)
    uniform_within(boxes[..., 1] / room[..., 1], 0, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (60, 90), (20, 300), (300, 20), (3, 2)])
def test_boxes_follow_the_law_of_torchvisions_random_resized_crop(height, width):
    """Every coordinate's mean and spread, rejections and the centered fallback included."""
    count = 3000
    ours = parameters(dataclasses.replace(SMALL, local_crops=1), count, height, width).boxes
    assert (ours[..., :2] >= 0).all() and (ours[..., 2:] >= 1).all()
    assert (ours[..., 0] + ours[..., 2] <= height).all() and (ours[..., 1] + ours[..., 3] <= width).all()
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    for view, scale in ((0, SMALL.global_scale), (2, SMALL.local_scale)):
        theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, SMALL.ratio) for _ in range(count)]).double()
        mine = ours[:, view].double()
        tolerance = 4.5 * theirs.std(0) * math.sqrt(2 / count) + 1e-9
        assert ((mine.mean(0) - theirs.mean(0)).abs() <= tolerance).all(), (mine.mean(0), theirs.mean(0))
        # The spread is an error of the fourth moment, so for a rare event (a 3 x 2 image) its own estimate sets the
        # tolerance.
        kurtosis = ((theirs - theirs.mean(0)) ** 4).mean(0) / theirs.var(0).square().clamp(min=1e-12)
        error = 4.5 * theirs.std(0) * ((kurtosis - 1).clamp(min=0) / 4 * 2 / count).sqrt() + 1e-9
        assert ((mine.std(0) - theirs.std(0)).abs() <= error).all(), (mine.std(0), theirs.std(0))


def test_probabilities_factors_and_orders():
    cfg = dataclasses.replace(SMALL, jitter_strength=[0.4, 0.3, 0.2, 0.1])
    drawn = parameters(cfg, 8000, 32, 32)
    for flags, probability in ((drawn.flip, 0.5), (drawn.jitter, 0.8), (drawn.gray, 0.2)):
        for view in range(6):
            share_is(flags[:, view], probability)
    for flags, probabilities in ((drawn.blur, cfg.blur), (drawn.solarize, cfg.solarize)):
        share_is(flags[:, 0], probabilities[0])
        share_is(flags[:, 1], probabilities[1])
        share_is(flags[:, 2:], probabilities[2])
    uniform_within(drawn.sigma, 0.1, 2.0)
    uniform_within(drawn.sigma[:, 2:][drawn.blur[:, 2:]], 0.1, 2.0)  # and not the draw that decides whether to blur
    for operation, strength in enumerate(cfg.jitter_strength):
        middle = 0 if operation == 3 else 1
        uniform_within(drawn.factors[..., operation], middle - strength, middle + strength)
    codes = (drawn.order @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
    assert len(codes) == 24  # all permutations, equally often
    share = drawn.order.shape[0] * 6 / 24
    assert ((codes - share).abs() < 4.5 * math.sqrt(share)).all()


def test_draws_are_independent_of_each_other():
    drawn = parameters(SMALL, 8000, 400, 400)
    area = drawn.boxes[..., 2] * drawn.boxes[..., 3]
    columns = [drawn.flip, drawn.jitter, drawn.gray, drawn.sigma, area, *drawn.factors.unbind(-1)]
    columns = torch.stack([column.double() for column in columns])[:, :, :2]  # (columns, samples, global views)
    correlation = torch.corrcoef(
        columns.transpose(1, 2).flatten(0, 1)
    )  # every column of both views against every other
    assert (correlation - torch.eye(len(correlation))).abs().max() < 5 / math.sqrt(8000)


def test_strong_jitter_never_turns_negative():
    drawn = parameters(dataclasses.replace(SMALL, jitter_strength=[1.5, 1.5, 1.5, 0.5]), 500, 32, 32)
    assert (
        drawn.factors[..., :3].min() >= 0
        and drawn.factors[..., :3].max() <= 2.5
        and drawn.factors[..., 3].abs().max() <= 0.5
    )


def test_views_have_their_sizes_and_normalized_values():
    views = MultiCrop(SMALL, MEAN, STD)(noise(5), alone(5))
    assert [tuple(view.shape) for view in views] == [(5, 3, 32, 32)] * 2 + [(5, 3, 16, 16)] * 4
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for view in views:
        assert view.dtype == torch.float32 and view.is_contiguous()
        pixels = view * std + mean
        assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5


def test_whole_image_without_augmentation_is_the_image():
    images = noise(4)
    cfg = dataclasses.replace(PLAIN, global_scale=[1.0, 1.0], ratio=[1.0, 1.0])
    first, second = MultiCrop(cfg, MEAN, STD)(images, alone(len(images)))[:2]
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=0)


def test_each_augmentation_reaches_the_views_it_is_for():
    images = noise(16)
    plain = MultiCrop(PLAIN, MEAN, STD)(images, alone(len(images)))
    for change, touched in (
        ({"flip": 1.0}, range(4)),
        ({"jitter": 1.0}, range(4)),
        ({"gray": 1.0}, range(4)),
        ({"blur": [1, 0, 0]}, [0]),
        ({"blur": [0, 1, 0]}, [1]),
        ({"blur": [0, 0, 1]}, [2, 3]),
        ({"solarize": [0, 1, 0]}, [1]),
        ({"solarize": [0, 0, 1]}, [2, 3]),
    ):
        views = MultiCrop(dataclasses.replace(PLAIN, **change), MEAN, STD)(images, alone(len(images)))
        pairs = enumerate(zip(plain, views, strict=True))
        changed = [index for index, (one, two) in pairs if not torch.allclose(one, two, atol=1e-4)]
        assert changed == list(touched), change
    gray = MultiCrop(dataclasses.replace(PLAIN, gray=1.0), [0.0] * 3, [1.0] * 3)(images, alone(len(images)))
    assert all(torch.equal(view[:, 0], view[:, 1]) and torch.equal(view[:, 0], view[:, 2]) for view in gray)


def test_same_generator_same_views_and_other_steps_other_views():
    images, crop = noise(8), MultiCrop(SMALL, MEAN, STD)
    once, again = (crop(images, alone(len(images), 3, 2, 7)) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(once, again, strict=True))
    for key in ((3, 2, 8), (3, 3, 7), (4, 2, 7), (3, 7, 2)):
        other = crop(images, alone(len(images), *key))
        assert all((one - two).abs().mean() > 0.1 for one, two in zip(once, other, strict=True))


def test_neighbouring_steps_are_independent():
    first = torch.stack(
        [
            torch.rand(64, generator=alone(1, 0, epoch, step).generator("views"))
            for epoch in range(8)
            for step in range(32)
        ]
    )
    assert len(first[:, 0].unique()) == 256
    correlation = torch.corrcoef(first.double()) - torch.eye(256)
    assert correlation.abs().max() < 6 / 8 and abs(correlation.mean()) < 0.01
    uniform_within(first, 0, 1)


@pytest.mark.parametrize("sizes", [(32, 16), (36, 18), (33, 17)])  # odd sides leave vector loops with a remainder
def test_rows_of_a_global_batch_are_bit_for_bit_the_full_batchs(sizes):
    cfg = dataclasses.replace(SMALL, global_size=sizes[0], local_size=sizes[1])
    images, crop, total = noise(48), MultiCrop(cfg, MEAN, STD), 48
    full = crop(images, alone(len(images), 0, 1, 2))
    for rows in (slice(0, 16), slice(16, 32), slice(32, 48), slice(5, 6), slice(47, 48)):
        part = crop(images[rows], Draw(0, 1, 2, rows, total))
        for one, two in zip(full, part, strict=True):
            assert torch.equal(one[rows], two)


def test_rows_must_fit_the_images():
    with pytest.raises(ValueError, match="rows select 8"):
        MultiCrop(SMALL, MEAN, STD)(noise(4), Draw(0, 0, 0, slice(0, 8), 16))


def test_ragged_equals_dense_for_images_of_one_size(monkeypatch):
    images = noise(4, height=70, width=90)
    cfg = dataclasses.replace(PLAIN, flip=0.5, gray=0.2)
    crop = MultiCrop(cfg, [0.0] * 3, [1.0] * 3)
    ragged = crop(list(images), alone(len(images)))
    for batch in (images, images / 255):  # float images never take the 8-bit resize
        for one, two in zip(ragged, crop(batch, alone(len(images))), strict=True):
            torch.testing.assert_close(one, two, atol=2.001 / 255, rtol=0)
    monkeypatch.setattr("vit_suite.views.resample.SPARSE_AREA", 10**9)
    for one, two in zip(ragged, crop(images, alone(len(images))), strict=True):
        torch.testing.assert_close(one, two, atol=2.001 / 255, rtol=0)


def test_ragged_list_of_many_sizes():
    images = [noise(1, height=height, width=width)[0] for height, width in ((20, 300), (64, 48), (500, 375), (16, 16))]
    views = MultiCrop(SMALL, MEAN, STD)(images, alone(len(images)))
    assert [tuple(view.shape) for view in views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 4
    assert all(view.isfinite().all() for view in views)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_other_channel_counts(channels):
    views = MultiCrop(SMALL, [0.5] * channels, [0.2] * channels)(noise(8, channels), alone(8))
    assert all(view.shape[1] == channels and view.isfinite().all() for view in views)


def test_statistics_of_another_channel_count_are_named():
    with pytest.raises(UserError, match="data.mean"):
        MultiCrop(SMALL, [0.5], [0.2])(noise(2), alone(2))


def test_no_local_crops():
    assert len(MultiCrop(dataclasses.replace(SMALL, local_crops=0), MEAN, STD)(noise(2), alone(2))) == 2


def test_workers_make_the_views_of_the_device():
    images = noise(8)
    worker = pickle.loads(pickle.dumps(ViewsInWorkers(MultiCrop(SMALL, MEAN, STD), seed=5, total=8)))
    whole = MultiCrop(SMALL, MEAN, STD)(images, alone(len(images), 5, 3, 11))
    for rows in (slice(0, 4), slice(4, 8)):
        made = worker(list(images[rows]), Batch(3, 11, 0, rows, torch.arange(8)[rows]))
        for one, other in zip(made, whole, strict=True):
            torch.testing.assert_close(one, other[rows], atol=2 / 255 / min(STD), rtol=0)
    other_step = worker(list(images), Batch(3, 12, 0, slice(0, 8), torch.arange(8)))
    assert not torch.allclose(other_step[0], whole[0], atol=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_scale", [0.0, 1.0]),
        ("global_scale", [0.5, 0.4]),
        ("local_scale", [0.1, 1.5]),
        ("local_scale", [0.1]),
        ("ratio", [0.0, 1.0]),
        ("ratio", [1.5, 1.0]),
        ("flip", 1.5),
        ("jitter", -0.1),
        ("gray", 2.0),
        ("blur", [1.0, 0.1]),
        ("blur", [1.0, 0.1, 1.1]),
        ("solarize", [0.2]),
        ("blur_sigma", [0.0, 2.0]),
        ("blur_sigma", [2.0, 1.0]),
        ("jitter_strength", [0.4, 0.4, 0.2]),
        ("jitter_strength", [0.4, 0.4, 0.2, 0.6]),
        ("jitter_strength", [-0.4, 0.4, 0.2, 0.1]),
        ("local_crops", -1),
        ("global_size", 0),
        ("local_size", 0),
        ("flip", float("nan")),
        ("global_scale", [float("nan"), 1.0]),
    ],
)
def test_a_setting_that_cannot_be_is_named(key, value):
    with pytest.raises(UserError, match=rf"^views\.{key}: ") as error:
        validate_views(dataclasses.replace(ViewsConfig(), **{key: value}))
    assert "\n" not in str(error.value)


def test_default_settings_are_valid():
    validate_views(ViewsConfig())


def test_backend():
    assert pick_backend(SMALL, "cpu", ragged=False) == "device"
    assert pick_backend(SMALL, "cuda", ragged=True) == "device"
    assert pick_backend(SMALL, "cpu", ragged=True) == "workers"
    assert pick_backend(dataclasses.replace(SMALL, backend="device"), "cpu", ragged=True) == "device"
    assert pick_backend(dataclasses.replace(SMALL, backend="workers"), "cuda", ragged=False) == "workers"
    with pytest.raises(UserError, match="views.backend"):
        validate_views(dataclasses.replace(SMALL, backend="gpu"))


@pytest.mark.skipif(not os.environ.get("VIT_SUITE_DATA"), reason="VIT_SUITE_DATA names no folder of real images")
def test_real_images_keep_their_mean():
    """Views of real files without color augmentation have the brightness of the images, and are neither flat nor
    saturated."""
    found = (
        path
        for path in Path(os.environ["VIT_SUITE_DATA"]).rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    files = itertools.islice(found, 50)
    images = [
        torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous() for path in files
    ]
    if not images:
        pytest.skip("no images there")
    views = MultiCrop(PLAIN, [0.0] * 3, [1.0] * 3)(images, alone(len(images)))
    level = torch.stack([image.float().mean() / 255 for image in images]).mean()
    assert abs(views[0].mean() - level) < 0.05 and views[0].std() > 0.1


def test_the_path_of_a_gpu_never_asks_the_device_for_a_value():
    """Tensors on PyTorch's meta device have shapes but no values, and take the GPU's path: any read back to the host
    raises."""
    crop = MultiCrop(SMALL, MEAN, STD)
    batch = crop(noise(6).to("meta"), alone(6))
    shapes = [(32, 32), (200, 150), (150, 200)]
    ragged = crop([noise(1, height=height, width=width)[0].to("meta") for height, width in shapes], alone(3))
    for views, count in ((batch, 6), (ragged, 3)):
        assert [tuple(view.shape) for view in views] == [(count, 3, 32, 32)] * 2 + [(count, 3, 16, 16)] * 4
        assert all(view.device.type == "meta" for view in views)
