"""Options of SiT, of its two views, and of its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vit_suite.config.limits import (
    DecimalEpochs,
    EpochsOrNone,
    Norm,
    Pair,
    PositiveShare,
    Range,
    Rate,
    Share,
    Side,
    Temperature,
    Width,
)
from vit_suite.config.method import MethodConfig
from vit_suite.config.shared import OptimConfig
from vit_suite.config.views import CropConfig, Strength, Two

Sides = Annotated[list[PositiveShare], Range(length=2, rising=True)]


@dataclass
class SiTConfig(MethodConfig):
    """SiT (Atito, Awais, Kittler 2021, arXiv 2104.03602); defaults are version 1 with rotation. Version 3:
    configs/sit/*_v3.yaml."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "drop_perc": "drop_area",
        "drop_replace": "replace_area",
        "drop_align": "align",
    }

    name: Literal["sit"] = "sit"
    """Method."""
    rotation: bool = True
    """Turn each view by 0, 90, 180 or 270 degrees and predict which, from a token of its own (v1; v3 has neither)."""
    turn_share: Annotated[float, Range(above=0, most=1)] = 0.75
    """Probability that a view is turned; 0.75 makes the four turns equally frequent (v1)."""
    turn_together: bool = False
    """Turn both views of an image alike, so that the contrastive loss need not make turned images equal (v1: false)."""
    contrastive: Literal["nt_xent", "info_nce", "none"] = "nt_xent"
    """nt_xent = the two views of an image against all others (v1); info_nce = against an EMA teacher's clean views
    (v3)."""
    contrastive_head: Literal["linear", "mlp"] = "linear"
    """linear (v1), or three layers with BatchNorm (v3)."""
    contrastive_dim: Width = 512
    """Width of the contrastive head's output (v3: 256)."""
    hidden_dim: Width = 4096
    """Width of the hidden layers of the `mlp` head."""
    temperature: Temperature = 0.5
    """Temperature of the contrastive loss (v3: 0.2)."""
    momentum_teacher: Share = 0.996
    """EMA momentum of the teacher of info_nce at the start; a cosine takes it to 1."""
    reconstruct: Literal["all", "corrupted", "none"] = "all"
    """Pixels that the L1 loss counts: all (v1), or the corrupted ones (v3, masked prediction)."""
    decoder: Literal["linear", "mlp"] = "linear"
    """From a patch token to its pixels: one transposed convolution (v1), or three layers before it (v3)."""
    loss_weights: Literal["july", "april", "fixed"] = "july"
    """Learned uncertainty: july = e^(-a s) L + s/2, april = a e^(-s) L + s/2, with a = 1, 1, 0.5 and s = 1 at the start
    (v1); fixed = rotation + contrastive + reconstruction_weight x reconstruction (v3)."""
    reconstruction_weight: Rate = 1.0
    """Lambda of `fixed`: 1, or 5 on small data (v3)."""
    corruption: Literal["blocks", "gmml", "mask", "none"] = "blocks"
    """blocks = gray, blur, noise and replaced blocks (v1); gmml = dropped or replaced blocks (v3); mask = a mask token
    (BERT-like)."""
    block_side: Sides = field(default_factory=lambda: [0.05, 0.25])
    """Side of a block of noise or replacement (v1) as a share of the image's, [least, most]."""
    drop_area: Share = 0.3
    """Most area, as a share, that noise (v1) or dropping (gmml: 0.5) takes. `blocks` draws the area from 0 to it;
    `gmml` from half of the view, so that up to 0.5 it is fixed."""
    drop_type: list[Literal["noise", "zeros"]] = field(default_factory=lambda: ["noise"])
    """What dropped pixels become: Gaussian noise, or zero, which is the mean color; drawn an image when both (gmml)."""
    replace_area: Share = 0.3
    """Most area, as a share, that is taken from another image of the batch."""
    align: Side = 1
    """Corners and sides of gmml blocks are multiples of so many pixels; the patch size aligns them with patches."""
    color: Share = 0.0
    """Probability that a block of an image is recolored too (blocks and gmml; not in the paper's code)."""
    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.15
    """Share of patches that `mask` hides (BERT: 0.15; masked autoencoders: up to 0.75)."""
    mask_rule: Literal["token", "80/10/10"] = "token"
    """Hidden patches become the mask token; or 80% of them, 10% another image's patch, 10% stay as they are (BERT)."""
    order: Literal["none", "causal"] = "none"
    """causal = a patch attends to itself and to those before it in raster order and predicts the next one
    (GPT-like)."""
    sheet_every_epochs: EpochsOrNone = 1
    """Epochs between two sheets of clean, corrupted and reconstructed images in RUN/reconstructions; 0 draws none."""


@dataclass
class SiTViewsConfig(CropConfig):
    """SiT's two views of an image. Local crops are DINO's: SiT compares and reconstructs two views of one size."""

    global_scale: Pair = field(default_factory=lambda: [0.08, 1.0])
    """Area of a view as a share of the image, [least, most] (v1: timm's default; v3: 0.2 to 1)."""
    jitter: Share = 1.0
    """Probability of color jitter (v3: 0.8)."""
    jitter_strength: Strength = field(default_factory=lambda: [0.4, 0.4, 0.4, 0.0])
    """Largest change of brightness, contrast, saturation, hue (hue in turns); v3: 0.4 0.4 0.2 0.1."""
    gray: Share = 0.0
    """Probability of grayscale (v3: 0.2)."""
    blur: Two = field(default_factory=lambda: [0.0, 0.0])
    """Probability of Gaussian blur on the first and the second view (v3: 1.0 and 0.1)."""
    solarize: Two = field(default_factory=lambda: [0.0, 0.0])
    """Probability of solarization on the first and the second view (v3: 0 and 0.2)."""


@dataclass
class SiTOptimConfig(OptimConfig):
    """AdamW as SiT's first version has it."""

    lr: Rate = 5e-4
    """Peak learning rate for a global batch of 256 (the paper's 1e-3 for 512); scaled by batch / 256."""
    min_lr: Rate = 1e-5
    """Learning rate that the cosine approaches (not scaled)."""
    warmup_epochs: DecimalEpochs = 5
    """Epochs of linear warm-up from 0."""
    weight_decay: Rate = 0.05
    """Weight decay at the start; none on biases and other 1-D parameters (v3: 0.04)."""
    weight_decay_end: Rate = 0.05
    """Weight decay that the cosine approaches (v3: 0.1)."""
    decay_tokens: bool = False
    """Decay the position embedding, CLS token and registers too (v3: true)."""
    clip: Norm = 0.0
    """Largest L2 norm of a gradient; 0 turns clipping off (v3: 3.0)."""
