"""Options of `vit-suite make_shards`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vit_suite.config.data import ImagesConfig
from vit_suite.config.limits import Channels, Count, OutputFolder, Seed


@dataclass
class MakeShardsConfig:
    """A data set as tar files in the WebDataset layout, which `data.name shards` reads: for disks that give a few large
    files faster than millions of small ones.

    Files keep their bytes, and equal input gives equal bytes. Images that lie in no file of their own (CIFAR's batches,
    generated ones) become PNG, or .npy where they have neither 1 nor 3 channels. Boxes and masks stay behind."""

    output: OutputFolder
    """Folder of the shards; it holds nothing else."""
    data: ImagesConfig = field(default_factory=lambda: ImagesConfig(name=""))
    splits: list[str] | None = None
    """Splits to pack; train and the one to score when not given."""
    shard_mb: Count | None = None
    """Largest size of a shard in MiB; 256 when neither this nor shard_images is given."""
    shard_images: Count | None = None
    """Images of a shard, in place of a size."""
    seed: Seed = 0
    """Of the order of the images, which are shuffled once: a reader that goes from shard to shard sees mixed
    classes."""
    keep_order: bool = False
    """Do not shuffle: class after class, as most sets lie."""
    channels: Channels = 3
    """Channels of images that lie in no file of their own."""
    overwrite: bool = False
    """Replace the shards that the output holds."""
