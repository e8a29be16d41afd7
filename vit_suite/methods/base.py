"""The part of a training that all methods share: views, schedules per optimizer step, clipping, logging.

`Method` turns the hooks of hooks.py into a LightningModule. It works under any `pl.Trainer`, with any DataLoader that
yields `(images, labels, ...)`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.config import BackboneConfig, CropConfig, MethodConfig, OptimConfig, PretrainConfig
from vit_suite.config.limits import pair
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError, counted
from vit_suite.methods.hooks import Losses as Losses
from vit_suite.methods.hooks import MethodHooks
from vit_suite.methods.sharding import Sharded
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import check_image_size, known_patch_size
from vit_suite.optim.groups import clip_all, clip_each, clip_networks, parameter_groups, round_first_moments
from vit_suite.optim.schedules import cosine, peak_rate, rate_of_epoch
from vit_suite.views.draw import Draw

log = logging.getLogger("vit_suite")
T = TypeVar("T")

UNKNOWN_BATCH = 256
"""Images of a rank's micro-batch, where neither the method nor the loader says how many it has."""


def log_every(trainer: Any) -> int:
    """Optimizer steps between two log entries. Lightning sets this on its trainer without declaring it."""
    return trainer.log_every_n_steps


def images_and_labels(batch: Any) -> tuple[Any, Tensor]:
    """The images of a batch, and its labels (B,). UserError where a loader of one's own yields anything else."""
    parts = batch if isinstance(batch, (list, tuple)) else [batch]
    labels = parts[1] if len(parts) > 1 else None
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        found = "images alone" if labels is None else "no labels (B,) in second place"
        raise UserError(
            f"the training loader yields {found}: expected (images, labels). A method without labels takes"
            " any integers, such as TensorDataset(images, torch.zeros(len(images), dtype=torch.int64))."
        )
    return parts[0], labels


def as_config(cls: type[T], value: Any) -> T:
    """`value` as a `cls`: a dataclass stays as it is, the dict of a checkpoint is unpacked, None gives the defaults."""
    given: Any = value
    return given if is_dataclass(value) else cls(**(value or {}))


def for_views(backbone: BackboneConfig, views: CropConfig) -> BackboneConfig:
    """`backbone` with an image size: its own, or that of the global crop.

    Raises:
        UserError: its patches do not tile the global crop.
    """
    if patch := known_patch_size(backbone):  # checked here, where the message can name the option
        check_image_size(views.global_size, patch, "views.global_size")
    return replace(backbone, image_size=backbone.image_size or list(pair(views.global_size)))


class Method(MethodHooks):
    """A training method: its networks, its loss, and its training loop.

    A subclass names its option classes, makes its networks in `build`, and implements `losses`, `trained` and
    `evaluation_backbone`. All other hooks have a default (hooks.py). docs/add_a_method.md goes through an example.

    Args:
        method, backbone, views, optim: options, as dataclasses or as the plain dicts of a checkpoint. `optim.lr` is per
            256 images; it is scaled to the global batch.
        mean, std: statistics of the images per channel, for pixels in 0..1.
        seed: key of all random numbers of the views. (Weights are initialized from torch's global generator.)
        batch_size: the global batch; None takes it from the trainer's loader.
        classes: names of the labels, or their number; for methods that learn from labels.
    """

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
        self.sums: dict[str, Tensor] = {}  # `Losses.sums` of the current step
        backbone = for_views(as_config(BackboneConfig, backbone), self.views_config)
        self.build(backbone)
        check_image_size(self.views_config.global_size, self.evaluation_backbone().patch, "views.global_size")
        # Saved as plain data, so that the checkpoint loads with `weights_only=True`.
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
        """The method of the run `cfg`, with the channels, statistics and classes of its data."""
        backbone = replace(cfg.backbone, channels=cfg.data.channels)
        sized: dict[str, Any] = {
            "seed": cfg.run.seed,
            "batch_size": cfg.data.batch_size,
            "classes": cls.class_names(data),
        }
        return cls(cfg.method, backbone, cfg.views, cfg.optim, data.mean, data.std, **sized)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what weights/checkpoint.py needs to rebuild the evaluated backbone: its options, and the prefix of its
        weights' names."""
        vit = self.evaluation_backbone().vit
        prefix = next(name for name, module in self.named_modules() if module is vit) + "."
        description = {
            "backbone": asdict(self.evaluation_backbone().cfg),
            "prefix": prefix,
            "mean": self.mean,
            "std": self.std,
        }
        checkpoint["vit_suite"] = description

    # Ranks that share the parameters (trainer.strategy fsdp2).

    def configure_model(self) -> None:
        if self.device_mesh is not None and self.sharded is None:
            self.sharded = Sharded(self, bf16=self.trainer.precision == "bf16-mixed")

    def whole(self, *parts: str) -> Self:
        """This method; where ranks share its parameters, a copy with all of them, for scores, pictures and files.

        All ranks call this together, and each may do with its copy what it likes.

        Args:
            parts: functions of the method that give the modules that are needed, such as `evaluation_backbone`. Only
                these are gathered; the rest of the copy has no values. Without any, everything is gathered.
        """
        return self.sharded.whole(parts) if self.sharded else self

    # The start of a training.

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        # Not in on_fit_start: the number of steps is not known before the loader is set up, and there this would happen
        # before a resumed run's position is restored. Its epoch would start over with its first images.
        self.max_steps = self.planned_steps()
        accumulate = self.trainer.accumulate_grad_batches
        if self.global_batch is None:
            local = getattr(self.trainer.train_dataloader, "batch_size", None) or UNKNOWN_BATCH
            self.global_batch = local * self.trainer.world_size * accumulate
        self.peak_lr = peak_rate(self.optim.lr, self.global_batch, self.optim.lr_scaling)
        log.info(
            "global batch %d = %s x %d accumulated x %s; lr %.3g = %.3g x %s; %s of %s",
            self.global_batch,
            counted(self.trainer.world_size, "rank"),
            accumulate,
            counted(self.global_batch // self.trainer.world_size // accumulate, "image"),
            self.peak_lr,
            self.optim.lr,
            f"{self.global_batch} / 256" if self.optim.lr_scaling == "linear" else f"sqrt({self.global_batch} / 1024)",
            counted(self.max_steps, "step"),
            counted(math.ceil(self.max_steps / self.steps_per_epoch), "epoch"),
        )
        self._warn_of_schedules()
        mixing = self.mixes_images()
        if mixing and self.global_batch == self.trainer.world_size * accumulate and self.trainer.is_global_zero:
            log.warning(
                "%s: no effect, because a micro-batch has one image, which has no partner: raise data.batch_size",
                " and ".join(mixing),
            )
        compared = self.compares_images()
        if compared and accumulate > 1 and self.trainer.is_global_zero:
            log.warning(
                "trainer.accumulate %d: %s: over the %d images of a micro-batch, so the loss is not that of the whole"
                " batch of %d",
                accumulate,
                ", ".join(compared),
                self.global_batch // accumulate,
                self.global_batch,
            )

    def _warn_of_schedules(self) -> None:
        """Warn of a rate that rises to its end, and of a resumed run whose schedules changed (more epochs, for
        example), because its learning rate jumps. `doctor` and the start of a run warn of a long warm-up."""
        if self.peak_lr < self.optim.min_lr:
            log.warning(
                "the learning rate rises from %.3g to optim.min_lr %.3g, which is not scaled to the batch",
                self.peak_lr,
                self.optim.min_lr,
            )
        step, optimizer = self.global_step, self.optimizers(use_pl_optimizer=False)
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

    def planned_steps(self) -> int:
        """Optimizer steps of the whole training; schedules span them.

        Raises:
            UserError: the trainer and its data do not say how many.
        """
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

    # A step.

    def draw(self, batch_idx: int, count: int) -> Draw:
        """The rows of the global batch that are in micro-batch `batch_idx` of this rank, which has `count` images."""
        accumulate = self.trainer.accumulate_grad_batches
        step, micro = divmod(batch_idx, accumulate)
        start = (micro * distributed.world_size() + distributed.rank()) * count
        total = count * distributed.world_size() * accumulate
        return Draw(self.seed, self.current_epoch, step, slice(start, start + count), total)

    def crops(self, images: Tensor | list[Tensor], draw: Draw) -> list[Tensor]:
        """The views of a batch, (B, C, S, S) each. A list of 4-D tensors has its views already, and is returned."""
        if isinstance(images, (list, tuple)) and images[0].ndim == 4:
            return list(images)
        return self.views(images, draw)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = images_and_labels(batch)
        logged = (self.global_step + 1) % log_every(self.trainer) == 0
        draw = self.draw(batch_idx, len(labels))
        values = self.losses(self.crops(images, draw), labels, draw, logged)
        # Reading a value makes a GPU wait. So a GPU is asked only in logged steps, where values are read anyway.
        if logged or self.device.type == "cpu":
            self.check_finite(values["loss"])
        for name, value in values.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if logged:
            self.watch(values)
        self.log_means(values, batch_idx, logged)
        return values["loss"]

    def check_finite(self, loss: Tensor) -> None:
        """Raise RuntimeError, on all ranks, when the loss of any rank is not finite.

        The mean over ranks is tested. If a rank tested its own loss alone, it would leave the others waiting for it.
        """
        mean = distributed.mean_over_ranks(loss.detach())
        if not torch.isfinite(mean):
            here = distributed.active() and not torch.isfinite(loss)
            where = f" (on rank {distributed.rank()})" if here else ""
            raise RuntimeError(
                f"the loss is {mean.item()} at step {self.global_step}{where}: lower optim.lr, or train with"
                " trainer.precision=fp32"
            )

    def log_means(self, values: dict[str, Tensor], batch_idx: int, logged: bool) -> None:
        """Log the mean of each value over the micro-batches of a step and, when `logged`, over ranks.

        Losses and accuracies are then those of the global batch. Values that are no mean over images (PSNR, prototypes
        used, spread of features) become the mean of the micro-batches' values.
        """
        micro = batch_idx % self.trainer.accumulate_grad_batches
        found = torch.stack([value.detach().float() for value in values.values()])
        self.logged_sum = found if micro == 0 else self.logged_sum + found
        if micro + 1 < self.trainer.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        means = self.logged_sum / (micro + 1)
        if logged:  # not by Lightning's sync_dist, which has to be the same at every step and reduces value by value
            means = distributed.mean_over_ranks(means)
        for name, value in zip(values, means, strict=True):
            # Lightning reads a value of the progress bar after every batch, and a GPU would be waited for.
            self.log(f"train/{name}", value, prog_bar=name == "loss" and self.device.type == "cpu")

    # The optimizer.

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.adamw(
            parameter_groups(self.trained(), self.optim.layer_decay, self.optim.decay_tokens, self.optim.patch_embed_lr)
        )

    def adamw(self, groups: list[dict]) -> torch.optim.AdamW:
        """The optimizer that `optim` describes, for these parameter groups."""
        optim = self.optim
        betas = optim.betas[0], optim.betas[1]
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=True)
        if optim.first_moment == "bf16":
            adamw.register_step_post_hook(round_first_moments)
        return adamw

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, without the factors of layers."""
        optim = self.optim
        if optim.rate_changes == "epoch":
            epoch, epochs = step // self.steps_per_epoch, math.ceil(self.max_steps / self.steps_per_epoch)
            return rate_of_epoch(epoch, epochs, self.peak_lr, optim.min_lr, optim.warmup_epochs, optim.warmup_start)
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        return cosine(step, self.max_steps, self.peak_lr, optim.min_lr, warmup, optim.warmup_start)

    def set_rates(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the learning rate and weight decay of optimizer step `step` into the parameter groups."""
        lr = self.rate(step)
        decay = cosine(step, self.max_steps, self.optim.weight_decay, self.optim.weight_decay_end)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if group["decay"]:
                group["weight_decay"] = decay

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.global_step  # Lightning calls this hook once per optimizer step, and counts the step afterwards
        self.set_rates(optimizer, step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if (step + 1) % log_every(self.trainer) == 0:  # not in every step: sending a number to a GPU makes it wait
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            self.log("train/weight_decay", optimizer.param_groups[0]["weight_decay"])
        if self.sums:
            self.use_sums(self.sums)
            self.sums = {}
        self.after_step(step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # None instead of zeros: AdamW then leaves the parameter alone, with its moments and without weight decay.
        if self.epochs_done() < self.optim.freeze_backbone_epochs:
            for part in self.trained().modules():
                if isinstance(part, Backbone):
                    for parameter in part.parameters():
                        parameter.grad = None

    def epochs_done(self) -> float:
        """Epochs before the current optimizer step."""
        return self.global_step / max(1, self.steps_per_epoch)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip as `optim.clip_mode` says. The trainer's own clipping arguments are not used."""
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
