"""What a training method says of itself. `Method` in base.py drives a training with it.

A method has to fill `build`, `losses`, `trained` and `evaluation_backbone`. Every other hook has a default here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import Tensor, nn

from vit_suite.config import BackboneConfig, CropConfig, MethodConfig, OptimConfig, ViewsConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.methods.start import copy_backbone
from vit_suite.models.backbone import Backbone
from vit_suite.views.draw import Draw
from vit_suite.views.multicrop import MultiCrop


class Losses(dict[str, Tensor]):
    """The result of `Method.losses`: scalars by name. `loss` is minimized, and all of them are logged.

    `sums` holds what the method needs after the step, by name. These tensors are added up over the micro-batches of the
    step and then given to `Method.use_sums`. DINO's center needs the sum of the teacher's logits and their number.
    """

    def __init__(self, values: Mapping[str, Tensor], sums: Mapping[str, Tensor] | None = None):
        super().__init__(values)
        self.sums = dict(sums or {})


class MethodHooks(pl.LightningModule):
    """The hooks of a training method; each subclass of `Method` fills them."""

    config_class: ClassVar[type[MethodConfig]]
    views_class: ClassVar[type[CropConfig]] = ViewsConfig
    optim_class: ClassVar[type[OptimConfig]] = OptimConfig
    """The classes of the method's options: the same as in its row of registry.py."""
    online_scores: ClassVar[tuple[str, ...]] = ("knn",)
    """Names of the scores that are taken during training (training/scores.py). The last one picks the best
    checkpoint."""
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
    """Function of the method -> the part of a step under which `vit-suite profile` counts its time. Parts that the
    function calls count for themselves."""
    method: Any
    views_config: Any

    # What a method has to provide.

    def build(self, backbone: BackboneConfig) -> None:
        """Make the networks, as attributes of the module. `self.method`, `self.views_config` and `self.classes` are set
        before.

        Raises:
            UserError: options contradict each other.
        """
        raise NotImplementedError

    def losses(self, crops: list[Tensor], labels: Tensor, draw: Draw, logged: bool) -> Losses:
        """The losses of a micro-batch.

        It must not change the method: a second call with the same arguments gives the same result (running statistics
        of BatchNorm layers aside).

        Args:
            crops: the views, (B, C, S_v, S_v) each.
            labels: (B,) integers.
            draw: the key of all random numbers beyond those of the crops.
            logged: whether this step is logged. Values that are costly and only logged are computed only then.
        """
        raise NotImplementedError

    def trained(self) -> nn.Module:
        """The module whose parameters the optimizer gets."""
        raise NotImplementedError

    def evaluation_backbone(self) -> Backbone:
        """The backbone that is scored and exported."""
        raise NotImplementedError

    # What a method may provide. For callbacks of its own it has Lightning's `configure_callbacks`.

    @staticmethod
    def build_views(views: CropConfig, mean: list[float], std: list[float]) -> Callable[[Any, Draw], list[Tensor]]:
        """A function `(images, draw) -> [(B, C, S, S), ...]` that makes the normalized crops of a micro-batch. It must
        be picklable, because loader workers may run it."""
        return MultiCrop(views, mean, std)

    @classmethod
    def class_names(cls, data: ImageDataModule) -> list[str] | None:
        """The names of the labels that the method learns from; None for a method that learns without labels.

        Raises:
            UserError: the data does not have the labels.
        """
        return None

    def classifier(self) -> nn.Module | None:
        """The network that maps images (B, C, H, W) to logits (B, K) of `classes`, if the method trains one. It is
        scored on the whole test set when training ends."""
        return None

    def evaluation_head(self) -> nn.Linear | None:
        """The classifier on top of `evaluation_backbone`. It is written beside the backbone as head.safetensors."""
        return None

    @property
    def sheet_every_epochs(self) -> int:
        """Epochs between two pictures of `sheet`; 0 draws none."""
        return 0

    def sheet(self, clean: Tensor) -> list[Tensor]:
        """Rows of a picture that shows what the method does with images. Each row is a normalized tensor (B, C, S, S),
        and the first row is `clean` itself."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """Name of a part of a step -> the network whose forward pass it is, for `vit-suite profile`."""
        return {"student forward": self.trained()}

    def gathered_parts(self) -> list[nn.Module]:
        """Large parts, besides transformer blocks, that FSDP2 gathers only while they run. The rest of the method is
        gathered for the whole step."""
        return []

    def start_from(self, backbone: Backbone) -> None:
        """Copy the weights of `backbone`, of the same architecture, into every backbone of the method. Heads keep their
        initialization."""
        for part in self.modules():
            if isinstance(part, Backbone):
                copy_backbone(part, backbone)

    def compares_images(self) -> list[str]:
        """Names of the parts of the loss that compare images of one micro-batch. Accumulation changes their values."""
        norms = (nn.BatchNorm1d, nn.BatchNorm2d)
        return ["BatchNorm"] * any(isinstance(part, norms) for part in self.trained().modules())

    def mixes_images(self) -> list[str]:
        """Names of the options that blend an image with its partner in the micro-batch. A single image has none."""
        return []

    def use_sums(self, sums: dict[str, Tensor]) -> None:
        """Called once after each optimizer step, before `after_step`. `sums` is `Losses.sums` of this rank, added up
        over the micro-batches of the step."""

    def watch(self, values: Losses) -> None:
        """Called in logged steps with the result of `losses`, to warn when a value looks wrong."""

    def after_step(self, step: int) -> None:
        """Called once after optimizer step number `step` (0-based)."""
