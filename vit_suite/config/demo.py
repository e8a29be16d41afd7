"""`vit-suite demo`."""

from __future__ import annotations

from dataclasses import dataclass

from vit_suite.config.limits import Count, Positive, Whole


@dataclass
class DemoConfig:
    """Everything once, offline: generated images, a small ViT, DINO, kNN and attention masks."""

    output: str = "demo"
    """Run directory."""
    seed: Whole = 0
    """Seed of the images, the weights and the views."""
    images: Count = 4000
    """Generated training images."""
    test_images: Count = 1000
    """Generated images that are scored."""
    epochs: Count = 20
    """Passes over the training images."""
    minutes: Positive = 2.5
    """Stop training after so many minutes, wherever it stands."""
    progress: bool = True
    """Show a progress bar."""
    overwrite: bool = False
    """Delete what `output` holds and start anew."""
