"""Options of the commands that write features down and look at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vit_suite.config.data import ImagesConfig
from vit_suite.config.limits import (
    Batch,
    Checkpoint,
    Count,
    Input,
    Output,
    OutputFolder,
    Processes,
    Seed,
    Share,
    Side,
)
from vit_suite.config.shared import ReadingConfig


@dataclass
class EmbedConfig(ReadingConfig):
    """Features of every image of a folder, a list or a data set, in one file, with paths, labels and sizes beside.

    Started by torchrun or srun, the processes share the images; the file is the same, byte for byte. A run that was
    stopped goes on when it is started again."""

    checkpoint: Checkpoint
    """Run directory, file or folder of a released network (DINO, DINOv2, DINOv3, MAE, SiT, Hugging Face, timm,
    solo-learn, lightly), timm:NAME, or builtin:shapes."""
    images: Input | None = None
    """Folder of images (searched through), one image, or a list (text or CSV); without it the split of data.name."""
    data: ImagesConfig = field(default_factory=lambda: ImagesConfig(name=""))
    output: Output = "embeddings.parquet"
    """File that is written; its ending is the format: .parquet (needs pyarrow), .npz, .npy (with NAME.table.csv) or
    .csv. Patch tokens go into a folder (no ending: a .npz an image) or a .zarr."""
    features: Literal["auto", "cls", "mean", "both", "patches"] = "auto"
    """cls = the CLS token, mean = the mean of the patch tokens, both = one after the other, patches = every patch token
    (16 bits a number), all after the final norm; auto = the backbone's own representation (cls, or mean without a CLS
    token)."""
    normalize: bool = True
    """Scale each feature to length 1."""
    image_size: Side | None = None
    """Side in pixels of the center crop; the one stored with the weights when not given."""
    batch_size: Batch = 64
    """Images in a forward pass."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward pass; auto = bf16 where the hardware multiplies it natively. What is written is fp32."""
    workers: Processes | None = None
    """Threads that decode and compute, each its own batch; the process's cores, at most 8, when not given."""
    seed: Seed = 0
    """Seed of generated data, and of the draw behind data.test_length."""
    overwrite: bool = False
    """Replace what stands at `output`."""


@dataclass
class NeighboursConfig(ReadingConfig):
    """What a file of embeddings says about its images: the nearest of a query, near-duplicates, what train and test
    share, clusters, and how spread the features are. Works without a network, except for queries from outside the file.
    """

    embeddings: Input
    """File of `vit-suite embed` (.parquet, .npz, .npy or .csv)."""
    query: list[str] | None = None
    """Images whose nearest are shown: paths as they stand in the file (or the ends of them that only one has), or with
    `checkpoint` any image files."""
    k: Count = 8
    """Nearest images of each query."""
    duplicates: bool = False
    """List pairs of images that are at least as alike as `cosine`."""
    leak: Input | None = None
    """Second file of embeddings (the test set): list the pairs between the two that are at least as alike as
    `cosine`."""
    cosine: Share = 0.95
    """Cosine similarity from which on two images are listed."""
    clusters: Count | None = None
    """Number of k-means clusters (needs scikit-learn)."""
    checkpoint: Checkpoint | None = None
    """The weights that the embeddings were made with; needed for queries that are not in the file."""
    images: Input | None = None
    """Folder that relative paths of the file start from; the working directory when not given."""
    output: OutputFolder = "neighbours"
    """Folder for lists (CSV), contact sheets (PNG) and results.json."""
    seed: Seed = 0
    """Seed of the first cluster centers, and of the sample behind uniformity."""
    overwrite: bool = False
    """Replace files that stand in `output`."""
