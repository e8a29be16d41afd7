"""Builds timm's network for a `BackboneConfig`: `vit` with explicit dimensions, or a timm name.

`vit` is timm's VisionTransformer. With rotary positions it is timm's Eva, as for DINOv3. Key names are timm's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.layers import LayerNorm, PatchEmbed, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_jax
from torch import nn

from vit_suite.config import BackboneConfig
from vit_suite.config.limits import pair, spell_sides
from vit_suite.errors import UserError, nearest
from vit_suite.models.blocks import (
    Attention,
    PostNormBlock,
    PreNormBlock,
    own_layers,
    replace_drop_path,
    replace_rope_blocks,
)
from vit_suite.models.positions import sincos_positions
from vit_suite.models.stem import ConvStem

EXPLICIT = "vit"
"""The value of backbone.name for explicit dimensions instead of a timm model."""
ROPE_BASE = 100.0
"""DINOv3's: the longest period of its rotary positions (dinov3 rope_position_encoding.py, `base`)."""
VIT_EPS, ROPE_EPS = 1e-6, 1e-5
"""Default epsilon of LayerNorm: of ViT and DINO, and of DINOv3."""


def check_image_size(size: int | Iterable[int], patch_size: int | Iterable[int], what: str = "image size") -> None:
    """Raise `UserError` unless both sides (pixels) are positive multiples of the patch's."""
    size, patch = pair(size), pair(patch_size)
    shown = f"{what} {size[0]}x{size[1]}"
    named = spell_sides(patch)
    for side, length in zip(size, patch, strict=True):
        if side < length:
            raise UserError(f"{shown} is smaller than a patch of {named} pixels.")
        if side % length:
            below = side // length * length
            raise UserError(
                f"{shown} is not divisible by the patch size {named}: nearest sides are {below} and {below + length}."
            )


def known_patch_size(cfg: BackboneConfig) -> tuple[int, int] | None:
    """Sides of a patch in pixels, before the network is built; None if neither the options nor the name tell."""
    patch = cfg.patch_size or (16 if cfg.name == EXPLICIT else _patch_of(cfg.name))
    return None if patch is None else pair(patch)


def _patch_of(name: str) -> int | None:
    """Patch size in a timm name (`vit_small_patch16_224` -> 16), to check the image size before timm asserts it."""
    for part in name.split("_"):
        if part.startswith("patch") and part[5:].isdigit():
            return int(part[5:])
    return None


def build_vit(cfg: BackboneConfig) -> VisionTransformer | Eva:
    """The timm network of `cfg`, without a classifier, whose blocks take `kept` (models/blocks.py).

    Raises:
        UserError: the name is no timm model or of another family, the image size is not divisible by the patch, or
            options contradict each other.
    """
    common = {
        "num_classes": 0,
        "global_pool": "",
        "in_chans": cfg.channels,
        "drop_path_rate": cfg.drop_path,
        "dynamic_img_size": True,
    }
    if cfg.image_size is not None:
        common["img_size"] = pair(cfg.image_size)
    vit = _explicit(cfg, common) if cfg.name == EXPLICIT else _named(cfg, common)
    replace_rope_blocks(vit)
    replace_drop_path(vit, cfg.drop_path if cfg.drop_path_uniform else 0.0)
    return vit


# -- explicit dimensions -----------------------------------------------------------------------------------------------


def _explicit(cfg: BackboneConfig, common: dict[str, Any]) -> VisionTransformer | Eva:
    """A network given by its dimensions, DeiT-small's where a dimension is left out."""
    if cfg.pretrained:
        raise UserError("backbone.pretrained needs a timm name in backbone.name; 'vit' has no published weights.")
    dim = cfg.dim or 384
    heads = cfg.heads or max(1, dim // 64)
    if cfg.resize == "sincos" and not cfg.positions.startswith("sincos"):
        raise UserError(
            f"backbone.resize sincos is for backbone.positions sincos_1d and sincos_2d, not {cfg.positions}."
        )
    if dim % heads:
        raise UserError(f"backbone.dim {dim} is not divisible by backbone.heads {heads}.")
    patch = pair(cfg.patch_size or 16)
    check_image_size(common.get("img_size", (224, 224)), patch)
    common = common | {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": cfg.depth or (11 if cfg.stem == "conv" else 12),
        "num_heads": heads,
        "init_values": cfg.layer_scale,
        "class_token": cfg.class_token,
        "no_embed_class": not cfg.prefix_positions,
    }
    hidden = int(dim * (4.0 if cfg.mlp_ratio is None else cfg.mlp_ratio) + 1e-6)  # the ratio may be a rounded quotient
    vit = _rotary(cfg, common, hidden) if cfg.positions == "rope" else _plain(cfg, common, hidden)
    if vit.cls_token is not None:
        nn.init.trunc_normal_(vit.cls_token, std=0.02)
    return vit


def _ratio(width: int, dim: int) -> float:
    """The ratio for which timm's int(dim * ratio) is `width`."""
    return (width + 0.5) / dim


def _plain(cfg: BackboneConfig, common: dict[str, Any], hidden: int) -> VisionTransformer:
    """timm's VisionTransformer."""
    gated = cfg.mlp == "swiglu"
    layers: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    if cfg.mlp == "gelu_tanh":
        layers["act_layer"] = functools.partial(nn.GELU, approximate="tanh")
    vit = VisionTransformer(
        **common,
        **layers,
        mlp_ratio=_ratio(hidden * (2 if gated else 1), common["embed_dim"]),  # the packed layer has gate and value
        reg_tokens=cfg.registers or 0,
        norm_layer=functools.partial(LayerNorm, eps=cfg.norm_eps or VIT_EPS),
        attn_layer=Attention,
        block_fn=PreNormBlock if cfg.norm == "pre" else PostNormBlock,
        final_norm=cfg.norm == "pre",
        embed_layer=ConvStem if cfg.stem == "conv" else PatchEmbed,
    )
    if cfg.positions != "learned":
        prefix = vit.num_prefix_tokens if cfg.prefix_positions else 0
        kind: Any = cfg.positions
        fixed = sincos_positions(kind, vit.patch_embed.grid_size, vit.embed_dim, prefix)
        del vit.pos_embed
        vit.register_buffer("pos_embed", fixed)  # a buffer: neither trained nor averaged
    if cfg.init == "xavier":
        init_xavier_(vit)
    return vit


def init_xavier_(vit: VisionTransformer) -> None:
    """Initialize linear layers and convolutions as Flax code does (big_vision models/vit.py), by timm's function.

    Linear layers are Xavier-uniform, the patch embedding LeCun-normal; biases are 0, those of MLPs from a normal of
    1e-6. timm's function takes queries, keys and values for one layer; here each has its own range, as in Flax.
    """
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_weights_vit_jax(module, name)
            if name.endswith(".qkv"):
                for part in module.weight.detach().chunk(3):
                    nn.init.xavier_uniform_(part)


def _rotary(cfg: BackboneConfig, common: dict[str, Any], hidden: int) -> Eva:
    """timm's Eva as in DINOv3: every block has rotary positions of the patches, and there are no other positions."""
    for option in ("norm", "stem", "init", "mlp"):
        value = getattr(cfg, option)
        if value not in (getattr(BackboneConfig, option), "swiglu"):
            raise UserError(f"backbone.{option} {value} is not for backbone.positions rope.")
    width = common["embed_dim"] // common["num_heads"]
    if width % 4:
        raise UserError(
            "backbone.positions rope rotates pairs of numbers by row and by column: backbone.dim / backbone.heads has"
            f" to be divisible by 4, and is {width}."
        )
    return Eva(
        **common,
        mlp_ratio=_ratio(hidden, common["embed_dim"]),
        swiglu_mlp=cfg.mlp == "swiglu",
        swiglu_align_to=1,  # gate and value are separate layers, as in DINOv3, of exactly the requested width
        num_reg_tokens=cfg.registers or 0,
        norm_layer=functools.partial(LayerNorm, eps=cfg.norm_eps or ROPE_EPS),
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=ROPE_BASE,
        rope_rotate_half=True,
        use_fc_norm=False,
    )


# -- timm names --------------------------------------------------------------------------------------------------------

OF_VIT = ("class_token", "positions", "norm", "norm_eps", "layer_scale", "mlp", "init", "prefix_positions", "stem")
"""Options that a timm name already fixes."""


def _named(cfg: BackboneConfig, common: dict[str, Any]) -> VisionTransformer | Eva:
    """A network by its timm name."""
    if not timm.is_model(cfg.name):
        known = [EXPLICIT, *timm.list_models("*vit*"), *timm.list_models("deit*"), *timm.list_models("eva*")]
        raise UserError(
            f"unknown backbone '{cfg.name}'.{nearest(cfg.name, known)} Use a timm ViT name, or 'vit' with explicit"
            " dims."
        )
    patch = known_patch_size(cfg)
    if "img_size" in common and patch is not None:
        check_image_size(common["img_size"], patch)
    try:
        with torch.device("meta"):  # one block, without memory, shows the family
            family = timm.create_model(cfg.name, **common | _overrides(cfg, {}) | {"depth": 1})
        tokens = "num_reg_tokens" if isinstance(family, Eva) else "reg_tokens"
        arguments = common | _overrides(cfg, {tokens: cfg.registers})
        layers: dict[str, Any] = dict(own_layers(family))
        vit = timm.create_model(cfg.name, pretrained=cfg.pretrained, **arguments, **layers)
    except TypeError as error:  # timm families other than these do not take these arguments
        raise UserError(f"backbone '{cfg.name}' is not of timm's VisionTransformer family ({error}).") from error
    except AssertionError as error:  # timm's own checks: a width that the heads do not divide, a distilled model
        raise UserError(f"backbone '{cfg.name}' cannot be built like this ({error}).") from error
    if not isinstance(vit, VisionTransformer | Eva):
        raise UserError(f"backbone '{cfg.name}' is a {type(vit).__name__}, not a timm VisionTransformer.")
    return vit


def _overrides(cfg: BackboneConfig, more: dict[str, Any]) -> dict[str, Any]:
    """timm arguments of the dimensions that the user set beside a timm name."""
    if cfg.resize == "sincos":
        raise UserError(f"backbone.resize sincos is for backbone.name 'vit'; '{cfg.name}' learns its positions.")
    for option in OF_VIT:
        if getattr(cfg, option) != getattr(BackboneConfig, option):
            raise UserError(f"backbone.{option} is for backbone.name 'vit'; '{cfg.name}' has its own.")
    given = {
        "patch_size": None if cfg.patch_size is None else pair(cfg.patch_size),
        "embed_dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
        "mlp_ratio": cfg.mlp_ratio,
        **more,
    }
    return {key: value for key, value in given.items() if value is not None}
