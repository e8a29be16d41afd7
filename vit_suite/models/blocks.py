"""Pieces of a ViT that timm has no option for: fixed sine positions, post-norm blocks, causal order over patches, a
last block for the CLS token alone, and drop path that does not depend on the number of ranks.

Axes: B images, N patches (row-major), T = prefix + N tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vit_suite.errors import UserError
from vit_suite.views.draw import Draw, alone


class PostNormBlock(Block):
    """LayerNorm after each sum, as in the original Transformer (Vaswani et al. 2017, section 3.1), with timm's
    parameter names.

    A network of these needs no norm at its end; without a warm-up of the learning rate it trains badly (arXiv
    2002.04745).
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


PLAIN = {torch.bfloat16: 1536, torch.float32: 64}
"""Tokens from which torch's fused kernel is faster on a CPU. With AVX512-BF16 it took, forward and backward, so many
times as long as `PlainAttention`: bf16, 65 tokens 5.4, 577 2.1, 1,025 1.4, 2,304 0.85; fp32, 17 tokens 1.6, 50 1.2, 65
0.9, 577 0.9, 1,025 0.5."""


class Attention(TimmAttention):
    """timm's attention, with two things more:

    `forward(x, first=n)` answers for the first n tokens alone, (B, n, D): they look at all, but who looks at them is
    not worked out. Where `fused_attn` is off, and there is no mask, dropout or norm of q and k, `PlainAttention` does
    the work between the two linear layers of sequences up to `PLAIN` tokens; of longer ones it is the fused kernel all
    the same, which keeps no (T, T) weights.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, first: int | None = None
    ) -> Tensor:
        if first is not None:
            return self._of_first(x, first)
        usual = (
            attn_mask is None
            and not is_causal
            and isinstance(self.q_norm, nn.Identity)
            and not (self.training and self.attn_drop.p)
        )
        if self.fused_attn or not usual:
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x)
        if x.shape[1] < PLAIN.get(qkv.dtype, 0):
            x = PlainAttention.apply(qkv, self.num_heads, self.scale)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))

    def _of_first(self, x: Tensor, first: int) -> Tensor:
        (batch, tokens, _), width = x.shape, self.qkv.out_features // 3
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :first], weight[:width], None if bias is None else bias[:width])
        kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
        q = self.q_norm(q.view(batch, first, self.num_heads, -1).transpose(1, 2))  # (B, heads, n, d)
        k, v = kv.view(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        k, dropout = self.k_norm(k), self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class PlainAttention(torch.autograd.Function):
    """softmax(scale q k^T) v of qkv (B, T, 3 D), as timm's q, k and v lie in it: (B, T, D).

    By hand, because q, k and v are then copied into place once instead of one by one, and so are their gradients: on a
    CPU 5-20% less
    time than autograd's, the same numbers. Not differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, scale: float) -> Tensor:
        batch, tokens, _ = qkv.shape
        q, k, v = (
            qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)
        )  # (B heads, T, d)
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale)
        weights = scores.softmax(dim=-1, dtype=_softmax_dtype(scores)).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.heads, ctx.scale = heads, scale
        return (weights @ v).view(batch, heads, tokens, -1).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        batch, tokens, _ = gradient.shape
        gradient = gradient.view(batch, tokens, ctx.heads, -1).transpose(1, 2).flatten(0, 1)  # (B heads, T, d)
        found = torch.empty(3, *q.shape, dtype=q.dtype, device=q.device)  # of q, k, v
        torch.bmm(weights.mT, gradient, out=found[2])
        dtype = _softmax_dtype(weights)
        weights = weights.to(dtype)
        of_scores = torch._softmax_backward_data((gradient @ v.mT).to(dtype), weights, -1, dtype).to(q.dtype)
        torch.baddbmm(found[0], of_scores, k, beta=0, alpha=ctx.scale, out=found[0])
        torch.baddbmm(found[1], of_scores.mT, q, beta=0, alpha=ctx.scale, out=found[1])
        return found.view(3, batch, ctx.heads, tokens, -1).permute(1, 3, 0, 2, 4).reshape(batch, tokens, -1), None, None


def _softmax_dtype(scores: Tensor) -> torch.dtype:
    """fp32 for rows shorter than a vector of 32 bf16 numbers, which torch's CPU kernel is 2 (backward 10) times slower
    with."""
    return torch.float32 if scores.dtype == torch.bfloat16 and scores.shape[-1] < 32 else scores.dtype


def of_first(block: nn.Module, x: Tensor, first: int) -> Tensor:
    """The first tokens (B, first, D) of what `block` (`answers_first`) makes of x (B, T, D): the same numbers, to
    rounding, for less."""
    post = isinstance(block, PostNormBlock)
    change = block.drop_path1(block.ls1(block.attn(x if post else block.norm1(x), first=first)))
    if post:
        x = block.norm1(x[:, :first] + change)
        return block.norm2(x + block.drop_path2(block.ls2(block.mlp(x))))
    x = x[:, :first] + change
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def answers_first(block: nn.Module) -> bool:
    """Whether `of_first` knows what this block does."""
    return type(block) in (Block, PostNormBlock) and isinstance(block.attn, Attention)


def replace_attention(vit: nn.Module) -> None:
    """Make timm's plain attention this module's, which has the same parameters; variants of it (gates, norms of the
    output) stay."""
    for block in vit.blocks:
        attention = getattr(block, "attn", None)
        plain = getattr(attention, "gate", None) is None and isinstance(
            getattr(attention, "norm", nn.Identity()), nn.Identity
        )
        if type(attention) is TimmAttention and plain:
            attention.__class__ = Attention


class DropPath(nn.Module):
    """timm's stochastic depth, drawn for the GLOBAL batch of a step and cut to the rows of this micro-batch.

    So ranks and micro-batches drop what one rank with the whole batch drops, provided that torch's generator, which the
    numbers come from, stands alike on all of them. `place` says which rows the images are; without it they are all
    there are. Input (V B, T, D): V views of B images, view by view; with `views` they are the views from its first
    number on, of as many as its second says.
    """

    place: Draw | None = None
    views: tuple[int, int] | None = None

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    @torch.compiler.disable  # its rate, another in every block, would make every block another graph
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        place = self.place or alone(len(x))
        count = len(x) // (place.rows.stop - place.rows.start)
        first, views = self.views or (0, count)
        kept = x.new_empty(views, place.total).bernoulli_(1 - self.rate)[first : first + count, place.rows] / (
            1 - self.rate
        )
        return x * kept.reshape(-1, 1, 1)


@contextmanager
def drawing_for(network: nn.Module, views: range, alike: range) -> Iterator[None]:
    """Here `network` sees `views` of the views `alike`, and its drop path draws what it would draw in one pass over all
    of these.

    The passes follow each other; each but the last leaves torch's generators as it found them.
    """
    device = next(network.parameters()).device
    paths = [module for module in network.modules() if isinstance(module, DropPath)]
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=views.stop < alike.stop):
        for path in paths:
            path.views = views.start - alike.start, len(alike)
        try:
            yield
        finally:
            for path in paths:
                path.views = None


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

    sincos_1d: of the place in the sequence, prefix included; sine and cosine take turns (Vaswani et al. 2017, section
    3.5).
    sincos_2d: quarters sin(column), cos(column), sin(row), cos(row), and zero for the prefix (Beyer et al. 2022 after
    MoCo v3).
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
