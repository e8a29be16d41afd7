"""Attention maps and masks from the attention of a vision transformer: tensors in, tensors out.

Source: facebookresearch/dino visualize_attention.py, main block. Its `w_featmap` counts rows and its `h_featmap`
columns; here a grid
is always (rows, columns). Deliberate deviations: batches, any number of prefix tokens (registers), sizes that are no
multiple of the patch, bilinear upsampling beside the official nearest one. Beyond it: rollout (Abnar, Zuidema 2020,
arXiv 2005.00928) and the artifacts of high norm (Darcet et al. 2023, arXiv 2309.16588).

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
    """What the CLS token looks at in the last block: images (B, C, H, W), normalized -> (B, h, gh, gw) float32, without
    gradients.

    backbone: anything with patch_size (or patch, both sides), prefix_tokens, has_cls and last_attention
    (vit_suite.models.backbone.Backbone). A module runs in eval mode and gets its own mode back. UserError for a
    backbone without a CLS token.
    """
    require_cls(backbone)
    with torch.no_grad(), frozen(backbone) if isinstance(backbone, nn.Module) else nullcontext():
        return look(backbone, images).heads


def look(backbone: Any, images: Tensor, rollout: bool = False, norms: bool = False, patches: bool = False) -> Look:
    """The maps of images (B, C, H, W), normalized, from one forward pass. Gradients and train or eval mode are the
    caller's.

    `rollout` holds an attention matrix (B, T, T) for each block; without it memory grows with T alone where the kernel
    of the blocks allows it. For anything beyond the heads the backbone needs depth, embed, blocks and attention_of too.
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
    """What the CLS token looks at: (B, h, T, T) softmaxed attention, or its first row (B, h, 1, T) -> (B, h, gh, gw),
    without the prefix columns.

    Values are as the softmax gave them: a map sums to 1 minus what CLS gives to itself and to the registers.
    Raises ValueError when T is not prefix_tokens + gh * gw, or there is no CLS token (prefix_tokens < 1).
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
    """What reaches the CLS token through all blocks: mean over heads (B, T, T) of each block, first block first -> (B,
    T), rows sum to 1.

    Attention rollout of Abnar and Zuidema: the product over blocks of 0.5 A + 0.5 I, the second for the residual
    connection. Only its
    first row is computed, from the last block back.
    """
    row = torch.zeros_like(attentions[0][:, 0])
    row[:, 0] = 1
    with torch.autocast(row.device.type, enabled=False):  # shares as small as 1 / T are added up
        for attention in reversed(attentions):
            row = 0.5 * row + 0.5 * torch.einsum("bt,btu->bu", row, attention)
    return row


def artifacts(norms: Tensor, factor: float) -> Tensor:
    """Patches that the network has turned into registers: norms (B, gh, gw) -> bool, True above `factor` times the
    image's median.

    Darcet et al. find the norms of a picture's patches in two groups, the smaller one several times above the other,
    and cut between them; where the cut lies depends on the model, its ratio to the median hardly.
    """
    return norms > factor * norms.flatten(-2).median(-1).values[..., None, None]


def without_artifacts(maps: Tensor, found: Tensor) -> Tensor:
    """maps (B, ..., gh, gw) whose patches in `found` (B, gh, gw) get the median of their neighbours (of 8, those that
    are none).

    Where artifacts touch, the outermost are filled first. A picture of artifacts alone stays as it is.
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

    The official rule: patches in ascending order, each divided by the sum of the map; kept are those whose cumulative
    sum, their own
    share included, is strictly above 1 - threshold. Equal patches are ordered by their index (the official sort
    promises no order). A map without any mass gives an empty mask. Raises ValueError for a threshold outside 0..1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the mass threshold must lie in 0..1, not {threshold}")
    return (_ascending_mass(maps) > 1 - threshold).view(maps.shape)


def _ascending_mass(maps: Tensor) -> Tensor:
    """(..., gh, gw) -> (..., gh * gw): for every patch the cumulative mass of itself and all smaller ones."""
    flat = maps.flatten(-2)
    values, order = torch.sort(flat, dim=-1, stable=True)
    values = values / values.sum(-1, keepdim=True)
    cumulative = values.cumsum(
        -1
    )  # in float32, ascending: as the official code, whose rounding decides patches at the cut
    return torch.empty_like(cumulative).scatter_(-1, order, cumulative)


def mean_map(maps: Tensor) -> Tensor:
    """(B, h, gh, gw) -> (B, gh, gw): mean over heads."""
    return maps.mean(1)


def max_map(maps: Tensor) -> Tensor:
    """(B, h, gh, gw) -> (B, gh, gw): largest value over heads, after each head is scaled to mass 1 (else a sharp head
    that gives much to its prefix tokens would never show)."""
    return _shares(maps).amax(1)


def winning_head(maps: Tensor) -> Tensor:
    """(..., h, H, W) -> int64 (..., H, W): the head that gives most of its mass to each pixel, the first of equals."""
    return _shares(maps).argmax(-3)


def _shares(maps: Tensor) -> Tensor:
    return maps / maps.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def upsample(maps: Tensor, size: tuple[int, int], mode: Literal["nearest", "bilinear"] = "nearest") -> Tensor:
    """(..., gh, gw) floats or bools -> (..., H, W).

    `size` is the picture that the grid covers, in pixels; when the model saw a resized picture, give the original size:
    the grid stretches over it. nearest: pixel y takes the patch floor((y + 0.5) * gh / H), which for H = gh * patch
    repeats every patch, as the official code. bilinear: patch centers are interpolated, borders continue the outer
    patches; bools are not accepted.
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
    """(pixels,) int64: the cell that holds each pixel's center, in integer arithmetic."""
    return (2 * torch.arange(pixels, device=device) + 1) * cells // (2 * pixels)
