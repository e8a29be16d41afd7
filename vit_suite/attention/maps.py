"""Attention maps and masks from the attention of a vision transformer: tensors in, tensors out.

Source: facebookresearch/dino visualize_attention.py, main block. There `w_featmap` counts rows and `h_featmap` columns;
here a grid is always (rows, columns). Deliberate deviations: batches, any number of prefix tokens (registers), sizes
that are no multiple of the patch, and bilinear upsampling beside the official nearest one. Added: rollout (Abnar,
Zuidema 2020, arXiv 2005.00928) and the artifacts of high norm (Darcet et al. 2023, arXiv 2309.16588).

Axes: B images, h heads, T tokens = prefix tokens (CLS first, then registers) + gh x gw patches, row-major.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite.errors import UserError
from vit_suite.evaluation.features import frozen

CLS = slice(0, 1)
"""The row of an attention matrix that is the CLS token's."""


class Look(NamedTuple):
    """What one forward pass shows."""

    heads: Tensor
    """(B, h, gh, gw) float32: the CLS token's attention in the last block."""
    rollout: Tensor | None = None
    """(B, gh, gw) float32: the CLS token's attention through all blocks."""
    norms: Tensor | None = None
    """(B, gh, gw) float32: L2 norm of the patch tokens after the last block, before the final norm."""
    patches: Tensor | None = None
    """(B, gh, gw, D) float32: the patch tokens after the final norm."""


def attention_maps(backbone: Any, images: Tensor) -> Tensor:
    """What the CLS token looks at in the last block: images (B, C, H, W) -> (B, h, gh, gw) float32, without gradients.

    Args:
        backbone: anything with patch_size (or patch, both sides), prefix_tokens, has_cls and last_attention, such as
            vit_suite.models.backbone.Backbone. A module runs in eval mode and gets its own mode back.
        images: floats that are normalized by the backbone's mean and std. `load_backbone(...).transform` makes them.

    Raises:
        UserError: the backbone has no CLS token, or the images are no batch. (`Backbone` refuses pixels that are not
            normalized floats too.)
    """
    require_cls(backbone)
    if images.ndim != 4:
        raise UserError(
            f"expected images (B, C, H, W), not {tuple(images.shape)}; for a single image give image[None]."
        )
    with torch.no_grad(), frozen(backbone) if isinstance(backbone, nn.Module) else nullcontext():
        return look(backbone, images).heads


def look(backbone: Any, images: Tensor, rollout: bool = False, norms: bool = False, patches: bool = False) -> Look:
    """The maps of normalized images (B, C, H, W) from one forward pass. The caller decides about gradients and mode.

    `rollout` keeps an attention matrix (B, T, T) of each block in memory. Without it memory grows only with T, where
    the attention kernel of the blocks allows it. For more than the heads, the backbone needs depth, embed, blocks and
    attention_of too.
    """
    rows, columns = getattr(backbone, "patch", None) or (backbone.patch_size, backbone.patch_size)
    grid, prefix = (images.shape[-2] // rows, images.shape[-1] // columns), backbone.prefix_tokens
    if not (rollout or norms or patches):
        return Look(cls_attention(backbone.last_attention(images, CLS), prefix, grid).float())
    x, _ = backbone.embed(images)
    means: list[Tensor] = []
    for index, after in enumerate(backbone.blocks(x, grid)):
        if rollout:
            means.append(backbone.attention_of(index, x, grid).mean(1))
        if index == backbone.depth - 1:
            heads = backbone.attention_of(index, x, grid, CLS)
        x = after
    rolled = rolled_out(means)[:, prefix:].unflatten(-1, grid) if rollout else None
    lengths = x[:, prefix:].float().norm(dim=-1).unflatten(-1, grid) if norms else None
    features = backbone.vit.norm(x)[:, prefix:].float().unflatten(1, grid) if patches else None
    return Look(cls_attention(heads, prefix, grid), rolled, lengths, features)


def require_cls(backbone: Any) -> None:
    """UserError unless the backbone has a CLS token."""
    if not backbone.has_cls:
        raise UserError(
            "this backbone has no CLS token, so there is no CLS attention to draw; find its objects with `vit-suite"
            " localize` (lost and tokencut read patch tokens alone), or use a model with one, such as"
            " timm:vit_small_patch16_224 or a DINO checkpoint"
        )


def cls_attention(attention: Tensor, prefix_tokens: int, grid: tuple[int, int]) -> Tensor:
    """The CLS token's row of softmaxed attention (B, h, T, T), or that row alone (B, h, 1, T) -> (B, h, gh, gw).

    The columns of prefix tokens are left out. Values are as the softmax gave them: a map sums to 1 minus what CLS gives
    to itself and to the registers. ValueError when T is not prefix_tokens + gh * gw, and without a CLS token
    (prefix_tokens < 1).
    """
    rows, columns = grid
    tokens = attention.shape[-1]
    if prefix_tokens < 1:
        raise ValueError("attention of the CLS token needs a CLS token: prefix_tokens is 0")
    if attention.ndim != 4 or attention.shape[-2] not in (1, tokens) or tokens != prefix_tokens + rows * columns:
        raise ValueError(
            f"attention {tuple(attention.shape)} does not fit {prefix_tokens} prefix tokens and a {rows}x{columns} grid"
        )
    return attention[:, :, 0, prefix_tokens:].unflatten(-1, (rows, columns))


def rolled_out(attentions: Sequence[Tensor]) -> Tensor:
    """What reaches the CLS token through all blocks: (B, T); rows sum to 1.

    attentions: (B, T, T) of each block, the mean over its heads, first block first. Attention rollout of Abnar and
    Zuidema is the product over blocks of 0.5 A + 0.5 I, where I stands for the residual connection. Only the first row
    of the product is computed, from the last block backwards.
    """
    row = torch.zeros_like(attentions[0][:, 0])
    row[:, 0] = 1
    with torch.autocast(row.device.type, enabled=False):  # bf16 would lose shares as small as 1 / T
        for attention in reversed(attentions):
            row = 0.5 * row + 0.5 * torch.einsum("bt,btu->bu", row, attention)
    return row


def artifacts(norms: Tensor, factor: float) -> Tensor:
    """Patches that the network uses as registers: norms (B, gh, gw) -> bool, True above `factor` times the image's
    median.

    Darcet et al. find two groups of norms in a picture, the smaller group several times above the other, and cut
    between them. The cut depends on the model, but its ratio to the median hardly does.
    """
    return norms > factor * norms.flatten(-2).median(-1).values[..., None, None]


def without_artifacts(maps: Tensor, found: Tensor) -> Tensor:
    """maps (B, ..., gh, gw) in which each patch of `found` (B, gh, gw) gets the median of its neighbours.

    Neighbours are the up to 8 patches around it that are no artifacts. Where artifacts touch, the outer ones are filled
    first. A picture of artifacts alone stays as it is.
    """
    found = found.view(len(found), *[1] * (maps.ndim - 3), *found.shape[1:]).expand_as(maps)
    filled = maps.masked_fill(found, torch.nan)
    for _ in range(max(maps.shape[-2:])):
        missing = filled.isnan()
        if not missing.any():
            break
        padded = functional.pad(filled, (1, 1, 1, 1), value=torch.nan)
        median = padded.unfold(-2, 3, 1).unfold(-2, 3, 1).flatten(-2).nanmedian(-1).values
        filled = torch.where(missing, median, filled)
    return torch.where(filled.isnan(), maps, filled)


def mass_mask(maps: Tensor, threshold: float = 0.6) -> Tensor:
    """The patches that hold the top `threshold` of a map's mass: (..., gh, gw) attention -> bool of the same shape.

    The official rule: sort the patches in ascending order and divide each by the sum of the map. A patch is kept when
    the cumulative sum, its own share included, is strictly above 1 - threshold. Equal patches are ordered by their
    index (the official sort promises no order). A map without mass gives an empty mask. ValueError for a threshold
    outside 0..1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the mass threshold must lie in 0..1, not {threshold}")
    return (_ascending_mass(maps) > 1 - threshold).view(maps.shape)


def _ascending_mass(maps: Tensor) -> Tensor:
    """(..., gh, gw) -> (..., gh * gw): for every patch the cumulative mass of itself and all smaller ones."""
    flat = maps.flatten(-2)
    values, order = torch.sort(flat, dim=-1, stable=True)
    values = values / values.sum(-1, keepdim=True)
    # In float32 and ascending, as in the official code: rounding decides about patches at the cut.
    cumulative = values.cumsum(-1)
    return torch.empty_like(cumulative).scatter_(-1, order, cumulative)


def mean_map(maps: Tensor) -> Tensor:
    """(B, h, gh, gw) -> (B, gh, gw): mean over heads."""
    return maps.mean(1)


def max_map(maps: Tensor) -> Tensor:
    """(B, h, gh, gw) -> (B, gh, gw): the largest value over heads, each head scaled to mass 1.

    Without the scaling, a sharp head that gives much attention to its prefix tokens would never show.
    """
    return _shares(maps).amax(1)


def winning_head(maps: Tensor) -> Tensor:
    """(..., h, H, W) -> int64 (..., H, W): the head that gives most of its mass to each pixel, the first of equals."""
    return _shares(maps).argmax(-3)


def _shares(maps: Tensor) -> Tensor:
    return maps / maps.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def upsample(maps: Tensor, size: tuple[int, int], mode: Literal["nearest", "bilinear"] = "nearest") -> Tensor:
    """(..., gh, gw) floats or bools -> (..., H, W).

    size: of the picture that the grid covers, in pixels. When the model saw a resized picture, give the original size;
    the grid is stretched over it. nearest: pixel y takes the patch floor((y + 0.5) * gh / H). For H = gh * patch that
    repeats every patch, as in the official code. bilinear: interpolated between the centers of patches; the border
    continues the outer patches. It takes no bools.
    """
    rows, columns = maps.shape[-2:]
    height, width = size
    if mode == "nearest":
        return maps.index_select(-1, _nearest(columns, width, maps.device)).index_select(
            -2, _nearest(rows, height, maps.device)
        )
    if mode != "bilinear":
        raise ValueError(f"upsampling mode must be nearest or bilinear, not {mode!r}")
    if not maps.is_floating_point():
        raise ValueError("bilinear upsampling needs floats: upsample the map and then make the mask, or use nearest")
    flat = maps.reshape(1, -1, rows, columns)
    return functional.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False).view(
        *maps.shape[:-2], height, width
    )


@functools.lru_cache(maxsize=256)
def _nearest(cells: int, pixels: int, device: torch.device) -> Tensor:
    """(pixels,) int64: the cell that holds the center of each pixel, in integer arithmetic."""
    return (2 * torch.arange(pixels, device=device) + 1) * cells // (2 * pixels)
