"""Images of different sizes in one buffer, so that one copy takes a whole batch to a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Packed(list[Tensor]):
    """Images (C, H_i, W_i) that lie one after the other in `pixels` (P,), of which they are views.

    `pixels` ends with `slack` more zeros, so that a row of the last image can be read as if it were so much longer.
    """

    def __init__(self, pixels: Tensor, shapes: Sequence[torch.Size], slack: int = 0) -> None:
        counts = [shape.numel() for shape in shapes]
        parts = pixels[: len(pixels) - slack].split(counts)
        super().__init__(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        self.pixels, self.slack = pixels, slack

    def to(self, device: torch.device, **_: Any) -> Packed:
        """The images on `device`, by one copy, with slack for their widest row. Lightning calls this as it does for a
        tensor. A GPU is not waited for if the pixels are pinned."""
        if self.pixels.device == device:
            return self
        slack = max(image.shape[-1] for image in self)
        count = len(self.pixels) - self.slack
        pixels = torch.empty(count + 2 * slack, dtype=self.pixels.dtype, device=device)
        pixels[:count].copy_(self.pixels[:count], non_blocking=True)
        pixels[count:].zero_()
        return Packed(pixels, [image.shape for image in self], 2 * slack)


def packed(images: Sequence[Tensor], slack: int) -> Packed:
    """The images (C, H_i, W_i), of one type and on one device, in one buffer with at least `slack` zeros at its end."""
    if isinstance(images, Packed) and images.slack >= slack:
        return images
    pixels = torch.cat([*(image.reshape(-1) for image in images), images[0].new_zeros(slack)])
    return Packed(pixels, [image.shape for image in images], slack)
