"""Supervised ViT as a module: its loss, its average, its layer decay, what it starts from, and that it learns."""

from __future__ import annotations

from colorsys import hsv_to_rgb

import pytest
import pytorch_lightning as pl
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch.utils.data import DataLoader, TensorDataset

from vit_suite import SupervisedViT
from vit_suite.config import BackboneConfig, DataConfig, SupervisedConfig, SupervisedOptimConfig, SupervisedViewsConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError
from vit_suite.methods.supervised import Classifier, average_momentum, soft_cross_entropy
from vit_suite.models.backbone import Backbone
from vit_suite.models.positions import resize_position
from vit_suite.optim.groups import parameter_groups
from vit_suite.views.draw import alone
from vit_suite.views.mix import smoothed

VIEWS = SupervisedViewsConfig(global_size=16, crop="padded", randaugment=0, erase=0.0)


def make(
    views: SupervisedViewsConfig = VIEWS, backbone: dict | None = None, optim: dict | None = None, **method
) -> SupervisedViT:
    torch.manual_seed(0)
    return SupervisedViT(
        SupervisedConfig(**{"mixup": 0.0, "cutmix": 0.0, "ema": 0.0} | method),
        BackboneConfig(**{"patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "drop_path": 0.0} | (backbone or {})),
        views,
        SupervisedOptimConfig(**{"lr": 1e-2, "warmup_epochs": 1} | (optim or {})),
        batch_size=16,
        classes=10,
    )


def train(module: SupervisedViT, source, tmp_path, epochs: int = 2, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        | options
    )
    trainer.fit(module, source, weights_only=True)
    return trainer


def shapes(length: int = 48, batch_size: int = 16, accumulate: int = 1) -> ImageDataModule:
    return ImageDataModule(
        DataConfig(name="shapes", image_size=16, length=length, batch_size=batch_size), accumulate=accumulate
    )


# Loss
# ----------------------------------------------------------------------------------------------------------------------


def test_loss_is_timms():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(6, 10, generator=generator), torch.randint(10, (6,), generator=generator)
    mixed = torch.rand(6, 10, generator=generator).softmax(1)
    torch.testing.assert_close(soft_cross_entropy(logits, mixed), SoftTargetCrossEntropy()(logits, mixed))
    torch.testing.assert_close(
        soft_cross_entropy(logits, smoothed(labels, 10, 0.1)), LabelSmoothingCrossEntropy(0.1)(logits, labels)
    )
    assert soft_cross_entropy(logits.bfloat16(), mixed).dtype == torch.float32


def test_losses_mix_and_log_against_the_larger_share():
    module = make(mixup=0.8, label_smoothing=0.0)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    assert set(module.losses([images], labels, alone(8))) == {"loss"}
    values = module.losses([images], labels, alone(8), logged=True)
    assert set(values) == {"loss", "top1"}
    assert not torch.isclose(values["loss"], make(label_smoothing=0.0).losses([images], labels, alone(8))["loss"])


def test_head_starts_as_timms_does():
    torch.manual_seed(0)
    head = Classifier(BackboneConfig(patch_size=16, dim=192, depth=1, heads=3), 1000).head
    assert abs(head.weight.std() - 0.02) < 1e-3 and not head.bias.any()


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_outside_the_head_is_refused(label):
    with pytest.raises(UserError, match=f"label {label} has no place in a head of 10 classes"):
        make().losses([torch.randn(2, 3, 16, 16)], torch.tensor([3, label]), alone(2))


def test_one_class_is_refused():
    with pytest.raises(UserError, match="at least 2 classes"):
        SupervisedViT(backbone=BackboneConfig(patch_size=16, dim=16, depth=1, heads=2), classes=["cat"])


# Average
# ----------------------------------------------------------------------------------------------------------------------


def test_momentum_rises_to_its_value():
    assert [average_momentum(step, 0.99) for step in (0, 8, 89, 10**6)] == [0.1, 0.5, pytest.approx(90 / 99), 0.99]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_follows_once_a_step(tmp_path, accumulate):
    module, history = make(ema=0.5), []
    average = [parameter.clone() for parameter in module.average.parameters()]
    step = SupervisedViT.after_step

    def after(self, number):
        step(self, number)
        history.append([parameter.detach().clone() for parameter in self.network.parameters()])

    module.after_step = after.__get__(module)
    train(module, shapes(accumulate=accumulate), tmp_path, accumulate_grad_batches=accumulate)
    assert len(history) == 6
    for number, weights in enumerate(history):
        momentum = average_momentum(number, 0.5)
        average = [momentum * old + (1 - momentum) * new for old, new in zip(average, weights, strict=True)]
    for expected, parameter in zip(average, module.average.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
        assert not parameter.requires_grad
    assert module.evaluation_backbone() is module.average.backbone and module.evaluation_head() is module.average.head


def test_the_average_has_the_statistics_of_the_network():
    """It never runs in training, so a convolutional stem's BatchNorm would keep mean 0 and variance 1."""
    module = SupervisedViT(
        SupervisedConfig(mixup=0.0, cutmix=0.0, ema=0.5),
        BackboneConfig(patch_size=8, dim=24, depth=1, heads=3, image_size=[16, 16], stem="conv"),
        classes=["a", "b"],
    )
    with torch.no_grad():
        module.network.train()(torch.randn(4, 3, 16, 16))
    module.after_step(0)
    mine, theirs = dict(module.average.named_buffers()), dict(module.network.named_buffers())
    assert any("running_mean" in name for name in mine)
    assert all(buffer.equal(theirs[name]) for name, buffer in mine.items())
    assert all(buffer.data_ptr() != theirs[name].data_ptr() for name, buffer in mine.items())


def test_without_an_average_the_network_is_scored():
    module = make()
    assert module.average is None and module.evaluation_backbone() is module.network.backbone


# Layer decay
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.65, 0.75])
def test_rates_by_layer_are_timms(decay):
    classifier = Classifier(BackboneConfig(name="vit_tiny_patch16_224", image_size=[32, 32], depth=4), 10)
    ours = {}
    for group in parameter_groups(classifier, decay):
        for parameter in group["params"]:
            ours[id(parameter)] = group["lr_scale"]
    names = {
        name.removeprefix("backbone.vit."): ours[id(parameter)] for name, parameter in classifier.named_parameters()
    }
    reference = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=10, img_size=32)
    scales = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(reference, layer_decay=decay)
        for p in group["params"]
    }
    for name, parameter in reference.named_parameters():
        if name.startswith(
            "norm."
        ):  # timm counts the last norm to the last block; BEiT and MAE, and so we, to the head
            assert names[name] == 1
            continue
        assert names[name] == pytest.approx(scales[id(parameter)]), name
    assert names["blocks.0.attn.qkv.weight"] == pytest.approx(decay**4) and names["head.weight"] == 1


# Starting from weights
# ----------------------------------------------------------------------------------------------------------


def test_starts_from_a_backbone_of_the_same_size():
    torch.manual_seed(5)
    given = Backbone(BackboneConfig(patch_size=4, dim=24, depth=2, heads=3, image_size=[16, 16]))
    module = make(ema=0.9)
    head = module.network.head.weight.clone()
    module.start_from(given)
    images = torch.randn(2, 3, 16, 16)
    for classifier in (module.network.eval(), module.average.eval()):
        torch.testing.assert_close(classifier.backbone(images), given.eval()(images))
    assert torch.equal(module.network.head.weight, head)


@pytest.mark.parametrize(
    "backbone", [{}, {"registers": 2}, {"class_token": False, "pool": "mean"}, {"positions": "sincos_2d"}]
)
def test_positions_are_resized_once(backbone):
    torch.manual_seed(5)
    given = Backbone(
        BackboneConfig(**{"patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "image_size": [24, 24]} | backbone)
    ).eval()
    module = make(backbone=backbone)
    module.start_from(given)
    own = module.network.backbone.eval()
    assert own.native_grid == (4, 4)
    if backbone.get("positions"):
        assert torch.equal(own.vit.pos_embed, make(backbone=backbone).network.backbone.vit.pos_embed)
        return
    torch.testing.assert_close(
        own.vit.pos_embed, resize_position(given.vit.pos_embed, (6, 6), (4, 4), own.prefix_tokens)
    )
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(own(images), given(images), atol=1e-5, rtol=1e-5)  # what the given one does on the fly


# Training
# ----------------------------------------------------------------------------------------------------------------------


def colored(count: int, seed: int) -> TensorDataset:
    """Images of ten colors with noise, uint8 (count, 3, 16, 16), and which color each
    has. A generated outline is not learned in seconds, a color is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    colors = 255 * torch.tensor([hsv_to_rgb(index / 10, 0.8, 0.8) for index in range(10)])
    noise = 40 * torch.randn(count, 3, 16, 16, generator=generator)
    return TensorDataset((colors[labels, :, None, None] + noise).clamp(0, 255).byte(), labels)


def test_learns_colors(tmp_path):
    module = make(optim={"lr": 4e-2, "clip": 1.0}, ema=0.9)
    train(module, DataLoader(colored(640, seed=0), batch_size=40, shuffle=True), tmp_path, epochs=4)
    images, labels = colored(500, seed=1).tensors
    with torch.no_grad():
        images = (images / 255 - torch.tensor(module.mean).view(3, 1, 1)) / torch.tensor(module.std).view(3, 1, 1)
        accuracy = (module.classifier().eval()(images).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.8, accuracy


def test_any_loader_of_images_and_labels(tmp_path):
    """A plain DataLoader of float images; and the ready checkpoint is plain data."""
    module = make(SupervisedViewsConfig(global_size=16), mixup=0.8, cutmix=1.0, ema=0.9)
    loader = DataLoader(TensorDataset(torch.rand(32, 3, 16, 16), torch.arange(32) % 10), batch_size=16)
    trainer = train(module, loader, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = SupervisedViT.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.classes == [str(index) for index in range(10)]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.classifier().eval()(images), module.classifier().eval()(images))


def test_bf16(tmp_path):
    module = make(SupervisedViewsConfig(global_size=16), mixup=0.8, cutmix=1.0, ema=0.9)
    trainer = train(module, shapes(), tmp_path, precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
