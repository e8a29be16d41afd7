"""DINOv2 as a module under a Trainer: what reaches the loss, centers, rates, Gram anchoring, late stage, resume.
Numbers are in tests/parity."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from vit_suite.config import BackboneConfig
from vit_suite.config.dinov2 import DINOv2Config, DINOv2OptimConfig, DINOv2ViewsConfig
from vit_suite.errors import UserError
from vit_suite.losses.dino import dino_loss, teacher_probabilities
from vit_suite.losses.gram import gram_loss
from vit_suite.methods.dinov2 import DINOv2, masked_patches, refresh_due
from vit_suite.models.backbone import Backbone
from vit_suite.models.batch_norm import BatchNorm1d
from vit_suite.views.draw import alone
from vit_suite.views.masks import Masks

from .test_dino import close, crops, data, train

SIZES = {"global_size": 16, "local_size": 8, "local_crops": 3}


def make(
    seed: int = 0,
    drop_path: float = 0.0,
    method: dict | None = None,
    optim: dict | None = None,
    views: dict | None = None,
) -> DINOv2:
    torch.manual_seed(seed)
    small = {
        "out_dim": 32,
        "hidden_dim": 24,
        "bottleneck_dim": 8,
        "momentum_teacher": 0.9,
        "freeze_last_layer_epochs": 0,
    }
    return DINOv2(
        DINOv2Config(**small | (method or {})),
        BackboneConfig(patch_size=4, dim=24, depth=2, heads=3, drop_path=drop_path),
        DINOv2ViewsConfig(**SIZES | (views or {})),
        DINOv2OptimConfig(**{"lr": 1e-2, "warmup_epochs": 1} | (optim or {})),
        batch_size=16,
    )


def test_every_crop_reaches_the_loss():
    module, views = make(), crops()
    reference = module.losses(views)["loss"].item()
    for index in range(len(views)):
        changed = [view.clone() for view in views]
        changed[index][0] += 1.0
        assert abs(module.losses(changed)["loss"].item() - reference) > 1e-6, f"crop {index} does not reach the loss"


def test_the_total_is_the_weighted_sum():
    weights = {"dino_weight": 0.5, "ibot_weight": 2.0, "koleo_weight": 0.3, "gram_weight": 4.0}
    values = make(method=weights).losses(crops())
    expected = sum(weights[f"{name}_weight"] * values[name] for name in ("dino", "ibot", "koleo", "gram"))
    torch.testing.assert_close(values["loss"], expected)
    assert values["gram"] > 0  # the student sees masked crops, so it differs from the equal copy


def test_losses_change_nothing_and_repeat():
    module, views = make(drop_path=0.5), crops()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first, second = module.losses(views, draw=alone(4, 3)), module.losses(views, draw=alone(4, 3))
    assert first["loss"].item() == second["loss"].item() != module.losses(views, draw=alone(4, 4))["loss"].item()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_no_gradient_reaches_teacher_or_gram_teacher_and_every_student_parameter_has_one():
    module = make(method={"gram_weight": 1.0, "separate_head": True})
    module.losses(crops())["loss"].backward()
    for network in (module.teacher, module.gram_teacher):
        assert all(parameter.grad is None for parameter in network.parameters())
    assert [name for name, p in module.student.named_parameters() if p.grad is None] == []
    assert float(module.student.mask_token.grad.norm()) > 0


def test_the_student_alone_sees_the_mask_token():
    module, views = make(), crops()
    target = teacher_probabilities(module.teacher.logits(module.teacher.features(views[:2]).cls), module.center, 0.04)
    values = module.losses(views)
    with torch.no_grad():
        module.teacher.mask_token.add_(1.0)
    assert module.losses(views)["loss"].item() == values["loss"].item()
    hidden = module.masks(views[0], alone(4)).hidden
    student = module.student.logits(module.student.features(views, hidden).cls)
    torch.testing.assert_close(values["dino"], dino_loss(student, target, 0.1))
    with torch.no_grad():
        module.student.mask_token.add_(1.0)
    assert module.losses(views)["loss"].item() != values["loss"].item()


def test_the_buffer_of_masked_patches():
    hidden = torch.zeros(2, 2, 4, dtype=torch.bool)
    hidden[0, 1, 2] = hidden[1, 0, 0] = hidden[1, 0, 3] = True
    found = masked_patches(Masks(hidden, 5))
    assert found.places[:3].tolist() == [6, 8, 11] and found.counted.tolist() == [True] * 3 + [False] * 2
    assert found.weights.tolist() == [1, 0.5, 0.5, 0, 0]
    assert masked_patches(Masks(torch.zeros(2, 2, 4, dtype=torch.bool), 0)).weights.tolist() == [0]


@pytest.mark.parametrize("most", [40, 64, 128])
def test_the_length_of_the_buffer_does_not_matter(most):
    """Sinkhorn-Knopp, centers and loss count what is masked alone."""
    for centering in ("ema", "sinkhorn_knopp"):
        module, views = make(method={"centering": centering}), crops()
        expected = module.losses(views)
        hidden = module.masks(views[0], alone(4)).hidden
        module.masks = lambda *_, hidden=hidden: Masks(hidden, most)
        found = module.losses(views)
        torch.testing.assert_close(found["loss"], expected["loss"])
        for name, value in expected.sums.items():
            torch.testing.assert_close(found.sums[name], value)


def test_a_batch_without_masks_moves_no_patch_center():
    module = make()
    module.patch_center.fill_(0.5)
    module.masks = lambda *_: Masks(torch.zeros(2, 4, 16, dtype=torch.bool), 20)
    values = module.losses(crops())
    assert values["ibot"].item() == 0 and torch.isfinite(values["loss"])
    module.use_sums(values.sums)
    assert torch.equal(module.patch_center, torch.full((32,), 0.5)) and module.center.norm() > 0


def test_shared_and_separate_heads():
    shared, separate = make(), make(method={"separate_head": True, "ibot_out_dim": 16, "ibot_bottleneck_dim": 4})
    assert shared.student.ibot_head is None and separate.student.ibot_head.last_layer.weight_v.shape == (16, 4)
    assert shared.patch_center.shape == (32,) and separate.patch_center.shape == (16,)
    assert torch.isfinite(separate.losses(crops())["loss"])
    plain = make(method={"last_layer": "linear"})
    assert plain.student.head.last_layer.weight.shape == (32, 8) and torch.isfinite(plain.losses(crops())["loss"])


def test_batch_norm_is_in_the_head_of_cls_tokens_alone():
    """Rows that only fill the buffer of masked patches must not reach the statistics."""
    module = make(method={"separate_head": True, "head_batch_norm": True})
    for network in (module.student, module.teacher):
        assert sum(isinstance(layer, BatchNorm1d) for layer in network.head.mlp) == 2
        assert not any(isinstance(layer, BatchNorm1d) for layer in network.ibot_head.mlp)
    assert torch.isfinite(module.losses(crops())["loss"])
    assert module.student.head.mlp[1].num_batches_tracked == module.teacher.head.mlp[1].num_batches_tracked == 1
    without = make(method={"ibot_weight": 0.0, "head_batch_norm": True})  # nothing shares the head
    assert torch.isfinite(without.losses(crops())["loss"])


def test_gram_features_of_larger_crops_are_resized():
    module = make(method={"gram_weight": 1.0}, views={"gram_size": 32})
    large = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    values = module.losses([*crops(), *large])
    hidden = module.masks(crops()[0], alone(4)).hidden
    student = module.student.features(crops(), hidden).patches
    anchor = module.anchor(large, (4, 4))
    assert anchor.shape == student.shape == (8, 16, 24)
    torch.testing.assert_close(values["gram"], gram_loss(student, anchor))
    small = module.gram_teacher.tokens(torch.cat(large)).patches.mT.unflatten(-1, (8, 8))
    resized = torch.nn.functional.interpolate(small, size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(anchor, resized.flatten(2).mT)


def test_when_the_gram_teacher_is_copied():
    def times(**options) -> list[int]:
        return [step for step in range(1, 40) if refresh_due(DINOv2Config(gram_weight=1.0, **options), step)]

    assert times() == []  # it is what the run starts from
    assert times(gram_from=5) == [5]
    assert times(gram_every=10) == [10, 20, 30]
    assert times(gram_from=5, gram_every=10) == [5, 15, 25, 35]
    assert times(gram_from=5, gram_every=10, gram_refreshes=1) == [5, 15]


class Watch(pl.Callback):
    """The Gram loss of each step, and whether the copy was the teacher after it."""

    def __init__(self):
        self.gram, self.equal = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.gram.append("train/gram" in trainer.logged_metrics)
        ours, theirs = module.gram_teacher.state_dict(), module.teacher.backbone.state_dict()
        self.equal.append(all(torch.equal(ours[name], theirs[name]) for name in ours))


def test_gram_starts_and_refreshes_at_its_steps(tmp_path):
    watch = Watch()
    module = make(method={"gram_weight": 1.0, "gram_from": 2, "gram_every": 3}, optim={"warmup_epochs": 0})
    train(module, data(), tmp_path, callbacks=[watch])
    assert watch.gram == [False, False, True, True, True, True]
    assert watch.equal == [False, True, False, False, True, False]


def test_last_layers_have_rate_0_in_the_first_epoch_and_decay_nothing(tmp_path):
    class Last(pl.Callback):
        def __init__(self):
            self.weights, self.rates = [], []

        def on_train_epoch_end(self, trainer, module):
            heads = (module.student.head, module.student.ibot_head)
            self.weights.append([head.last_layer.weight_v.detach().clone() for head in heads])
            self.rates.append({(group["last_layer"], group["lr"] > 0) for group in trainer.optimizers[0].param_groups})

    last = Last()
    module = make(method={"freeze_last_layer_epochs": 1, "separate_head": True}, optim={"warmup_epochs": 0.5})
    start = [head.last_layer.weight_v.detach().clone() for head in (module.student.head, module.student.ibot_head)]
    train(module, data(), tmp_path, callbacks=[last])
    for before, frozen, after in zip(start, *last.weights, strict=True):
        assert torch.equal(before, frozen) and not torch.equal(frozen, after)
    assert last.rates == [{(True, False), (False, True)}, {(True, True), (False, True)}]


def test_the_late_stage_has_larger_crops(tmp_path):
    class Sizes(pl.Callback):
        def __init__(self):
            self.found = []

        def on_train_epoch_end(self, trainer, module):
            images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
            views = module.crops(images, module.draw(0, 2))
            self.found.append([view.shape[-1] for view in views])

    sizes = Sizes()
    late = {"late_from_epoch": 1, "late_global_size": 24, "late_local_size": 12, "gram_size": 32}
    train(make(method={"gram_weight": 1.0}, views=late), data(), tmp_path, callbacks=[sizes])
    assert sizes.found == [[16, 16, 8, 8, 8, 32, 32], [24, 24, 12, 12, 12, 32, 32]]


def test_gram_crops_show_what_the_global_crops_show():
    module = make(method={"gram_weight": 1.0}, views={"gram_size": 32})
    smooth = torch.linspace(0, 255, 40).expand(2, 3, 40, 40).to(torch.uint8)
    first, second, *_, large, other = module.views(smooth, alone(2, 1))
    for small, big in ((first, large), (second, other)):
        down = torch.nn.functional.avg_pool2d(big, 2)
        assert float((down - small).abs().mean()) < 0.1 * float(small.std() + 0.1)


@pytest.mark.parametrize("centering", ["ema", "sinkhorn_knopp"])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, centering):
    options = {"centering": centering, "gram_weight": 0.5, "gram_from": 2, "gram_every": 2}
    straight, stopped = (make(drop_path=0.1, method=options) for _ in range(2))
    train(straight, data(), tmp_path, epochs=4)
    path = tmp_path / "half.ckpt"

    class StopHalfway(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    train(stopped, data(), tmp_path, epochs=4, callbacks=[StopHalfway()])
    torch.load(path, weights_only=True)  # plain data
    resumed = make(seed=9, drop_path=0.1, method=options)
    train(resumed, data(), tmp_path, epochs=4, ckpt_path=path)
    close(resumed, straight, atol=0, rtol=0)


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(tmp_path):
    """What compares images, KoLeo, is off. Masks, centers and drop path are those of the whole batch."""
    whole, halves = (make(drop_path=0.3, method={"koleo_weight": 0.0}, optim={"lr": 1e-3}) for _ in range(2))
    train(whole, data(), tmp_path, epochs=1, max_steps=1)
    train(halves, data(2), tmp_path, epochs=1, max_steps=1, accumulate_grad_batches=2)
    for name in ("center", "patch_center"):
        torch.testing.assert_close(getattr(halves, name), getattr(whole, name), atol=1e-6, rtol=1e-4)


def test_what_compares_images_is_said():
    assert make(method={"centering": "sinkhorn_knopp"}).compares_images() == ["KoLeo", "Sinkhorn-Knopp"]
    assert make(method={"koleo_weight": 0.0}).compares_images() == []


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        module = make(drop_path=0.3)
        for network in (module.student, module.teacher):
            network.backbone.cfg.checkpointing = checkpointing
        module.losses(crops(), draw=alone(4, 2))["loss"].backward()
        gradients.append([p.grad for p in module.student.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_bf16_trains_close_to_fp32(tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        trainer = train(make(optim={"lr": 1e-3}), data(), tmp_path, epochs=1, precision=precision)
        losses[precision] = float(trainer.callback_metrics["train/loss"])
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.03)


def test_collapse_is_said(tmp_path, caplog):
    """A teacher that is as good as uniform, with a loss at ln K."""
    module = make(
        method={"teacher_temperature": 100.0, "warmup_teacher_temperature_epochs": 0}, optim={"lr": 0.0, "min_lr": 0.0}
    )
    module.monitor.patience = 3
    with torch.no_grad():
        for network in (module.student, module.teacher):
            network.head.last_layer.weight_v.copy_(network.head.last_layer.weight_v[:1].expand(32, -1))
    with caplog.at_level("WARNING", "vit_suite"):
        train(module, data(), tmp_path)
    assert "the loss has stayed at ln K = 3.4657" in caplog.text


@pytest.mark.parametrize(
    "method, views, message",
    [
        ({"gram_from": 5}, {}, "method.gram_from 5 has no effect here: it is for method.gram_weight above 0."),
        ({"ibot_out_dim": 5}, {}, "method.ibot_out_dim 5 has no effect here: it is for method.separate_head true."),
        ({"center_momentum": 0.5, "centering": "sinkhorn_knopp"}, {}, "it is for method.centering ema."),
        (
            {"mask_probability": 0.0, "ibot_weight": 0.0, "mask_ratio": [0.3, 0.6]},
            {},
            "mask_ratio [0.3, 0.6] has no effect",
        ),
        (
            {"mask_probability": 0.0, "ibot_weight": 0.0, "separate_head": True},
            {},
            "method.separate_head True has no effect",
        ),
        (
            {},
            {"local_crops": 0, "late_local_size": 8, "late_from_epoch": 1},
            "views.late_local_size has no effect here",
        ),
        ({"head_batch_norm": True}, {}, "masked patches share it: set method.separate_head true."),
        ({"mask_probability": 0.0}, {}, "set method.ibot_weight 0 too"),
        ({"mask_ratio": [0.0, 0.01]}, {}, "of the 16 patches of a global crop is less than one patch"),
        ({}, {"gram_size": 32}, "views.gram_size 32 has no effect here"),
        ({}, {"late_from_epoch": 3}, "views.late_from_epoch has no effect without views.late_global_size"),
        ({}, {"late_global_size": 32}, "has no effect without views.late_from_epoch"),
        ({}, {"late_global_size": 30, "late_from_epoch": 1}, "views.late_global_size 30x30 is not divisible"),
        ({}, {"local_size": 10}, "views.local_size 10x10 is not divisible"),
    ],
)
def test_contradictions_are_refused(method, views, message):
    with pytest.raises(UserError) as error:
        make(method=method, views=views)
    assert message in str(error.value)


def test_without_masks_it_is_dino_with_koleo():
    module = make(method={"mask_probability": 0.0, "ibot_weight": 0.0})
    values = module.losses(crops())
    assert set(values) == {"loss", "dino", "koleo"} and module.student.mask_token is None
    values["loss"].backward()


def test_gram_anchors_lora_to_the_start_weights():
    """The pairs alone learn, and the copy is the start: without masks the first Gram loss is 0."""
    torch.manual_seed(0)
    start = Backbone(BackboneConfig(patch_size=4, dim=24, depth=2, heads=3, image_size=[16, 16], drop_path=0.0))
    plain = {"gram_weight": 1.0, "mask_probability": 0.0, "ibot_weight": 0.0}
    module = DINOv2(
        DINOv2Config(out_dim=32, hidden_dim=24, bottleneck_dim=8, **plain),
        BackboneConfig(patch_size=4, dim=24, depth=2, heads=3, drop_path=0.0, lora_rank=2),
        DINOv2ViewsConfig(**SIZES),
    )
    module.start_from(start)
    images = crops()[0]
    expected = start.tokens(images).patches
    for backbone in (module.student.backbone, module.teacher.backbone, module.gram_teacher):
        torch.testing.assert_close(backbone.tokens(images).patches, expected)
    values = module.losses(crops())
    assert float(values["gram"]) < 1e-10
    values["loss"].backward()
    learned = [name for name, p in module.student.backbone.named_parameters() if p.grad is not None]
    assert learned and all("parametrizations" in name for name in learned)
