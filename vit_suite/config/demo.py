"""`vit-suite demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vit_suite.config.limits import Epochs, Minutes, OutputFolder, Range, Seed


@dataclass
class DemoConfig:
    """Everything once, offline: a small ViT that comes along, generated images to train it on, kNN and attention
    masks."""

    output: OutputFolder = "demo"
    """Run directory."""
    seed: Seed = 1
    """Seed of the images, the weights and the views. The backbone that comes along was trained on images of seed 0."""
    images: Annotated[int, Range(1, ceiling=1_000_000)] = 5000
    """Generated training images."""
    test_images: Annotated[int, Range(1, ceiling=1_000_000)] = 1000
    """Generated images that are scored."""
    epochs: Epochs = 8
    """Passes over the training images."""
    minutes: Minutes = 2.5
    """Stop training after so many minutes, wherever it stands."""
    progress: bool = True
    """Show a progress bar."""
    overwrite: bool = False
    """Delete what `output` holds and start anew."""
