"""What every pretraining method shares: views on the device, schedules per optimizer step, clipping, logging.

A method implements `build`, `losses`, `trained` and `evaluation_backbone`; this class turns them into a LightningModule
that works under any `pl.Trainer` with any DataLoader that yields `(images, labels, ...)`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vit_suite import distributed
from vit_suite.config import BackboneConfig, CropConfig, MethodConfig, OptimConfig, PretrainConfig, ViewsConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError
from vit_suite.methods.sharding import Sharded
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import check_image_size, known_patch_size
from vit_suite.models.lora import with_frozen_names
from vit_suite.models.positions import resize_position
from vit_suite.optim.groups import clip_all, clip_each, clip_networks, parameter_groups
from vit_suite.optim.schedules import cosine, peak_rate
from vit_suite.views.draw import Draw
from vit_suite.views.multicrop import MultiCrop

log = logging.getLogger("vit_suite")
T = TypeVar("T")


def log_every(trainer: Any) -> int:
    """Optimizer steps between two log entries, which Lightning sets on its trainer without declaring it."""
    return trainer.log_every_n_steps


def as_config(cls: type[T], value: Any) -> T:
    """A dataclass from itself, from the plain dict a checkpoint holds, or its defaults."""
    given: Any = value
    return given if is_dataclass(value) else cls(**(value or {}))


def for_views(backbone: BackboneConfig, views: CropConfig) -> BackboneConfig:
    """`backbone` with the position grid of the global crop where it names none. UserError when its patches do not tile
    that crop."""
    if patch := known_patch_size(backbone):  # here the message can name the option; the network knows a size only
        check_image_size([views.global_size], patch, "views.global_size")
    return replace(backbone, image_size=backbone.image_size or [views.global_size, views.global_size])


def copy_backbone(to: Backbone, source: Backbone) -> None:
    """Give `to` the weights of `source`, of the same architecture.

    Learned positions of another size are resized. Where `to` takes another number of channels, each of them gets the
    mean of the source's patch embedding over channels, times the ratio of the numbers: an image whose channels are all
    alike gives the same tokens.
    """
    state = source.vit.state_dict()
    mine, theirs = to.cfg.channels, source.cfg.channels
    if mine != theirs:
        kernel = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = kernel.mean(1, keepdim=True).repeat(1, mine, 1, 1) * (theirs / mine)
    if to.prefix_tokens != source.prefix_tokens:
        state = with_more_registers(state, to, source)
    if to.native_grid != source.native_grid and "pos_embed" in state:
        learned = "pos_embed" in dict(to.vit.named_parameters())
        prefix = 0 if to.vit.no_embed_class else to.prefix_tokens
        how = source.cfg.resize
        if not learned:
            state["pos_embed"] = to.vit.state_dict()["pos_embed"]
        elif how is not None and how != "sincos":
            state["pos_embed"] = resize_position(state["pos_embed"], source.native_grid, to.native_grid, prefix, how)
    if to.cfg.lora_rank:
        state = with_frozen_names(state, to.vit.state_dict())
    to.vit.load_state_dict(state)


def with_more_registers(state: dict[str, Tensor], to: Backbone, source: Backbone) -> dict[str, Tensor]:
    """`state` of `source` with the registers that `to` has beyond it (SiT's rotation token), fresh as they are there.

    Raises:
        UserError: `source` has registers that `to` has no place for.
    """
    more = to.prefix_tokens - source.prefix_tokens
    if more < 0 or to.has_cls != source.has_cls:
        raise UserError(
            f"the start has {source.prefix_tokens} tokens before the patches, and this method has a place for"
            f" {to.prefix_tokens}."
        )
    own = to.vit.state_dict()
    found = dict(state)
    tokens = [state["reg_token"]] if "reg_token" in state else []
    found["reg_token"] = torch.cat([*tokens, own["reg_token"][:, -more:]], dim=1)
    if "pos_embed" in state and not to.vit.no_embed_class:
        old, new = source.prefix_tokens, own["pos_embed"][:, to.prefix_tokens - more : to.prefix_tokens]
        found["pos_embed"] = torch.cat([state["pos_embed"][:, :old], new, state["pos_embed"][:, old:]], dim=1)
    return found


class Losses(dict[str, Tensor]):
    """What `Method.losses` answers: scalars by name, of which `loss` is minimized and all are logged.

    `sums` are what the method needs after the step, by name: tensors that are added up over the micro-batches of the
    step and then given to `Method.use_sums` (DINO: the sum of the teacher's logits, and how many there are).
    """

    def __init__(self, values: Mapping[str, Tensor], sums: Mapping[str, Tensor] | None = None):
        super().__init__(values)
        self.sums = dict(sums or {})


class Method(pl.LightningModule):
    """A training method: networks, loss, and what else a training needs to know of it.

    A subclass names its options in the class attributes below, makes its networks in `build`, and implements `losses`,
    `trained` and `evaluation_backbone`. Everything else has a default. docs/add_a_method.md goes through an example.

    Args:
        method, backbone, views, optim: options; a plain dict, as a checkpoint holds it, does too. `optim.lr` is per 256
            images and scaled by the global batch.
        mean, std: of the images, per channel, 0..1.
        seed: of the view draws (weights are initialized from torch's global generator).
        batch_size: global batch; taken from the trainer's loader when None.
        classes: names of the labels, or how many there are; for methods that learn from labels.
    """

    config_class: ClassVar[type[MethodConfig]]
    views_class: ClassVar[type[CropConfig]] = ViewsConfig
    optim_class: ClassVar[type[OptimConfig]] = OptimConfig
    """The classes of its options: those of its row in registry.py."""
    online_scores: ClassVar[tuple[str, ...]] = ("knn",)
    """Scores that are taken during training, by name (training/scores.py). The last one picks the best checkpoint."""
    timed_functions: ClassVar[dict[str, str]] = {
        "transfer_batch_to_device": "data",
        "training_step": "other",
        "crops": "views",
        "losses": "loss",
        "backward": "backward",
        "configure_gradient_clipping": "clip",
        "optimizer_step": "optimizer",
        "use_sums": "EMA",
        "after_step": "EMA",
    }
    """Function of the method -> the part of a step under which `vit-suite profile` counts its time, less the parts that
    it calls."""
    logged_sum: Tensor

    def __init__(
        self,
        method: MethodConfig | dict | None = None,
        backbone: BackboneConfig | dict | None = None,
        views: CropConfig | dict | None = None,
        optim: OptimConfig | dict | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        seed: int = 0,
        batch_size: int | None = None,
        classes: int | list[str] | None = None,
    ):
        super().__init__()
        self.method: Any = as_config(self.config_class, method)
        self.views_config: Any = as_config(self.views_class, views)
        self.optim = as_config(self.optim_class, optim)
        self.mean, self.std = list(mean), list(std)
        self.views = self.build_views(self.views_config, self.mean, self.std)
        self.seed = seed
        self.global_batch = batch_size
        self.classes = [str(index) for index in range(classes)] if isinstance(classes, int) else classes
        self.sharded: Sharded | None = None
        self.sums: dict[str, Tensor] = {}  # of the micro-batches of the step under way
        backbone = for_views(as_config(BackboneConfig, backbone), self.views_config)
        self.build(backbone)
        check_image_size([self.views_config.global_size], self.evaluation_backbone().patch, "views.global_size")
        # As plain data, so that the checkpoint loads with `weights_only=True`.
        options: dict[str, Any] = {
            "method": self.method,
            "backbone": backbone,
            "views": self.views_config,
            "optim": self.optim,
        }
        self.save_hyperparameters(
            {name: asdict(value) for name, value in options.items()}
            | {"mean": self.mean, "std": self.std, "seed": seed, "batch_size": batch_size, "classes": self.classes}
        )

    @classmethod
    def from_data(cls, cfg: PretrainConfig, data: ImageDataModule) -> Self:
        """The method of the run `cfg`, sized for its data."""
        backbone = replace(cfg.backbone, channels=cfg.data.channels)
        sized: dict[str, Any] = {
            "seed": cfg.run.seed,
            "batch_size": cfg.data.batch_size,
            "classes": cls.class_names(data),
        }
        return cls(cfg.method, backbone, cfg.views, cfg.optim, data.mean, data.std, **sized)

    # -- what a method has to provide ----------------------------------------------------------------------------------

    def build(self, backbone: BackboneConfig) -> None:
        """Make the networks: modules as attributes. `self.method`, `self.views_config` and `self.classes` are there.

        Raises:
            UserError: options contradict each other.
        """
        raise NotImplementedError

    def losses(self, crops: list[Tensor], labels: Tensor, draw: Draw, logged: bool) -> Losses:
        """The scalar to minimize under `loss`, and further scalars to log; the costly ones only when `logged`.

        `draw` keys whatever is random on top of the crops. Changes nothing of the method: a second call with the same
        arguments gives the same answer (statistics of BatchNorm layers aside).
        """
        raise NotImplementedError

    def trained(self) -> nn.Module:
        """The module whose parameters the optimizer gets."""
        raise NotImplementedError

    def evaluation_backbone(self) -> Backbone:
        """The backbone that is scored and exported."""
        raise NotImplementedError

    # -- what a method may provide -------------------------------------------------------------------------------------
    # Callbacks of its own: Lightning's `configure_callbacks`.

    @staticmethod
    def build_views(views: CropConfig, mean: list[float], std: list[float]) -> Callable[[Any, Draw], list[Tensor]]:
        """`(images, draw) -> [(B, C, S, S), ...]`: the crops of a micro-batch, normalized; picklable, as workers run it
        too."""
        return MultiCrop(views, mean, std)

    @classmethod
    def class_names(cls, data: ImageDataModule) -> list[str] | None:
        """Names of the labels that the method learns from; None for one that learns without labels.

        Raises:
            UserError: the data does not have the labels.
        """
        return None

    def classifier(self) -> nn.Module | None:
        """The network that answers images (B, C, H, W) with logits (B, K) of `classes`, of a method that trains one. It
        is scored on the whole test set when training ends."""
        return None

    def evaluation_head(self) -> nn.Linear | None:
        """The classifier on `evaluation_backbone`, written beside it as head.safetensors."""
        return None

    @property
    def sheet_every_epochs(self) -> int:
        """Epochs between two pictures of `sheet`; 0 draws none."""
        return 0

    def sheet(self, clean: Tensor) -> list[Tensor]:
        """Rows of a picture that shows what the method does with images: normalized tensors (B, C, S, S) each, the
        first of them `clean` itself."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """Part of a step -> the network whose forward pass it is, for `vit-suite profile`."""
        return {"student forward": self.trained()}

    def gathered_parts(self) -> list[nn.Module]:
        """Large parts besides the transformer blocks that FSDP2 gathers one at a time, when they run. The rest of the
        method is gathered for the whole of a step."""
        return []

    def start_from(self, backbone: Backbone) -> None:
        """Take the weights of `backbone`, of the same architecture, into every backbone of the method. Learned
        positions of another size are resized. Heads stay as they were initialized."""
        for part in self.modules():
            if isinstance(part, Backbone):
                copy_backbone(part, backbone)

    def compares_images(self) -> list[str]:
        """What the loss takes from several images at a time, of all ranks but of one micro-batch: accumulation changes
        it."""
        norms = (nn.BatchNorm1d, nn.BatchNorm2d)
        return ["BatchNorm"] * any(isinstance(part, norms) for part in self.trained().modules())

    def use_sums(self, sums: dict[str, Tensor]) -> None:
        """Called once after each optimizer step, before `after_step`, with `Losses.sums` of this rank added up over the
        micro-batches of the step."""

    def watch(self, values: Losses) -> None:
        """Called in logged steps with what `losses` answered, to warn about what looks wrong."""

    def after_step(self, step: int) -> None:
        """Called once after optimizer step number `step` (0-based)."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What weights/checkpoint.py needs to rebuild the evaluated backbone: its options and the names of its
        weights."""
        vit = self.evaluation_backbone().vit
        prefix = next(name for name, module in self.named_modules() if module is vit) + "."
        description = {
            "backbone": asdict(self.evaluation_backbone().cfg),
            "prefix": prefix,
            "mean": self.mean,
            "std": self.std,
        }
        checkpoint["vit_suite"] = description

    def whole(self) -> Self:
        """This method, or where its parameters are sharded over the ranks a copy with all of them, to score, draw or
        write: all ranks call this together, and what they do with the copy is their own affair."""
        return self.sharded.whole() if self.sharded else self

    # -- shared --------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.device_mesh is not None and self.sharded is None:  # trainer.strategy fsdp2
            self.sharded = Sharded(self, bf16=self.trainer.precision == "bf16-mixed")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        # Not on_fit_start: asking for the number of steps there sets up the loader before a resumed run's position is
        # restored, and an epoch that was under way would start over with its first images.
        self.max_steps = self.planned_steps()
        if self.global_batch is None:
            local = getattr(self.trainer.train_dataloader, "batch_size", None) or 256
            self.global_batch = local * self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.peak_lr = peak_rate(self.optim.lr, self.global_batch, self.optim.lr_scaling)
        log.info(
            "global batch %d = %d ranks x %d accumulated x %d images; lr %.3g = %.3g x %s; %d steps of %d epochs",
            self.global_batch,
            self.trainer.world_size,
            self.trainer.accumulate_grad_batches,
            self.global_batch // self.trainer.world_size // self.trainer.accumulate_grad_batches,
            self.peak_lr,
            self.optim.lr,
            f"{self.global_batch} / 256" if self.optim.lr_scaling == "linear" else f"sqrt({self.global_batch} / 1024)",
            self.max_steps,
            math.ceil(self.max_steps / self.steps_per_epoch),
        )
        if self.optim.warmup_epochs * self.steps_per_epoch > self.max_steps:
            log.warning(
                "optim.warmup_epochs %g is longer than the run: its learning rate is never reached",
                self.optim.warmup_epochs,
            )
        self._say_jump()
        compared = self.compares_images()
        if compared and self.trainer.accumulate_grad_batches > 1 and self.trainer.is_global_zero:
            log.warning(
                "trainer.accumulate %d: %s: over the %d images of a micro-batch, so the loss is not that of the whole"
                " batch of %d",
                self.trainer.accumulate_grad_batches,
                ", ".join(compared),
                self.global_batch // self.trainer.accumulate_grad_batches,
                self.global_batch,
            )

    def _say_jump(self) -> None:
        """Say that a resumed run has other schedules than before, as with more epochs: the rate is another at once."""
        step, optimizer = self.global_step, self.optimizers(use_pl_optimizer=False)
        if self.peak_lr < self.optim.min_lr:
            log.warning(
                "the learning rate rises from %.3g to optim.min_lr %.3g, which is not scaled to the batch",
                self.peak_lr,
                self.optim.min_lr,
            )
        first: Any = optimizer
        group = first.param_groups[0]
        before, now = group["lr"] / group["lr_scale"], self.rate(step)
        if step and not math.isclose(before, self.rate(step - 1), rel_tol=1e-3, abs_tol=1e-12):
            log.warning(
                "the schedules now span %d steps, not those of before: the learning rate goes from %.3g to %.3g",
                self.max_steps,
                before,
                now,
            )

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, before any layer's factor."""
        warmup = round(self.optim.warmup_epochs * self.steps_per_epoch)
        return cosine(step, self.max_steps, self.peak_lr, self.optim.min_lr, warmup)

    def planned_steps(self) -> int:
        """Optimizer steps of the whole training, which schedules span. UserError where the trainer and its data do not
        say how many."""
        if not math.isfinite(self.trainer.num_training_batches):
            raise UserError(
                "the training loader does not say how many batches an epoch has, and warm-up and schedules count in"
                " epochs: give its dataset a __len__, or the Trainer limit_train_batches, a number of batches."
            )
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise UserError(
                "the Trainer has neither max_epochs nor max_steps: schedules need to know where training ends."
            )
        return int(steps)

    def draw(self, batch_idx: int, count: int) -> Draw:
        """Where micro-batch `batch_idx` of this rank, `count` images, stands in the global batch of its step."""
        accumulate = self.trainer.accumulate_grad_batches
        step, micro = divmod(batch_idx, accumulate)
        start = (micro * distributed.world_size() + distributed.rank()) * count
        total = count * distributed.world_size() * accumulate
        return Draw(self.seed, self.current_epoch, step, slice(start, start + count), total)

    def crops(self, images: Tensor | list[Tensor], draw: Draw) -> list[Tensor]:
        """Views of a batch: a list of (B, C, S, S) tensors. Ready-made views (a list of 4-D tensors) pass through."""
        if isinstance(images, (list, tuple)) and images[0].ndim == 4:
            return list(images)
        return self.views(images, draw)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, *_ = batch
        logged = (self.global_step + 1) % log_every(self.trainer) == 0
        draw = self.draw(batch_idx, len(labels))
        values = self.losses(self.crops(images, draw), labels, draw, logged)
        # Reading a value makes a GPU wait, so there the check is made where values are read anyway.
        if (logged or self.device.type == "cpu") and not torch.isfinite(values["loss"]):
            raise RuntimeError(
                f"the loss is {values['loss'].item()} at step {self.global_step}: lower optim.lr, or train with"
                " trainer.precision=fp32"
            )
        for name, value in values.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if logged:
            self.watch(values)
        self.log_means(values, batch_idx, logged)
        return values["loss"]

    def log_means(self, values: dict[str, Tensor], batch_idx: int, logged: bool) -> None:
        """Log the mean of each value over the micro-batches of a step, with the last of them, and over ranks when
        `logged`.

        So losses and accuracies are those of the global batch; what is no mean over images (PSNR, prototypes used,
        spread of features) is the mean of that of each micro-batch.
        """
        micro = batch_idx % self.trainer.accumulate_grad_batches
        found = torch.stack([value.detach().float() for value in values.values()])
        self.logged_sum = found if micro == 0 else self.logged_sum + found
        if micro + 1 < self.trainer.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        means = self.logged_sum / (micro + 1)
        if logged:  # not by sync_dist: Lightning wants it alike at every step, and makes all ranks wait for each value
            means = distributed.mean_over_ranks(means)
        for name, value in zip(values, means, strict=True):
            # Lightning reads a value of the progress bar after every batch, for which a GPU would have to be waited
            # for.
            self.log(f"train/{name}", value, prog_bar=name == "loss" and self.device.type == "cpu")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(
            self.trained(), self.optim.layer_decay, self.optim.decay_tokens, self.optim.patch_embed_lr
        )
        return torch.optim.AdamW(
            groups,
            lr=self.optim.lr,
            betas=(self.optim.betas[0], self.optim.betas[1]),
            weight_decay=self.optim.weight_decay,
            fused=True,
        )

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write learning rate and weight decay of optimizer step `step` into the parameter groups."""
        lr = self.rate(step)
        decay = cosine(step, self.max_steps, self.optim.weight_decay, self.optim.weight_decay_end)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["decay"]:
                group["weight_decay"] = decay

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.global_step  # Lightning counts it up after this hook, and calls the hook once per accumulated batch
        self.set_rates(optimizer, step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (step + 1) % log_every(self.trainer) == 0:  # not at every step: a GPU waits for each number that it is sent
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            self.log("train/weight_decay", optimizer.param_groups[0]["weight_decay"])
        if self.sums:
            self.use_sums(self.sums)
            self.sums = {}
        self.after_step(step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # None instead of zeros: AdamW then skips a parameter whole, its moments and weight decay included.
        if self.epochs_done() < self.optim.freeze_backbone_epochs:
            for part in self.trained().modules():
                if isinstance(part, Backbone):
                    for parameter in part.parameters():
                        parameter.grad = None

    def epochs_done(self) -> float:
        """Epochs behind the optimizer step under way."""
        return self.global_step / max(1, self.steps_per_epoch)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip as `optim.clip_mode` says; the trainer's own clipping arguments are not used."""
        if not self.optim.clip:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.optim.clip_mode == "tensor":
            clip_each([p.grad for p in parameters], self.optim.clip)
        elif self.optim.clip_mode == "network":
            named = self.trained().named_parameters()
            clip_networks({name: p.grad for name, p in named if p.grad is not None}, self.optim.clip)
        else:
            clip_all([p.grad for p in parameters], self.optim.clip)
