"""Masked autoencoders: an encoder that sees only the visible patches, and two decoders.

MAE (He et al. 2021, arXiv 2111.06377; facebookresearch/mae models_mae.py): the self-attention of the decoder runs over
all patches, with a mask token in the place of each hidden one. CrossMAE (arXiv 2401.14391; TonyLianLong/CrossMAE
models_cross.py): hidden patches attend to the visible ones by cross-attention, and never to each other. So any part of
the hidden patches can be predicted.

Axes: B images, C channels, N patches (row-major), n visible ones, m predicted ones, P prefix tokens (CLS, registers),
D encoder width, E decoder width, p side of a patch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.blocks import Attention, PreNormBlock
from vit_suite.models.positions import sincos_positions
from vit_suite.views.masks import Split

layer_norm = partial(nn.LayerNorm, eps=1e-6)
"""The epsilon of the official factories; torch's 1e-5 moves the outputs by 1e-3."""


def encode_visible(backbone: Backbone, images: Tensor, visible: Tensor, kept: Tensor | None = None) -> list[Tensor]:
    """Tokens (B, P + n, D) before the first block and after each block, without the final norm.

    Hidden patches are dropped after the positions are added, so the blocks compute n patches only.

    Args:
        images: (B, C, H, W), normalized.
        visible: (B, n) places of the patches that are seen.
        kept: (2 depth, B) which paths the blocks keep (`Backbone.drawn_paths`).
    """
    x, _ = backbone.embed(images)
    prefix = backbone.prefix_tokens
    patches = x[:, prefix:].gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    x = torch.cat([x[:, :prefix], patches], dim=1)
    return [x, *backbone.blocks(x, None, kept)]


class Decoder(nn.Module):
    """The parts of both decoders: positions, the mask token, and the last linear map to pixels.

    Args:
        grid: (h, w) of the patches.
        dim: E. UserError unless `heads` and 4 divide it.
        pixels: p p C, the numbers of a patch.
    """

    def __init__(self, grid: tuple[int, int], dim: int, heads: int, pixels: int):
        super().__init__()
        if dim % heads:
            raise UserError(f"method.decoder_dim {dim} is not divisible by method.decoder_heads {heads}.")
        if dim % 4:
            raise UserError(f"method.decoder_dim {dim} is not divisible by 4, which its sine positions need.")
        self.positions: Tensor
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions("sincos_2d", grid, dim, 0), persistent=False)  # (1, N, E)
        self.norm = layer_norm(dim)
        self.predict = nn.Linear(dim, pixels)


class SelfDecoder(Decoder):
    """MAE's: transformer blocks over the prefix and all patches."""

    def __init__(self, encoder: Backbone, dim: int, depth: int, heads: int, mlp_ratio: float):
        pixels = encoder.patch_size**2 * encoder.cfg.channels
        super().__init__(encoder.native_grid, dim, heads, pixels)
        self.prefix = encoder.prefix_tokens
        self.embed = nn.Linear(encoder.dim, dim)
        options: dict[str, Any] = {"qkv_bias": True, "norm_layer": layer_norm, "attn_layer": Attention}
        self.blocks = nn.ModuleList(PreNormBlock(dim, heads, mlp_ratio, **options) for _ in range(depth))

    def forward(self, tokens: Tensor, split: Split) -> Tensor:
        """Normed tokens (B, P + n, D) of the encoder -> pixels (B, N, p p C) of all patches."""
        x = self.embed(tokens)
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        hidden = split.order.shape[1] - visible.shape[1]
        fill = self.mask_token.to(x.dtype).expand(len(x), hidden, -1)
        patches = torch.cat([visible, fill], dim=1)  # visible, then hidden, as `order` counts them
        patches = patches.gather(1, split.order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([prefix, patches + self.positions], dim=1)  # the prefix has no position: zeros, as in MAE
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))[:, self.prefix :]


class CrossAttention(nn.Module):
    """Queries (B, m, E) attend to the encoder's tokens (B, T, D)."""

    def __init__(self, encoder_dim: int, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(encoder_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads_of(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, heads, m, d), k and v (B, heads, T, d)."""
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(*self.heads_of(queries, tokens))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Attention of each query: (B, heads, m, T) in fp32, rows sum to 1."""
        q, k, _ = self.heads_of(queries, tokens)
        return (q.float() * q.shape[-1] ** -0.5 @ k.float().mT).softmax(dim=-1)


class CrossBlock(nn.Module):
    """Cross-attention and MLP; no attention among the queries."""

    def __init__(self, encoder_dim: int, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = CrossAttention(encoder_dim, dim, heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = queries + self.attn(self.norm1(queries), tokens)
        return queries + self.mlp(self.norm2(queries))


class CrossDecoder(Decoder):
    """CrossMAE's: each block attends to its own learned mixture of the encoder's levels (`encode_visible`)."""

    def __init__(self, encoder: Backbone, dim: int, depth: int, heads: int, mlp_ratio: float):
        pixels = encoder.patch_size**2 * encoder.cfg.channels
        super().__init__(encoder.native_grid, dim, heads, pixels)
        self.prefix = encoder.prefix_tokens
        self.mix = nn.Linear(encoder.depth + 1, depth, bias=False)
        self.norms = nn.ModuleList(layer_norm(encoder.dim) for _ in range(depth))
        self.blocks = nn.ModuleList(CrossBlock(encoder.dim, dim, heads, mlp_ratio) for _ in range(depth))

    def mixtures(self, levels: list[Tensor]) -> Tensor:
        """Encoder tokens of depth + 1 levels, each (B, T, D) -> one mixture a decoder block, (blocks, B, T, D)."""
        stacked = torch.stack(levels)  # (levels, B, T, D)
        return (self.mix.weight.to(stacked.dtype) @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])

    def queries(self, split: Split) -> Tensor:
        """Mask token and position of each predicted patch, in row-major order: (B, m, E)."""
        return self.mask_token + self.positions[0][split.asked]

    def forward(self, levels: list[Tensor], split: Split) -> Tensor:
        """Encoder tokens of each level -> pixels (B, m, p p C) of the predicted patches, in row-major order."""
        x = self.queries(split)
        for block, norm, tokens in zip(self.blocks, self.norms, self.mixtures(levels), strict=True):
            x = block(x, norm(tokens))
        return self.predict(self.norm(x))

    def attention(self, levels: list[Tensor], split: Split, index: int = -1) -> Tensor:
        """Attention of each predicted patch in decoder block `index`: (B, heads, m, P + n) in fp32."""
        x = self.queries(split)
        index %= len(self.blocks)
        blocks: Any = self.blocks
        for place, (block, norm, tokens) in enumerate(zip(blocks, self.norms, self.mixtures(levels), strict=True)):
            if place == index:
                return block.attn.weights(block.norm1(x), norm(tokens))
            x = block(x, norm(tokens))
        raise AssertionError("index is a block's")


def init_mae_(network: nn.Module) -> None:
    """Initialize as MAE: Xavier-uniform linear layers and patch embedding, biases 0, tokens from a normal of 0.02."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
