"""Options of supervised training, of its views, and of its optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vit_suite.config.limits import DecimalEpochs, Norm, Pair, Range, Rate, Share, ShareBelow
from vit_suite.config.method import MethodConfig
from vit_suite.config.shared import OptimConfig
from vit_suite.config.views import CropConfig, Strength


@dataclass
class SupervisedConfig(MethodConfig):
    """Cross-entropy on labels (Dosovitskiy et al. 2020); defaults are DeiT's (Touvron et al. 2021, arXiv
    2012.12877)."""

    name: Literal["supervised"] = "supervised"
    """Method."""
    label_smoothing: ShareBelow = 0.1
    """Mass that is spread evenly over all classes."""
    mixup: Rate = 0.8
    """Alpha of mixup's Beta distribution; 0 turns it off."""
    cutmix: Rate = 1.0
    """Alpha of cutmix's Beta distribution; 0 turns it off."""
    mix_probability: Share = 1.0
    """Probability that a batch is mixed at all."""
    cutmix_share: Share = 0.5
    """Share of mixed batches that take cutmix where both are on."""
    ema: Share = 0.99996
    """Momentum of the average of the weights that is scored and exported, reached from below: at most (1 + step) / (10
    + step); 0 scores the weights themselves."""


@dataclass
class SupervisedViewsConfig(CropConfig):
    """One view of an image: crop, flip, RandAugment or color jitter, erasing."""

    global_crops: ClassVar[int] = 1

    crop: Literal["resized", "padded"] = "resized"
    """resized = random area and shape; padded = the image with a border of 1/8, cut at random (CIFAR)."""
    global_scale: Pair = field(default_factory=lambda: [0.08, 1.0])
    """Area of a resized crop as a share of the image, [least, most]."""
    interpolation: Literal["bicubic", "bilinear", "bilinear_plain"] = "bicubic"
    """How crops are resized: bicubic or bilinear, both antialiased, or bilinear without antialias as TensorFlow does
    (Beyer)."""
    jitter: Share = 0.0
    """Probability of color jitter (DeiT's is replaced by RandAugment)."""
    jitter_strength: Strength = field(default_factory=lambda: [0.4, 0.4, 0.4, 0.0])
    """Largest change of brightness, contrast, saturation, hue (hue in turns)."""
    gray: Share = 0.0
    """Probability of grayscale."""
    blur: Annotated[list[Share], Range(length=1)] = field(default_factory=lambda: [0.0])
    """Probability of Gaussian blur."""
    solarize: Annotated[list[Share], Range(length=1)] = field(default_factory=lambda: [0.0])
    """Probability of solarization."""
    randaugment: Annotated[int, Range(0, ceiling=100)] = 2
    """RandAugment operations an image; 0 turns it off."""
    randaugment_set: Literal["increasing", "original"] = "increasing"
    """increasing = timm's, all operations change more with more magnitude (DeiT); original = TensorFlow's, with Cutout
    (Beyer)."""
    randaugment_probability: Share = 0.5
    """Probability that a drawn operation is applied (timm and DeiT 0.5; the paper and Beyer 1)."""
    magnitude: Annotated[float, Range(0, 10)] = 9.0
    """Strength of RandAugment operations, 0 to 10."""
    magnitude_std: Annotated[float, Range(0, 10)] = 0.5
    """Standard deviation of the strength from one draw to the next."""
    erase: Share = 0.25
    """Probability that a rectangle is replaced by noise."""
    erase_area: Pair = field(default_factory=lambda: [0.02, 1 / 3])
    """Area of that rectangle as a share of the view, [least, most]."""


@dataclass
class SupervisedOptimConfig(OptimConfig):
    """AdamW as DeiT has it."""

    lr: Rate = 2.5e-4
    """Peak learning rate for a global batch of 256 (DeiT's 5e-4 for 512); scaled by batch / 256."""
    min_lr: Rate = 1e-5
    """Learning rate that the cosine approaches (not scaled)."""
    warmup_epochs: DecimalEpochs = 5
    """Epochs of linear warm-up from 0."""
    weight_decay: Rate = 0.05
    """Weight decay at the start; none on biases and other 1-D parameters."""
    weight_decay_end: Rate = 0.05
    """Weight decay that the cosine approaches."""
    decay_tokens: bool = False
    """Decay the position embedding, CLS token and registers too."""
    clip: Norm = 0.0
    """Largest L2 norm of a gradient; 0 turns clipping off."""
