"""Pieces of a ViT that timm has no option for: fixed sine positions, post-norm blocks, causal order over patches, and drop path that does
not depend on the number of ranks.

Axes: B images, N patches (row-major), T = prefix + N tokens, D width.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vit_suite.errors import UserError
from vit_suite.views.draw import Draw, alone


class PostNormBlock(Block):
    """LayerNorm after each sum, as in the original Transformer (Vaswani et al. 2017, section 3.1), with timm's parameter names.

    A network of these needs no norm at its end; without a warm-up of the learning rate it trains badly (arXiv 2002.04745).
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


class DropPath(nn.Module):
    """timm's stochastic depth, drawn for the GLOBAL batch of a step and cut to the rows of this micro-batch.

    So ranks and micro-batches drop what one rank with the whole batch drops, provided that torch's generator, which the numbers come
    from, stands alike on all of them. `place` says which rows the images are; without it they are all there are. Input (V B, T, D): V
    views of B images, view by view.
    """

    place: Draw | None = None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        place = self.place or alone(len(x))
        views = len(x) // (place.rows.stop - place.rows.start)
        kept = x.new_empty(views, place.total).bernoulli_(1 - self.rate)[:, place.rows] / (1 - self.rate)
        return x * kept.reshape(-1, 1, 1)


def replace_drop_path(vit: nn.Module) -> None:
    """Put this module's `DropPath` in the place of timm's."""
    for block in vit.blocks:
        for name in ("drop_path1", "drop_path2"):
            if isinstance(getattr(block, name, None), TimmDropPath):
                setattr(block, name, DropPath(getattr(block, name).drop_prob))


@functools.lru_cache(maxsize=8)
def causal_mask(tokens: int, prefix: int, device: torch.device) -> Tensor:
    """(T, T) bool, True where a row may look: the prefix at everything, a patch at itself and earlier patches.

    Patches do not see the prefix: CLS has seen the whole image one block before, and would tell them what comes next.
    """
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
    mask[:, :prefix] = False
    mask[:prefix] = True
    return mask.to(device)


def _waves(places: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """sin and cos (..., dim / 2) of places at wavelengths from 2 pi to 10,000 x 2 pi."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = places.double().unsqueeze(-1) * rates
    return angles.sin(), angles.cos()


def sincos_positions(kind: Literal["sincos_1d", "sincos_2d"], grid: tuple[int, int], dim: int, prefix: int) -> Tensor:
    """Fixed position embedding (1, T, D).

    sincos_1d: of the place in the sequence, prefix included; sine and cosine take turns (Vaswani et al. 2017, section 3.5).
    sincos_2d: quarters sin(column), cos(column), sin(row), cos(row), and zero for the prefix (Beyer et al. 2022 after MoCo v3).
    """
    need = 2 if kind == "sincos_1d" else 4
    if dim % need:
        raise UserError(f"backbone.positions {kind} needs a backbone.dim that {need} divides, not {dim}.")
    if kind == "sincos_1d":
        sine, cosine = _waves(torch.arange(prefix + grid[0] * grid[1]), dim)
        return torch.stack([sine, cosine], -1).flatten(1).float().unsqueeze(0)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    patches = torch.cat([*_waves(columns.flatten(), dim // 2), *_waves(rows.flatten(), dim // 2)], dim=-1)  # (N, D)
    return torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), patches]).float().unsqueeze(0)
