"""Options that every method has: backbone, data, optimizer, trainer, checkpoints, online score, loggers, run
directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vit_suite.config.limits import (
    Batch,
    Channels,
    Count,
    DecimalEpochs,
    Depth,
    Epochs,
    EpochsOrNone,
    Minutes,
    Nodes,
    Norm,
    OutputFolder,
    PositiveShare,
    Processes,
    Range,
    Rate,
    Seed,
    ShareBelow,
    Side,
    Sides,
    Temperature,
    TokenWidth,
    Whole,
)


@dataclass
class BackboneConfig:
    """The vision transformer: a timm name, or `vit` with explicit dimensions."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "arch": "name",
        "model": "name",
        "embed_dim": "dim",
        "drop_path_rate": "drop_path",
    }

    name: str = "vit"
    """timm model name (vit_small_patch16_224, vit_small_patch14_reg4_dinov2, vit_small_patch16_dinov3, ...), or
    `vit`."""
    patch_size: Sides | None = None
    """Side of a patch in pixels, or [height, width]; timm's own for a timm name, 16 for `vit`."""
    dim: TokenWidth | None = None
    """Width of a token; timm's own for a timm name, 384 for `vit`."""
    depth: Depth | None = None
    """Number of blocks; timm's own for a timm name, 12 for `vit` (11 with backbone.stem conv)."""
    heads: Depth | None = None
    """Attention heads; timm's own for a timm name, dim / 64 (at least 1) for `vit`."""
    mlp_ratio: Annotated[float, Range(above=0, ceiling=64)] | None = None
    """Hidden width of a block's MLP over dim; timm's own for a timm name, 4 for `vit`."""
    mlp: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """A block's MLP: two layers with GELU, exact or by tanh as JAX code has it, or gated by SiLU (SwiGLU, arXiv
    2002.05202), which has a third layer of the same width. For `vit`."""
    init: Literal["normal", "xavier"] = "normal"
    """First weights: linear layers from a truncated normal of 0.02 (timm, DINO, DeiT), or Xavier-uniform as in Flax
    code (Beyer et al. 2022). For `vit`; MAE has its own."""
    layer_scale: Annotated[float, Range(above=0, most=1)] | None = None
    """First value of LayerScale (arXiv 2103.17239), a learned factor for each channel of a block's branches: DINOv2 and
    DINOv3 start at 1e-5; none when not given. For `vit`."""
    stem: Literal["patch", "conv"] = "patch"
    """What makes tokens of pixels: one linear map of each patch, or 3x3 convolutions of stride 2 with BatchNorm (arXiv
    2106.14881). For `vit` with square patches of 4, 8, 16 or 32."""
    registers: Annotated[int, Range(0, ceiling=1024)] | None = None
    """Register tokens (arXiv 2309.16588); timm's own for a timm name, 0 for `vit`."""
    class_token: bool = True
    """Have a CLS token; for `vit`, timm names decide themselves. Without one, backbone.pool has to be mean."""
    pool: Literal["cls", "mean"] = "cls"
    """The image's representation: the CLS token, or the mean of the patch tokens, both after the final norm."""
    positions: Literal["learned", "sincos_1d", "sincos_2d", "sincos_2d_beyer", "rope"] = "learned"
    """Position embedding: learned, or fixed sines and cosines of the patch's number (Vaswani et al. 2017) or of its row
    and column (MAE; with the frequencies of Beyer et al. 2022); or rotary, which turns queries and keys by row and
    column (DINOv3). For `vit`."""
    resize: Literal["offset", "antialias", "bicubic", "sincos"] | None = None
    """How positions of another size than image_size are made: offset = DINO and DINOv2; antialias = DINOv2 with
    registers; bicubic = MAE's fine-tuning, Hugging Face's ViT; sincos = computed anew, for positions sincos_*. When not
    given: antialias for timm's reg4_dinov2, else offset. Rotary positions fit any size."""
    prefix_positions: bool = True
    """Whether CLS and registers have learned positions too (DINO), or patches alone (DeiT-3, DINOv2 with registers).
    For `vit`."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each branch (ViT), or after each sum, with none at the end (Vaswani et al. 2017). For `vit`."""
    norm_eps: PositiveShare | None = None
    """Added to the variance in every LayerNorm; timm's own for a timm name, 1e-6 for `vit` (1e-5 with rotary
    positions). Hugging Face's ViT has 1e-12, DINOv3 1e-5."""
    causal: bool = False
    """A patch attends to itself and earlier ones, in raster order; CLS and registers to everything (set by method.order
    causal)."""
    image_size: Annotated[list[Side], Range(length=2)] | None = None
    """[height, width] in pixels of the position grid; the global crop when not given. Other sizes are interpolated."""
    channels: Channels = 3
    """Input channels; follows data.channels in a run."""
    drop_path: ShareBelow = 0.1
    """Stochastic depth of the student, rising linearly over blocks; the teacher has none (DINO main_dino.py)."""
    drop_path_uniform: bool = False
    """Give all blocks the rate backbone.drop_path, as DINOv2's configurations do, instead of the linear rise."""
    lora_rank: Annotated[int, Range(0, ceiling=1024)] = 0
    """LoRA (arXiv 2106.09685), for training that starts from a checkpoint: rank of the pairs that learn beside the
    blocks' linear layers (8 to 32), while everything else of the backbone is frozen. What is exported is a plain
    network, with the pairs merged. 0 trains all weights."""
    checkpointing: bool = False
    """Keep of each block its input alone and compute the rest again in the backward pass (arXiv 1604.06174): far less
    memory for a third more arithmetic. The numbers stay the same."""
    pretrained: bool = False
    """Start from timm's pretrained weights (downloads them)."""


@dataclass(kw_only=True)
class ReadingConfig:
    """How a checkpoint is read where its file does not say enough; each has an effect only then."""

    checkpoint_heads: Count | None = None
    """Attention heads, where neither the file nor the size of a published network tells them: shapes do not."""
    checkpoint_family: (
        Literal[
            "vit",
            "dinov2",
            "dinov2_reg",
            "dinov3",
            "eva",
            "mae",
            "sit",
            "hf_vit",
            "hf_vitmae",
            "hf_dinov2",
            "hf_dinov2_reg",
            "hf_dinov3",
            "timm",
            "vit-suite",
        ]
        | None
    ) = None
    """Family that the file has to be of (docs/weights.md); told by its keys when not given."""
    checkpoint_branch: str | None = None
    """Which network of a file that holds several, by a word of its name: teacher, student, momentum, ema. The one that
    its authors evaluate when not given."""
    allow_partial: bool = False
    """Take the keys that fit although the backbone has others, which stay untrained."""


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, set at every optimizer step."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "learning_rate": "lr",
        "base_lr": "lr",
        "blr": "lr",
        "clip_grad": "clip",
        "gradient_clip_val": "clip",
    }

    lr: Rate = 5e-4
    """Peak learning rate for a global batch of 256 (lr_scaling sqrt: of 1,024); scaled to the batch of the run."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How the rate follows the global batch: lr x batch / 256, or lr x sqrt(batch / 1024) (DINOv2)."""
    min_lr: Rate = 1e-6
    """Learning rate that the cosine approaches (not scaled)."""
    warmup_start: Rate = 0.0
    """Learning rate at which the warm-up starts (not scaled; DeiT: 1e-6)."""
    rate_changes: Literal["step", "epoch"] = "step"
    """How often the learning rate changes: at every optimizer step (DINO), or once an epoch as in DeiT, where the
    second epoch repeats the rate of the first and the cosine spans the warm-up too."""
    warmup_epochs: DecimalEpochs = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: Rate = 0.04
    """Weight decay at the start; none on biases and other 1-D parameters."""
    weight_decay_end: Rate = 0.4
    """Weight decay that the cosine approaches."""
    decay_tokens: bool = True
    """Decay the position embedding, CLS token and registers too (DINO does; DeiT and SiT's first version do not)."""
    betas: Annotated[list[ShareBelow], Range(length=2)] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's betas."""
    first_moment: Literal["fp32", "bf16"] = "fp32"
    """Precision of AdamW's first moment after each step. bf16 gives the numbers of JAX code that keeps it so (Beyer et
    al. 2022); it takes no less memory here."""
    clip: Norm = 3.0
    """Largest L2 norm of a gradient; 0 turns clipping off."""
    clip_mode: Literal["tensor", "global", "network"] = "tensor"
    """Clip each parameter tensor by its own norm (DINO), all of them by the global norm, or backbone and heads each by
    the norm of its own (DINOv2)."""
    freeze_backbone_epochs: Annotated[float, Range(0, ceiling=1_000_000)] = 0
    """Epochs at the start in which the heads alone learn: for --start, whose backbone random heads would disturb."""
    layer_decay: PositiveShare = 1.0
    """Factor on the learning rate from one block to the one before it (BEiT; 0.65 to 0.75 in fine-tuning); heads have
    the full rate."""
    patch_embed_lr: Rate = 1.0
    """Factor on the learning rate of the patch embedding, besides its layer's (DINOv2: 0.2)."""

    def problem(self) -> str | None:
        """What is wrong with these values together."""
        if self.min_lr > self.lr:
            return f"min_lr: {self.min_lr:g} is above optim.lr {self.lr:g}, which it ends at; lower it too."
        if self.rate_changes == "epoch" and self.warmup_epochs and not self.warmup_start:
            return "warmup_start: 0 with optim.rate_changes epoch trains the first two epochs at rate 0; DeiT has 1e-6."
        return None


@dataclass
class TrainerConfig:
    """How long, on what, in which precision."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "epochs": "max_epochs",
        "gpus": "devices",
        "num_nodes": "nodes",
        "accumulate_grad_batches": "accumulate",
        "accum_iter": "accumulate",
    }

    max_epochs: Epochs = 100
    """Passes over the training images; schedules span them."""
    max_steps: Annotated[int, Range(-1, ceiling=1_000_000_000)] = -1
    """Stop after this many optimizer steps and let the schedules span them; -1 = max_epochs decides."""
    max_minutes: Minutes | None = None
    """Stop after this many minutes of training, wherever the schedules stand. This is checked between steps: the step
    under way is finished and saved first."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    devices: Processes | Literal["auto"] = "auto"
    """Processes (GPUs, or CPU ranks) on a node; auto = as many as torchrun or srun started, else all GPUs, or 1 on a
    CPU."""
    nodes: Nodes = 1
    """Machines; follows torchrun and srun too."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Every rank holds all weights (ddp), or weights, gradients, optimizer state and teacher are spread over the ranks
    (fsdp2): for networks that leave no memory for images otherwise (docs/scaling.md). Results, up to rounding, and
    checkpoints are the same."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast or fp32; auto = bf16 where the hardware multiplies it natively. Losses and norms stay fp32."""
    compile: Literal["none", "blocks", "graphs"] = "none"
    """Have torch.compile merge what the transformer blocks of a training do (blocks), and record it as CUDA graphs too
    (graphs: on a GPU, without accumulation). Results are the same up to rounding. The first steps take half a minute or
    more; on a CPU, which needs a C++ compiler, later ones took 0 to 9% less time. Not measured on a GPU yet."""
    accumulate: Annotated[int, Range(1, ceiling=65_536)] = 1
    """Micro-batches whose gradients are summed before an optimizer step."""
    log_every: Count = 20
    """Optimizer steps between two log entries. Where an epoch has fewer steps, there is an entry each epoch."""
    progress: bool = True
    """Show how far the training is: a progress bar on a terminal, else (in a log file) a line every `line_every`
    seconds."""
    line_every: Annotated[float, Range(0.1, 86400)] = 60.0
    """Seconds between two such lines."""
    threads: Processes | None = None
    """CPU threads a process uses for tensors; PyTorch's choice when not given."""


@dataclass
class SavingConfig:
    """What is written, when."""

    SYNONYMS: ClassVar[dict[str, str]] = {"saveckp_freq": "keep_every_epochs"}

    every_epochs: Epochs = 1
    """Epochs between two writes of last.ckpt."""
    every_steps: Count | None = None
    """Optimizer steps between two writes of last.ckpt, besides the above."""
    every_minutes: Minutes | None = None
    """Minutes between two writes of last.ckpt, besides the above: the most that a kill without warning costs. The main
    process's clock."""
    keep_every_epochs: Epochs | None = None
    """Also keep a checkpoint of every so many epochs for good."""


@dataclass
class EvaluateConfig:
    """Scores during training: weighted kNN of the representation, and the top-1 of a supervised head on the same test
    images."""

    every_epochs: EpochsOrNone = 1
    """Epochs between two scores; 0 turns them off."""
    k: Count = 20
    """Neighbours."""
    temperature: Temperature = 0.07
    """Temperature of the vote, exp(similarity / temperature)."""
    bank_size: Whole = 10000
    """Training images in the bank during training (the offline command uses all); 0 = all."""
    test_size: Whole = 2000
    """Scored images during training (the offline command uses all); 0 = all."""
    batch_size: Batch = 256
    """Images in a forward pass on one rank."""


@dataclass
class LoggerConfig:
    """metrics.csv is always written; W&B and TensorBoard come beside it."""

    wandb: bool = False
    """Log to Weights & Biases too."""
    wandb_project: str = "vit-suite"
    """W&B project."""
    wandb_offline: bool = False
    """Keep the W&B log on disk, for `wandb sync` later. Each start of a run leaves a folder there, all with the id of
    one W&B run."""
    tensorboard: bool = False
    """Log for TensorBoard too, into RUN/tensorboard: `tensorboard --logdir RUN`."""


@dataclass
class RunOptions:
    """Where the run lives."""

    SYNONYMS: ClassVar[dict[str, str]] = {"output_dir": "output"}

    name: str = "run"
    """Name of the run in loggers."""
    output: OutputFolder = "runs/run"
    """Run directory. A second start with the same directory resumes."""
    seed: Seed = 0
    """Seed of weights, sampling, views and generated data."""
    overwrite: bool = False
    """Delete what the run directory holds and start anew."""
    report: bool = True
    """Write RUN/report.html at the end: curves, scores, pictures, a map of test images (`vit-suite report`)."""
