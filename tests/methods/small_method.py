"""SimCLR (Chen et al. 2020, arXiv 2002.05709): the two views of an image are told apart from all other images.

The example of docs/add_a_method.md. Axes: B images, V = 2 views, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite import distributed
from vit_suite.config import BackboneConfig, MethodConfig, SiTViewsConfig
from vit_suite.config.limits import Count, Temperature
from vit_suite.losses.contrastive import nt_xent_logits
from vit_suite.methods.base import Losses, Method
from vit_suite.models.backbone import Backbone
from vit_suite.views.draw import Draw


@dataclass
class SimCLRConfig(MethodConfig):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709)."""

    name: Literal["simclr"] = "simclr"
    """Method."""
    projection_dim: Count = 128
    """Width of the projection that the loss compares."""
    temperature: Temperature = 0.1
    """Temperature of the loss."""


class SimCLR(Method):
    """SimCLR as a LightningModule. Logged: loss, and how often the other view of an image is the nearest (0..1)."""

    config_class = SimCLRConfig
    views_class = SiTViewsConfig
    method: SimCLRConfig

    def build(self, backbone: BackboneConfig) -> None:
        self.backbone = Backbone(backbone)
        width = self.backbone.dim
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.method.projection_dim)
        )

    def trained(self) -> nn.Module:
        return nn.ModuleDict({"backbone": self.backbone, "projection": self.projection})

    def evaluation_backbone(self) -> Backbone:
        return self.backbone

    def compares_images(self) -> list[str]:
        return [*super().compares_images(), "negatives"]

    def losses(self, crops: list[Tensor], labels: Tensor, draw: Draw, logged: bool) -> Losses:
        """NT-Xent (equation 1) over the images of all ranks."""
        kept = self.backbone.drawn_paths(draw, len(crops))  # stochastic depth, the same for any number of ranks
        features = self.backbone(torch.cat(crops), None if kept is None else kept.flatten(1))  # (V B, D)
        first, second = self.projection(features).unflatten(0, (len(crops), -1))
        offset = distributed.rank() * len(first)
        everyone = distributed.gather_rows(first), distributed.gather_rows(second)
        logits, positive = nt_xent_logits(first, second, *everyone, self.method.temperature, offset)
        values = {"loss": functional.cross_entropy(logits, positive)}
        if logged:
            values["accuracy"] = (logits.argmax(-1) == positive).float().mean()
        return Losses(values)
