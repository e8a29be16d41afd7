"""The backbone: a timm network that returns tokens and attention, for images of any size.

Dosovitskiy et al. 2020 (arXiv 2010.11929) for the network, registers after arXiv 2309.16588, rotary positions as in
DINOv3 (arXiv 2508.10104). timm builds the blocks (models/build.py), so key names are those of timm and of the DINO
release. Deliberate differences from timm:

- Position embeddings of another size are resized as `backbone.resize` says. The default is the rule of the DINO release
  (models/positions.py), not timm's, because the released weights were trained with it. Another rule moves the CLS
  output of DINO by 0.035-0.49.
- The CLS token starts from a truncated normal of 0.02 like the position embedding (DINO vision_transformer.py), not
  from 1e-6.
- On a CPU attention is plain softmax(q k^T) v up to the length where the fused kernel is faster. On a GPU it is always
  the fused kernel. The device of the input decides.
- `backbone(images)` computes the last block for the CLS token only, because nothing reads the other tokens after it. A
  DINO step then has 11% fewer FLOP at depth 6 and 7% fewer at depth 12; the numbers are the same to rounding. `tokens`
  computes the whole last block, so a hook on a part of that block needs `tokens`.

Axes: B images, C channels, H x W pixels, h x w patches (N = h w, row-major), T = prefix + N tokens, D width,
R registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.hardware import send
from vit_suite.models.blocks import DropPath, answers_first, causal_mask, of_first, queries_and_keys
from vit_suite.models.build import build_vit, check_image_size
from vit_suite.models.casts import cast_together, linear_tensors
from vit_suite.models.lora import add_pairs
from vit_suite.models.positions import resize_position, sincos_positions
from vit_suite.views.draw import Draw


@dataclass
class Tokens:
    """The output of a forward pass, after the final LayerNorm."""

    cls: Tensor | None
    """(B, D); None where the network has no CLS token."""
    registers: Tensor
    """(B, R, D)."""
    patches: Tensor
    """(B, N, D), row-major over the grid."""
    grid: tuple[int, int]
    """(h, w) in patches."""
    blocks: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)
    """(cls, patches) of each requested block, in the order of the blocks, after the final LayerNorm."""


class Backbone(nn.Module):
    """A ViT that returns its representation, CLS, register and patch tokens, tokens of chosen blocks, and attention.

    `backbone(images)` takes normalized images (B, C, H, W) whose sides are divisible by the patch. It returns the
    representation (B, D): the CLS token after the final LayerNorm, or with `pool: mean` the mean of the patch tokens.
    Heads, kNN and probes take it.

    Raises UserError when the network has no CLS token and `pool` is cls.
    """

    def __init__(self, cfg: BackboneConfig):
        super().__init__()
        self.vit = build_vit(cfg)
        self.has_cls: bool = self.vit.cls_token is not None
        if cfg.pool == "cls" and not self.has_cls:
            raise UserError(
                f"backbone '{cfg.name}' has no CLS token: set backbone.pool to mean, or use a model with one."
            )
        height, width = self.vit.patch_embed.patch_size
        self.patch: tuple[int, int] = (int(height), int(width))
        """Pixels of a patch: (rows, columns)."""
        self.dim: int = int(self.vit.embed_dim)
        self.depth: int = len(self.vit.blocks)
        self.heads: int = (
            int(getattr(self.vit.blocks[-1].attn, "num_heads", 0)) if hasattr(self.vit.blocks[-1], "attn") else 0
        )
        paths = [getattr(block, name, None) for block in self.vit.blocks for name in ("drop_path1", "drop_path2")]
        self.drop_rates = [path.rate if isinstance(path, DropPath) else 0.0 for path in paths]  # (2 depth)
        self.prefix_tokens: int = int(self.vit.num_prefix_tokens)
        self.native_grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        if cfg.lora_rank:
            add_pairs(self.vit, cfg.lora_rank)
        # Every dimension is written out, so metadata rebuild the network even if a default or timm's model changes.
        self.cfg = replace(
            cfg,
            image_size=[side * length for side, length in zip(self.native_grid, self.patch, strict=True)],
            patch_size=self.patch[0] if self.patch[0] == self.patch[1] else list(self.patch),
            dim=self.dim,
            depth=self.depth,
            heads=self.heads or None,
            resize=cfg.resize or ("antialias" if "reg4_dinov2" in cfg.name else "offset"),
        )

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels. UserError if the patches are not square; `patch` has both sides."""
        if self.patch[0] != self.patch[1]:
            height, width = self.patch
            raise UserError(f"this needs square patches, and those of the backbone are {height}x{width}.")
        return self.patch[0]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """(h, w) in patches of images (..., H, W)."""
        height, width = images.shape[-2:]
        return height // self.patch[0], width // self.patch[1]

    def drawn_paths(self, draw: Draw, views: int) -> Tensor | None:
        """Factors of drop path for a training step: (2 depth, V, B) for V = `views` views of the images of `draw`.

        None if nothing is dropped. `forward`, `tokens` and `blocks` take the factors as `kept` (2 depth, M), one column
        for each row of the pass. Example: `drawn[:, 1:3].flatten(1)` for a pass over views 1 and 2. The random numbers
        belong to rows of the global batch, so they do not depend on the number of ranks or micro-batches.
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

        `mask_token` (D,) replaces the content of the `hidden` (B, N) bool patches; they keep their positions.
        """
        vit = self.vit
        if not images.is_floating_point():
            raise UserError(
                f"a backbone takes normalized float images, got {images.dtype}: `load_backbone(...).transform(images)`"
                " makes them of pixels."
            )
        check_image_size(images.shape[-2:], self.patch)
        x = vit.patch_embed(images)  # (B, h, w, D)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)  # (B, N, D)
        if hidden is not None and mask_token is not None:
            x = torch.where(hidden.unsqueeze(-1), mask_token.to(x.dtype), x)
        prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)
        elif vit.no_embed_class:  # positions belong to patches alone (DeiT-3, DINOv2 with registers)
            x = torch.cat([*prefix, x + self.position(grid, 0)], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + self.position(grid, self.prefix_tokens)
        return vit.norm_pre(vit.pos_drop(x)), grid

    def position(self, grid: tuple[int, int], prefix: int) -> Tensor:
        """The position embedding (1, prefix + N, D) for a grid."""
        own: Tensor | None = self.vit.pos_embed
        if own is None:
            raise RuntimeError("a network with rotary positions adds none to its tokens")
        if grid == self.native_grid:
            return own
        how, kind = self.cfg.resize, self.cfg.positions
        if how == "sincos" and kind != "learned" and kind != "rope":
            return sincos_positions(kind, grid, self.dim, prefix).to(own)
        return resize_position(own, self.native_grid, grid, prefix, "offset" if how is None or how == "sincos" else how)

    def rope(self, grid: tuple[int, int] | None) -> list[Tensor | None]:
        """The rotary positions (N, 2 d) of the patches (sines, cosines) for each block; None for a block without."""
        rope: Any = self.vit.rope if isinstance(self.vit, Eva) else None
        if rope is None:
            return [None] * self.depth
        if grid is None:
            raise UserError("a network with rotary positions has to see all patches: use learned or sine positions.")
        values: Any = rope.get_embed(shape=list(grid))
        return list(values) if self.vit.rope_mixed else [values] * self.depth

    def blocks(self, x: Tensor, grid: tuple[int, int] | None, kept: Tensor | None = None) -> Iterator[Tensor]:
        """The tokens (B, T, D) after each block in turn; x and `grid` as `embed` returns them, `kept`: `drawn_paths`.

        `grid` is None if x holds only some of the patches. A network with rotary positions then raises UserError.
        """
        for index, (block, rope) in enumerate(zip(self.vit.blocks, self.rope(grid), strict=True)):
            arguments: dict[str, Any] = {} if rope is None else {"rope": rope}
            if self.cfg.causal:
                arguments["attn_mask"] = causal_mask(x.shape[1], self.prefix_tokens, x.device)
            if kept is not None:
                arguments["kept"] = kept[2 * index : 2 * index + 2]
            x = self._run(index, block, x, **arguments)
            yield x

    @functools.cached_property
    def linear_tensors(self) -> list[list[tuple[nn.Module, str]]]:
        """The weights that autocast casts in each block."""
        return [linear_tensors(block) for block in self.vit.blocks]

    def _run(self, index: int, function: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        """Call `function(x)` of block `index`; with backbone.checkpointing the backward pass calls it a second time."""
        if x.device.type != "cpu":  # a CPU has no launches to save
            function = functools.partial(self._run_cast, index, function)
        if self.cfg.checkpointing and self.training and torch.is_grad_enabled():
            function = functools.partial(checkpoint, function, use_reentrant=False)
        return function(x, **kwargs)

    def _run_cast(self, index: int, function: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        if self.vit.blocks[index]._compiled_call_impl is not None:  # a compiled block merges the casts itself
            return function(x, **kwargs)
        with cast_together(self.linear_tensors[index], x.device.type):
            return function(x, **kwargs)

    def pooled(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) of the last block -> representation (B, D)."""
        if self.cfg.pool == "mean":
            return self.vit.norm(x)[:, self.prefix_tokens :].mean(dim=1)
        return self.vit.norm(x[:, 0])  # LayerNorm works on each token alone, so the others are not needed

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> representation (B, D); `kept`: see `drawn_paths`."""
        x, grid = self.embed(images)
        block = self.vit.blocks[-1]
        if self.cfg.pool == "cls" and answers_first(block):  # nothing reads the patches of the last block
            x = last(islice(self.blocks(x, grid, kept), self.depth - 1), x)
            kept = None if kept is None else kept[-2:]
            return self.pooled(self._run(-1, functools.partial(of_first, block), x, first=1, kept=kept))
        return self.pooled(last(self.blocks(x, grid, kept), x))

    def tokens(
        self,
        images: Tensor,
        blocks: Iterable[int] = (),
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tokens:
        """CLS, register and patch tokens after the final LayerNorm. `hidden`, `mask_token`: `embed`; `kept`:
        `drawn_paths`.

        blocks: further blocks (0 = first, -1 = last) whose CLS and patch tokens are returned. As in DINO's
        `get_intermediate_layers`, these tokens go through the final LayerNorm too.
        """
        wanted = {index % self.depth for index in blocks}
        x, grid = self.embed(images, hidden, mask_token)
        found = []
        for index, tokens in enumerate(self.blocks(x, grid, kept)):
            if index in wanted:
                found.append(self._split(self.vit.norm(tokens))[::2])
            x = tokens
        cls, registers, patches = self._split(self.vit.norm(x))
        return Tokens(cls, registers, patches, grid, found)

    def _split(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(B, T, D) -> CLS (B, D) or None, registers (B, R, D), patches (B, N, D)."""
        first = int(self.has_cls)
        return x[:, 0] if first else None, x[:, first : self.prefix_tokens], x[:, self.prefix_tokens :]

    def attention_of(self, index: int, x: Tensor, grid: tuple[int, int] | None, rows: slice = slice(None)) -> Tensor:
        """Softmaxed attention of block `index` (-1 = last) whose input is x (B, T, D): (B, heads, rows, T) in fp32.

        It is computed from the block's q and k, because fused kernels keep no attention weights. In a rotary network q
        and k are first rotated by the positions of `grid`. `rows` selects rows of the T x T matrix: `slice(0, 1)` is
        what the CLS token looks at, and takes T numbers a head instead of T^2.
        """
        block: Any = self.vit.blocks[index]
        q, k = queries_and_keys(block, x, self.rope(grid)[index])
        with torch.autocast(x.device.type, enabled=False):
            scores = (q[:, :, rows].float() * block.attn.scale) @ k.float().transpose(-2, -1)
            if self.cfg.causal:
                scores = scores.masked_fill(~causal_mask(x.shape[1], self.prefix_tokens, x.device)[rows], -torch.inf)
            return scores.softmax(dim=-1)

    def last_attention(self, images: Tensor, rows: slice = slice(None)) -> Tensor:
        """Softmaxed attention of the last block, (B, heads, rows, T) in fp32; row 0 is what the CLS token looks at."""
        x, grid = self.embed(images)
        return self.attention_of(-1, last(islice(self.blocks(x, grid), self.depth - 1), x), grid, rows)


def last(items: Iterable[Tensor], default: Tensor) -> Tensor:
    """The last item, or `default` if there is none. Earlier items are not kept in memory."""
    for item in items:
        default = item
    return default
