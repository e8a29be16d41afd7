"""Every shipped config loads, opens with the promised header, and builds the network it describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_suite.models.backbone import Backbone, check_image_size
from vit_suite.parsing import load_config
from vit_suite.views.multicrop import validate_views

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    cfg = load_config(path)
    validate_views(cfg.views)
    size = cfg.backbone.image_size or [cfg.views.global_size] * 2
    cfg.backbone.image_size = size
    backbone = Backbone(cfg.backbone)
    check_image_size([cfg.views.local_size], backbone.patch_size)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "source", "expected", "cost"):
        assert any(line.startswith(f"#   {word}") for line in header), f"{path.name}: no '{word}' in the header"
    assert any(f"--config configs/{path.relative_to(path.parents[1])}" in line for line in header)


def test_the_papers_recipe_is_the_papers():
    cfg = load_config(next(path for path in CONFIGS if path.stem == "imagenet_vit_small_p16"))
    assert (cfg.method.out_dim, cfg.method.momentum_teacher, cfg.method.center_momentum) == (65536, 0.996, 0.9)
    assert (cfg.method.warmup_teacher_temperature, cfg.method.teacher_temperature) == (0.04, 0.07)
    assert cfg.optim.lr * cfg.data.batch_size / 256 == pytest.approx(0.002)
    assert sum(parameter.numel() for parameter in Backbone(cfg.backbone).parameters()) == 21665664  # ViT-S/16 without a classifier
