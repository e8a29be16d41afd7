"""Options of DINOv2, with DINOv3's Gram anchoring, of its views, and of its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vit_suite.config.limits import (
    Count,
    Depth,
    EpochsOrNone,
    Pair,
    PositiveShare,
    Rate,
    Share,
    Side,
    Temperature,
    Whole,
    Width,
)
from vit_suite.config.method import MethodConfig
from vit_suite.config.shared import OptimConfig
from vit_suite.config.views import Three, ViewsConfig


@dataclass
class DINOv2Config(MethodConfig):
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193): DINO on CLS tokens, iBOT on masked patches, KoLeo; and Gram
    anchoring of DINOv3 (arXiv 2508.10104). Defaults are the official ImageNet-1k recipe, ViT-L/16; see
    configs/dinov2/*.yaml for its backbone options."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "use_bn_in_head": "head_batch_norm",
        "teacher_temp": "teacher_temperature",
        "warmup_teacher_temp": "warmup_teacher_temperature",
        "freeze_last_layer": "freeze_last_layer_epochs",
        "mask_sample_probability": "mask_probability",
        "mask_ratio_min_max": "mask_ratio",
        "head_n_prototypes": "out_dim",
        "head_bottleneck_dim": "bottleneck_dim",
    }
    WITHOUT: ClassVar[dict[str, str]] = {
        "crops_at_once": "DINOv2 has no crops_at_once, because the masked patches of all crops go through the head"
        " together; --backbone.checkpointing true saves memory instead.",
    }

    name: Literal["dinov2"] = "dinov2"
    """Method."""
    out_dim: Width = 65536
    """Prototypes K: width of the head's output (ImageNet-22k: 131072)."""
    hidden_dim: Width = 2048
    """Width of the hidden layers of the heads."""
    bottleneck_dim: Width = 256
    """Width of the head's L2-normalized bottleneck (ImageNet-22k: 384)."""
    head_layers: Depth = 3
    """Layers of the heads' MLPs."""
    head_batch_norm: bool = False
    """BatchNorm in the head for CLS tokens, as DINO's option of that name (not in DINOv2). The head for patches has
    none, so it has to be a separate one. Statistics are over all ranks, and over one micro-batch when gradients are
    accumulated."""
    last_layer: Literal["weight_norm", "linear"] = "weight_norm"
    """Map from the bottleneck to the prototypes: weight-normed with a learned gain (DINOv2), or plain (DINOv3)."""
    separate_head: bool = False
    """Give the patches a head of their own (ImageNet-22k and DINOv3); else CLS and patches share one."""
    ibot_out_dim: Width | None = None
    """Prototypes of the separate head; method.out_dim when not given."""
    ibot_bottleneck_dim: Width | None = None
    """Bottleneck of the separate head; method.bottleneck_dim when not given."""
    freeze_last_layer_epochs: EpochsOrNone = 1
    """Epochs at the start in which the last layers have learning rate 0."""
    centering: Literal["ema", "sinkhorn_knopp"] = "ema"
    """How the teacher's output is kept from collapse: less a running mean (ImageNet-1k), or by three iterations of
    Sinkhorn-Knopp over the batch of all ranks (ImageNet-22k and DINOv3)."""
    center_momentum: Share = 0.9
    """Momentum of the running means of `centering ema`."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: Temperature = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temperature: Temperature = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temperature_epochs: EpochsOrNone = 30
    """Epochs of the linear rise between the two."""
    momentum_teacher: Share = 0.992
    """EMA momentum of the teacher at the start; a cosine takes it to 1 (ImageNet-22k: 0.994)."""
    dino_weight: Rate = 1.0
    """Weight of the loss between CLS tokens of different crops."""
    ibot_weight: Rate = 1.0
    """Weight of the loss of masked patches."""
    koleo_weight: Rate = 0.1
    """Weight of KoLeo, the sum over the student's CLS tokens of the two global crops. Neighbours are sought among the
    images of all ranks (DINOv2: of a rank), so that any number of ranks trains alike."""
    mask_probability: Share = 0.5
    """Share of the global crops that get a mask."""
    mask_ratio: Pair = field(default_factory=lambda: [0.1, 0.5])
    """Share of a masked crop's patches that is masked, [least, most], spread evenly over the crops."""
    mask_shift: bool = False
    """Shift each mask by random rows and columns, around the edges, so that border patches are masked as often as
    others (DINOv3's mask_random_circular_shift, false by default there too)."""
    gram_weight: Rate = 0.0
    """Weight of Gram anchoring: the similarities between a crop's patches are held to those of an earlier copy of the
    teacher (DINOv3's 7B run: 2); 0 turns it off."""
    gram_from: Whole = 0
    """Optimizer step at which the teacher is copied and the anchoring starts. 0: the copy is what the run starts from,
    which `--start` names (DINOv3's 7B run: 1,000,000)."""
    gram_every: Count | None = None
    """Steps after which the copy is taken anew (DINOv3's 7B run: 10,000); never when not given."""
    gram_refreshes: Count | None = None
    """Most times that the copy is taken anew (DINOv3's 7B run: 3); no limit when not given."""
    gram_negatives: Literal["keep", "drop", "drop_anchor"] = "keep"
    """Negative similarities: as they are; 0 in both; or 0 in the copy alone."""


@dataclass
class DINOv2ViewsConfig(ViewsConfig):
    """Multi-crop of DINOv2's ImageNet-1k recipe."""

    global_scale: Pair = field(default_factory=lambda: [0.32, 1.0])
    """Area of a global crop as a share of the image, [least, most]."""
    local_scale: Pair = field(default_factory=lambda: [0.05, 0.32])
    """Area of a local crop as a share of the image, [least, most]."""
    blur: Three = field(default_factory=lambda: [1.0, 0.1, 0.5])
    """Probability of Gaussian blur on the first global, second global, and local crops."""
    gram_size: Side | None = None
    """Side in pixels at which the Gram copy sees the global crops; their own when not given. Its features are resized
    to the student's patches (DINOv3: twice the global size)."""
    late_from_epoch: EpochsOrNone | None = None
    """Epoch (0 = first) from which the crops have the late sizes, for a short stage at high resolution; never when not
    given."""
    late_global_size: Side | None = None
    """Side in pixels of the global crops of that stage (DINOv2: 518); global_size when not given."""
    late_local_size: Side | None = None
    """Side in pixels of the local crops of that stage; local_size when not given."""


@dataclass
class DINOv2OptimConfig(OptimConfig):
    """AdamW as DINOv2 has it on ImageNet-1k."""

    lr: Rate = 4e-3
    """Peak learning rate for a global batch of 1,024 under lr_scaling sqrt (ImageNet-22k: 2e-4)."""
    lr_scaling: Literal["linear", "sqrt"] = "sqrt"
    """How the rate follows the global batch: lr x batch / 256, or lr x sqrt(batch / 1024) (DINOv2)."""
    clip_mode: Literal["tensor", "global", "network"] = "network"
    """Clip each parameter tensor by its own norm (DINO), all of them by the global norm, or backbone and heads each by
    the norm of its own (DINOv2)."""
    layer_decay: PositiveShare = 0.9
    """Factor on the learning rate from one block to the one before it (ImageNet-22k: 1)."""
    patch_embed_lr: Rate = 0.2
    """Factor on the patch embedding's learning rate, besides its layer's."""
