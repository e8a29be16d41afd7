"""DINOv2: DINO on CLS tokens, iBOT on masked patches, and KoLeo (Oquab et al. 2023, arXiv 2304.07193;
facebookresearch/dinov2 dinov2/train/ssl_meta_arch.py), with DINOv3's Gram anchoring (arXiv 2508.10104;
facebookresearch/dinov3 dinov3/train/ssl_meta_arch.py).

A student sees all crops, with patches of the global ones masked. An EMA teacher sees the global crops whole. Deliberate
differences from the official code:

- Masks, Sinkhorn-Knopp, centers and KoLeo work on the global batch, so that the number of ranks does not matter. DINOv2
  spreads masks over the images of one rank, and KoLeo compares only images of one rank.
- Centers move once per optimizer step, from all of its micro-batches. Without accumulation the two agree.
- Drop path draws for every image. DINOv2 instead runs a part of the batch through each branch, which is faster.
- The buffer of masked patches has a fixed length, as in DINOv2, but unused places in it have no weight in the loss.

Axes: V views (G = 2 global ones first), B images, N = h w patches, M masked patches, D width, K prototypes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vit_suite import distributed
from vit_suite.config import BackboneConfig
from vit_suite.config.dinov2 import DINOv2Config, DINOv2OptimConfig, DINOv2ViewsConfig
from vit_suite.config.limits import pair
from vit_suite.errors import UserError
from vit_suite.losses.dino import dino_loss, teacher_probabilities, updated_center
from vit_suite.losses.gram import gram_loss, resize_features
from vit_suite.losses.ibot import ibot_loss, patch_weights
from vit_suite.losses.koleo import koleo_loss
from vit_suite.losses.sinkhorn import sinkhorn_knopp
from vit_suite.methods.base import Losses
from vit_suite.methods.collapse import CollapseMonitor, distillation_signs
from vit_suite.methods.distillation import GLOBAL_CROPS, SelfDistillation
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import check_image_size
from vit_suite.models.ema import copy_parameters, copy_weights
from vit_suite.models.heads import DINOHead
from vit_suite.models.stem import check_hidden
from vit_suite.optim.groups import parameter_groups
from vit_suite.optim.schedules import teacher_temperature
from vit_suite.views.draw import Draw, alone
from vit_suite.views.masks import Masks, Spread, draw_block_masks
from vit_suite.views.staged import StagedMultiCrop

log = logging.getLogger("vit_suite")


class Features(NamedTuple):
    """The features of V views."""

    cls: Tensor
    """(V, B, D) one vector per view: the CLS token, or the mean of the patches."""
    patches: Tensor
    """(G B, N, D) patch tokens of the global crops: all images of the first crop, then all of the second."""
    grid: tuple[int, int]
    """(h, w) of the patches, h w = N."""


class MaskedPatches(NamedTuple):
    """The places of the masked patches, in a buffer of fixed length."""

    places: Tensor
    """(M,) int64 places in (G B N)."""
    counted: Tensor
    """(M,) bool: False for places that only fill the buffer."""
    weights: Tensor
    """(M,) 1 / number of masked patches of the crop; 0 where not counted."""


class Network(nn.Module):
    """Backbone, mask token and heads: the student is one such network, the teacher another."""

    def __init__(self, backbone: BackboneConfig, method: DINOv2Config):
        super().__init__()
        self.backbone = Backbone(backbone)
        self.head = self.new_head(method, method.out_dim, method.bottleneck_dim, method.head_batch_norm)
        self.ibot_head: DINOHead | None = None
        if method.separate_head and method.ibot_weight:
            self.ibot_head = self.new_head(
                method,
                method.ibot_out_dim or method.out_dim,
                method.ibot_bottleneck_dim or method.bottleneck_dim,
            )
        self.mask_token = nn.Parameter(torch.zeros(1, self.backbone.dim)) if method.mask_probability else None

    def new_head(self, method: DINOv2Config, out_dim: int, bottleneck_dim: int, batch_norm: bool = False) -> DINOHead:
        """A projection head on the backbone's width."""
        return DINOHead(
            self.backbone.dim,
            out_dim,
            method.hidden_dim,
            bottleneck_dim,
            method.head_layers,
            batch_norm=batch_norm,
            norm_last_layer=False,
            weight_norm=method.last_layer == "weight_norm",
        )

    def features(self, crops: list[Tensor], hidden: Tensor | None = None, kept: Tensor | None = None) -> Features:
        """Features of the two global crops, which come first, and of the local ones, if any.

        Args:
            crops: V tensors (B, C, S_v, S_v).
            hidden: (G, B, N) bool: patches of the global crops that the mask token replaces.
            kept: (2 depth, V, B) which paths drop path keeps in the blocks, for each crop (`Backbone.drawn_paths`).
        """
        images = torch.cat(crops[:GLOBAL_CROPS])
        tokens = self.backbone.tokens(
            images,
            hidden=None if hidden is None else hidden.flatten(0, 1),
            mask_token=self.mask_token,
            kept=None if kept is None else kept[:, :GLOBAL_CROPS].flatten(1),
        )
        pooled = tokens.patches.mean(1) if self.backbone.cfg.pool == "mean" or tokens.cls is None else tokens.cls
        found = [pooled]
        if len(crops) > GLOBAL_CROPS:
            own = None if kept is None else kept[:, GLOBAL_CROPS:].flatten(1)
            found.append(self.backbone(torch.cat(crops[GLOBAL_CROPS:]), own))
        return Features(torch.cat(found).unflatten(0, (len(crops), -1)), tokens.patches, tokens.grid)

    def logits(self, cls: Tensor) -> Tensor:
        """(V, B, D) -> (V, B, K); the head runs once over all crops."""
        return self.head(cls.flatten(0, 1)).unflatten(0, cls.shape[:2])

    def patch_logits(self, patches: Tensor, masked: MaskedPatches) -> Tensor:
        """(G B, N, D) -> logits (M, K) of the masked patches, from the head for patches or, without one, the common
        head."""
        rows = patches.flatten(0, 1).index_select(0, masked.places)
        return (self.ibot_head or self.head)(rows)


class DINOv2(SelfDistillation):
    """DINOv2 as a LightningModule. The teacher is scored and exported.

    The centers and the Gram teacher are in the checkpoint, so they survive a resume. Logged: loss; its parts `dino`,
    `ibot`, `koleo` and `gram`, each without its weight; the signs of collapse that DINO logs too.
    """

    config_class = DINOv2Config
    views_class = DINOv2ViewsConfig
    optim_class = DINOv2OptimConfig
    method: DINOv2Config
    center: Tensor
    patch_center: Tensor
    views_config: DINOv2ViewsConfig

    def build(self, backbone: BackboneConfig) -> None:
        method = self.method
        check_options(method, self.views_config)
        if method.mask_probability:
            check_hidden(backbone, "masked patches (method.mask_probability and method.ibot_weight above 0)")
        self.student = Network(backbone, method)
        still = replace(backbone, drop_path=0.0, pretrained=False)
        self.teacher = Network(still, method)
        copy_weights(self.teacher, self.student)
        self.gram_teacher: Backbone | None = None
        if method.gram_weight:
            self.gram_teacher = Backbone(still)
            copy_weights(self.gram_teacher, self.student.backbone)
        check_sizes(method, self.views_config, self.student.backbone.patch_size)
        least, most = method.mask_ratio
        self.spread = Spread(method.mask_probability, least, most, method.mask_shift)
        self.ibot = bool(method.ibot_weight and method.mask_probability)
        if method.centering == "ema":
            self.register_buffer("center", torch.zeros(method.out_dim))
            if self.ibot:
                own = method.ibot_out_dim if method.separate_head else None
                self.register_buffer("patch_center", torch.zeros(own or method.out_dim))
        self.monitor = CollapseMonitor(method.out_dim)

    @staticmethod
    def build_views(views: Any, mean: list[float], std: list[float]) -> StagedMultiCrop:
        return StagedMultiCrop(views, mean, std)

    def gathered_parts(self) -> list[nn.Module]:
        heads = [(network.head, network.ibot_head) for network in (self.student, self.teacher)]
        return [head for pair in heads for head in pair if head is not None]

    def compares_images(self) -> list[str]:
        there = {
            "KoLeo": self.method.koleo_weight > 0,
            "Sinkhorn-Knopp": self.method.centering == "sinkhorn_knopp",
        }
        return super().compares_images() + [name for name in there if there[name]]

    def losses(
        self, crops: list[Tensor], labels: Tensor | None = None, draw: Draw | None = None, logged: bool = False
    ) -> Losses:
        """The weighted sum of all losses. `sums` are for the centers.

        `crops` are the global crops, the local crops and, with views.gram_size, the global crops again at that size.
        """
        draw = draw or alone(len(crops[0]), self.seed)
        anchors = crops[:GLOBAL_CROPS]
        if self.views_config.gram_size:
            crops, anchors = crops[:-GLOBAL_CROPS], crops[-GLOBAL_CROPS:]
        masks = self.masks(crops[0], draw)
        masked = masked_patches(masks) if self.ibot and masks else None
        with torch.no_grad():
            features = self.teacher.features(crops[:GLOBAL_CROPS])
            target, patch_target, sums = self.targets(features, masked)
        kept = self.student.backbone.drawn_paths(draw, len(crops))
        found = self.student.features(crops, masks.hidden if masks else None, kept)
        values = self.parts(found, target, patch_target, masked)
        if self.gram_teacher is not None and self.global_step >= self.method.gram_from:
            values["gram"] = gram_loss(
                found.patches, self.anchor(anchors, found.grid), negatives=self.method.gram_negatives
            )
        weights = {name: getattr(self.method, f"{name}_weight") for name in values}
        total = sum(weights[name] * value for name, value in values.items())
        signs = distillation_signs(values["dino"].detach(), target, features.cls) if logged else {}
        if logged and self.method.centering == "ema":
            signs["center_norm"] = self.center.norm()
        return Losses({"loss": total} | values | signs, sums)

    def masks(self, images: Tensor, draw: Draw) -> Masks | None:
        """The patches of the global crops that the student does not see; None without masks. `images` (B, C, H, W) is
        one global crop."""
        if not self.method.mask_probability:
            return None
        patch = self.student.backbone.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        return draw_block_masks(draw, GLOBAL_CROPS, grid, self.spread, images.device)

    def targets(
        self, features: Features, masked: MaskedPatches | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The teacher's probabilities for the crops (G, B, K) and for the masked patches (M, K2), and the sums that
        move the centers."""
        temperature = teacher_temperature(
            self.current_epoch,
            self.method.warmup_teacher_temperature_epochs,
            self.method.warmup_teacher_temperature,
            self.method.teacher_temperature,
        )
        logits = self.teacher.logits(features.cls).float()  # (G, B, K)
        patch_logits: Any = self.teacher.patch_logits(features.patches, masked).float() if masked else None
        if self.method.centering == "sinkhorn_knopp":
            target = sinkhorn_knopp(logits.flatten(0, 1), temperature).view_as(logits)
            if masked is None:
                return target, None, {}
            return target, sinkhorn_knopp(patch_logits, temperature, counted=masked.counted), {}
        sums = {"logits": logits.sum((0, 1)), "count": logits.new_full((), logits.shape[:2].numel())}
        target = teacher_probabilities(logits, self.center, temperature)
        if masked is None:
            return target, None, sums
        sums["patch_logits"] = (patch_logits * masked.counted.unsqueeze(-1)).sum(0)
        sums["patch_count"] = masked.counted.sum().float()
        return target, teacher_probabilities(patch_logits, self.patch_center, temperature), sums

    def parts(
        self, student: Features, target: Tensor, patch_target: Tensor | None, masked: MaskedPatches | None
    ) -> dict[str, Tensor]:
        """The losses without their weights.

        DINO's loss is the mean over all pairs of crops. DINOv2 writes the same number as the sum of a global and a
        local part, each times its share of the pairs.
        """
        temperature = self.method.student_temperature
        values = {"dino": dino_loss(self.student.logits(student.cls), target, temperature)}
        if masked is not None and patch_target is not None:
            logits = self.student.patch_logits(student.patches, masked)
            values["ibot"] = ibot_loss(logits, patch_target, temperature, masked.weights, len(student.patches))
        if self.method.koleo_weight:
            count = student.cls.shape[1]
            own = slice(distributed.rank() * count, (distributed.rank() + 1) * count)
            crops = student.cls[:GLOBAL_CROPS]
            spread = [koleo_loss(distributed.gather_rows(crop), own) for crop in crops]
            values["koleo"] = sum(spread, start=spread[0].new_zeros(()))
        return values

    @torch.no_grad()
    def anchor(self, crops: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """The Gram teacher's patch features of unmasked global crops, resized to the student's `grid`: (G B, N, D)."""
        assert self.gram_teacher is not None
        tokens = self.gram_teacher.tokens(torch.cat(crops))
        return resize_features(tokens.patches, tokens.grid, grid)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.optim
        return self.adamw(
            parameter_groups(
                self.student, optim.layer_decay, optim.decay_tokens, optim.patch_embed_lr, last_layer_apart=True
            )
        )

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        super().set_rates(optimizer, step)
        if self.current_epoch < self.method.freeze_last_layer_epochs:
            for group in optimizer.param_groups:
                if group["last_layer"]:  # only the rate is 0; AdamW's moments are updated, as in DINOv2
                    group["lr"] = 0.0

    def use_sums(self, sums: dict[str, Tensor]) -> None:
        """Move the centers. This happens after the optimizer step, because the loss of the step uses the old ones."""
        momentum = self.method.center_momentum
        for center, name in ((self.center, ""), (getattr(self, "patch_center", None), "patch_")):
            if center is not None:
                total, count = (distributed.mean_over_ranks(sums[f"{name}{what}"]) for what in ("logits", "count"))
                moved = updated_center(center, total / count.clamp(min=1e-6), momentum)
                center.copy_(torch.where(count > 0, moved, center))  # a batch without a masked patch moves nothing

    def after_step(self, step: int) -> None:
        """Move the teacher, and copy it to the Gram teacher when that is due."""
        super().after_step(step)
        if self.gram_teacher is not None and refresh_due(self.method, step + 1):
            copy_parameters(self.gram_teacher, self.teacher.backbone)
            if distributed.rank() == 0:
                log.info("step %d: the Gram teacher is now the teacher of this moment", step + 1)


def refresh_due(method: DINOv2Config, done: int) -> bool:
    """Whether the Gram teacher is copied after `done` steps. Before the first copy it has the weights that the run
    started from."""
    since = done - method.gram_from
    if since <= 0 or not method.gram_every:
        return since == 0
    times, rest = divmod(since, method.gram_every)
    return rest == 0 and (method.gram_refreshes is None or times <= method.gram_refreshes)


def masked_patches(masks: Masks) -> MaskedPatches:
    """The masked patches in a buffer that holds the largest possible number of them. The true number is never read, so
    a GPU does not wait."""
    hidden = masks.hidden.flatten(0, 1)  # (G B, N)
    length = max(1, masks.most)  # never empty, because Sinkhorn-Knopp needs all ranks
    places = (~hidden.flatten()).to(torch.uint8).argsort(stable=True)[:length]
    return MaskedPatches(
        places, hidden.flatten().index_select(0, places), patch_weights(hidden).flatten().index_select(0, places)
    )


def check_options(method: DINOv2Config, views: DINOv2ViewsConfig) -> None:
    """UserError for options that exclude each other, or that have no effect."""
    if method.mask_ratio[0] > method.mask_ratio[1]:
        raise UserError(f"method.mask_ratio: expected [least, most], least first; got {method.mask_ratio}.")
    if method.ibot_weight and not method.mask_probability:
        raise UserError(
            "method.mask_probability is 0, and method.ibot_weight asks for the loss of masked patches: set"
            " method.ibot_weight 0 too."
        )
    if method.head_batch_norm and method.ibot_weight and not method.separate_head:
        # The buffer of masked patches has rows that do not count, and they would be in the statistics.
        raise UserError(
            "method.head_batch_norm is for the head of CLS tokens, and masked patches share it: set"
            " method.separate_head true."
        )
    serves = {
        "mask_shift": (method.mask_probability, "method.mask_probability above 0"),
        "gram_from": (method.gram_weight, "method.gram_weight above 0"),
        "gram_every": (method.gram_weight, "method.gram_weight above 0"),
        "gram_refreshes": (method.gram_weight and method.gram_every, "method.gram_every"),
        "gram_negatives": (method.gram_weight, "method.gram_weight above 0"),
        "mask_ratio": (method.mask_probability, "method.mask_probability above 0"),
        "center_momentum": (method.centering == "ema", "method.centering ema"),
        "separate_head": (method.ibot_weight, "method.ibot_weight above 0"),
        "ibot_out_dim": (method.separate_head, "method.separate_head true"),
        "ibot_bottleneck_dim": (method.separate_head, "method.separate_head true"),
    }
    for option, (has_effect, needed) in serves.items():
        if getattr(method, option) != getattr(DINOv2Config(), option) and not has_effect:
            raise UserError(f"method.{option} {getattr(method, option)} has no effect here: it is for {needed}.")
    if views.gram_size and not method.gram_weight:
        raise UserError(f"views.gram_size {views.gram_size} has no effect here: it is for method.gram_weight above 0.")
    if views.late_local_size and not views.local_crops:
        raise UserError("views.late_local_size has no effect here: it is for views.local_crops above 0.")
    late = views.late_global_size or views.late_local_size
    if (views.late_from_epoch is None) != (late is None):
        given, missing = ("late_from_epoch", "late_global_size") if late is None else ("a late size", "late_from_epoch")
        raise UserError(f"views.{given} has no effect without views.{missing}.".replace("views.a late", "a late"))


def check_sizes(method: DINOv2Config, views: DINOv2ViewsConfig, patch: int) -> None:
    """UserError where patches do not tile a crop, or the largest mask has less than one patch."""
    sizes = ["global_size", "late_global_size", "gram_size"] + ["local_size", "late_local_size"] * (
        views.local_crops > 0
    )
    for name in sizes:
        if (size := getattr(views, name)) is not None:
            height, width = pair(size)
            if height != width:
                raise UserError(f"views.{name} {height}x{width} is no square: method dinov2 takes one side.")
            check_image_size(size, patch, f"views.{name}")
    patches = (pair(views.global_size)[0] // patch) ** 2
    if method.mask_probability and int(patches * method.mask_ratio[1]) < 1:
        raise UserError(
            f"method.mask_ratio {method.mask_ratio} of the {patches} patches of a global crop is less than one patch:"
            " raise it, or use smaller patches."
        )
