"""DINOv2's views: multi-crop, with larger crops in the last stage of a training. A Gram teacher gets the global crops a
second time, in a larger size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from vit_suite.config.dinov2 import DINOv2ViewsConfig
from vit_suite.config.limits import pair
from vit_suite.views.draw import Draw
from vit_suite.views.multicrop import MultiCrop, draw_views, image_sizes


class StagedMultiCrop:
    """`views(images, draw)`: the global crops, the local crops, and with `gram_size` the global crops in that size.

    Each is (B, C, S, S), normalized, on the images' device. The object is picklable. A crop for the Gram teacher has
    the box, colors and blur of its global crop. The width of a blur is in pixels of the crop, so it grows with the
    crop.

    mean, std: C floats in 0..1.
    """

    def __init__(self, cfg: DINOv2ViewsConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        self.cfg = cfg
        self.early = MultiCrop(cfg, mean, std)
        sizes = (cfg.late_global_size or cfg.global_size, cfg.late_local_size or cfg.local_size)
        self.late = MultiCrop(replace(cfg, global_size=sizes[0], local_size=sizes[1]), mean, std)

    def __call__(self, images: Tensor | Sequence[Tensor], draw: Draw) -> list[Tensor]:
        """images: uint8 or float 0..1 (B, C, H, W), or a list of (C, H_i, W_i): the rows' images."""
        late = self.cfg.late_from_epoch is not None and draw.epoch >= self.cfg.late_from_epoch
        crop = self.late if late else self.early
        parameters = draw_views(crop.cfg, image_sizes(images), draw)
        sizes = crop.sizes(parameters)
        if self.cfg.gram_size:
            drawn = replace(sizes[0][0], sigma=sizes[0][0].sigma * (self.cfg.gram_size / pair(crop.cfg.global_size)[0]))
            sizes.append((drawn, pair(self.cfg.gram_size)))
        return crop.groups(images, sizes)
