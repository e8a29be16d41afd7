"""Options of the commands that score a backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vit_suite.config.limits import Count, Positive, Whole
from vit_suite.config.shared import DataConfig


@dataclass
class KNNConfig:
    """Weighted kNN of a backbone's CLS token: the training split votes on the test split."""

    checkpoint: str
    """Run directory, .ckpt, .safetensors, .pth of the DINO release, or timm:NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    k: list[Count] = field(default_factory=lambda: [10, 20, 100, 200])
    """Neighbours; one score each."""
    temperature: Positive = 0.07
    """Temperature of the vote, exp(similarity / temperature)."""
    batch_size: Count = 256
    """Images in a forward pass."""
    image_size: Count | None = None
    """Side in pixels of the centre crop; the one stored with the weights when not given."""
    seed: Whole = 0
    """Seed of generated data, and of the draw behind data.length."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; auto = bf16 where the hardware multiplies it natively. Similarities are fp32."""
    baselines: bool = False
    """Also score the same backbone untrained, and raw pixels: what the number is read beside."""
    output: str | None = None
    """File the scores are appended to; results.json in the run directory when the checkpoint is one, else in this folder."""
