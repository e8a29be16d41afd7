"""A backbone in the names of Hugging Face: `config.json`, `model.safetensors`, `preprocessor_config.json`.

Which class: ViTModel for a plain ViT; Dinov2WithRegistersModel for one with registers; Dinov2Model for one with
LayerScale; DINOv3ViTModel for one with rotary positions. Names only: nothing here needs transformers, whose own
loading is the check that follows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor

from vit_suite.config.limits import one_or_two
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.weights.checkpoint import LoadedBackbone

ARCHITECTURES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
"""model_type -> class of transformers."""


def model_type(backbone: Backbone) -> str:
    """Which of transformers' networks this is. UserError where it is none."""
    vit, cfg = backbone.vit, backbone.cfg
    if isinstance(vit, Eva):
        if not is_dinov3(vit):
            raise UserError("--format huggingface: of networks with rotary positions only DINOv3's are known.")
        return "dinov3_vit"
    faults = {
        "blocks with LayerNorm after the sum (backbone.norm post)": cfg.norm == "post",
        "a causal order (backbone.causal)": cfg.causal,
        "no CLS token": not backbone.has_cls,
        "a norm before the blocks": not isinstance(vit.norm_pre, torch.nn.Identity),
        "no learned position embedding": vit.pos_embed is None,
        "norms of query and key": not getattr(vit.blocks[0].attn, "plain", False),
    }
    for fault, holds in faults.items():
        if holds:
            raise UserError(f"--format huggingface: this network has {fault}, which no model of transformers has.")
    if backbone.prefix_tokens > 1:
        return "dinov2_with_registers"
    return "dinov2" if hasattr(vit.blocks[0].ls1, "gamma") else "vit"


def write_huggingface(loaded: LoadedBackbone, folder: Path) -> None:
    """The folder that `transformers.AutoModel.from_pretrained` loads."""
    kind = model_type(loaded.backbone)
    writers = {"vit": to_vit, "dinov3_vit": to_dinov3}
    state = writers.get(kind, to_dinov2)(loaded.backbone)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = dinov3_config(loaded.backbone) if kind == "dinov3_vit" else config_of(loaded.backbone, kind)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor_of(loaded))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_of(backbone: Backbone, kind: str) -> dict[str, Any]:
    """config.json: every dimension, so that no default of transformers counts."""
    vit, cfg = backbone.vit, backbone.cfg
    block: Any = vit.blocks[0]
    mlp = block.mlp
    gated = not isinstance(mlp.act, torch.nn.GELU)
    hidden = mlp.fc1.out_features // (2 if gated else 1)
    height, width = cfg.image_size or [0, 0]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": backbone.dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "image_size": one_or_two((height, width)),
        "patch_size": one_or_two(backbone.patch),
        "num_channels": cfg.channels,
        "hidden_act": "gelu_pytorch_tanh" if getattr(mlp.act, "approximate", "") == "tanh" else "gelu",
        "layer_norm_eps": vit.norm.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
    }
    if kind == "vit":
        return config | {"intermediate_size": hidden}
    ratio = mlp.fc1.out_features / backbone.dim
    if gated:  # transformers works the width out from the ratio: 2/3 of it, rounded up to 8
        ratio = 4.0
        if (int(int(backbone.dim * ratio) * 2 / 3) + 7) // 8 * 8 != hidden:
            raise UserError(f"--format huggingface: a SwiGLU of width {hidden} is none that transformers builds.")
    config |= {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio, "use_swiglu_ffn": gated}
    config |= {"layerscale_value": 1.0, "drop_path_rate": 0.0}
    return config | ({"num_register_tokens": backbone.prefix_tokens - 1} if kind == "dinov2_with_registers" else {})


def preprocessor_of(loaded: LoadedBackbone) -> dict[str, Any]:
    """preprocessor_config.json: this suite's evaluation view, shorter side to 256/224 of the crop, center crop."""
    height, width = loaded.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": loaded.mean,
        "image_std": loaded.std,
        "do_convert_rgb": loaded.backbone.cfg.channels == 3,
    }


def split_qkv(state: dict[str, Tensor], index: int, attention: str) -> dict[str, Tensor]:
    """`blocks.N.attn.qkv.*` (3 D) -> query, key and value under `attention`."""
    found = {}
    for kind in ("weight", "bias"):
        if (full := state.get(f"blocks.{index}.attn.qkv.{kind}")) is not None:
            for part, tensor in zip(("query", "key", "value"), full.chunk(3), strict=True):
                found[f"{attention}.attention.{part}.{kind}"] = tensor
    for kind in ("weight", "bias"):
        found[f"{attention}.output.dense.{kind}"] = state[f"blocks.{index}.attn.proj.{kind}"]
    return found


def embeddings(backbone: Backbone) -> dict[str, Tensor]:
    """Patch embedding, CLS, registers and positions, as transformers holds them: positions for CLS and patches, none
    for registers."""
    vit = backbone.vit
    state = dict(vit.state_dict())
    cls, position = state["cls_token"], state["pos_embed"]
    registers = state.get("reg_token")
    if vit.no_embed_class:
        position = torch.cat([torch.zeros_like(cls), position], dim=1)
    elif registers is not None:  # their positions are added to the tokens once and for all
        registers = registers + position[:, 1 : backbone.prefix_tokens]
        position = torch.cat([position[:, :1], position[:, backbone.prefix_tokens :]], dim=1)
    found = {
        "embeddings.cls_token": cls,
        "embeddings.position_embeddings": position,
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    return found if registers is None else found | {"embeddings.register_tokens": registers}


def to_vit(backbone: Backbone) -> dict[str, Tensor]:
    """Weights in the names of ViTModel."""
    state, found = dict(backbone.vit.state_dict()), embeddings(backbone)
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for index in range(backbone.depth):
        layer = f"encoder.layer.{index}"
        found |= split_qkv(state, index, f"{layer}.attention")
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                found[f"{layer}.{theirs}.{kind}"] = state[f"blocks.{index}.{ours}.{kind}"]
    return found


def to_dinov2(backbone: Backbone) -> dict[str, Tensor]:
    """Weights in the names of Dinov2Model; LayerScale is 1 where the network has none."""
    state, found = dict(backbone.vit.state_dict()), embeddings(backbone)
    first: Any = backbone.vit.blocks[0]
    gated = not isinstance(first.mlp.act, torch.nn.GELU)
    inner, outer = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": f"mlp.{inner}", "mlp.fc2": f"mlp.{outer}"}
    found["embeddings.mask_token"] = torch.zeros(1, backbone.dim)
    for index in range(backbone.depth):
        layer = f"encoder.layer.{index}"
        found |= split_qkv(state, index, f"{layer}.attention")
        for number in (1, 2):
            gamma = state.get(f"blocks.{index}.ls{number}.gamma")
            found[f"{layer}.layer_scale{number}.lambda1"] = torch.ones(backbone.dim) if gamma is None else gamma
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                found[f"{layer}.{theirs}.{kind}"] = state[f"blocks.{index}.{ours}.{kind}"]
    return found


# -- DINOv3 ------------------------------------------------------------------------------------------------------------


def is_dinov3(vit: Eva) -> bool:
    """Whether this Eva has rotary positions alone, LayerScale, and no bias of the key."""
    names = set(dict(vit.state_dict()))
    return {"cls_token", "reg_token", "blocks.0.gamma_1", "blocks.0.attn.q_bias", "norm.weight"} <= names and (
        "pos_embed" not in names
    )


def dinov3_config(backbone: Backbone) -> dict[str, Any]:
    """config.json of DINOv3ViTModel."""
    state = backbone.vit.state_dict()
    height, width = backbone.cfg.image_size or [0, 0]
    gated = "blocks.0.mlp.fc1_g.weight" in state
    return {
        "architectures": [ARCHITECTURES["dinov3_vit"]],
        "model_type": "dinov3_vit",
        "hidden_size": backbone.dim,
        "intermediate_size": state["blocks.0.mlp.fc2.weight"].shape[1],
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "num_register_tokens": backbone.prefix_tokens - 1,
        "image_size": one_or_two((height, width)),
        "patch_size": one_or_two(backbone.patch),
        "num_channels": backbone.cfg.channels,
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "layer_norm_eps": backbone.vit.norm.eps,
        "rope_theta": 100.0,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "layerscale_value": 1.0,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
        "dtype": "float32",
    }


def to_dinov3(backbone: Backbone) -> dict[str, Tensor]:
    """Weights in the names of DINOv3ViTModel."""
    state = dict(backbone.vit.state_dict())
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, 1, backbone.dim),
        "embeddings.register_tokens": state["reg_token"],
        "embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": state["patch_embed.proj.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    gated = "blocks.0.mlp.fc1_g.weight" in state
    up = {"fc1_g": "gate_proj", "fc1_x": "up_proj"} if gated else {"fc1": "up_proj"}
    names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
    names |= {f"mlp.{ours}": f"mlp.{theirs}" for ours, theirs in {**up, "fc2": "down_proj"}.items()}
    for index in range(backbone.depth):
        block, layer = f"blocks.{index}", f"layer.{index}"
        for part, tensor in zip("qkv", state[f"{block}.attn.qkv.weight"].chunk(3), strict=True):
            found[f"{layer}.attention.{part}_proj.weight"] = tensor
        for part in "qv":
            found[f"{layer}.attention.{part}_proj.bias"] = state[f"{block}.attn.{part}_bias"]
        for number in (1, 2):
            found[f"{layer}.layer_scale{number}.lambda1"] = state[f"{block}.gamma_{number}"]
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                found[f"{layer}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
    return found
