"""Options of masked autoencoders, of their view, and of their optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vit_suite.config.limits import (
    DecimalEpochs,
    Depth,
    EpochsOrNone,
    Norm,
    Pair,
    PositiveShare,
    Range,
    Rate,
    Share,
    ShareBelow,
    TokenWidth,
)
from vit_suite.config.method import MethodConfig
from vit_suite.config.shared import OptimConfig
from vit_suite.config.views import CropConfig

One = Annotated[list[Share], Range(length=1)]


@dataclass
class MAEConfig(MethodConfig):
    """MAE (He et al. 2021, arXiv 2111.06377) and CrossMAE (arXiv 2401.14391); defaults are MAE's, ViT-B/16. Recipes
    set backbone.positions sincos_2d and backbone.drop_path 0, as both have them."""

    WITHOUT: ClassVar[dict[str, str]] = {
        "crops_at_once": "MAE has no crops_at_once, because it has one view of an image; --backbone.checkpointing true"
        " saves memory instead.",
    }

    name: Literal["mae"] = "mae"
    """Method."""
    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.75
    """Share of the patches that the encoder does not see."""
    decoder: Literal["self", "cross"] = "self"
    """self = transformer blocks over all patches (MAE); cross = hidden patches look at visible ones by cross-attention
    alone (CrossMAE)."""
    predict_ratio: PositiveShare | None = None
    """Share of ALL patches that the cross decoder predicts, at most method.mask_ratio (CrossMAE: 0.25 to 0.75); all
    hidden ones when not given."""
    decoder_dim: TokenWidth = 512
    """Width of the decoder."""
    decoder_depth: Depth = 8
    """Blocks of the decoder (CrossMAE: 12)."""
    decoder_heads: Depth = 16
    """Attention heads of the decoder."""
    decoder_mlp_ratio: Annotated[float, Range(above=0, ceiling=64)] = 4.0
    """Hidden width of a decoder block's MLP over decoder_dim."""
    norm_pix_loss: bool = True
    """Predict the pixels of a patch less their mean, over their standard deviation (the paper's better results)."""
    sheet_every_epochs: EpochsOrNone = 1
    """Epochs between two sheets of clean, masked and reconstructed images in RUN/reconstructions; 0 draws none."""


@dataclass
class MAEViewsConfig(CropConfig):
    """MAE's one view of an image: crop and flip, no change of color."""

    global_crops: ClassVar[int] = 1

    global_scale: Pair = field(default_factory=lambda: [0.2, 1.0])
    """Area of the view as a share of the image, [least, most]."""
    jitter: Share = 0.0
    """Probability of color jitter."""
    gray: Share = 0.0
    """Probability of grayscale."""
    blur: One = field(default_factory=lambda: [0.0])
    """Probability of Gaussian blur."""
    solarize: One = field(default_factory=lambda: [0.0])
    """Probability of solarization."""


@dataclass
class MAEOptimConfig(OptimConfig):
    """AdamW as MAE has it."""

    lr: Rate = 1.5e-4
    """Peak learning rate for a global batch of 256; scaled by batch / 256."""
    min_lr: Rate = 0.0
    """Learning rate that the cosine approaches (not scaled)."""
    warmup_epochs: DecimalEpochs = 40
    """Epochs of linear warm-up from 0."""
    weight_decay: Rate = 0.05
    """Weight decay at the start; none on biases and other 1-D parameters."""
    weight_decay_end: Rate = 0.05
    """Weight decay that the cosine approaches."""
    betas: Annotated[list[ShareBelow], Range(length=2)] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's betas."""
    clip: Norm = 0.0
    """Largest L2 norm of a gradient; 0 turns clipping off."""
