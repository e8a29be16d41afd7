"""SiT as a module: what each option trains, what it refuses, what reaches the loss. Numbers are in
tests/parity/test_sit.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from vit_suite.config import BackboneConfig, SiTConfig, SiTOptimConfig, SiTViewsConfig
from vit_suite.errors import UserError
from vit_suite.losses.reconstruction import reconstruction_l1
from vit_suite.methods.sit import SiT
from vit_suite.models.backbone import Backbone
from vit_suite.views.corruption import corrupt
from vit_suite.views.draw import alone
from vit_suite.views.rotate import draw_turns, rotate

from .test_dino import data, train

V3 = {
    "rotation": False,
    "contrastive": "info_nce",
    "contrastive_head": "mlp",
    "hidden_dim": 32,
    "corruption": "gmml",
    "reconstruct": "corrupted",
    "decoder": "mlp",
    "loss_weights": "fixed",
    "temperature": 0.2,
    "drop_area": 0.5,
}
MASKED = {"corruption": "mask", "mask_ratio": 0.4}
CAUSAL = {"order": "causal", "corruption": "none"}
KINDS = {"v1": {}, "v3": V3, "mask": MASKED, "causal": CAUSAL}


def make(backbone: dict | None = None, seed: int = 0, **method) -> SiT:
    torch.manual_seed(seed)
    return SiT(
        SiTConfig(**{"contrastive_dim": 16} | method),
        BackboneConfig(**{"patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "drop_path": 0.0} | (backbone or {})),
        SiTViewsConfig(global_size=16),
        SiTOptimConfig(lr=1e-2, warmup_epochs=1),
        batch_size=16,
    )


def crops(batch: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 16, 16, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_and_both_views_are_trained(kind):
    """Every parameter that the optimizer gets has a gradient, as DDP asks, and none of the teacher's."""
    module = make(**KINDS[kind])
    views = [view.requires_grad_() for view in crops()]
    values = module.losses(views, logged=True)
    assert torch.isfinite(torch.stack(list(values.values()))).all()
    values["loss"].backward()
    assert [name for name, parameter in module.trained().named_parameters() if parameter.grad is None] == []
    assert all(float(view.grad.norm()) > 0 for view in views)
    if module.teacher is not None:
        assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_what_is_logged():
    names = set(make().losses(crops(), logged=True))
    tasks = {"rotation", "contrastive", "reconstruction"}
    assert names == {"loss", "rotation_accuracy", "contrastive_accuracy", "psnr"} | tasks | {
        f"weight_{task}" for task in tasks
    }
    assert set(make(**V3).losses(crops(), logged=True)) == {
        "loss",
        "contrastive",
        "reconstruction",
        "contrastive_accuracy",
        "psnr",
    }


def test_fixed_weights_are_lambda():
    once, five = (make(**V3 | {"reconstruction_weight": weight}).losses(crops()) for weight in (1.0, 5.0))
    torch.testing.assert_close(five["loss"] - once["loss"], 4 * once["reconstruction"])
    torch.testing.assert_close(once["loss"], once["contrastive"] + once["reconstruction"])


def test_only_corrupted_pixels_count_in_version_3():
    module = make(**V3)
    clean, draw = torch.stack(crops()), alone(4)
    corrupted = corrupt(module.method, clean, draw, 4)
    output = module.student(corrupted.images.flatten(0, 1)).pixels.unflatten(0, (2, 4))
    expected = (output - clean).abs().permute(0, 1, 3, 4, 2)[corrupted.changed].mean()
    torch.testing.assert_close(module.losses(crops(), draw=draw)["reconstruction"], expected)


def test_the_target_is_the_clean_turned_view():
    module, views, draw = make(), torch.stack(crops()), alone(4)
    turns = draw_turns(draw, 2, views.device)
    assert turns.unique().numel() > 1
    clean = rotate(views, turns)
    corrupted = corrupt(module.method, clean, draw, 4)
    output = module.student(corrupted.images.flatten(0, 1)).pixels.unflatten(0, (2, 4))
    torch.testing.assert_close(module.losses(crops(), draw=draw)["reconstruction"], reconstruction_l1(output, clean))
    assert not torch.equal(corrupted.images, clean)


def test_how_often_and_how_views_are_turned():
    draw = alone(4000)
    each = draw_turns(draw, 2, torch.device("cpu"))
    assert torch.equal(each, (draw.uniform(2, purpose="rotation").T * 4).long())  # four labels, equally frequent
    assert (each[0] != each[1]).double().mean() == pytest.approx(0.75, abs=0.03)
    seldom = draw_turns(draw, 2, torch.device("cpu"), share=0.3)
    assert torch.bincount(seldom.flatten()).div(8000).tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.02)
    together = draw_turns(draw, 2, torch.device("cpu"), together=True)
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], each[0])
    assert (draw_turns(draw, 2, torch.device("cpu"), share=1.0) > 0).all()


def test_a_module_turns_views_as_its_options_say():
    module, draw = make(turn_share=1.0, turn_together=True), alone(4)
    clean = rotate(torch.stack(crops()), draw_turns(draw, 2, torch.device("cpu"), 1.0, together=True))
    corrupted = corrupt(module.method, clean, draw, 4)
    output = module.student(corrupted.images.flatten(0, 1)).pixels.unflatten(0, (2, 4))
    torch.testing.assert_close(module.losses(crops(), draw=draw)["reconstruction"], reconstruction_l1(output, clean))
    with pytest.raises(UserError, match="turn_share 0.5 has no effect here: it is for method.rotation true"):
        make(rotation=False, turn_share=0.5)


def test_causal_tokens_draw_the_next_patch():
    module = make(**CAUSAL)
    images = torch.stack(crops())
    pixels = module.student(images.flatten(0, 1)).pixels
    changed = images.clone()
    changed[..., 4:8, 8:12] += 1  # patch 6
    moved = (
        (module.student(changed.flatten(0, 1)).pixels - pixels)
        .abs()
        .amax((0, 1))
        .unfold(0, 4, 4)
        .unfold(1, 4, 4)
        .amax((-1, -2))
    )
    assert (moved.flatten() > 1e-6).tolist() == [False] * 7 + [
        True
    ] * 9  # the patch itself is drawn without having been seen
    counted = module.counted(corrupt(module.method, images, alone(4), 4))
    assert not counted[..., :4, :4].any() and counted[..., 4:, :].all() and counted[..., :4, 4:].all()
    assert module.evaluation_backbone().cfg.causal


def test_the_rotation_token_is_a_register_beside_the_users_own():
    assert make().student.backbone.prefix_tokens == 2
    assert make({"registers": 2}).student.backbone.prefix_tokens == 4
    assert make(**V3).student.backbone.prefix_tokens == 1
    assert make({"class_token": False, "pool": "mean"}).student.backbone.prefix_tokens == 1


def test_the_teacher_is_what_is_scored_in_version_3(tmp_path):
    module = make(**V3 | {"momentum_teacher": 0.9})
    assert module.evaluation_backbone() is module.teacher.backbone
    before = module.teacher.backbone.vit.cls_token.clone()
    train(module, data(), tmp_path, epochs=1)
    after = module.teacher.backbone.vit.cls_token
    assert not torch.equal(before, after) and not torch.equal(after, module.student.backbone.vit.cls_token)


def gradients(count: int, seed: int) -> torch.Tensor:
    """uint8 (count, 3, 24, 24): smooth color gradients, so that what is hidden follows from what is seen."""
    corners = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(corners, 24, mode="bilinear", align_corners=True)
    return (255 * smooth).to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind, tmp_path):
    """The reconstruction of held-out images of the same kind gets better. Measured: the loss falls to 0.86 of what it
    was in version 3, and to about half in the others."""
    module = make(**KINDS[kind] | {"contrastive_dim": 32})
    module.optim.lr = 0.1  # 6e-3 for the batch of 16: 48 steps are few
    images = TensorDataset(gradients(64, seed=1), torch.zeros(64, dtype=torch.int64))
    views = module.crops(gradients(64, seed=2), alone(64))

    def held_out() -> float:
        module.eval()
        return float(module.losses(views)["reconstruction"].detach())

    before = held_out()
    train(module, DataLoader(images, batch_size=16), tmp_path, epochs=12)
    assert held_out() < 0.9 * before


def test_reconstruct_shows_what_the_network_is_shown():
    module, clean = make(**MASKED), crops()[0]
    shown, output = module.reconstruct(clean)
    hidden = corrupt(module.method, clean.unsqueeze(0), alone(4), 4).hidden[0]
    patches = shown.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax((1, 4, 5)).flatten(1)
    assert torch.equal(patches == 0, hidden) and hidden.sum(1).tolist() == [6] * 4
    assert output.shape == clean.shape and module.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": False, "contrastive": "none", "reconstruct": "none"}, "nothing is left to learn from"),
        ({"reconstruct": "corrupted", "corruption": "none"}, "no pixel would count"),
        ({"corruption": "mask", "reconstruct": "none"}, "method.corruption mask"),
        ({"order": "causal", "reconstruct": "none"}, "method.order causal"),
        ({"contrastive": "none", "contrastive_head": "mlp"}, "method.contrastive_head mlp has no effect"),
        (
            {"reconstruction_weight": 5.0},
            "method.reconstruction_weight 5.0 has no effect here: it is for method.loss_weights fixed",
        ),
        (
            {"contrastive": "none", "contrastive_dim": 512, "temperature": 0.1},
            "method.temperature 0.1 has no effect here",
        ),
        ({"corruption": "mask", "color": 0.5}, "method.color 0.5 has no effect"),
        ({"mask_ratio": 0.5}, "it is for method.corruption mask"),
        ({"drop_area": 0.0, "replace_area": 0.0, "reconstruct": "corrupted"}, "nothing would count"),
        ({"corruption": "gmml", "drop_type": []}, "method.drop_type is empty"),
        ({"order": "causal", "contrastive": "none", "contrastive_dim": 512}, "trains no CLS token"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_start_with_registers_gets_a_rotation_token_of_its_own(lora):
    """The registers of the start stay what they are; the new token is trained, and the rotation head reads it."""
    torch.manual_seed(5)
    shape = {"patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "image_size": [16, 16]}
    given = Backbone(BackboneConfig(**shape, registers=2))
    torch.nn.init.constant_(given.vit.reg_token, 7.0)
    module = make({"registers": 2, "lora_rank": lora})
    module.start_from(given)
    token = module.student.backbone.vit.reg_token
    assert token.shape == (1, 3, 24) and (token[:, :2] == 7).all() and token[:, 2].abs().max() < 0.2
    module.student(crops()[0]).turns.sum().backward()
    changed = module.student.rotation_head.weight.grad
    tokens = module.student.backbone.tokens(crops()[0])
    torch.testing.assert_close(changed, tokens.registers[:, 2].sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)
    assert token.requires_grad and token.grad[:, 2].abs().sum() > 0


def test_a_convolutional_stem_hides_no_patches():
    with pytest.raises(UserError, match="backbone.stem conv is not for method.corruption mask: its convolutions"):
        make({"stem": "conv"}, **MASKED)
    make({"stem": "conv"}, **V3)


def test_a_single_image_has_no_partner():
    assert make(**V3, replace_area=0.3).mixes_images() == ["method.replace_area"]
    assert make(**V3, replace_area=0.0).mixes_images() == [] == make(**MASKED).mixes_images()


def test_pretrained_weights_have_no_rotation_token():
    with pytest.raises(UserError, match="no rotation token"):
        make(
            {
                "name": "vit_tiny_patch16_224",
                "pretrained": True,
                "patch_size": None,
                "dim": None,
                "depth": None,
                "heads": None,
            }
        )


def test_version_3_is_defined_by_options_of_the_same_class():
    assert replace(SiTConfig(), **V3).name == "sit"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_teacher_follows_once_an_optimizer_step(tmp_path, accumulate):
    class Students(pl.Callback):
        """The student's weights after every micro-batch, and the step they belong to."""

        def on_train_batch_end(self, trainer, module, *_):
            history[trainer.global_step] = [parameter.detach().clone() for parameter in module.student.parameters()]

    history: dict[int, list[torch.Tensor]] = {}
    module = make(**V3)
    expected = [parameter.clone() for parameter in module.teacher.parameters()]
    train(module, data(accumulate), tmp_path, callbacks=[Students()], accumulate_grad_batches=accumulate)
    assert max(history) == 6  # 48 images in batches of 16, twice
    for step in range(6):
        momentum = 1 - 0.002 * (1 + math.cos(math.pi * step / 6))
        expected = [momentum * old + (1 - momentum) * new for old, new in zip(expected, history[step + 1], strict=True)]
    for parameter, value in zip(module.teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value, atol=1e-6, rtol=1e-5)
