"""Options of the commands that score a backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vit_suite.config.data import ScoreDataConfig
from vit_suite.config.limits import (
    Batch,
    Checkpoint,
    Count,
    Depth,
    Epochs,
    OutputFile,
    Range,
    Seed,
    Side,
    Temperature,
    Width,
)
from vit_suite.config.shared import ReadingConfig


@dataclass
class ScoreConfig(ReadingConfig):
    """What every score of a frozen backbone shares."""

    checkpoint: Checkpoint
    """Run directory, file or folder of a released network (DINO, DINOv2, DINOv3, MAE, SiT, Hugging Face, timm,
    solo-learn, lightly), timm:NAME, or builtin:shapes."""
    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)
    batch_size: Batch = 256
    """Images in a forward pass; for linear also in an optimizer step of the heads."""
    image_size: Side | None = None
    """Side in pixels of the center crop; the one stored with the weights when not given."""
    shots: list[Count] | None = None
    """Few-shot: use only so many labeled images of each class (1 5 10: one score each) instead of all."""
    draws: Annotated[int, Range(1, ceiling=1000)] = 5
    """Few-shot: so many random choices of those images; mean and standard deviation over them are shown."""
    seed: Seed = 0
    """Seed of few-shot draws, held-out images, heads and their batches; of generated data; of the draw behind
    data.length."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Precision of the backbone's forward pass: fp32, as in published protocols, or bf16, which is faster; auto = bf16
    where the hardware multiplies it natively. What follows the backbone is fp32."""
    baselines: bool = False
    """Also score the same backbone untrained, and raw pixels: what the number is read beside."""
    output: OutputFile | None = None
    """File the scores are appended to; results.json in the run directory when the checkpoint is one, else in this
    folder."""


@dataclass
class KNNConfig(ScoreConfig):
    """Weighted kNN of a backbone's representation: the training split votes on the test split."""

    k: list[Count] = field(default_factory=lambda: [10, 20, 100, 200])
    """Neighbours; one score each."""
    temperature: Temperature = 0.07
    """Temperature of the vote, exp(similarity / temperature)."""


@dataclass
class LinearConfig(ScoreConfig):
    """Linear evaluation: heads on the frozen backbone. One pass over the images feeds a sweep of learning rates x
    blocks x pooling; the winner is chosen on held-out images of the training split, and it alone is scored, once, on
    the test split.
    """

    protocol: Literal["sweep", "dino", "sit"] = "sweep"
    """Where lr, blocks, pool, epochs and augment come from when not given. sweep = 7 rates x 1 and 4 blocks x every
    pooling, 30 epochs; dino = the paper's: 1e-3, CLS of 4 blocks (dim 768 and wider: of 1 block, with the mean of the
    patches), augmented, 100 epochs; sit = the first version's: AdamW 5e-4, a head on each of its two tokens, augmented,
    501 epochs."""
    lr: list[Annotated[float, Range(above=0, ceiling=3.4e38)]] | None = None
    """Learning rates for a batch of 256, scaled by batch_size / 256; a head each."""
    blocks: list[Depth] | None = None
    """How many of the last blocks a head sees; a head each."""
    pool: list[Literal["cls", "mean", "cls_mean", "tokens"]] | None = None
    """What a head sees: cls = the CLS token of each of those blocks; mean = the mean patch token of each; cls_mean =
    cls and the mean patch of the last block; tokens = a head on each of CLS and registers of the last block, their
    logits averaged (SiT). All that the backbone has when not given."""
    head: Literal["linear", "mlp"] = "linear"
    """linear, or two layers with tanh between them (SiT)."""
    hidden_dim: Width = 1024
    """Width of the hidden layer of `mlp`."""
    epochs: Epochs | None = None
    """Passes over the training images; the learning rate falls to 0 along half a cosine."""
    augment: bool | None = None
    """Crop and flip training images at random, anew each epoch: a forward pass an epoch instead of one in all."""
    validation_share: Annotated[float, Range(above=0, most=0.5)] = 0.1
    """Share of the training split, class by class, that chooses the winner; none is held out when there is nothing to
    choose."""
    shot_steps: Count = 500
    """Few-shot: optimizer steps instead of epochs, which would be one or two batches each."""
    memory_gb: Annotated[float, Range(above=0, ceiling=1_000_000)] = 8.0
    """Limit in GiB for the features that are kept (16 bits a number)."""
