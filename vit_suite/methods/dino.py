"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294; facebookresearch/dino main_dino.py).

A student sees all crops, an EMA teacher the two global ones. The student learns to match the teacher's centered and
sharpened output for other crops of the same image. Deliberate differences from the official code:

- The center is updated once per optimizer step from the mean over its micro-batches, not once per forward pass.
  Gradient accumulation then gives the numbers of the whole batch. Without accumulation the two agree.
- Student and teacher heads return fp32 logits to the loss; their matrix products may run in bf16.
- The teacher temperature warms up 0.04 -> 0.07 over 30 epochs, as in the paper; the official code's default is a
  constant 0.04.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from vit_suite import distributed
from vit_suite.config import BackboneConfig, DINOConfig, ViewsConfig
from vit_suite.errors import UserError
from vit_suite.losses.dino import dino_loss, teacher_probabilities, updated_center
from vit_suite.losses.koleo import koleo_loss
from vit_suite.methods.base import Losses
from vit_suite.methods.collapse import CollapseMonitor, distillation_signs
from vit_suite.methods.distillation import GLOBAL_CROPS, SelfDistillation
from vit_suite.methods.gradients import Gradients, add_gradients, with_gradients
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import check_image_size
from vit_suite.models.ema import copy_weights
from vit_suite.models.heads import DINOHead
from vit_suite.optim.schedules import teacher_temperature
from vit_suite.views.draw import Draw, alone


class Network(nn.Module):
    """Backbone and head: the student is one such network, the teacher another."""

    def __init__(self, backbone: BackboneConfig, method: DINOConfig, norm_last_layer: bool):
        super().__init__()
        self.backbone = Backbone(backbone)
        self.head = DINOHead(
            self.backbone.dim,
            method.out_dim,
            method.hidden_dim,
            method.bottleneck_dim,
            method.head_layers,
            method.head_batch_norm,
            norm_last_layer,
        )

    def features(self, crops: list[Tensor], kept: Tensor | None = None) -> Tensor:
        """CLS tokens of V crops (B, C, S_v, S_v) -> (V, B, D); crops of one size go through the backbone together.

        `kept` (2 depth, V, B): which paths drop path keeps in the blocks, for each crop (`Backbone.drawn_paths`).
        """
        tokens, start = [], 0
        for _, same in groupby(crops, key=lambda crop: crop.shape[-2:]):
            group = list(same)
            own = None if kept is None else kept[:, start : start + len(group)].flatten(1)
            tokens.append(self.backbone(torch.cat(group), own))
            start += len(group)
        return torch.cat(tokens).unflatten(0, (len(crops), -1))

    def logits(self, features: Tensor) -> Tensor:
        """(V, B, D) -> (V, B, K); the head runs once over all crops."""
        return self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Logits of V crops -> (V, B, K)."""
        return self.logits(self.features(crops))


def groups(crops: list[Tensor], at_once: int) -> Iterator[range]:
    """Split the crops into groups of neighbours of one size, each with at most the pixels of `at_once` global crops.

    Crops of 224, 224, 96 x 8 pixels and `at_once` 1 give range(0, 1), range(1, 2), range(2, 7), range(7, 10).
    """
    start = 0
    for shape, same in groupby(crop.shape[-2:] for crop in crops):
        alike = range(start, start + len(list(same)))
        start = alike.stop
        most = max(1, at_once * crops[0].shape[-2:].numel() // shape.numel())
        yield from (alike[first : first + most] for first in range(0, len(alike), most))


class DINO(SelfDistillation):
    """DINO as a LightningModule. The teacher is scored and exported.

    `center` (K,) is a buffer, so it survives a resume. Logged: loss; teacher entropy and KL(teacher || student) in
    nats; norm of the center; share of the prototypes that are the first choice of some image; standard deviation of the
    L2-normalized teacher features over the batch, times sqrt(D) (1 means isotropic).
    """

    config_class = DINOConfig
    center: Tensor
    timed_functions = SelfDistillation.timed_functions | {"backward_of_group": "backward"}
    method: DINOConfig
    views_config: ViewsConfig

    def build(self, backbone: BackboneConfig) -> None:
        method, views = self.method, self.views_config
        if method.crops_at_once and method.head_batch_norm:
            raise UserError(
                "method.head_batch_norm takes statistics over all crops, and method.crops_at_once has only some of them"
                " at a time: leave one out; backbone.checkpointing saves memory with either."
            )
        if method.crops_at_once and backbone.stem == "conv":
            raise UserError(
                "backbone.stem conv has BatchNorm, which takes statistics over all crops of a size, and"
                " method.crops_at_once has only some of them at a time: leave one out."
            )
        self.student = Network(backbone, method, method.norm_last_layer)
        # As in the release, the teacher's last layer always has a fixed gain, and only the student has drop path.
        self.teacher = Network(replace(backbone, drop_path=0.0, pretrained=False), method, norm_last_layer=True)
        copy_weights(self.teacher, self.student)
        if views.local_crops:
            check_image_size(views.local_size, self.student.backbone.patch, "views.local_size")
        self.register_buffer("center", torch.zeros(method.out_dim))
        self.monitor = CollapseMonitor(method.out_dim)

    def gathered_parts(self) -> list[nn.Module]:
        return [self.student.head, self.teacher.head]

    def compares_images(self) -> list[str]:
        return super().compares_images() + ["KoLeo"] * bool(self.method.koleo_weight)

    def configure_model(self) -> None:
        if self.method.crops_at_once and self.device_mesh is not None:
            raise UserError(
                "trainer.strategy fsdp2 averages the gradients of one backward pass, and method.crops_at_once has"
                " several: leave one out; backbone.checkpointing saves memory with either."
            )
        super().configure_model()

    def losses(
        self, crops: list[Tensor], labels: Tensor | None = None, draw: Draw | None = None, logged: bool = False
    ) -> Losses:
        """DINO's loss over all crops, the global ones first. `sums` are for the center.

        With `method.crops_at_once` the backward pass gives gradients to the student's parameters only, not to the
        crops.
        """
        temperature = teacher_temperature(
            self.current_epoch,
            self.method.warmup_teacher_temperature_epochs,
            self.method.warmup_teacher_temperature,
            self.method.teacher_temperature,
        )
        with torch.no_grad():
            features = self.teacher.features(crops[:GLOBAL_CROPS])
            teacher_logits = self.teacher.logits(features).float()  # (2, B, K)
            target = teacher_probabilities(teacher_logits, self.center, temperature)
            count = teacher_logits.shape[:2].numel()
            sums = {"logits": teacher_logits.sum((0, 1)), "count": teacher_logits.new_full((), count)}
        kept = self.student.backbone.drawn_paths(draw or alone(len(crops[0]), self.seed), len(crops))
        if self.method.crops_at_once and torch.is_grad_enabled():
            values = self.losses_in_groups(crops, target, kept)
        else:
            values = self.student_losses(crops, target, range(len(crops)), kept)
        if logged:
            loss = values.get("dino", values["loss"]).detach()
            values |= distillation_signs(loss, target, features) | {"center_norm": self.center.norm()}
        return Losses(values, sums)

    def student_losses(
        self, crops: list[Tensor], target: Tensor, views: range, kept: Tensor | None
    ) -> dict[str, Tensor]:
        """The share of some crops in the losses.

        Args:
            crops: all V crops.
            target: (2, B, K) the teacher's probabilities.
            views: indices of the crops that go through the student.
            kept: (2 depth, V, B) the paths of all crops that drop path keeps.
        """
        own = None if kept is None else kept[:, views.start : views.stop]
        tokens = self.student.features([crops[view] for view in views], own)  # (V, B, D)
        logits = self.student.logits(tokens)
        distillation = dino_loss(logits, target, self.method.student_temperature, views.start, len(crops))
        if not self.method.koleo_weight:
            return {"loss": distillation}
        start, count = distributed.rank() * tokens.shape[1], tokens.shape[1]
        here = slice(start, start + count)
        spread = [
            koleo_loss(distributed.gather_rows(tokens[view - views.start]), here)
            for view in views
            if view < GLOBAL_CROPS
        ]
        koleo = sum(spread, start=distillation.new_zeros(()))  # a sum over both crops, as in DINOv2
        return {"loss": distillation + self.method.koleo_weight * koleo, "dino": distillation, "koleo": koleo}

    def losses_in_groups(self, crops: list[Tensor], target: Tensor, kept: Tensor | None) -> dict[str, Tensor]:
        """The losses of all crops. One group at a time goes through the student, forward and backward, so that only its
        activations are in memory."""
        total: dict[str, Tensor] = {}
        gradients: Gradients = {}
        for views in groups(crops, self.method.crops_at_once or len(crops)):
            values = self.student_losses(crops, target, views, kept)
            self.backward_of_group(values["loss"], gradients)
            total = {name: total.get(name, 0) + value.detach() for name, value in values.items()}
        return total | {"loss": with_gradients(total["loss"], gradients)}

    def backward_of_group(self, loss: Tensor, gradients: Gradients) -> None:
        """Add the gradients of a group's loss to `gradients`, and free its activations."""
        add_gradients(
            gradients, loss, [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        # None instead of zeros: AdamW then leaves the layer alone, with its moments and without weight decay.
        if self.current_epoch < self.method.freeze_last_layer_epochs:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    def use_sums(self, sums: dict[str, Tensor]) -> None:
        """Move the center. This happens after the optimizer step, because the loss of the step uses the old center."""
        mean = distributed.mean_over_ranks(sums["logits"] / sums["count"])
        self.center.copy_(updated_center(self.center, mean, self.method.center_momentum))
