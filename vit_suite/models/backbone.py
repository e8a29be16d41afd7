"""The backbone: a timm `VisionTransformer` that answers with tokens and attention, at any image size.

Dosovitskiy et al. 2020 (arXiv 2010.11929) for the network, registers after arXiv 2309.16588. timm builds the blocks, so
key names are those of timm and of the DINO release. Deliberate differences from timm:

- Position embeddings at other sizes are resized as the DINO release does it (`resize_position`), not as timm does:
  released DINO and DINOv2 weights were trained that way, and `size=` moves the CLS output by 0.035-0.49.
- The CLS token starts from a truncated normal of 0.02 like the position embedding (DINO vision_transformer.py), not
  from 1e-6.
- On a CPU attention is plain softmax(q k^T) v up to the length where the fused kernel is faster. On a GPU it is always
  the fused kernel. The input's device decides.
- `backbone(images)` computes the last block for the CLS token alone, since nobody asks for its patches: a DINO step has
  11% fewer FLOP at depth 6, 7% at depth 12, and the same numbers to rounding. `tokens` runs it whole, so hooks on that
  block's parts belong on `tokens`.

Options beyond timm's, for `vit`: fixed sine positions, post-norm blocks, causal order over patches (models/blocks.py).

Axes: B images, C channels, H x W pixels, h x w patches (N = h w, row-major), T = prefix + N tokens, D width, R
registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError, nearest
from vit_suite.hardware import send
from vit_suite.models.blocks import (
    Attention,
    DropPath,
    PostNormBlock,
    PreNormBlock,
    answers_first,
    causal_mask,
    of_first,
    own_layers,
    replace_drop_path,
    sincos_positions,
)
from vit_suite.models.lora import add_pairs
from vit_suite.views.draw import Draw

EXPLICIT = "vit"
"""The name that stands for explicit dimensions instead of a timm model."""


@dataclass
class Tokens:
    """What a forward pass leaves behind, after the final LayerNorm."""

    cls: Tensor | None
    """(B, D); None where the network has no CLS token."""
    registers: Tensor
    """(B, R, D)."""
    patches: Tensor
    """(B, N, D), row-major over the grid."""
    grid: tuple[int, int]
    """(h, w) in patches."""
    blocks: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)
    """(cls, patches) of each block asked for, in the order of the blocks, each through the final LayerNorm."""


def resize_position(position: Tensor, native: tuple[int, int], grid: tuple[int, int], prefix: int) -> Tensor:
    """Position embeddings (1, prefix + N, D) of the `native` grid, bicubically resized to `grid`.

    As in DINO `vision_transformer.py` `interpolate_pos_encoding`: `scale_factor` (not `size`), with 0.1 added to the
    target, whose effect on the sampling points is part of what the released weights expect.
    """
    if grid == native:
        return position
    head, patches = position[:, :prefix], position[:, prefix:]
    patches = patches.reshape(1, *native, -1).permute(0, 3, 1, 2).float()  # (1, D, h0, w0)
    scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    if tuple(patches.shape[-2:]) != tuple(grid):
        raise RuntimeError(f"position embeddings came out {tuple(patches.shape[-2:])}, not {grid}")
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)
    return torch.cat([head, patches], dim=1)


def check_image_size(size: Iterable[int], patch_size: int, what: str = "image size") -> None:
    """Raise `UserError` unless both sides (pixels) are positive multiples of the patch."""
    size = tuple(int(side) for side in size)
    for side in size:
        if side < patch_size:
            raise UserError(f"{what} {size[0]}x{size[-1]} is smaller than a patch of {patch_size} pixels.")
        if side % patch_size:
            below = side // patch_size * patch_size
            raise UserError(
                f"{what} {size[0]}x{size[-1]} is not divisible by the patch size {patch_size}: nearest sides are "
                f"{below} and {below + patch_size}."
            )


def _explicit(cfg: BackboneConfig) -> dict:
    """timm arguments of a backbone given by its dimensions, DeiT-small's where a dimension is left out."""
    dim = cfg.dim or 384
    heads = cfg.heads or max(1, dim // 64)
    if dim % heads:
        raise UserError(f"backbone.dim {dim} is not divisible by backbone.heads {heads}.")
    return {
        "patch_size": cfg.patch_size or 16,
        "embed_dim": dim,
        "depth": cfg.depth or 12,
        "num_heads": heads,
        "mlp_ratio": 4.0 if cfg.mlp_ratio is None else cfg.mlp_ratio,
        "reg_tokens": cfg.registers or 0,
        "class_token": cfg.class_token,
        "norm_layer": functools.partial(LayerNorm, eps=cfg.norm_eps or 1e-6),
        "attn_layer": Attention,
        "block_fn": PreNormBlock if cfg.norm == "pre" else PostNormBlock,
        "final_norm": cfg.norm == "pre",
    }


def _overrides(cfg: BackboneConfig) -> dict:
    """timm arguments of the dimensions that the user set beside a timm name."""
    for option in ("class_token", "positions", "norm", "norm_eps"):
        if getattr(cfg, option) != getattr(BackboneConfig, option):
            raise UserError(f"backbone.{option} is for backbone.name 'vit'; '{cfg.name}' has its own.")
    given = {
        "patch_size": cfg.patch_size,
        "embed_dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
        "mlp_ratio": cfg.mlp_ratio,
        "reg_tokens": cfg.registers,
    }
    return {key: value for key, value in given.items() if value is not None}


def known_patch_size(cfg: BackboneConfig) -> int | None:
    """Side of a patch in pixels before the network is built, as far as options and name tell."""
    return cfg.patch_size or (16 if cfg.name == EXPLICIT else _patch_of(cfg.name))


def build_vit(cfg: BackboneConfig) -> VisionTransformer:
    """The timm network of `cfg`, without a classifier.

    Raises:
        UserError: the name is no timm model, the model is no plain VisionTransformer with a CLS token, or the image
            size is not divisible by the patch.
    """
    common = {"num_classes": 0, "global_pool": "", "in_chans": cfg.channels, "drop_path_rate": cfg.drop_path}
    if cfg.image_size is not None:
        size = tuple(cfg.image_size)
        common["img_size"] = size if len(size) == 2 else size * 2
    if cfg.name == EXPLICIT:
        if cfg.pretrained:
            raise UserError("backbone.pretrained needs a timm name in backbone.name; 'vit' has no published weights.")
        arguments = _explicit(cfg) | common
        check_image_size(common.get("img_size", (224, 224)), arguments["patch_size"])
        vit = VisionTransformer(dynamic_img_size=True, **arguments)
        if vit.cls_token is not None:
            nn.init.trunc_normal_(vit.cls_token, std=0.02)
        if cfg.positions != "learned":
            fixed = sincos_positions(cfg.positions, vit.patch_embed.grid_size, vit.embed_dim, vit.num_prefix_tokens)
            del vit.pos_embed
            vit.register_buffer("pos_embed", fixed)  # a buffer: neither trained nor averaged
        return vit
    if not timm.is_model(cfg.name):
        known = [EXPLICIT, *timm.list_models("*vit*"), *timm.list_models("deit*")]
        raise UserError(
            f"unknown backbone '{cfg.name}'.{nearest(cfg.name, known)} Use a timm ViT name, or 'vit' with explicit"
            " dims."
        )
    if "img_size" in common:
        native = cfg.patch_size or _patch_of(cfg.name)
        if native:
            check_image_size(common["img_size"], native)
    try:
        arguments = {"dynamic_img_size": True} | common | _overrides(cfg)
        with torch.device("meta"):
            layers = own_layers(timm.create_model(cfg.name, **arguments | {"depth": 1}))
        vit = timm.create_model(cfg.name, pretrained=cfg.pretrained, **arguments, **layers)
    except TypeError as error:  # timm families other than VisionTransformer do not take these arguments
        raise UserError(f"backbone '{cfg.name}' is not of timm's VisionTransformer family ({error}).") from error
    except AssertionError as error:  # timm's own checks: a width that the heads do not divide, a distilled model
        raise UserError(f"backbone '{cfg.name}' cannot be built like this ({error}).") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"backbone '{cfg.name}' is a {type(vit).__name__}, not a timm VisionTransformer.")
    return vit


def _patch_of(name: str) -> int | None:
    """Patch size in a timm name (`vit_small_patch16_224` -> 16), so that a wrong image size is answered before timm
    asserts."""
    for part in name.split("_"):
        if part.startswith("patch") and part[5:].isdigit():
            return int(part[5:])
    return None


class Backbone(nn.Module):
    """A ViT that returns its representation, CLS, register and patch tokens, tokens of chosen blocks, and attention.

    `backbone(images)` with images (B, C, H, W), normalized, sides divisible by the patch, gives the representation (B,
    D): the CLS token after the final LayerNorm, or with `pool: mean` the mean of the patch tokens after it. Heads, kNN
    and probes take it.

    Raises UserError when the network has no CLS token and `pool` is cls.
    """

    def __init__(self, cfg: BackboneConfig):
        super().__init__()
        self.vit = build_vit(cfg)
        replace_drop_path(self.vit)
        self.has_cls: bool = self.vit.cls_token is not None
        if cfg.pool == "cls" and not self.has_cls:
            raise UserError(
                f"backbone '{cfg.name}' has no CLS token: set backbone.pool to mean, or use a model with one."
            )
        patch = self.vit.patch_embed.patch_size
        if patch[0] != patch[1]:
            raise UserError(
                f"backbone '{cfg.name}' has {patch[0]}x{patch[1]} patches; only square patches are supported."
            )
        self.patch_size: int = int(patch[0])
        self.dim: int = int(self.vit.embed_dim)
        self.depth: int = len(self.vit.blocks)
        self.heads: int = (
            int(getattr(self.vit.blocks[-1].attn, "num_heads", 0)) if hasattr(self.vit.blocks[-1], "attn") else 0
        )
        paths = [getattr(block, name, None) for block in self.vit.blocks for name in ("drop_path1", "drop_path2")]
        self.drop_rates = [path.rate if isinstance(path, DropPath) else 0.0 for path in paths]  # (2 depth)
        self.prefix_tokens: int = int(self.vit.num_prefix_tokens)
        self.native_grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        # Everything is spelled out, so that metadata alone rebuilds the network even if a default or timm's model
        # changes.
        native = [side * self.patch_size for side in self.native_grid]
        if cfg.lora_rank:
            add_pairs(self.vit, cfg.lora_rank)
        self.cfg = replace(
            cfg, image_size=native, patch_size=self.patch_size, dim=self.dim, depth=self.depth, heads=self.heads or None
        )

    def drawn_paths(self, draw: Draw, views: int) -> Tensor | None:
        """Which paths the blocks keep of a training step: factors (2 depth, V, B), for `views` views of the images of
        `draw`; None where nothing is dropped.

        `forward`, `tokens` and `blocks` take them as `kept` (2 depth, M), with the views in the order of their rows:
        `drawn[:, 1:3].flatten(1)` for a pass over views 1 and 2. The numbers belong to the rows of the global batch, so
        they do not depend on the number of ranks or micro-batches.
        """
        if not self.training or not any(self.drop_rates):
            return None
        uniform = draw.uniform(views, len(self.drop_rates), purpose="drop path")  # (B, V, 2 depth)
        rates = torch.tensor(self.drop_rates)
        kept = torch.where(uniform >= rates, 1 / (1 - rates), 0.0)
        return send(kept.permute(2, 1, 0).contiguous(), next(self.parameters()).device)

    def embed(
        self, images: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Patches, CLS, registers and positions: (B, C, H, W) -> tokens (B, T, D) before the first block, and the grid
        (h, w).

        `mask_token` (D,) stands in for the content, not the position, of the `hidden` (B, N) bool patches.
        """
        vit = self.vit
        check_image_size(images.shape[-2:], self.patch_size)
        x = vit.patch_embed(images)  # (B, h, w, D)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)  # (B, N, D)
        if hidden is not None:
            x = torch.where(hidden.unsqueeze(-1), mask_token.to(x.dtype), x)
        prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)
        elif vit.no_embed_class:  # positions belong to patches alone (DeiT-3, DINOv2)
            x = torch.cat([*prefix, x + resize_position(vit.pos_embed, self.native_grid, grid, 0)], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + resize_position(
                vit.pos_embed, self.native_grid, grid, self.prefix_tokens
            )
        return vit.norm_pre(vit.patch_drop(vit.pos_drop(x))), grid

    def blocks(self, x: Tensor, kept: Tensor | None = None) -> Iterator[Tensor]:
        """The tokens (B, T, D) after each block in turn; `kept`: see `drawn_paths`."""
        for index, block in enumerate(self.vit.blocks):
            arguments: dict[str, Any] = {}
            if self.cfg.causal:
                arguments["attn_mask"] = causal_mask(x.shape[1], self.prefix_tokens, x.device)
            if kept is not None:
                arguments["kept"] = kept[2 * index : 2 * index + 2]
            x = self._run(block, x, **arguments)
            yield x

    def _run(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """`function` of the arguments; with backbone.checkpointing it is run again for its gradient."""
        if self.cfg.checkpointing and self.training and torch.is_grad_enabled():
            function = functools.partial(checkpoint, function, use_reentrant=False)
        return function(*args, **kwargs)

    def pooled(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) of the last block -> representation (B, D)."""
        if self.cfg.pool == "mean":
            return self.vit.norm(x)[:, self.prefix_tokens :].mean(dim=1)
        return self.vit.norm(x[:, 0])  # token by token, so the CLS token alone gives the same numbers

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> representation (B, D); `kept`: see `drawn_paths`."""
        x, _ = self.embed(images)
        block = self.vit.blocks[-1]
        if self.cfg.pool == "cls" and answers_first(block):  # nobody asks for the patches of the last block
            x = last(islice(self.blocks(x, kept), self.depth - 1), x)
            return self.pooled(self._run(of_first, block, x, first=1, kept=None if kept is None else kept[-2:]))
        return self.pooled(last(self.blocks(x, kept), x))

    def tokens(
        self,
        images: Tensor,
        blocks: Iterable[int] = (),
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tokens:
        """CLS, register and patch tokens after the final LayerNorm; `blocks` names further blocks (0 = first, -1 =
        last) whose CLS and patch tokens are kept. `hidden`, `mask_token`: see `embed`; `kept`: see `drawn_paths`.

        As DINO's `get_intermediate_layers`, kept tokens go through the final LayerNorm too.
        """
        wanted = {index % self.depth for index in blocks}
        x, grid = self.embed(images, hidden, mask_token)
        found = []
        for index, tokens in enumerate(self.blocks(x, kept)):
            if index in wanted:
                found.append(self._split(self.vit.norm(tokens))[::2])
            x = tokens
        cls, registers, patches = self._split(self.vit.norm(x))
        return Tokens(cls, registers, patches, grid, found)

    def _split(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(B, T, D) -> CLS (B, D) or None, registers (B, R, D), patches (B, N, D)."""
        first = int(self.has_cls)
        return x[:, 0] if first else None, x[:, first : self.prefix_tokens], x[:, self.prefix_tokens :]

    def attention_of(self, index: int, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Softmaxed attention of block `index` (-1 = last) whose input is x (B, T, D): (B, heads, rows, T) in fp32.

        Recomputed from the block's own q and k, so it does not depend on the kernel the block runs (fused kernels keep
        no weights). `rows` of the T x T matrix: `slice(0, 1)` is what the CLS token looks at, and costs T numbers a
        head instead of T^2.
        """
        block = self.vit.blocks[index]
        attention = getattr(block, "attn", None)
        if not all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "num_heads", "scale")):
            raise UserError(f"the attention of {type(block).__name__} blocks cannot be read; use a plain ViT.")
        x = x if isinstance(block, PostNormBlock) else block.norm1(x)
        batch, tokens, _ = x.shape
        qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(qkv[0][:, :, rows]).float(), attention.k_norm(qkv[1]).float()
        with torch.autocast(x.device.type, enabled=False):
            scores = (q * attention.scale) @ k.transpose(-2, -1)
            if self.cfg.causal:
                scores = scores.masked_fill(~causal_mask(tokens, self.prefix_tokens, x.device)[rows], -torch.inf)
            return scores.softmax(dim=-1)

    def last_attention(self, images: Tensor, rows: slice = slice(None)) -> Tensor:
        """Softmaxed attention of the last block, (B, heads, rows, T) in fp32; row 0 is what the CLS token looks at."""
        x, _ = self.embed(images)
        return self.attention_of(-1, last(islice(self.blocks(x), self.depth - 1), x), rows)


def last(items: Iterable[Tensor], default: Tensor) -> Tensor:
    """The last item, `default` when there is none; no other is kept in memory."""
    for item in items:
        default = item
    return default
