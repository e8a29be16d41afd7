"""`pretrain --start`: every method goes on from a backbone, with all weights or with LoRA."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone
from vit_suite.models.positions import resize_position
from vit_suite.weights.checkpoint import load_backbone

OF_DINO = ("out_dim", "hidden_dim", "bottleneck_dim", "warmup_teacher_temperature_epochs")
OTHER = {f"method__{name}": None for name in OF_DINO} | {"views__local_size": None, "views__local_crops": None}
OF_METHOD = {
    "supervised": {"method__ema": 0.0},
    "mae": {"method__decoder_dim": 16, "method__decoder_depth": 1, "method__decoder_heads": 2},
    "dinov2": {
        "method__out_dim": 32,
        "method__hidden_dim": 24,
        "method__bottleneck_dim": 8,
        "views__local_size": 16,
        "views__local_crops": 2,
    },
}
STILL = {"optim__lr": 0.0, "optim__min_lr": 0.0, "optim__weight_decay": 0.0, "optim__weight_decay_end": 0.0}
"""Steps that change nothing: whatever a run ends with, it began with."""


@pytest.fixture
def go_on(pretrain, tiny_run, tmp_path):
    def run(method="dino", **options):
        options = (OTHER if method != "dino" else {}) | {"start": tiny_run} | options
        return pretrain(method__name=method, trainer__max_steps=2, evaluate__every_epochs=0, **options)

    return run


def state(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "backbone.safetensors")


@pytest.mark.parametrize("method", ["dino", "dinov2", "mae", "sit", "supervised"])
def test_methods_start_from_a_run(go_on, tiny_run, tmp_path, method):
    said = go_on(method, **STILL, **OF_METHOD.get(method, {}))
    assert said.status == 0, said.err
    before, after = state(tiny_run), state(tmp_path / "run")
    if method != "sit":  # whose rotation token is one more register
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_the_license_of_released_weights_comes_along(go_on, vit_suite, tmp_path):
    """Through the run and a second one to the model card of an export."""
    released = Backbone(BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, layer_scale=1e-5, image_size=[32, 32]))
    state = released.vit.state_dict() | {"mask_token": torch.zeros(1, 24)}  # DINOv2's names
    torch.save(state, tmp_path / "dinov2.pth")
    assert go_on(start=tmp_path / "dinov2.pth", checkpoint_heads=3).status == 0
    assert load_backbone(tmp_path / "run").license == "Apache-2.0"
    assert go_on(start=tmp_path / "run", output=tmp_path / "second").status == 0
    for checkpoint in (tmp_path / "second", tmp_path / "second" / "backbone.safetensors"):
        out = tmp_path / f"out{checkpoint.suffix}"
        said = vit_suite("export", "--checkpoint", checkpoint, "--output", out, "--data.name", "shapes")
        assert said.status == 0, said.err
        assert "License of the weights it started from: Apache-2.0." in (out / "README.md").read_text()


def test_lora_leaves_a_plain_network_and_says_what_learns(go_on, tiny_run, tmp_path, caplog):
    said = go_on(backbone__lora_rank=2, optim__lr=0.1, optim__warmup_epochs=0)
    assert said.status == 0, said.err
    assert "LoRA of rank 2" in said.log + caplog.text
    before, after = state(tiny_run), state(tmp_path / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight") and ".norm" not in name for name in changed)
    whole = load_backbone(tmp_path / "run" / "checkpoints" / "last.ckpt")  # merged on the way in
    images = torch.randn(2, 3, *whole.image_size)
    with torch.no_grad():
        first, second = whole.backbone(images), load_backbone(tmp_path / "run").backbone(images)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_heads_come_along_when_asked_for(go_on, tiny_run, tmp_path):
    said = go_on(start_heads=True, method__momentum_teacher=1.0, **STILL)
    assert said.status == 0, said.err
    before, after = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tiny_run, tmp_path / "run")
    )
    heads = [name for name in before if ".head." in name and "teacher" in name]
    assert heads and all(torch.allclose(before[name], after[name], atol=1e-6) for name in heads)


def test_heads_of_a_full_checkpoint_of_dino(go_on, tiny_run, tmp_path):
    """main_dino.py's names: `head.mlp.0.weight` of the teacher, `module.head.` of the student."""
    ours = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    teacher = {name.removeprefix("teacher.").replace(".vit.", "."): x for name, x in ours.items() if "teacher." in name}
    student = {f"module.{name}": torch.zeros_like(x) for name, x in teacher.items()}
    torch.save({"teacher": teacher, "student": student, "epoch": 3}, tmp_path / "checkpoint.pth")
    start = {"start": tmp_path / "checkpoint.pth", "checkpoint_heads": 3}
    said = go_on(start_heads=True, method__momentum_teacher=1.0, **start, **STILL)
    assert said.status == 0, said.err
    after = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    heads = [name for name in ours if name.startswith("teacher.head.")]
    assert heads and all(torch.allclose(ours[name], after[name], atol=1e-6) for name in heads)


def test_another_image_size_resizes_the_positions_once(go_on, tiny_run, tmp_path):
    said = go_on(views__global_size=48, views__local_size=24, **STILL)
    assert said.status == 0, said.err
    before, after = state(tiny_run)["pos_embed"], state(tmp_path / "run")["pos_embed"]
    assert before.shape == (1, 17, 24) and after.shape == (1, 37, 24)  # CLS, and 4 x 4 or 6 x 6 patches
    torch.testing.assert_close(after, resize_position(before, (4, 4), (6, 6), 1), atol=1e-6, rtol=0)


def test_heads_that_do_not_fit(go_on, tmp_path):
    said = go_on(start_heads=True, method__out_dim=17)
    assert said.status == 2 and "start_heads: 'teacher.head.last_layer.weight_g'" in said.err
    assert not (tmp_path / "run").exists()


def test_a_frozen_backbone_stays_while_heads_learn(go_on, tiny_run, tmp_path):
    said = go_on(
        "supervised", method__ema=0.0, optim__freeze_backbone_epochs=100, optim__lr=0.1, optim__warmup_epochs=0
    )
    assert said.status == 0, said.err
    before, after = state(tiny_run), state(tmp_path / "run")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_another_number_of_channels_is_averaged_in(go_on, tmp_path):
    said = go_on(data__channels=1)
    assert said.status == 0, said.err
    assert "takes 3 channels, the data has 1" in said.log
    assert load_backbone(tmp_path / "run").backbone.cfg.channels == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone__lora_rank": 4}, "give the weights it starts from with --start"),
        ({"start_heads": True}, "start_heads needs --start"),
    ],
)
def test_options_that_need_a_start(pretrain, tmp_path, options, message):
    said = pretrain(**options)
    assert said.status == 2 and message in said.err and not (tmp_path / "run").exists()
