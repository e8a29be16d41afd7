from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vit_suite.config import BackboneConfig
from vit_suite.data.shapes import ShapesSource
from vit_suite.models.backbone import Backbone
from vit_suite.training.parts import MODULES
from vit_suite.training.snapshots import GAP, HEADER, AttentionSnapshots, side_by_side

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.2, 0.2]


class Logger:
    def __init__(self):
        self.logged = []

    def log_image(self, key, images, step):
        self.logged.append((key, images[0].size, step))


def module(**options):
    torch.manual_seed(0)
    cfg = BackboneConfig(patch_size=8, dim=24, depth=2, heads=2, image_size=[32, 32], **options)
    backbone = Backbone(cfg)
    with torch.no_grad():
        for weights in backbone.parameters():
            weights.add_(0.3 * torch.randn_like(weights))
    found = SimpleNamespace(device=torch.device("cpu"), mean=MEAN, std=STD, evaluation_backbone=lambda: backbone)
    found.whole = lambda *parts: found
    return found


def trainer(**state):
    defaults = {
        "current_epoch": 0,
        "global_step": 0,
        "max_epochs": 5,
        "max_steps": -1,
        "should_stop": False,
        "is_global_zero": True,
    }
    return SimpleNamespace(**defaults | {"loggers": [object(), Logger()]} | state)


@pytest.fixture
def snapshots(tmp_path):
    return AttentionSnapshots(tmp_path / "snapshots", ShapesSource("test", 3, (32, 32), 3, 0), 32, 2, "fp32")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def train(snapshots, module, first=0, last=5):
    """What Lightning calls; returns what was logged."""
    logger = Logger()
    state = {"loggers": [logger]}
    snapshots.on_train_start(trainer(global_step=4 * first, current_epoch=first, **state), module)
    for epoch in range(first, last):
        snapshots.on_train_epoch_end(trainer(current_epoch=epoch, global_step=4 * epoch + 4, **state), module)
    snapshots.on_train_end(trainer(current_epoch=last, global_step=4 * last, **state), module)
    return logger.logged


def test_every_so_many_epochs_before_and_after(snapshots):
    logged = train(snapshots, module())
    names = sorted(path.name for path in snapshots.folder.iterdir())
    assert names == ["epoch_0000.png", "epoch_0002.png", "epoch_0004.png", "epoch_0005.png", "epochs.png"]
    assert [(key, step) for key, _, step in logged] == [("attention", s) for s in (0, 8, 16, 20)] + [
        ("attention/epochs", 20)
    ]
    assert pixels(snapshots.folder / "epoch_0002.png").shape == (
        HEADER + 3 * 98,
        4 * 98,
        3,
    )  # image, mean, two heads; 32 px enlarged
    assert pixels(snapshots.folder / "epochs.png").shape == (HEADER + 3 * 98, 5 * 98, 3)  # image, four epochs


def test_what_is_drawn(snapshots):
    made = module()
    sheet = np.asarray(snapshots.sheet(made))
    tile = sheet[HEADER : HEADER + 96, :96]
    assert np.abs(tile[::3, ::3].astype(int) - snapshots.images[0].permute(1, 2, 0).numpy()).max() <= 1
    backbone = made.evaluation_backbone()
    assert backbone.training
    with torch.no_grad():  # even attention is one flat color, whatever the noise
        backbone.vit.blocks[-1].attn.qkv.weight[:48] *= 1e-4
        backbone.vit.blocks[-1].attn.qkv.bias[:48] *= 1e-4
    snapshots.images = [torch.full((3, 32, 32), 90, dtype=torch.uint8)]
    flat = np.asarray(snapshots.sheet(made))[HEADER : HEADER + 96, 98 + 40 : 98 + 56].astype(int)
    inside = flat[2:20]
    assert (np.abs(inside - inside[0, 0]).max(-1) <= 2).mean() > 0.7


def test_the_strip_goes_on_where_a_run_was_interrupted(snapshots):
    train(snapshots, module(), last=2)
    before = pixels(snapshots.folder / "epoch_0002.png")
    Image.new("RGB", (7, 9)).save(snapshots.folder / "epoch_0001.png")  # of a run with other options
    Image.fromarray(before).save(snapshots.folder / "epoch_0009.png")  # from before it was set back
    train(snapshots, module(), first=2)
    strip = pixels(snapshots.folder / "epochs.png")
    assert strip.shape[1] == 5 * 98  # image, epochs 0, 2, 4, 5
    assert (strip[HEADER:, 2 * 98 : 3 * 98] == before[HEADER:, 98 : 2 * 98]).all()
    assert (strip[HEADER:, :98] == before[HEADER:, :98]).all()


def test_a_long_run_has_a_strip_that_fits(tmp_path):
    for epoch in range(40):
        Image.new("RGB", (3 * 12, HEADER + 12), (6 * epoch, 0, 0)).save(tmp_path / f"{epoch}.png")
    strip = np.asarray(side_by_side({epoch: tmp_path / f"{epoch}.png" for epoch in range(40)}, 10 + GAP))
    assert strip.shape[1] == 17 * 12 and strip[-1, -1, 0] == 6 * 39 and strip[-1, 12, 0] == 0


def test_no_cls_token_is_said_once_and_nothing_drawn(snapshots, caplog):
    with caplog.at_level("INFO", "vit_suite"):
        logged = train(snapshots, module(class_token=False, pool="mean", registers=1))
    assert not logged and not snapshots.folder.exists()
    assert len([record for record in caplog.records if "no CLS token" in record.message]) == 1


def test_only_one_rank_writes(snapshots):
    made = module()
    snapshots.on_train_start(trainer(is_global_zero=False), made)
    snapshots.on_train_end(trainer(is_global_zero=False), made)
    assert not snapshots.folder.exists()


@pytest.mark.parametrize("name", ["dinov2", "mae"])
def test_of_every_method(snapshots, name):
    """The sheet has a column for each head of the network that the method scores: the teacher, or the encoder."""
    cfg = BackboneConfig(patch_size=8, dim=24, depth=2, heads=2, image_size=[32, 32])
    narrow = {
        "dinov2": {"out_dim": 16, "hidden_dim": 8, "bottleneck_dim": 8},
        "mae": {"decoder_dim": 16, "decoder_heads": 2},
    }
    views = {"global_size": 32} | ({"local_size": 16, "local_crops": 0} if name == "dinov2" else {})
    method = MODULES[name](narrow[name], cfg, views, mean=MEAN, std=STD)
    sheet = snapshots.sheet(method.whole("evaluation_backbone"))
    assert sheet.size == ((2 + 2) * (96 + GAP), HEADER + 3 * (96 + GAP))
    weights = method.teacher.backbone if name == "dinov2" else method.student.backbone
    before = np.asarray(sheet)
    with torch.no_grad():
        weights.vit.blocks[-1].attn.qkv.weight.mul_(5)
    assert (np.asarray(snapshots.sheet(method)) != before).any()
