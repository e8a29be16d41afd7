"""Weights of timm: by name (`timm:vit_small_patch16_224`), or a folder that `timm.models.save_for_hf` wrote."""

from __future__ import annotations

import re
from typing import Any

from vit_suite.config import BackboneConfig, ReadingConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.build import EXPLICIT
from vit_suite.weights.description import check_own, check_statistics
from vit_suite.weights.families import HEADS, IMAGENET
from vit_suite.weights.loaded import LoadedBackbone, fill, finish
from vit_suite.weights.reading import Content, checked

BASE = "vit_base_patch16_224"
"""A plain timm ViT, of which a folder's arguments may override every dimension."""
ROTARY = "vit_small_patch16_dinov3_qkvb"
"""The same with rotary positions."""
TIMM_OPTIONS = {
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "patch_size": "patch_size",
    "reg_tokens": "registers",
    "in_chans": "channels",
    "img_size": "image_size",
}
"""Argument of a timm model in a folder's config.json -> option of the backbone."""
TIMM_WITHOUT_EFFECT = {"num_classes", "global_pool", "dynamic_img_size", "drop_path_rate", "drop_rate"}
TIMM_EXPLICIT = {"num_reg_tokens": "registers", "class_token": "class_token", "init_values": "layer_scale"}
"""More of them, of a network that all its dimensions describe (`explicit_options`)."""


def read_timm_folder(content: Content, source: str, how: ReadingConfig) -> LoadedBackbone:
    """A folder that `timm.models.save_for_hf` wrote: the architecture by name, its arguments, its weights."""
    arguments = content.config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"checkpoint '{source}': model_args in config.json are no dictionary.")
    named, arguments = explicit_options(content.config, arguments)
    unknown = [name for name in arguments if name not in TIMM_OPTIONS and name not in TIMM_WITHOUT_EFFECT]
    if unknown:
        raise UserError(
            f"checkpoint '{source}': config.json gives timm the argument '{unknown[0][:80]}', unknown here."
        )
    named |= {TIMM_OPTIONS[name]: value for name, value in arguments.items() if name in TIMM_OPTIONS}
    size = named.get("image_size")
    if isinstance(size, int):
        named["image_size"] = [size, size]
    state = checked(content.tensors, source)
    left_out = [name for name in state if any(re.match(pattern, name) for pattern in HEADS)]
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    description = {"backbone": {"name": content.config["architecture"], "drop_path": 0.0} | named}
    options = check_own(description, state, source)
    if how.checkpoint_family not in (None, "timm"):
        raise UserError(f"--checkpoint_family is {how.checkpoint_family}, but '{source}' is a folder of timm.")
    backbone, report = fill(options, state, left_out, source, how.allow_partial)
    published = content.config.get("pretrained_cfg") or {}
    statistic: dict[str, Any] = {
        name: list(published[name]) for name in ("mean", "std") if isinstance(published.get(name), list)
    }
    check_statistics(statistic, {"channels": backbone.cfg.channels}, source)
    said = statistic | {"license": published.get("license") or "not said", "heads_from": "config.json"}
    return finish(backbone, said, source, family="timm", report=report)


def explicit_options(config: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the backbone, arguments left) of a plain network whose arguments name every dimension, as those of
    `export --format timm` do: the name of its architecture then decides nothing but whether positions are rotary."""
    rotary = config["architecture"] == ROTARY
    dimensions = {"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token"}
    if not (rotary or config["architecture"] == BASE) or dimensions - arguments.keys():
        return {}, arguments
    left = dict(arguments)
    options = {TIMM_EXPLICIT[name]: left.pop(name) for name in TIMM_EXPLICIT if name in left}
    gelu_tanh, swiglu = left.get("act_layer") == "gelu_tanh", left.get("swiglu_mlp") is True
    options |= {
        "name": EXPLICIT,
        "mlp": "gelu_tanh" if gelu_tanh else "swiglu" if swiglu else "gelu",
        "positions": "rope" if rotary else "learned",
        "prefix_positions": left.get("no_embed_class") is not True,
        "pool": "mean" if left.get("global_pool") == "avg" else "cls",
    }
    without_effect: dict[str, Any] = {
        "swiglu_mlp": swiglu,
        "no_embed_class": not options["prefix_positions"],
        "act_layer": "gelu_tanh",
        "qkv_bias": True,
        "fc_norm": False,
        "swiglu_align_to": 1,
    }
    return options, {k: value for k, value in left.items() if k not in without_effect or value != without_effect[k]}


def read_timm(source: str, how: ReadingConfig) -> LoadedBackbone:
    name = source.removeprefix("timm:")
    if how.checkpoint_family not in (None, "timm"):
        raise UserError(f"--checkpoint_family is {how.checkpoint_family}, but '{source}' is timm's.")
    backbone = _pretrained(name, source)
    checked(backbone.vit.state_dict(), source)
    data: dict[str, Any] = getattr(backbone.vit, "pretrained_cfg", {})
    description = {"mean": list(data.get("mean", IMAGENET[0])), "std": list(data.get("std", IMAGENET[1]))}
    return finish(backbone, description | {"license": data.get("license") or "not said"}, source, family="timm")


def _pretrained(name: str, source: str) -> Backbone:
    try:
        return Backbone(BackboneConfig(name=name, drop_path=0.0, pretrained=True))
    except UserError:
        raise
    except Exception as error:  # hub clients raise many types when there is no network or no weights
        raise UserError(
            f"'{source}': timm could not provide the weights ({str(error).splitlines()[0][:160]})."
        ) from error
