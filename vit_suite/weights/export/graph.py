"""A backbone as plain tensor operations, for exporters that trace: any batch and any image size in one graph.

`Backbone` itself picks kernels by device and length and resizes positions by Python numbers, which a trace would
freeze. Here the position embedding of a grid is two matrix products whose weights come from the image's size, and
attention is written out. The numbers are the same to rounding (`tests/weights/test_export.py`).

Axes: B images, h x w patches, N = h w, T = prefix + N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.blocks import Attention, PostNormBlock, PreNormBlock, RopeBlock, queries_and_keys

Output = Literal["features", "patches", "attention"]
"""What a graph answers: the representation (B, D), the patch tokens (B, N, D) after the final norm, or what the CLS
token looks at in the last block, (B, heads, N), of which the prefix's share is left out."""
SHARPNESS, SMOOTH = -0.75, -0.5
"""The parameter of torch's bicubic kernel without and with antialiasing."""


def cubic(distance: Tensor, a: float = SHARPNESS) -> Tensor:
    """Keys' cubic convolution kernel of a distance in samples."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def smoothed_weights(count: Tensor, native: int) -> Tensor:
    """(count, native) matrix of `F.interpolate(size=count, mode="bicubic", antialias=True)`: another kernel (-0.5),
    as wide as the step where it shrinks."""
    step = native / (torch.ones_like(count).sum())
    width = torch.maximum(step, torch.ones_like(step))
    center = step * (count + 0.5)
    columns = torch.arange(native, device=count.device, dtype=count.dtype)
    weights = cubic((columns[None, :] - center[:, None] + 0.5) / width, SMOOTH)
    return weights / weights.sum(dim=1, keepdim=True)


def resize_weights(count: Tensor, native: int, offset: Tensor) -> Tensor:
    """(count, native) matrix that resizes a row of `native` samples bicubically to `count`, as `F.interpolate` does
    with `scale_factor=(count + offset) / native`. `count` (a vector 0 .. count - 1) may have any length in a graph.

    Samples beyond an end are the sample at that end.
    """
    length = count.shape[0]
    place = (count + 0.5) * native / (length + offset) - 0.5
    base = torch.floor(place)
    columns = torch.arange(native, device=count.device, dtype=count.dtype)
    weights = torch.zeros_like(place[:, None] * columns)
    for tap in (-1, 0, 1, 2):
        source = (base + tap).clamp(0, native - 1)
        weights = weights + cubic(place - base - tap)[:, None] * (source[:, None] == columns).to(count.dtype)
    return weights


def rotary_positions(periods: Tensor, grid: tuple[int, int]) -> Tensor:
    """(h w, 2 d): sines, then cosines, of the patches of a grid, for heads of width d and d / 4 periods.

    The formula of DINOv3 (rope_position_encoding.py): 2 pi times the middle of a patch, from -1 to 1 along each side,
    over each period. timm's module makes a Python number of the sides, which a trace would freeze.
    """
    places = []
    for side in grid:
        numbers = torch.arange(side, device=periods.device, dtype=torch.float32)
        places.append(2 * (numbers + 0.5) / torch.ones_like(numbers).sum() - 1)
    down, across = (2 * math.pi * place[:, None] / periods for place in places)  # (h, d / 4) and (w, d / 4)
    whole = torch.zeros_like(down[:, None] + across[None])
    angles = torch.cat([whole + down[:, None], whole + across[None]], dim=-1).flatten(0, 1)  # (h w, d / 2)
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([sine, sine, cosine, cosine], dim=-1)


class Traceable(nn.Module):
    """Images (B, C, H, W), normalized -> the tensors that `outputs` names, in that order.

    Raises:
        UserError: the backbone has a part that no graph is written for.
    """

    def __init__(self, backbone: Backbone, outputs: list[Output]):
        super().__init__()
        rope = getattr(backbone.vit, "rope", None)
        for block in backbone.vit.blocks:
            if not is_known(block, rope):
                raise UserError(
                    f"blocks of the type {type(block).__name__} cannot be exported as a graph: their attention is not"
                    " written for a trace. Take --format safetensors, timm or huggingface."
                )
        if backbone.cfg.causal:
            raise UserError("a network with causal order (backbone.causal) cannot be exported as a graph.")
        if "attention" in outputs and not backbone.has_cls:
            raise UserError("--outputs attention needs a CLS token, which this network does not have.")
        self.vit = backbone.vit
        self.periods: Tensor | None = None if rope is None else rope.periods
        self.outputs = list(outputs)
        self.pool, self.prefix = backbone.cfg.pool, backbone.prefix_tokens
        self.native = backbone.native_grid
        self.rule = backbone.cfg.resize or "offset"
        if self.rule == "sincos":
            raise UserError("a network with backbone.resize sincos cannot be exported as a graph.")
        self.post_norm = backbone.cfg.norm == "post"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, grid = self.embed(images)
        weights = x
        rope = None if self.periods is None else rotary_positions(self.periods, grid)
        for block in self.vit.blocks:
            x, weights = self.block(block, x) if rope is None else self.rotary_block(block, x, rope)
        x = self.vit.norm(x)
        patches = x[:, self.prefix :]
        answers = {
            "features": x[:, 0] if self.pool == "cls" else patches.mean(dim=1),
            "patches": patches,
            "attention": weights[:, :, 0, self.prefix :],
        }
        return tuple(answers[name] for name in self.outputs)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches, prefix tokens and positions (B, T, D), and the grid (h, w)."""
        vit = self.vit
        x = vit.patch_embed.proj(images)  # (B, D, h, w)
        grid = (x.shape[2], x.shape[3])
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))
        prefix = [token.expand(x.shape[0], -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is None:
            return vit.norm_pre(torch.cat([*prefix, x], dim=1)), grid
        skipped = 0 if vit.no_embed_class else self.prefix
        positions = self.positions(vit.pos_embed[:, skipped:], grid)
        if vit.no_embed_class:
            return vit.norm_pre(torch.cat([*prefix, x + positions], dim=1)), grid
        positions = torch.cat([vit.pos_embed[:, :skipped], positions], dim=1)
        return vit.norm_pre(torch.cat([*prefix, x], dim=1) + positions), grid

    def positions(self, position: Tensor, grid: tuple[int, int]) -> Tensor:
        """(1, h0 w0, D) of the native grid -> (1, h w, D): DINO's rule, `models.positions.resize_position`."""
        height, width = (
            torch.arange(side, device=position.device, dtype=torch.float32) for side in grid
        )  # of the graph's length
        if self.rule == "antialias":
            down, across = smoothed_weights(height, self.native[0]), smoothed_weights(width, self.native[1])
        else:
            same = torch.ones((), device=position.device)
            for numbers, native in ((height, self.native[0]), (width, self.native[1])):
                same = same * (torch.ones_like(numbers).sum() == native).to(same.dtype)
            # The native grid stays as it is, whatever the rule.
            offset = (0.1 if self.rule == "offset" else 0.0) * (1 - same)
            down = resize_weights(height, self.native[0], offset)
            across = resize_weights(width, self.native[1], offset)
        table = position.float().reshape(self.native[0], self.native[1], -1)
        return torch.einsum("ih,hwd,jw->ijd", down, table, across).flatten(0, 1).unsqueeze(0)

    def block(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, attention weights (B, heads, T, T)) after a block."""
        branch, weights = self.attend(block.attn, x if self.post_norm else block.norm1(x))
        x = x + block.ls1(branch)
        if self.post_norm:
            x = block.norm1(x)
            return block.norm2(x + block.ls2(block.mlp(x))), weights
        return x + block.ls2(block.mlp(block.norm2(x))), weights

    def attend(self, attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
        qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = F.softmax((q * attention.scale) @ k.transpose(-2, -1), dim=-1)
        return attention.proj((weights @ v).transpose(1, 2).flatten(2)), weights

    def rotary_block(self, block: Any, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, attention weights (B, heads, T, T)) after a block with rotary positions (N, 2 d)."""
        attention: Any = block.attn
        q, k = queries_and_keys(block, x, rope)
        weights = F.softmax((q * attention.scale) @ k.transpose(-2, -1), dim=-1)
        normed = block.norm1(x)
        v = attention.v_proj(normed) if attention.qkv is None else self.values(attention, normed)
        v = v.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        branch = attention.proj(attention.norm((weights @ v).transpose(1, 2).flatten(2)))
        x = x + (branch if block.gamma_1 is None else block.gamma_1 * branch)
        branch = block.mlp(block.norm2(x))
        return x + (branch if block.gamma_2 is None else block.gamma_2 * branch), weights

    @staticmethod
    def values(attention: Any, x: Tensor) -> Tensor:
        """v (B, T, heads d) of an attention whose q, k and v are one layer."""
        weight = attention.qkv.weight.chunk(3)[2]
        bias = attention.v_bias if attention.qkv.bias is None else attention.qkv.bias.chunk(3)[2]
        return F.linear(x, weight, bias)


def is_known(block: Any, rope: Any) -> bool:
    """Whether `Traceable` knows what the block computes. `rope`: the module of the network's rotary positions."""
    attention = block.attn
    if isinstance(block, RopeBlock):
        known = isinstance(attention, EvaAttention) and attention.gate is None and attention.rotate_half
        plain = isinstance(rope, RotaryEmbeddingDinoV3) and rope.normalize_coords == "separate"
        return bool(known and plain and not rope.grid_offset and rope.grid_indexing == "ij")
    known = type(block) in (Block, PreNormBlock, PostNormBlock) and isinstance(attention, Attention)
    return known and rope is None and attention.plain
