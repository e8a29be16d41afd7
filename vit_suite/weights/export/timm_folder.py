"""A backbone as a timm folder: `timm.create_model("local-dir:FOLDER")` loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.eva import Eva

from vit_suite.config.limits import one_or_two
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import EXPLICIT
from vit_suite.weights.checkpoint import LoadedBackbone
from vit_suite.weights.export.huggingface import write_json
from vit_suite.weights.timm_weights import BASE, ROTARY

TIMM_EPS = 1e-6
"""LayerNorm's epsilon in BASE."""


def write_timm(loaded: LoadedBackbone, folder: Path) -> None:
    """config.json (architecture, its arguments, statistics of the images) and model.safetensors."""
    backbone = loaded.backbone
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.vit.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    height, width = loaded.image_size
    arguments = arguments_of(backbone)
    write_json(
        folder / "config.json",
        {
            "architecture": architecture_of(backbone),
            "num_classes": 0,
            "num_features": backbone.dim,
            "global_pool": arguments["global_pool"],
            "model_args": arguments,
            "pretrained_cfg": {
                "tag": "vit_suite",
                "custom_load": False,
                "input_size": [backbone.cfg.channels, height, width],
                "fixed_input_size": False,
                "interpolation": "bicubic",
                "crop_pct": 224 / 256,
                "crop_mode": "center",
                "mean": loaded.mean,
                "std": loaded.std,
                "num_classes": 0,
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        },
    )


def architecture_of(backbone: Backbone) -> str:
    """Name of the timm model that the arguments are given to."""
    if backbone.cfg.name != EXPLICIT:
        return backbone.cfg.name
    return ROTARY if isinstance(backbone.vit, Eva) else BASE


def rotary_arguments(backbone: Backbone) -> dict[str, Any]:
    """Arguments of timm's Eva beside those of every network."""
    state = backbone.vit.state_dict()
    width = state["blocks.0.mlp.fc2.weight"].shape[1]
    if "blocks.0.gamma_1" not in state:
        raise UserError("--format timm: a network with rotary positions needs LayerScale (backbone.layer_scale) there.")
    return {
        "patch_size": one_or_two(backbone.patch),
        "embed_dim": backbone.dim,
        "depth": backbone.depth,
        "num_heads": backbone.heads,
        "mlp_ratio": (width + 0.5) / backbone.dim,  # timm cuts the product to a whole number
        "num_reg_tokens": backbone.prefix_tokens - int(backbone.has_cls),
        "class_token": backbone.has_cls,
        "init_values": 1e-5,
        "swiglu_mlp": "blocks.0.mlp.fc1_g.weight" in state,
        "swiglu_align_to": 1,
    }


def arguments_of(backbone: Backbone) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer that give this network. UserError where it is none."""
    cfg, vit = backbone.cfg, backbone.vit
    if cfg.norm == "post" or cfg.causal:
        what = "blocks with LayerNorm after the sum (backbone.norm post)" if cfg.norm == "post" else "a causal order"
        raise UserError(f"--format timm: this network has {what}, which timm does not have by name.")
    arguments: dict[str, Any] = {
        "img_size": list(cfg.image_size or []),
        "in_chans": cfg.channels,
        "num_classes": 0,
        "global_pool": "token" if cfg.pool == "cls" else "avg",
        "dynamic_img_size": True,
    }
    if cfg.name != EXPLICIT:
        return arguments
    if isinstance(vit, Eva):
        return arguments | rotary_arguments(backbone)
    norm: Any = vit.norm
    eps = float(norm.eps)
    if eps > TIMM_EPS:  # a smaller one, such as Hugging Face's 1e-12, is within the tolerance of the check
        raise UserError(f"--format timm: LayerNorm's epsilon is {eps:g}, and timm's config.json cannot say so.")
    block: Any = vit.blocks[0]
    if not isinstance(block.mlp.act, torch.nn.GELU):
        raise UserError("--format timm: timm's config.json cannot name a SwiGLU; take --format huggingface.")
    gamma = getattr(block.ls1, "gamma", None)
    if block.mlp.act.approximate == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    return arguments | {
        "patch_size": one_or_two(backbone.patch),
        "embed_dim": backbone.dim,
        "depth": backbone.depth,
        "num_heads": backbone.heads,
        "mlp_ratio": block.mlp.fc1.out_features / backbone.dim,
        "reg_tokens": backbone.prefix_tokens - int(backbone.has_cls),
        "class_token": backbone.has_cls,
        "no_embed_class": bool(vit.no_embed_class),
        "init_values": None if gamma is None else 1e-5,
        "qkv_bias": block.attn.qkv.bias is not None,
        **({"fc_norm": False} if cfg.pool == "mean" else {}),
    }
