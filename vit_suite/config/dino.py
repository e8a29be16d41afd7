"""Options of DINO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vit_suite.config.limits import Depth, EpochsOrNone, Rate, Share, Temperature, Width
from vit_suite.config.method import MethodConfig


@dataclass
class DINOConfig(MethodConfig):
    """DINO (Caron et al. 2021, arXiv 2104.14294); defaults are the paper's, ViT-S/16."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "use_bn_in_head": "head_batch_norm",
        "teacher_temp": "teacher_temperature",
        "warmup_teacher_temp": "warmup_teacher_temperature",
        "freeze_last_layer": "freeze_last_layer_epochs",
    }

    name: Literal["dino"] = "dino"
    """Method."""
    out_dim: Width = 65536
    """Prototypes K: width of the head's output."""
    hidden_dim: Width = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: Width = 256
    """Width of the head's L2-normalized bottleneck."""
    head_layers: Depth = 3
    """Layers of the head's MLP."""
    head_batch_norm: bool = False
    """BatchNorm in the head's MLP (the release's option for ResNets). Statistics are over all ranks, and over one
    micro-batch when gradients are accumulated."""
    norm_last_layer: bool = True
    """Keep the gain of the weight-normed last layer at 1; the teacher's is always kept."""
    freeze_last_layer_epochs: EpochsOrNone = 1
    """Epochs at the start during which the last layer's gradient is dropped."""
    student_temperature: Temperature = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: Temperature = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temperature: Temperature = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temperature_epochs: EpochsOrNone = 30
    """Epochs of the linear rise between the two."""
    center_momentum: Share = 0.9
    """Momentum of the running center of the teacher's output."""
    momentum_teacher: Share = 0.996
    """EMA momentum of the teacher at the start; a cosine takes it to 1."""
    crops_at_once: Depth | None = None
    """Global crops, or local crops of as many pixels, that the student learns from at a time: forward, loss and
    backward pass of one group of crops after the other, so that the activations of one alone are in memory
    (facebookresearch/dino issue 269). The gradients stay the same. 1 takes least memory; not given: all crops together,
    which is fastest."""
    koleo_weight: Rate = 0.0
    """Weight of DINOv2's KoLeo term, the sum over the student's CLS tokens of the two global crops (DINOv2: 0.1); 0 is
    DINO. Neighbours are sought among the images of all ranks (DINOv2: of a rank), so that any number of ranks trains
    alike."""
