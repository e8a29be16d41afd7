"""Which images, from where. Each command has the options that change what it does, and no others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from vit_suite.config.limits import Batch, Channels, Count, DataRoot, Gigabytes, Range, Seed, Share, Side

Limits = Annotated[list[float], Range(-1e12, ceiling=1e12, length=2, rising=True)]
"""Values of a file that become black and white."""


@dataclass
class ImagesConfig:
    """A set to look at, as `attention` does."""

    SYNONYMS: ClassVar[dict[str, str]] = {"dataset": "name", "data_path": "root", "data_dir": "root"}

    name: str = "cifar10"
    """Data set: cifar10 cifar100 stl10 flowers102 food101 oxford_pets imagenet tiny_imagenet folder flat list shards
    shapes."""
    root: DataRoot | None = None
    """Folder of the data (or list file, or pattern of shards); $VIT_SUITE_DATA when not given."""
    image_size: Side | None = None
    """Side in pixels of generated images (`shapes`); files keep their own size."""
    test_split: str | None = None
    """Split that is scored or shown; the data set's own (test, else val) when not given."""
    test_length: Count | None = None
    """Use at most this many images of that split, drawn class by class with the seed; for `shapes` how many are
    generated."""
    holdout: Annotated[float, Range(0, 0.5)] = 0.0
    """Share of a set without splits of its own (class folders, one list) that is held out, class by class, as its test
    split; the rest is its train split. The same images in every command."""
    holdout_seed: Seed = 0
    """Seed of that choice."""
    value_range: Limits | Literal["auto", "minmax"] = "auto"
    """What becomes black and white in files of more than 8 bits: auto = integers by the bits that the set uses (10, 12,
    14, 16), floats 0..1, DICOM by its window; minmax = each image's own least and largest value; or two numbers."""
    max_pixels: Count = 178_956_970
    """Files whose header claims more pixels are not read: they count as files that do not decode."""
    frame: Annotated[int, Range(0, ceiling=1_000_000)] = 0
    """Which page or frame is read of files that hold several (TIFF, GIF, DICOM, ...), counted from 0. Files with fewer
    count as files that do not decode."""
    max_corrupt: Share = 1.0
    """Share of files that may fail to decode (they are listed) before the command fails."""
    download: bool = False
    """Let torchvision download the set where it can."""

    def whole(self, channels: int) -> DataConfig:
        """The same as what the openers of data sets take, with the channels that a backbone has."""
        return DataConfig(**(asdict(self) | {"channels": channels}))


@dataclass
class LocalizeDataConfig(ImagesConfig):
    """A set to score where every image counts, as `localize` does."""

    max_corrupt: Share = 0.01
    """Share of files that may fail to decode (they are listed) before the command stops; one file always may, unless it
    is 0."""


@dataclass
class ScoreDataConfig(LocalizeDataConfig):
    """A set whose training split is learned from and whose other split is scored, as `knn` and `linear` do."""

    SYNONYMS: ClassVar[dict[str, str]] = {"num_workers": "workers"}

    train_split: str = "train"
    """Split that is trained on and fills the kNN bank."""
    length: Count | None = None
    """Use at most this many training images, drawn class by class with the seed; for `shapes` how many are
    generated."""
    workers: Annotated[int, Range(0, ceiling=1024)] | Literal["auto"] = "auto"
    """Images decoded at a time on a rank: by threads for scores, by processes in training. auto = 0 for images held in
    memory, else the cores of this rank (of a training at most 32, for scores at most 8)."""
    resident: bool | Literal["auto"] = "auto"
    """Hold the decoded set in memory as uint8; auto = when all images have one size and fit in data.memory_gb."""
    memory_gb: Gigabytes = 4.0
    """Limit in GiB for a resident set."""
    mean: list[Share] | None = None
    """Channel means in 0..1 that views subtract; the data set's published ones (ImageNet's for files) when not given.
    Scores take those of the checkpoint; these are for raw pixels, and for channels that no published ones fit."""
    std: list[Annotated[float, Range(1e-6, 1)]] | None = None
    """Channel standard deviations in 0..1; as for mean."""


@dataclass
class DataConfig(ScoreDataConfig):
    """A set to train on, and how its batches are made."""

    SYNONYMS: ClassVar[dict[str, str]] = {"batch_size_per_gpu": "batch_size"}

    batch_size: Batch = 256
    """GLOBAL batch: images an optimizer step sees, over all ranks and accumulation steps."""
    repeats: Annotated[int, Range(1, ceiling=1024)] = 1
    """Repeated augmentation (arXiv 1901.09335): copies of an image in a global batch, each with views of its own (DeiT:
    3). An epoch keeps its number of steps, so it sees one of so many images. Not for contrastive losses, which would
    take the copies for negatives."""
    channels: Channels = 3
    """Channels an image is converted to: 1 (gray), 3 (RGB) or N (files read as they are, which must have N)."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where JPEG files are decoded: by the workers, or together on the GPU, where workers only read them (and decode
    other formats). The GPU's pixels differ a little. Scores keep the CPU's. Not tried on a GPU yet."""
    order: Literal["shuffle", "shards"] = "shuffle"
    """Order of an epoch: all images shuffled, or, of shards, a few of them after the other: for disks that are slow at
    random."""
    shard_window: Count = 8
    """Shards whose images are shuffled together under data.order shards."""
