"""Attention maps and masks from the attention of a vision transformer's last block: tensors in, tensors out.

Source: facebookresearch/dino visualize_attention.py, main block. Its `w_featmap` counts rows and its `h_featmap` columns; here a grid
is always (rows, columns). Deliberate deviations: batches, any number of prefix tokens (registers), sizes that are no multiple of the
patch, bilinear upsampling beside the official nearest one.

Axes: B images, h heads, T tokens = prefix tokens (CLS first, then registers) + gh x gw patches, row-major.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_suite.errors import UserError
from vit_suite.evaluation.features import frozen


def attention_maps(backbone: Any, images: Tensor) -> Tensor:
    """What the CLS token looks at in the last block: images (B, C, H, W), normalised -> (B, h, gh, gw) float32, without gradients.

    backbone: anything with patch_size, prefix_tokens and last_attention (vit_suite.models.backbone.Backbone); a module runs in eval
    mode and gets its own mode back. UserError for a backbone without a CLS token.
    """
    require_cls(backbone)
    grid = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    with torch.no_grad(), frozen(backbone) if isinstance(backbone, nn.Module) else nullcontext():
        return cls_attention(backbone.last_attention(images), backbone.prefix_tokens, grid).float()


def require_cls(backbone: Any) -> None:
    """UserError unless the backbone has a CLS token."""
    if backbone.prefix_tokens < 1:
        raise UserError(
            "this backbone has no CLS token, so there is no CLS attention to draw; use a model with one, such as "
            "timm:vit_small_patch16_224 or a DINO checkpoint"
        )


def cls_attention(attention: Tensor, prefix_tokens: int, grid: tuple[int, int]) -> Tensor:
    """What the CLS token looks at: (B, h, T, T) softmaxed attention -> (B, h, gh, gw), the CLS row without the prefix columns.

    Values are as the softmax gave them: a map sums to 1 minus what CLS gives to itself and to the registers.
    Raises ValueError when T is not prefix_tokens + gh * gw, or there is no CLS token (prefix_tokens < 1).
    """
    rows, columns = grid
    tokens = attention.shape[-1]
    if prefix_tokens < 1:
        raise ValueError("attention of the CLS token needs a CLS token: prefix_tokens is 0")
    if attention.ndim != 4 or attention.shape[-2] != tokens or tokens != prefix_tokens + rows * columns:
        raise ValueError(f"attention {tuple(attention.shape)} does not fit {prefix_tokens} prefix tokens and a {rows}x{columns} grid")
    return attention[:, :, 0, prefix_tokens:].unflatten(-1, (rows, columns))


def mass_mask(maps: Tensor, threshold: float = 0.6) -> Tensor:
    """The patches that hold the top `threshold` of a map's mass: (..., gh, gw) attention -> bool of the same shape.

    The official rule: patches in ascending order, each divided by the sum of the map; kept are those whose cumulative sum, their own
    share included, is strictly above 1 - threshold. Equal patches are ordered by their index (the official sort promises no order).
    A map without any mass gives an empty mask. Raises ValueError for a threshold outside 0..1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the mass threshold must lie in 0..1, not {threshold}")
    return (_ascending_mass(maps) > 1 - threshold).view(maps.shape)


def _ascending_mass(maps: Tensor) -> Tensor:
    """(..., gh, gw) -> (..., gh * gw): for every patch the cumulative mass of itself and all smaller ones."""
    flat = maps.flatten(-2)
    values, order = torch.sort(flat, dim=-1, stable=True)
    values = values / values.sum(-1, keepdim=True)
    cumulative = values.cumsum(-1)  # in float32, ascending: as the official code, whose rounding decides patches at the cut
    return torch.empty_like(cumulative).scatter_(-1, order, cumulative)


def mean_map(maps: Tensor) -> Tensor:
    """(B, h, gh, gw) -> (B, gh, gw): mean over heads."""
    return maps.mean(1)


def max_map(maps: Tensor) -> Tensor:
    """(B, h, gh, gw) -> (B, gh, gw): largest value over heads, after each head is scaled to mass 1 (else a sharp head that gives
    much to its prefix tokens would never show)."""
    return (maps / maps.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)).amax(1)


def upsample(maps: Tensor, size: tuple[int, int], mode: Literal["nearest", "bilinear"] = "nearest") -> Tensor:
    """(..., gh, gw) floats or bools -> (..., H, W).

    `size` is the picture that the grid covers, in pixels; when the model saw a resized picture, give the original size: the grid
    stretches over it. nearest: pixel y takes the patch floor((y + 0.5) * gh / H), which for H = gh * patch repeats every patch, as the
    official code. bilinear: patch centres are interpolated, borders continue the outer patches; bools are not accepted.
    """
    rows, columns = maps.shape[-2:]
    height, width = size
    if mode == "nearest":
        return maps[..., _nearest(rows, height, maps.device)[:, None], _nearest(columns, width, maps.device)]
    if mode != "bilinear":
        raise ValueError(f"upsampling mode must be nearest or bilinear, not {mode!r}")
    if not maps.is_floating_point():
        raise ValueError("bilinear upsampling needs floats: upsample the map and then make the mask, or use nearest")
    flat = maps.reshape(1, -1, rows, columns)
    return functional.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False).view(*maps.shape[:-2], height, width)


def _nearest(cells: int, pixels: int, device: torch.device) -> Tensor:
    """(pixels,) int64: the cell that holds each pixel's centre, in integer arithmetic."""
    return (2 * torch.arange(pixels, device=device) + 1) * cells // (2 * pixels)
