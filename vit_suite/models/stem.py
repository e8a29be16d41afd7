"""A convolutional stem in the place of the patch embedding (Xiao et al. 2021, arXiv 2106.14881, section 4)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.batch_norm import BatchNorm2d


def check_hidden(backbone: BackboneConfig, what: str) -> None:
    """UserError where `what` hides patches from the network and the stem's convolutions, which overlap, would show some
    of their pixels in the patches beside them."""
    if backbone.stem == "conv":
        raise UserError(
            f"backbone.stem conv is not for {what}: its convolutions overlap, so the visible patches would show what"
            " the hidden ones hold. Use backbone.stem patch."
        )


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with BatchNorm and ReLU, then a 1x1 convolution to the width of a token.

    A patch of 2^n pixels takes n of them, whose channels double up to `embed_dim`. Example: 48, 96, 192, 384 for patch
    16 and width 384, as in the paper's 4GF network. (B, C, H, W) -> (B, h, w, D), as timm's PatchEmbed with output
    NHWC. The statistics of BatchNorm are over all ranks.

    Takes timm's arguments of an `embed_layer`. UserError unless the patch is square with a side of 4, 8, 16, 32 ...
    """

    def __init__(
        self, img_size: Any = 224, patch_size: Any = 16, in_chans: int = 3, embed_dim: int = 768, **_: Any
    ) -> None:
        super().__init__()
        height, width = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        layers = height.bit_length() - 1
        if height != width or 2**layers != height or height < 4:
            raise UserError(
                f"backbone.stem conv halves the image again and again: backbone.patch_size has to be 4, 8, 16 or 32,"
                f" not {height if height == width else [height, width]}."
            )
        if embed_dim % 2 ** (layers - 1):
            raise UserError(f"backbone.stem conv needs a backbone.dim that {2 ** (layers - 1)} divides.")
        self.patch_size = (height, width)
        self.grid_size = (size[0] // height, size[1] // width)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        channels = [in_chans] + [embed_dim // 2 ** (layers - 1 - index) for index in range(layers)]
        parts: list[nn.Module] = []
        for before, after in pairwise(channels):
            parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*parts)
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.convolutions(images)).permute(0, 2, 3, 1)
