"""Supervised ViT: cross-entropy on labels (Dosovitskiy et al. 2020, arXiv 2010.11929; DeiT, Touvron et al. 2021, arXiv
2012.12877; Beyer et al. 2022, arXiv 2205.01580).

A linear head on the backbone's representation. Its weights start from a truncated normal of 0.02 and its bias from 0,
as timm builds them for DeiT (Beyer et al. start both from 0).

Deliberate difference from timm's EMA: the momentum of the average of the weights rises to its value, as
min(ema, (1 + step) / (10 + step)). The average then spans about the last ninth of the steps so far. DeiT's constant
0.99996 averages over 25,000 steps, and after a shorter run the average would still be close to the initial weights.

Axes: B images, C channels, K classes, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite.config import BackboneConfig, SupervisedConfig, SupervisedOptimConfig, SupervisedViewsConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError
from vit_suite.methods.base import Losses, Method
from vit_suite.models.backbone import Backbone
from vit_suite.models.ema import copy_buffers, copy_weights, ema_update
from vit_suite.views.draw import Draw
from vit_suite.views.mix import mix
from vit_suite.views.supervised import SupervisedViews

IMAGENET_CLASSES = 1000
"""Number of classes of a head that is built without data."""


class Classifier(nn.Module):
    """Backbone and linear head."""

    def __init__(self, backbone: BackboneConfig, classes: int):
        super().__init__()
        self.backbone = Backbone(backbone)
        self.head = nn.Linear(self.backbone.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> logits (B, K). `kept` (2 depth, B): which paths drop path keeps in the blocks
        (`Backbone.drawn_paths`)."""
        features = self.backbone(images, kept)
        # In fp32, because calibration is measured on the logits, and bf16 has three digits.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """mean over b of -sum_k targets[b, k] log softmax(logits[b])[k]; (B, K) each, in fp32."""
    return -(targets * functional.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def average_momentum(step: int, most: float) -> float:
    """Momentum of the average after optimizer step `step` (0-based). It rises to `most`, as in TensorFlow's
    ExponentialMovingAverage."""
    return min(most, (1 + step) / (10 + step))


class SupervisedViT(Method):
    """Supervised training as a LightningModule.

    `classes` are the names of the labels, or their number; a label is an index into them. `average` is the EMA of the
    network, or None without EMA; where there is one, it is scored and exported. Logged: loss, and top-1 in percent on
    the training batch. The label of a mixed image is then the class with the larger share.
    """

    config_class = SupervisedConfig
    views_class = SupervisedViewsConfig
    optim_class = SupervisedOptimConfig
    online_scores = ("knn", "accuracy")
    method: SupervisedConfig
    classes: list[str]

    def build(self, backbone: BackboneConfig) -> None:
        if self.classes is None:
            self.classes = [str(index) for index in range(IMAGENET_CLASSES)]
        if len(self.classes) < 2:
            raise UserError(f"a classifier needs at least 2 classes; there is {len(self.classes)}.")
        self.network = Classifier(backbone, len(self.classes))
        self.average: Classifier | None = None
        if self.method.ema:
            self.average = Classifier(replace(backbone, drop_path=0.0, pretrained=False), len(self.classes))
            copy_weights(self.average, self.network)

    @staticmethod
    def build_views(views: Any, mean: list[float], std: list[float]) -> SupervisedViews:
        return SupervisedViews(views, mean, std)

    @classmethod
    def class_names(cls, data: ImageDataModule) -> list[str]:
        """The classes of the head. UserError where training images have no labels."""
        labels = data.train_source.labels
        without = len(data.train_source) if labels is None else int((labels < 0).sum())
        if without:
            images = len(data.train_source)
            some = "has no labels" if labels is None else f"has no label for {without} of its {images} training images"
            raise UserError(
                f"{data.name} {some}, and supervised training needs one for each: sort the images into a folder a class"
                " (--data.name folder), or pretrain without labels first: vit-suite pretrain --method.name dino."
            )
        return data.classes

    def trained(self) -> nn.Module:
        return self.network

    def classifier(self) -> Classifier:
        """The network that is scored: the average if there is one."""
        return self.network if self.average is None else self.average

    def evaluation_backbone(self) -> Backbone:
        return self.classifier().backbone

    def evaluation_head(self) -> nn.Linear:
        return self.classifier().head

    def losses(self, crops: list[Tensor], labels: Tensor, draw: Draw, logged: bool = False) -> Losses:
        """Cross-entropy of one view (B, C, S, S) against mixed, smoothed labels (B,)."""
        self.check_labels(labels, draw)
        images, targets = mix(crops[0], labels, draw, self.method, len(self.classes))
        kept = self.network.backbone.drawn_paths(draw, 1)
        logits = self.network(images, None if kept is None else kept[:, 0])
        loss = soft_cross_entropy(logits, targets)
        if not logged:
            return Losses({"loss": loss})
        hits = (logits.argmax(-1) == targets.argmax(-1)).float()
        return Losses({"loss": loss, "top1": 100 * hits.mean()})

    def check_labels(self, labels: Tensor, draw: Draw) -> None:
        """UserError for a label outside the head. On a GPU, which has to wait for this, labels are tested only in the
        first step of an epoch."""
        if labels.device.type == "cpu" or draw.step == 0:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(self.classes):
                label, count = low if low < 0 else high, len(self.classes)
                raise UserError(f"label {label} has no place in a head of {count} classes (0 to {count - 1}).")

    def mixes_images(self) -> list[str]:
        return [f"method.{name}" for name in ("mixup", "cutmix") if getattr(self.method, name)]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.average is not None:
            ema_update(self.average, self.network, average_momentum(step, self.method.ema))
            copy_buffers(self.average, self.network)  # it never trains, so its BatchNorm would keep its start
