"""Corruption of the rows of a global batch: the same on any number of ranks, on views of any size, and without waiting
for a GPU."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.views.test_corruption import ALL, BLOCKS, GMML, NAMES, flags, ramp
from vit_suite.config.sit import SiTConfig
from vit_suite.errors import UserError
from vit_suite.views import corruption
from vit_suite.views.corruption import Corrupted, corrupt
from vit_suite.views.draw import Draw, alone


def parts_of(cfg: SiTConfig, x: Tensor, count: int, seed: int = 3) -> list[Corrupted]:
    each = x.shape[1] // count
    rows = [slice(part * each, (part + 1) * each) for part in range(count)]
    return [corrupt(cfg, x[:, part], Draw(seed, 1, 2, part, x.shape[1]), 4) for part in rows]


@pytest.mark.parametrize("cfg", ALL, ids=NAMES)
@pytest.mark.parametrize("size", [32, 36])
def test_rows_of_a_global_batch_are_bit_for_bit_the_full_batchs(cfg, size):
    x = torch.randn(2, 24, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = corrupt(cfg, x, Draw(3, 1, 2, slice(0, 24), 24), 4)
    for count in (2, 4):
        for name, full in whole._asdict().items():
            made = [getattr(part, name) for part in parts_of(cfg, x, count)]
            assert (full is None and set(made) == {None}) or torch.equal(torch.cat(made, 1), full)


@pytest.mark.parametrize("cfg", ALL[:-1], ids=NAMES[:-1])
def test_views_images_and_steps_differ_and_a_step_repeats(cfg):
    x = torch.zeros(2, 6, 3, 32, 32) + torch.randn(
        3, 32, 32, generator=torch.Generator().manual_seed(0)
    )  # the same image 12 times
    made, again = (corrupt(cfg, x, alone(6, 1, 2, 3), 4) for _ in range(2))
    assert torch.equal(made.images, again.images) and torch.equal(made.changed, again.changed)
    assert len(made.changed.flatten(0, 1).unique(dim=0)) == 12
    for key in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        assert not torch.equal(corrupt(cfg, x, alone(6, *key), 4).changed, made.changed)


@pytest.mark.parametrize("cfg", ALL, ids=NAMES)
def test_views_stay_as_they_are(cfg):
    x = torch.randn(2, 7, 3, 32, 40)  # an odd number of images, and no square
    before = x.clone()
    made = corrupt(cfg, x, alone(7), 4)
    assert torch.equal(x, before)
    assert made.images.shape == x.shape and made.images.dtype == torch.float32 and made.images.isfinite().all()
    assert made.changed.shape == (2, 7, 32, 40) and made.changed.dtype == torch.bool
    assert torch.equal(made.images[flags(~made.changed, x)], x[flags(~made.changed, x)])
    assert (made.hidden is not None) == (cfg.corruption == "mask")
    if cfg.corruption == "none":
        assert not made.changed.any() and torch.equal(made.images, x)


@pytest.mark.parametrize("cfg", ALL, ids=NAMES)
def test_pieces_that_fit_the_cache_change_nothing(cfg, monkeypatch):
    x = torch.randn(2, 10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = corrupt(cfg, x, alone(10), 4)
    monkeypatch.setattr(corruption, "CPU_CHUNK", 1)
    assert torch.equal(corrupt(cfg, x, alone(10), 4).images, whole.images)


@pytest.mark.parametrize("cfg", ALL[:3], ids=NAMES[:3])
@pytest.mark.parametrize(("height", "width", "channels"), [(4, 4, 1), (12, 70, 6), (2, 2, 3)])
def test_small_odd_and_many_channelled_views(cfg, height, width, channels):
    if cfg.corruption == "gmml" and height < 4:
        pytest.skip("gmml refuses them")
    made = corrupt(cfg, torch.randn(2, 6, channels, height, width), alone(6), 4)
    assert made.images.isfinite().all() and made.changed.any()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"corruption": "gmml", "align": 16}, "align"),
        ({"corruption": "gmml", "align": 10}, "align"),
        ({"corruption": "gmml", "align": 8, "drop_area": 0.7}, "drop_area"),
        ({"corruption": "gmml", "align": 8, "replace_area": 0.7}, "replace_area"),
        ({"corruption": "blocks", "block_side": [0.4, 0.2]}, "block_side"),
        ({"corruption": "mask"}, "corruption"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, key):
    with pytest.raises(UserError, match=rf"^method\.{key}: ") as error:
        corrupt(SiTConfig(**changes), ramp(1, 2), alone(2), 5)
    assert "\n" not in str(error.value)


def test_rows_must_fit_the_images():
    with pytest.raises(ValueError, match="do not select 4"):
        corrupt(BLOCKS, ramp(2, 4), Draw(0, 0, 0, slice(0, 8), 16), 4)


@pytest.mark.parametrize("cfg", ALL, ids=NAMES)
def test_the_path_of_a_gpu_never_asks_the_device_for_a_value(cfg):
    """Tensors on PyTorch's meta device have shapes but no values: any read back to the host raises."""
    made = corrupt(cfg, ramp(2, 6).to("meta"), alone(6), 4)
    assert made.images.shape == (2, 6, 3, 32, 32) and made.changed.shape == (2, 6, 32, 32)
    assert all(value.device.type == "meta" for value in made if value is not None)


def test_zeros_alone_draw_no_noise(monkeypatch):
    cfg = dataclasses.replace(GMML, drop_type=["zeros"])
    views, draw = ramp(2, 6), alone(6)
    monkeypatch.setattr(corruption._Views, "noise", lambda self: pytest.fail("noise was drawn"))
    after = corrupt(cfg, views, draw, 8)
    gone = flags(after.changed, after.images)
    assert ((after.images == 0) & gone).any() and torch.equal(after.images[~gone], views[~gone])
    with pytest.raises(pytest.fail.Exception):
        corrupt(GMML, views, draw, 8)
