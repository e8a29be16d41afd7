"""Parts of a ViT for which timm has no option: post-norm blocks, causal order over patches, a last block for the CLS
token only, drop path whose draws do not depend on the number of ranks, and the attention weights of a block.

Axes: B images, N patches (row-major), T = prefix + N tokens, D width, M views (one row of a forward pass each).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers import DropPath as TimmDropPath
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vit_suite.errors import UserError


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drops the branch of a block for some of the views.

    `forward(x, kept)` multiplies view m of x (M, T, D) by kept[m], which is 0 or 1 / (1 - rate). `Backbone.drawn_paths`
    draws these factors once for a whole step. So all ranks and micro-batches together drop what one rank with the whole
    batch drops, and a block that is computed again in the backward pass drops the same views again. Without `kept` each
    call draws from torch's generator, as timm's DropPath does. In evaluation it does nothing.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        if not self.training:
            return x
        if kept is None:
            kept = self.draw(x)
        return x * kept.to(x.dtype).view(-1, 1, 1)

    @torch.compiler.disable  # each block has its own rate, so each block would compile to a graph of its own
    def draw(self, x: Tensor) -> Tensor:
        """(M,) factors for x (M, T, D), from torch's generator."""
        return x.new_empty(len(x)).bernoulli_(1 - self.rate) / (1 - self.rate)


def replace_drop_path(vit: Any, uniform: float = 0.0) -> None:
    """Replace timm's DropPath by this module's in blocks whose `forward` takes `kept`. UserError for other blocks.

    uniform: the rate of all blocks, in place of timm's rates, which rise linearly.
    """
    for block in vit.blocks:
        if uniform and isinstance(block, OWN_BLOCKS):
            for name in ("drop_path1", "drop_path2"):
                setattr(block, name, DropPath(uniform))
        for name, part in list(block.named_modules()):
            if isinstance(part, TimmDropPath):
                if not isinstance(block, OWN_BLOCKS):
                    raise UserError(
                        f"backbone.drop_path {part.drop_prob:g}: {type(block).__name__} blocks cannot drop the same"
                        " paths on any number of ranks: set backbone.drop_path 0."
                    )
                setattr(block, name, DropPath(part.drop_prob))


def _dropped(path: nn.Module, branch: Tensor, kept: Tensor | None, index: int) -> Tensor:
    """`branch` after the drop path of a block. timm has an Identity in place of a drop path of rate 0."""
    if not isinstance(path, DropPath):
        return branch
    return path(branch, None if kept is None else kept[index])


class PreNormBlock(Block):
    """timm's Block with drawn paths: `kept` (2, M) holds the factors of the attention and of the MLP branch."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, kept: Tensor | None = None
    ) -> Tensor:
        branch = self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        x = x + _dropped(self.drop_path1, branch, kept, 0)
        return x + _dropped(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), kept, 1)


class PostNormBlock(Block):
    """LayerNorm after each sum, as in the original Transformer (Vaswani et al. 2017, section 3.1). Parameter names are
    timm's.

    A network of these blocks needs no norm at its end. It trains badly without a warm-up of the learning rate (arXiv
    2002.04745).
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, kept: Tensor | None = None
    ) -> Tensor:
        branch = self.ls1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))
        x = self.norm1(x + _dropped(self.drop_path1, branch, kept, 0))
        return self.norm2(x + _dropped(self.drop_path2, self.ls2(self.mlp(x)), kept, 1))


class BranchNormBlock(ResPostBlock):
    """timm's ResPostBlock (LayerNorm at the end of each branch) with drawn paths."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, kept: Tensor | None = None
    ) -> Tensor:
        branch = self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal))
        x = x + _dropped(self.drop_path1, branch, kept, 0)
        return x + _dropped(self.drop_path2, self.norm2(self.mlp(x)), kept, 1)


class RopeBlock(EvaBlock):
    """timm's EvaBlock (rotary positions, LayerScale, plain or gated MLP) with drawn paths.

    `rope` (N, 2 d) or (heads, N, 2 d): sines and cosines of the patches' positions, for heads of width d.
    """

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        kept: Tensor | None = None,
    ) -> Tensor:
        branch = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = x + _dropped(self.drop_path1, branch if self.gamma_1 is None else self.gamma_1 * branch, kept, 0)
        branch = self.mlp(self.norm2(x))
        return x + _dropped(self.drop_path2, branch if self.gamma_2 is None else self.gamma_2 * branch, kept, 1)


OWN_BLOCKS = (PreNormBlock, PostNormBlock, BranchNormBlock, RopeBlock)
"""Blocks whose `forward` takes `kept`."""


def replace_rope_blocks(vit: nn.Module) -> None:
    """Turn timm's EvaBlocks into RopeBlocks, which hold the same parts. timm's Eva has no argument for its blocks."""
    blocks: Any = vit.blocks
    for block in blocks:
        if type(block) is EvaBlock:
            block.__class__ = RopeBlock


PLAIN = {torch.bfloat16: 1536, torch.float32: 64}
"""Number of tokens from which torch's fused kernel is faster on a CPU. Its time over that of `PlainAttention`, forward
and backward, on a core with AVX512-BF16:

- bf16: 5.4 at 65 tokens, 2.1 at 577, 1.4 at 1,025, 0.85 at 2,304.
- fp32: 1.6 at 17 tokens, 1.2 at 50, 0.9 at 65, 0.9 at 577, 0.5 at 1,025.
"""


class Attention(TimmAttention):
    """timm's attention, with two additions:

    - On a CPU, sequences shorter than `PLAIN` tokens go through `PlainAttention`, unless there is a mask, dropout, a
      gate or a norm. All other inputs go through torch's fused kernel, which keeps no (T, T) weights.
    - `of_first(x, n)` returns the output (B, n, D) of the first n tokens only. They attend to all tokens.
    """

    @property
    def plain(self) -> bool:
        """Whether only softmax(q k^T) v lies between the two linear layers."""
        norms = (self.q_norm, self.k_norm, self.norm)
        return self.gate is None and all(isinstance(norm, nn.Identity) for norm in norms)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, first: int | None = None
    ) -> Tensor:
        """`first`: return the output of that many first tokens only.

        It is an argument of `forward` because FSDP2 gathers the weights there.
        """
        if first is not None:
            return self.of_first(x, first)
        masked = attn_mask is not None or is_causal
        if masked or not self.plain or (self.training and self.attn_drop.p):
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x)
        if x.device.type != "cpu":  # timm's permutes before it takes apart, and the gradient of that is one more copy
            q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2))
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        elif x.shape[1] < PLAIN.get(qkv.dtype, 0):
            x = PlainAttention.apply(qkv, self.num_heads, self.scale)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))

    def of_first(self, x: Tensor, first: int) -> Tensor:
        """(B, T, D) -> (B, first, D). Needs a layer without `norm` and `gate`."""
        (batch, tokens, _), width = x.shape, self.qkv.out_features // 3
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :first], weight[:width], None if bias is None else bias[:width])
        kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
        q = self.q_norm(q.view(batch, first, self.num_heads, -1).transpose(1, 2))  # (B, heads, n, d)
        k, v = kv.view(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        k, dropout = self.k_norm(k), self.attn_drop.p if self.training else 0.0
        if x.device.type == "cpu":
            x = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class PlainAttention(torch.autograd.Function):
    """softmax(scale q k^T) v -> (B, T, D) from qkv (B, T, 3 D) in timm's layout.

    The gradient is written by hand: one copy moves q, k and v into place, and one copy their gradients. On a CPU that
    takes 5-20% less time than autograd, for the same numbers. It cannot be differentiated twice.
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
    """fp32 for rows of fewer than 32 bf16 numbers (one vector): there torch's CPU kernel is 2 times slower in bf16, and
    its backward pass 10 times."""
    return torch.float32 if scores.dtype == torch.bfloat16 and scores.shape[-1] < 32 else scores.dtype


def of_first(block: Any, x: Tensor, first: int, kept: Tensor | None = None) -> Tensor:
    """The first tokens (B, first, D) of `block(x)`, x (B, T, D), without the work for the other tokens.

    The numbers are the same to rounding. `answers_first(block)` has to be True.
    """
    post = isinstance(block, PostNormBlock)
    branch = block.ls1(block.attn(x if post else block.norm1(x), first=first))
    x = x[:, :first] + _dropped(block.drop_path1, branch, kept, 0)
    if post:
        x = block.norm1(x)
        return block.norm2(x + _dropped(block.drop_path2, block.ls2(block.mlp(x)), kept, 1))
    return x + _dropped(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), kept, 1)


def answers_first(block: nn.Module) -> bool:
    """Whether `of_first` can compute this block."""
    attention: Any = getattr(block, "attn", None)
    known = type(block) in (PreNormBlock, PostNormBlock) and isinstance(attention, Attention)
    return known and attention.gate is None and isinstance(attention.norm, nn.Identity)


def own_layers(vit: Any) -> dict[str, type[nn.Module]]:
    """timm arguments that build a network like `vit` with this module's blocks and attention in place of timm's plain
    ones."""
    block = vit.blocks[0]
    blocks = {Block: PreNormBlock, ResPostBlock: BranchNormBlock}
    layers: dict[str, type[nn.Module]] = {"block_fn": blocks[type(block)]} if type(block) in blocks else {}
    if type(getattr(block, "attn", None)) is TimmAttention and layers:
        layers["attn_layer"] = Attention
    return layers


def queries_and_keys(block: nn.Module, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k (B, heads, T, d) as `block` multiplies them: after their norms and rotations. x (B, T, D) is the input of
    the block.

    UserError if the attention of the block cannot be read.
    """
    attention: Any = getattr(block, "attn", None)  # the kinds of attention share names, but no base class
    known = isinstance(attention, TimmAttention | EvaAttention | AttentionRope)
    if not isinstance(block, OWN_BLOCKS) or not known:
        raise UserError(f"the attention of {type(block).__name__} blocks cannot be read; use a plain ViT.")
    x = x if isinstance(block, PostNormBlock | BranchNormBlock) else block.norm1(x)
    if attention.qkv is None:
        q, k = attention.q_proj(x), attention.k_proj(x)
    else:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:  # Eva's, which has no bias on k
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, _ = F.linear(x, attention.qkv.weight, bias).chunk(3, dim=-1)
    q, k = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in (q, k))
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        prefix = attention.num_prefix_tokens
        q, k = (
            torch.cat(
                [part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=attention.rotate_half)], dim=2
            )
            for part in (q, k)
        )
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # several heads may share a key


@functools.lru_cache(maxsize=8)
def causal_mask(tokens: int, prefix: int, device: torch.device) -> Tensor:
    """(T, T) bool, True where a row may attend: the prefix to all tokens, a patch to itself and to earlier patches.

    Patches do not attend to the prefix: one block earlier the CLS token saw the whole image, so it knows later patches.
    """
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_()
    mask[:, :prefix] = False
    mask[:prefix] = True
    return mask.to(device)
