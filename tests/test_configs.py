"""Every shipped config loads, opens with the promised header, and builds the network it describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vit_suite.data.registry import statistics
from vit_suite.models.backbone import Backbone
from vit_suite.parsing import load_config
from vit_suite.training.parts import method_class

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_config(path):
    cfg = load_config(path)
    with torch.device("meta"):  # shapes without numbers: a ViT-B takes no time
        method = method_class(cfg)(cfg.method, cfg.backbone, cfg.views, cfg.optim, classes=10)
    assert method.evaluation_backbone().depth == cfg.backbone.depth
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "source", "expected", "cost"):
        assert any(line.startswith(f"#   {word}") for line in header), f"{path.name}: no '{word}' in the header"
    assert any(f"--config configs/{path.relative_to(path.parents[1])}" in line for line in header)


def test_the_papers_recipe_is_the_papers():
    cfg = load("imagenet_vit_small_p16")
    assert (cfg.method.out_dim, cfg.method.momentum_teacher, cfg.method.center_momentum) == (65536, 0.996, 0.9)
    # The run whose scores the header gives: the defaults of main_dino.py on 8 GPUs of 64 images.
    assert (cfg.method.warmup_teacher_temperature_epochs, cfg.method.teacher_temperature) == (0, 0.04)
    assert cfg.data.batch_size == 512 and cfg.optim.lr * cfg.data.batch_size / 256 == pytest.approx(0.001)
    assert (
        sum(parameter.numel() for parameter in Backbone(cfg.backbone).parameters()) == 21665664
    )  # ViT-S/16 without a classifier


def load(name: str):
    return load_config(next(path for path in CONFIGS if path.stem == name))


def test_deits_recipe_is_deits():
    cfg = load("imagenet_deit_small")
    assert cfg.optim.lr * cfg.data.batch_size / 256 == pytest.approx(1e-3)  # 5e-4 x 1024 / 512
    assert (cfg.optim.rate_changes, cfg.optim.warmup_start) == ("epoch", 1e-6)
    assert (cfg.optim.weight_decay, cfg.optim.clip, cfg.optim.warmup_epochs, cfg.trainer.max_epochs) == (
        0.05,
        0,
        5,
        300,
    )
    assert (cfg.method.mixup, cfg.method.cutmix, cfg.method.label_smoothing, cfg.method.ema) == (0.8, 1.0, 0.1, 0.99996)
    assert (cfg.views.randaugment_set, cfg.views.magnitude, cfg.views.magnitude_std, cfg.views.erase) == (
        "increasing",
        9,
        0.5,
        0.25,
    )
    assert cfg.data.repeats == 3  # RASampler
    assert sum(parameter.numel() for parameter in Backbone(cfg.backbone).parameters()) == 21665664


def test_beyers_recipe_is_beyers():
    cfg = load("imagenet_beyer_small")
    peak = cfg.optim.lr * cfg.data.batch_size / 256
    assert (peak, peak * cfg.optim.weight_decay) == (pytest.approx(1e-3), pytest.approx(1e-4))  # big_vision's lr and wd
    assert (cfg.optim.clip, cfg.optim.clip_mode, cfg.method.mixup, cfg.method.cutmix, cfg.method.ema) == (
        1,
        "global",
        0.2,
        0,
        0,
    )
    assert (cfg.views.randaugment, cfg.views.magnitude, cfg.views.randaugment_probability) == (2, 10, 1)
    assert (cfg.backbone.positions, cfg.backbone.mlp, cfg.backbone.init) == ("sincos_2d_beyer", "gelu_tanh", "xavier")
    assert (cfg.views.interpolation, cfg.optim.first_moment) == ("bilinear_plain", "bf16")
    no_cls_nor_learned_positions = 21665664 - 384 - 197 * 384
    assert sum(parameter.numel() for parameter in Backbone(cfg.backbone).parameters()) == no_cls_nor_learned_positions


def test_sits_recipes_are_sits():
    first, third = load("imagenet_v1"), load("imagenet_v3")
    assert first.data.batch_size == 4 * 72 and first.optim.lr == pytest.approx(1e-3 * 256 / 512)
    assert (first.optim.min_lr, first.optim.warmup_start, first.optim.rate_changes) == (5e-6, 1e-6, "epoch")
    assert statistics(first.data) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (third.data.batch_size, third.method.align, third.method.reconstruction_weight) == (256, 1, 1)
