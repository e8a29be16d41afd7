"""The dataclasses of a run: every option of every method, once, with its unit, default and source.

They stand here, apart from the code that uses them, so that `vit-suite pretrain --help` and a wrong key answer without importing
torch (0.2 s instead of 5 s). Nothing below has a second default elsewhere: modules take these objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """Limits of a number, or of each number of a list, and the length of a list. parsing.py checks values and help shows it."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    length: int | None = None

    def holds(self, value: Any) -> bool:
        """Whether `value` is within; what is neither a number nor a list (None, "auto") always is."""
        if self.length is not None and isinstance(value, list) and len(value) != self.length:
            return False
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) in (int, float)]
        return all(self.least <= n <= self.most and n > self.above for n in numbers)

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{self.least} to {self.most}"
        limits = {"at least": self.least, "at most": self.most, "above": self.above}
        words = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
        return ", ".join(words + ([f"{self.length} of them"] if self.length else []))


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(0, 1)]
Pair = Annotated[list[Share], Range(length=2)]


@dataclass
class BackboneConfig:
    """The vision transformer: a timm name, or `vit` with explicit dimensions."""

    name: str = "vit"
    """timm model name (vit_small_patch16_224, deit3_base_patch16_224, vit_small_patch14_reg4_dinov2, ...), or `vit`."""
    patch_size: Count | None = None
    """Side of a patch in pixels; timm's own for a timm name, 16 for `vit`."""
    dim: Count | None = None
    """Width of a token; timm's own for a timm name, 384 for `vit`."""
    depth: Count | None = None
    """Number of blocks; timm's own for a timm name, 12 for `vit`."""
    heads: Count | None = None
    """Attention heads; timm's own for a timm name, dim / 64 (at least 1) for `vit`."""
    mlp_ratio: Positive | None = None
    """Hidden width of a block's MLP over dim; timm's own for a timm name, 4 for `vit`."""
    registers: Whole | None = None
    """Register tokens (arXiv 2309.16588); timm's own for a timm name, 0 for `vit`."""
    image_size: Annotated[list[Count], Range(length=2)] | None = None
    """[height, width] in pixels of the position grid; the global crop when not given. Other sizes are interpolated."""
    channels: Count = 3
    """Input channels; follows data.channels in a run."""
    drop_path: Share = 0.1
    """Stochastic depth of the student, rising linearly over blocks; the teacher has none (DINO main_dino.py)."""
    pretrained: bool = False
    """Start from timm's pretrained weights (downloads them)."""


@dataclass
class DataConfig:
    """Which images, from where, and how they are held."""

    name: str = "cifar10"
    """Data set: cifar10 cifar100 stl10 flowers102 food101 oxford_pets imagenet tiny_imagenet folder flat list shapes."""
    root: str | None = None
    """Folder (or list file) of the data; $VIT_SUITE_DATA when not given."""
    batch_size: Count = 256
    """GLOBAL batch: images an optimiser step sees, over all ranks and accumulation steps."""
    workers: Whole | Literal["auto"] = "auto"
    """Decoding processes a rank; auto = 0 for images held in memory, else the cores of this rank, at most 8."""
    channels: Count = 3
    """Channels an image is converted to: 1 (grey), 3 (RGB) or N (files read as they are, which must have N)."""
    image_size: Count | None = None
    """Side in pixels of generated images (`shapes`); files keep their own size."""
    train_split: str = "train"
    """Split that is trained on and fills the kNN bank."""
    test_split: str | None = None
    """Split that is scored; the data set's own (test, else val) when not given."""
    length: Count | None = None
    """Use at most this many training images, drawn class by class with run.seed; for `shapes` how many are generated."""
    test_length: Count | None = None
    """The same for the scored split."""
    resident: bool | Literal["auto"] = "auto"
    """Hold the decoded set in memory as uint8; auto = when all images have one size and fit in data.memory_gb."""
    memory_gb: NotNegative = 4.0
    """Limit in GiB for a resident set."""
    max_corrupt: Share = 0.01
    """Share of files that may fail to decode (they are listed in quarantine.txt) before the run stops."""
    mean: list[Share] | None = None
    """Channel means in 0..1 that views subtract; the data set's published ones (ImageNet's for files) when not given."""
    std: list[Positive] | None = None
    """Channel standard deviations in 0..1; as for mean."""
    download: bool = False
    """Let torchvision download the set where it can."""


@dataclass
class ViewsConfig:
    """Multi-crop augmentation of DINO (paper section 3.2 and main_dino.py DataAugmentationDINO)."""

    global_size: Count = 224
    """Side in pixels of a global crop."""
    local_size: Count = 96
    """Side in pixels of a local crop."""
    local_crops: Whole = 8
    """Local crops an image; the global ones are always 2."""
    global_scale: Pair = field(default_factory=lambda: [0.4, 1.0])
    """Area of a global crop as a share of the image, [least, most]."""
    local_scale: Pair = field(default_factory=lambda: [0.05, 0.4])
    """Area of a local crop as a share of the image, [least, most]."""
    ratio: Annotated[list[Positive], Range(length=2)] = field(default_factory=lambda: [0.75, 4 / 3])
    """Width over height of a crop, [least, most]."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    jitter: Share = 0.8
    """Probability of colour jitter."""
    jitter_strength: Annotated[list[NotNegative], Range(length=4)] = field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])
    """Largest change of brightness, contrast, saturation, hue (hue in turns)."""
    grey: Share = 0.2
    """Probability of greyscale."""
    blur: Annotated[list[Share], Range(length=3)] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    """Probability of Gaussian blur on the first global, second global, and local crops."""
    blur_sigma: Annotated[list[NotNegative], Range(length=2)] = field(default_factory=lambda: [0.1, 2.0])
    """Standard deviation of the blur in pixels of the crop, [least, most]."""
    solarise: Annotated[list[Share], Range(length=3)] = field(default_factory=lambda: [0.0, 0.2, 0.0])
    """Probability of solarisation (invert above one half) on the first global, second global, and local crops."""
    backend: Literal["auto", "device", "workers"] = "auto"
    """Where crops are cut: in batches on the device, or image by image in decoding workers; auto = the faster as measured."""


@dataclass
class DINOConfig:
    """DINO (Caron et al. 2021, arXiv 2104.14294); defaults are the paper's, ViT-S/16."""

    name: Literal["dino"] = "dino"
    """Method."""
    out_dim: Count = 65536
    """Prototypes K: width of the head's output."""
    hidden_dim: Count = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: Count = 256
    """Width of the head's L2-normalised bottleneck."""
    head_layers: Count = 3
    """Layers of the head's MLP."""
    head_batch_norm: bool = False
    """BatchNorm in the head's MLP (the release's option for ResNets). Statistics are over all ranks on GPUs, a rank's own on CPUs, and
    over one micro-batch when gradients are accumulated."""
    norm_last_layer: bool = True
    """Keep the gain of the weight-normed last layer at 1; the teacher's is always kept."""
    freeze_last_layer_epochs: Whole = 1
    """Epochs at the start during which the last layer's gradient is dropped."""
    student_temperature: Positive = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: Positive = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temperature: Positive = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temperature_epochs: Whole = 30
    """Epochs of the linear rise between the two."""
    center_momentum: Share = 0.9
    """Momentum of the running centre of the teacher's output."""
    momentum_teacher: Share = 0.996
    """EMA momentum of the teacher at the start; a cosine takes it to 1."""
    koleo_weight: NotNegative = 0.0
    """Weight of DINOv2's KoLeo term on the student's CLS tokens of the global crops (DINOv2: 0.1); 0 is DINO. Neighbours are sought
    within a rank's micro-batch, as there."""


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, set at every optimiser step."""

    lr: NotNegative = 5e-4
    """Peak learning rate for a global batch of 256; scaled by batch / 256."""
    min_lr: NotNegative = 1e-6
    """Learning rate that the cosine approaches (not scaled)."""
    warmup_epochs: NotNegative = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: NotNegative = 0.04
    """Weight decay at the start; none on biases and other 1-D parameters."""
    weight_decay_end: NotNegative = 0.4
    """Weight decay that the cosine approaches."""
    betas: Pair = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's betas."""
    clip: NotNegative = 3.0
    """Largest L2 norm of a gradient; 0 turns clipping off."""
    clip_mode: Literal["tensor", "global"] = "tensor"
    """Clip each parameter tensor by its own norm (DINO), or all of them by the global norm."""


@dataclass
class TrainerConfig:
    """How long, on what, in which precision."""

    max_epochs: Count = 100
    """Passes over the training images; schedules span them."""
    max_steps: Annotated[int, Range(least=-1)] = -1
    """Stop after this many optimiser steps and let the schedules span them; -1 = max_epochs decides."""
    max_minutes: Positive | None = None
    """Stop after this many minutes of training, wherever the schedules stand."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    devices: Count | Literal["auto"] = "auto"
    """Processes (GPUs, or CPU ranks) on a node; auto = all GPUs, or 1 on a CPU."""
    nodes: Count = 1
    """Machines."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast or fp32; auto = bf16 where the hardware multiplies it natively. Losses and norms stay fp32."""
    accumulate: Count = 1
    """Micro-batches whose gradients are summed before an optimiser step."""
    log_every: Count = 20
    """Optimiser steps between two log entries."""
    progress: bool = True
    """Show a progress bar."""
    threads: Count | None = None
    """CPU threads a process uses for tensors; PyTorch's choice when not given."""


@dataclass
class CheckpointConfig:
    """What is written, when."""

    every_epochs: Count = 1
    """Epochs between two writes of last.ckpt."""
    every_steps: Count | None = None
    """Optimiser steps between two writes of last.ckpt, besides the above."""
    every_minutes: Positive | None = None
    """Minutes between two writes of last.ckpt, besides the above."""
    keep_every_epochs: Count | None = None
    """Also keep a checkpoint of every so many epochs for good."""


@dataclass
class EvaluateConfig:
    """Weighted kNN on the teacher's CLS token during training."""

    every_epochs: Whole = 1
    """Epochs between two scores; 0 turns them off."""
    k: Count = 20
    """Neighbours."""
    temperature: Positive = 0.07
    """Temperature of the vote, exp(similarity / temperature)."""
    bank_size: Whole = 10000
    """Training images in the bank during training (the offline command uses all); 0 = all."""
    test_size: Whole = 2000
    """Scored images during training (the offline command uses all); 0 = all."""
    batch_size: Count = 256
    """Images in a forward pass on one rank."""


@dataclass
class LoggerConfig:
    """metrics.csv is always written; W&B comes beside it."""

    wandb: bool = False
    """Log to Weights & Biases too."""
    wandb_project: str = "vit-suite"
    """W&B project."""
    wandb_offline: bool = False
    """Keep the W&B log on disk, for `wandb sync` later."""


@dataclass
class RunOptions:
    """Where the run lives."""

    name: str = "run"
    """Name of the run in loggers."""
    output: str = "runs/run"
    """Run directory. A second start with the same directory resumes."""
    seed: Whole = 0
    """Seed of weights, sampling, views and generated data."""
    overwrite: bool = False
    """Delete what the run directory holds and start anew."""


METHODS = {"dino": DINOConfig}
"""Method name -> its options. `method.name` picks the class, so that each method keeps its own defaults."""


@dataclass
class PretrainConfig:
    """A pretraining run."""

    method: DINOConfig = field(default_factory=DINOConfig, metadata={"variants": METHODS})
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunOptions = field(default_factory=RunOptions)


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


@dataclass
class AttentionConfig:
    """Where the CLS token looks in each image of a folder: the last block's attention as heat maps, overlays and masks."""

    checkpoint: str
    """Run directory, .ckpt, .safetensors, .pth of the DINO release, or timm:NAME."""
    images: str
    """Folder of images (searched through), or one image."""
    output: str = "attention"
    """Folder the files are written to, in the tree of `images`."""
    formats: list[Literal["png", "overlay", "mask", "npz"]] = field(default_factory=lambda: ["overlay", "mask"])
    """Files an image: png = heat map, overlay = heat map on the image, mask = the top mass, npz = the raw numbers."""
    threshold: Share = 0.6
    """Share of the attention's mass that a mask keeps."""
    heads: Literal["all", "mean", "heads"] = "all"
    """Which maps: each head and their mean (all), the mean alone, or each head alone."""
    resize: Count | None = None
    """Shorter side in pixels an image is resized to before the backbone; its own size when not given."""
    max_tokens: Count = 4096
    """Larger images are shrunk until they have at most so many patches."""
    batch_size: Count = 16
    """Images in a forward pass; only images of one size share one."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """From patches to pixels; nearest is the DINO release's."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; auto = bf16 where the hardware multiplies it natively. The softmax is fp32."""
    overwrite: bool = False
    """Replace files that stand in `output`."""


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
