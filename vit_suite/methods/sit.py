"""SiT: reconstruct corrupted images, tell their rotation, and tell them apart (Atito, Awais, Kittler 2021, arXiv
2104.03602).

The default is version 1 (with rotation; code of July 2021). Options give version 3 (December 2022), masked patch
prediction (`corruption: mask`) and causal patch prediction (`order: causal`). Deliberate differences from the official
code:

- The contrastive token is the CLS token, and the rotation token is a register after it. So kNN, probes and attention
  maps of this suite use the contrastive token. The official order is the reverse; with two rows of the position
  embedding swapped the numbers are the same (tests/parity/test_sit.py).
- Negatives come from all ranks; version 1 takes them from one rank. The mean over corrupted pixels is over all ranks;
  version 3 takes one mean per rank. With gradient accumulation both are over one micro-batch.
- With two kinds of dropping the official loader replaces blocks with probability 1/2, here 1/3 (views/corruption.py).
- Masked prediction uses the L1 loss on pixels, like SiT's reconstruction, and no visual words.

Axes: V = 2 views, B images, C channels, S x S pixels, N patches, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_suite import distributed
from vit_suite.config import BackboneConfig, SiTConfig, SiTOptimConfig, SiTViewsConfig
from vit_suite.config.limits import pair
from vit_suite.errors import UserError
from vit_suite.losses.contrastive import info_nce, info_nce_logits, nt_xent_logits
from vit_suite.losses.reconstruction import psnr, reconstruction_l1
from vit_suite.losses.uncertainty import uncertainty_sum, uncertainty_weights
from vit_suite.methods.base import Losses, Method
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import EXPLICIT, check_image_size
from vit_suite.models.ema import assert_twins, copy_weights, ema_update
from vit_suite.models.heads import ContrastiveHead, PatchDecoder, init_linear_
from vit_suite.models.stem import check_hidden
from vit_suite.optim.schedules import cosine
from vit_suite.views.corruption import Corrupted, corrupt, validate_corruption
from vit_suite.views.draw import Draw, alone
from vit_suite.views.rotate import draw_turns, rotate

TURNS = 4
SERVES = {
    "turn_share": (lambda m: m.rotation, "method.rotation true"),
    "turn_together": (lambda m: m.rotation, "method.rotation true"),
    "contrastive_head": (lambda m: m.contrastive != "none", "method.contrastive nt_xent or info_nce"),
    "contrastive_dim": (lambda m: m.contrastive != "none", "method.contrastive nt_xent or info_nce"),
    "temperature": (lambda m: m.contrastive != "none", "method.contrastive nt_xent or info_nce"),
    "hidden_dim": (lambda m: m.contrastive_head == "mlp", "method.contrastive_head mlp"),
    "momentum_teacher": (lambda m: m.contrastive == "info_nce", "method.contrastive info_nce"),
    "decoder": (lambda m: m.reconstruct != "none", "method.reconstruct all or corrupted"),
    "reconstruction_weight": (
        lambda m: m.loss_weights == "fixed" and m.reconstruct != "none",
        "method.loss_weights fixed and method.reconstruct all or corrupted",
    ),
    "block_side": (lambda m: m.corruption == "blocks", "method.corruption blocks"),
    "drop_type": (lambda m: m.corruption == "gmml", "method.corruption gmml"),
    "align": (lambda m: m.corruption == "gmml", "method.corruption gmml"),
    "drop_area": (lambda m: m.corruption in ("blocks", "gmml"), "method.corruption blocks or gmml"),
    "replace_area": (lambda m: m.corruption in ("blocks", "gmml"), "method.corruption blocks or gmml"),
    "color": (lambda m: m.corruption in ("blocks", "gmml"), "method.corruption blocks or gmml"),
    "mask_ratio": (lambda m: m.corruption == "mask", "method.corruption mask"),
    "mask_rule": (lambda m: m.corruption == "mask", "method.corruption mask"),
}
"""Option -> when it has an effect, and these conditions in words. An option that is set without effect is refused."""
TASKS = {"rotation": 1.0, "contrastive": 1.0, "reconstruction": 0.5}
"""The losses, and the factor `a` of their uncertainty weights (losses/uncertainty.py): 1 for classification, 0.5 for
L1."""


class Outputs(NamedTuple):
    """The network's output for M views. A head that the options do not ask for gives None."""

    embedding: Tensor | None
    """(M, E) of the contrastive token."""
    turns: Tensor | None
    """(M, 4) logits of the rotation token."""
    pixels: Tensor | None
    """(M, C, S, S)."""


class Network(nn.Module):
    """Backbone and the heads that the options ask for. With rotation, the last register is the rotation token: those of
    a start come before it."""

    def __init__(self, backbone: BackboneConfig, method: SiTConfig):
        super().__init__()
        self.backbone = Backbone(backbone)
        dim, cfg = self.backbone.dim, self.backbone.cfg
        self.rotation_head = self.contrastive_head = self.decoder = self.mask_token = None
        if method.rotation:
            self.rotation_head = nn.Linear(dim, TURNS)
            init_linear_(self.rotation_head)
            registers: Any = self.backbone.vit.reg_token
            nn.init.trunc_normal_(registers, std=0.02)  # as the CLS token; timm starts registers at 1e-6
            registers.requires_grad_(True)  # beside LoRA's frozen network too, because the token is new
        if method.contrastive != "none":
            self.contrastive_head = ContrastiveHead(
                dim, method.contrastive_dim, method.contrastive_head, method.hidden_dim
            )
        if method.reconstruct != "none":
            self.decoder = PatchDecoder(dim, cfg.channels, self.backbone.patch, method.decoder)
        if method.corruption == "mask":
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(dim), std=0.02))

    def forward(self, images: Tensor, hidden: Tensor | None = None, kept: Tensor | None = None) -> Outputs:
        """The outputs for views (M, C, S, S).

        Args:
            hidden: (M, N) bool: patches that the mask token replaces.
            kept: (2 depth, M) which paths drop path keeps in the blocks (`Backbone.drawn_paths`).
        """
        tokens = self.backbone.tokens(images, hidden=hidden, mask_token=self.mask_token, kept=kept)
        pooled = tokens.patches.mean(1) if self.backbone.cfg.pool == "mean" else tokens.cls
        pixels = None
        if self.decoder is not None:
            patches = tokens.patches
            if self.backbone.cfg.causal:  # the token of patch i predicts patch i + 1; nothing predicts the first
                patches = torch.cat([torch.zeros_like(patches[:, :1]), patches[:, :-1]], dim=1)
            pixels = self.decoder(patches, tokens.grid)
        return Outputs(
            None if self.contrastive_head is None else self.contrastive_head(pooled),
            None if self.rotation_head is None else self.rotation_head(tokens.registers[:, -1]),
            pixels,
        )


class SiT(Method):
    """SiT as a LightningModule. With `contrastive: info_nce` the EMA teacher is scored and exported, else the network
    itself.

    Logged: loss; the loss of each task; rotation and contrastive accuracy in 0..1; PSNR in dB of the whole
    reconstruction; the weight of each task where it is learned.
    """

    config_class = SiTConfig
    factors: Tensor
    pixel_std: Tensor
    views_class = SiTViewsConfig
    optim_class = SiTOptimConfig
    method: SiTConfig

    def build(self, backbone: BackboneConfig) -> None:
        method, size = self.method, self.views_config.global_size
        check_options(method)
        if method.corruption == "mask":
            check_hidden(backbone, "method.corruption mask")
        backbone = network_config(backbone, method)
        self.student = Network(backbone, method)
        patch = self.student.backbone.patch
        check_image_size(size, patch, "views.global_size")
        height, width = pair(size)
        if method.rotation and height != width:
            raise UserError(
                f"method.rotation turns views by 90 degrees, and views.global_size {height}x{width} is no square: set"
                " method.rotation false, or give one side."
            )
        validate_corruption(method, height, width, patch)
        self.teacher: Network | None = None
        if method.contrastive == "info_nce":
            # The teacher has all heads, as in the official code. Only its contrastive head is run.
            self.teacher = Network(replace(backbone, drop_path=0.0, pretrained=False), method)
            copy_weights(self.teacher, self.student)
        present = {
            "rotation": method.rotation,
            "contrastive": method.contrastive != "none",
            "reconstruction": method.reconstruct != "none",
        }
        self.tasks = [task for task in TASKS if present[task]]
        learned = method.loss_weights != "fixed"
        self.log_variances = nn.Parameter(torch.ones(len(self.tasks))) if learned else None
        factors = [TASKS[task] for task in self.tasks]
        if not learned:
            factors = [method.reconstruction_weight if task == "reconstruction" else 1.0 for task in self.tasks]
        self.register_buffer("factors", torch.tensor(factors), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.std), persistent=False)

    def trained(self) -> nn.Module:
        learned = {} if self.log_variances is None else {"log_variances": self.log_variances}
        return nn.ModuleDict({"student": self.student, "weights": nn.ParameterDict(learned)})

    def evaluation_backbone(self) -> Backbone:
        return (self.teacher or self.student).backbone

    def networks(self) -> dict[str, nn.Module]:
        found = {"student forward": self.student, "teacher forward": self.teacher}
        return {part: network for part, network in found.items() if network is not None}

    def gathered_parts(self) -> list[nn.Module]:
        networks: list[Any] = list(self.networks().values())
        heads = [(network.contrastive_head, network.decoder) for network in networks]
        return [head for pair in heads for head in pair if head is not None]

    @property
    def sheet_every_epochs(self) -> int:
        return self.method.sheet_every_epochs if self.method.reconstruct != "none" else 0

    def sheet(self, clean: Tensor) -> list[Tensor]:
        """Three rows: clean, corrupted and reconstructed images. The corruption is the same each time, so that epochs
        can be compared."""
        return [clean, *self.reconstruct(clean, alone(len(clean), self.seed))]

    def compares_images(self) -> list[str]:
        there = {
            "negatives": self.method.contrastive != "none",
            "the mean over corrupted pixels": self.method.reconstruct == "corrupted",
        }
        return super().compares_images() + [name for name in there if there[name]]

    def mixes_images(self) -> list[str]:
        return ["method.replace_area"] * bool(self.method.corruption in ("blocks", "gmml") and self.method.replace_area)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.teacher is not None and self.global_step == 0:
            assert_twins(self.teacher, self.student)

    def losses(
        self, crops: list[Tensor], labels: Tensor | None = None, draw: Draw | None = None, logged: bool = False
    ) -> Losses:
        """The weighted sum of the tasks' losses for two clean views. They are turned and corrupted here."""
        draw = draw or alone(len(crops[0]), self.seed)
        clean = torch.stack(crops)  # (V, B, C, S, S)
        turns = None
        if self.method.rotation:
            turns = draw_turns(draw, len(crops), clean.device, self.method.turn_share, self.method.turn_together)
            clean = rotate(clean, turns)
        corrupted = corrupt(self.method, clean, draw, self.student.backbone.patch)
        hidden = None if corrupted.hidden is None else corrupted.hidden.flatten(0, 1)
        kept = self.student.backbone.drawn_paths(draw, len(crops))
        output = self.student(corrupted.images.flatten(0, 1), hidden, None if kept is None else kept.flatten(1))
        values, more = self.task_losses(output, clean, turns, corrupted, logged)
        losses = torch.stack([values[task] for task in self.tasks])
        if self.log_variances is None:
            total = (self.factors * losses).sum()
        else:
            form: Any = self.method.loss_weights
            total = uncertainty_sum(losses, self.log_variances, self.factors, form)
            weights = uncertainty_weights(self.log_variances.detach(), self.factors, form)
            more |= {f"weight_{task}": weight for task, weight in zip(self.tasks, weights, strict=True)}
        return Losses({"loss": total} | values | (more if logged else {}))

    def task_losses(
        self, output: Outputs, clean: Tensor, turns: Tensor | None, corrupted: Corrupted, logged: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of each task, and further values to log; the costly ones only when `logged`."""
        values, more = {}, {}
        if turns is not None and output.turns is not None:
            label = turns.flatten()
            values["rotation"] = F.cross_entropy(output.turns.float(), label)
            more["rotation_accuracy"] = accuracy(output.turns, label)
        if output.embedding is not None:
            values["contrastive"], more["contrastive_accuracy"] = self.contrastive(
                output.embedding.unflatten(0, clean.shape[:2]), clean
            )
        if output.pixels is not None:
            pixels = output.pixels.unflatten(0, clean.shape[:2])
            counted = self.counted(corrupted)
            number = None if counted is None else distributed.mean_over_ranks(counted.sum())
            values["reconstruction"] = reconstruction_l1(pixels, clean, counted, number)
            if logged:
                more["psnr"] = psnr(pixels.detach(), clean, self.pixel_std, distributed.mean_over_ranks)
        return values, more

    def contrastive(self, embedding: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive loss and accuracy of the embeddings (2, B, E) of the corrupted views. `clean` is for the
        teacher."""
        temperature, offset = self.method.temperature, distributed.rank() * embedding.shape[1]
        if self.teacher is None:
            first, second = embedding
            everything = distributed.gather_rows(first), distributed.gather_rows(second)
            logits, positive = nt_xent_logits(first, second, *everything, temperature, offset)
            return F.cross_entropy(logits, positive), accuracy(logits, positive)
        with torch.no_grad():
            head: Any = self.teacher.contrastive_head
            keys = head(self.teacher.backbone(clean.flatten(0, 1))).unflatten(0, clean.shape[:2])
        pairs = [
            info_nce_logits(query, distributed.gather_rows(key), temperature, offset)
            for query, key in zip(embedding, keys.flip(0), strict=True)  # each view against the teacher's other one
        ]
        losses, hits = zip(*[(info_nce(*pair, temperature), accuracy(*pair)) for pair in pairs], strict=True)
        return sum(losses), sum(hits) / len(hits)

    def counted(self, corrupted: Corrupted) -> Tensor | None:
        """(V, B, S, S) bool: the pixels in the reconstruction loss; None for all."""
        counted = corrupted.changed if self.method.reconstruct == "corrupted" else None
        if self.method.order == "causal":  # nothing predicts the first patch
            rows, columns = self.student.backbone.patch
            counted = torch.ones_like(corrupted.changed) if counted is None else counted.clone()
            counted[..., :rows, :columns] = False
        return counted

    @torch.no_grad()
    def reconstruct(self, clean: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Clean views (B, C, S, S) after corruption, with hidden patches as 0, and the network's reconstruction."""
        corrupted = corrupt(self.method, clean.unsqueeze(0), draw or alone(len(clean)), self.student.backbone.patch)
        training = self.student.training
        hidden = None if corrupted.hidden is None else corrupted.hidden[0]
        output = self.student.eval()(corrupted.images[0], hidden).pixels
        self.student.train(training)
        shown = corrupted.images[0]
        if hidden is not None:
            area = hidden.unflatten(1, self.student.backbone.grid_of(clean)).unsqueeze(1)
            shown = torch.where(F.interpolate(area.float(), size=clean.shape[-2:]).bool(), 0, shown)
        return shown, output

    def after_step(self, step: int) -> None:
        """The teacher of version 3, after the optimizer step."""
        if self.teacher is not None:
            momentum = cosine(step, self.max_steps, self.method.momentum_teacher, 1.0)
            ema_update(self.teacher, self.student, momentum)


def accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Share of rows whose largest logit is the label's."""
    return (logits.detach().argmax(-1) == label).float().mean()


def network_config(backbone: BackboneConfig, method: SiTConfig) -> BackboneConfig:
    """The options of the backbone with the register for rotation, and with causal attention where the patches have an
    order."""
    if method.order == "causal" and backbone.class_token and (method.contrastive == "none" or backbone.pool == "mean"):
        # Patches do not attend to the CLS token, so only a loss on the token itself trains it.
        raise UserError(
            "method.order causal without a contrastive loss on the CLS token trains no CLS token: set"
            " backbone.class_token false and backbone.pool mean."
        )
    registers = backbone.registers
    if method.rotation:
        if backbone.pretrained:
            raise UserError("backbone.pretrained: timm's weights have no rotation token; set method.rotation false.")
        if registers is None and backbone.name != EXPLICIT:
            with torch.device("meta"):  # to count the registers of this model
                probe = Backbone(backbone)
            registers = probe.prefix_tokens - int(probe.has_cls)
        registers = (registers or 0) + 1
    return replace(backbone, registers=registers, causal=backbone.causal or method.order == "causal")


def check_options(method: SiTConfig) -> None:
    """UserError for options that exclude each other."""
    if not (method.rotation or method.contrastive != "none" or method.reconstruct != "none"):
        raise UserError(
            "method.rotation is false, method.contrastive and method.reconstruct are none: nothing is left to learn"
            " from."
        )
    if method.reconstruct == "corrupted" and method.corruption == "none":
        raise UserError("method.reconstruct is corrupted, but method.corruption is none: no pixel would count.")
    if method.corruption == "mask" and method.reconstruct == "none":
        raise UserError("method.corruption mask has patches predicted, but method.reconstruct is none.")
    if method.order == "causal" and method.reconstruct == "none":
        raise UserError("method.order causal predicts the next patch, but method.reconstruct is none.")
    if (
        method.corruption in ("blocks", "gmml")
        and method.reconstruct == "corrupted"
        and not (method.drop_area or method.replace_area)
    ):
        raise UserError(
            "method.drop_area and method.replace_area are 0, but method.reconstruct is corrupted: nothing would count."
        )
    if method.corruption == "gmml" and method.drop_area and not method.drop_type:
        raise UserError("method.drop_type is empty, but method.drop_area is not 0: give noise, zeros or both.")
    for option, (serves, needed) in SERVES.items():
        if getattr(method, option) != getattr(SiTConfig(), option) and not serves(method):
            raise UserError(f"method.{option} {getattr(method, option)} has no effect here: it is for {needed}.")
