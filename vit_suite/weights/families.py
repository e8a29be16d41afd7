"""Released vision transformers by the names of their weights: one row a family.

A row says by which keys a family is recognized, how each key becomes the name that timm and this suite use, what the
keys do not say (epsilon, how positions are resized, statistics of the images, heads of the published sizes), and which
keys serve its pretraining only. These are only names: nothing here needs the libraries that wrote the files.

Sources: facebookresearch/dino, dinov2, dinov3 and mae `vision_transformer.py`, transformers `modeling_*.py`, SiT
(umar-atito/SiT) `vision_transformer.py`, timm `vision_transformer.py` and `eva.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vit_suite.errors import UserError

State = dict[str, Tensor]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
TIMM_ANCHOR = "patch_embed.proj.weight"
ANCHORS = (TIMM_ANCHOR, "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight")
"""Key of the patch embedding's weight. Every network has it once, so what stands before it is the network's prefix."""
HEADS = (r"head(_dist)?\.", r"heads?\.", r"fc\.", r"classifier\.", r"pre_logits\.", r"projector\.", r"dino_head\.")
"""Layers behind the backbone, under the same prefix."""

VIT_SIZES = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}
"""(width, depth) -> heads of ViT-B, L and H, the same in every release."""


@dataclass(frozen=True)
class Family:
    """One naming of vision transformers."""

    name: str
    """What --checkpoint_family takes."""
    title: str
    """What a person calls it."""
    has: tuple[str, ...]
    """Patterns of keys that a file of this family has, beside the anchor."""
    anchor: str = TIMM_ANCHOR
    lacks: tuple[str, ...] = ()
    """Patterns of keys that it never has."""
    rename: Callable[[State], State] = dict
    """Its state -> timm's names, with parts split and merged as timm holds them. May raise UserError."""
    dropped: tuple[str, ...] = ()
    """Patterns of keys that only its pretraining needs."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of the backbone that hold for every file of the family."""
    heads: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(width, depth) -> heads of the published sizes."""
    size: int = 224
    """Side in pixels of the images, where no position embedding tells it."""
    statistics: tuple[list[float], list[float]] = IMAGENET
    model_type: str | None = None
    """Its name in a Hugging Face config.json."""
    license: str = "not said"
    """Of the published weights."""


# -- renaming ----------------------------------------------------------------------------------------------------------


def substitute(rules: Iterable[tuple[str, str]]) -> Callable[[State], State]:
    """A renaming by regular expressions, each applied to the result of the one before."""
    compiled = [(re.compile(pattern), to) for pattern, to in rules]

    def rename(state: State) -> State:
        found: State = {}
        for name, tensor in state.items():
            new = name
            for pattern, to in compiled:
                new = pattern.sub(to, new)
            if new in found:
                raise UserError(f"two keys stand for '{new}', the second is '{name[:80]}'.")
            found[new] = tensor
        return found

    return rename


def merge_qkv(state: State) -> State:
    """`attn.q.weight`, `attn.k.weight`, `attn.v.weight` (D, D) -> `attn.qkv.weight` (3 D, D); the biases likewise. A
    missing bias becomes zeros."""
    found = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.[qkv]\.(weight|bias)$", name)}
    for stem in {name.rpartition(".attn.")[0] for name in state.keys() - found.keys()}:
        for kind in ("weight", "bias"):
            parts = [state.get(f"{stem}.attn.{part}.{kind}") for part in "qkv"]
            given = [part for part in parts if part is not None]
            if not given:
                continue
            if kind == "weight" and len(given) < 3:
                raise UserError(f"'{stem}' has {len(given)} of the weights of query, key and value.")
            full = [torch.zeros_like(given[0]) if part is None else part for part in parts]
            if len({part.shape for part in full}) > 1:
                raise UserError(f"query, key and value of '{stem}' have other shapes than each other.")
            found[f"{stem}.attn.qkv.{kind}"] = torch.cat(full)
    return found


HF_LAYERS = (
    (r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|model)\.", ""),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(layernorm|norm)\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
"""Keys that all models of Hugging Face transformers share, in versions 4 and 5."""


def from_hf_vit(state: State) -> State:
    """ViTModel, ViTMAEModel and their relatives."""
    rules = (
        *HF_LAYERS,
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
    return merge_qkv(substitute(rules)(state))


def from_hf_dinov2(state: State) -> State:
    """Dinov2Model and Dinov2WithRegistersModel."""
    rules = (*HF_LAYERS, (r"\.mlp\.weights_in\.", ".mlp.fc1."), (r"\.mlp\.weights_out\.", ".mlp.fc2."))
    return positions_of_patches(merge_qkv(substitute(rules)(state)))


def from_dinov2(state: State) -> State:
    """facebookresearch/dinov2: registers, blocks in chunks (`blocks.0.11.` of FSDP), SwiGLU as w12 and w3."""
    rules = (
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    return positions_of_patches(substitute(rules)(state))


def positions_of_patches(state: State) -> State:
    """With registers, timm holds positions for patches alone: the one of CLS is added to the CLS token."""
    if "reg_token" not in state or "pos_embed" not in state:
        return state
    grid, tokens = math.isqrt(state["pos_embed"].shape[1] - 1), state["pos_embed"].shape[1]
    if grid * grid + 1 != tokens:
        return state
    position = state["pos_embed"]
    return state | {"cls_token": state["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}


def from_sit(state: State) -> State:
    """SiT version 1 has [rotation, contrastive, patches]; here the contrastive token stands first, as CLS, and the
    rotation token is a register. The two rows of the position embedding change places with them."""
    if "rot_token" not in state:
        return state
    position = state["pos_embed"]
    swapped = torch.cat([position[:, 1:2], position[:, :1], position[:, 2:]], dim=1)
    rest = {name: tensor for name, tensor in state.items() if name not in ("rot_token", "contrastive_token")}
    return rest | {"cls_token": state["contrastive_token"], "reg_token": state["rot_token"], "pos_embed": swapped}


def from_dinov3(state: State) -> State:
    """facebookresearch/dinov3 -> timm's Eva: storage tokens, LayerScale, SwiGLU in three parts, a key without bias."""
    rules = (
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
        (r"^storage_tokens$", "reg_token"),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    )
    check_periods(state)
    return split_bias(substitute(rules)(state), {name: tensor for name, tensor in state.items() if "bias_mask" in name})


def from_hf_dinov3(state: State) -> State:
    """DINOv3ViTModel -> timm's Eva."""
    gated = any(".mlp.gate_proj." in name for name in state)
    rules = (
        *HF_LAYERS,
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"\.ls([12])\.gamma$", r".gamma_\1"),
    )
    return split_bias(merge_qkv(substitute(rules)(state)), {})


def split_bias(state: State, masks: State) -> State:
    """timm's Eva holds the bias of query and value, and none of the key: `qkv.bias` (3 D) -> `q_bias`, `v_bias`.

    The key's bias has to be zero, as it is or as `bias_mask` makes it: with rotary positions it would count.
    """
    found: State = {}
    for name, tensor in state.items():
        if not name.endswith(".attn.qkv.bias"):
            found[name] = tensor
            continue
        mask = next((mask for key, mask in masks.items() if key.startswith(name.partition(".qkv.")[0] + ".")), None)
        query, key, value = tensor.chunk(3)
        if mask is not None and mask.shape == tensor.shape:
            key = key * mask.chunk(3)[1]
        if bool((key != 0).any()):
            raise UserError(f"'{name}' has a bias of the key that is not zero, which no released DINOv3 network has.")
        stem = name.removesuffix("qkv.bias")
        found |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
    return found


def check_periods(state: State) -> None:
    """UserError unless RoPE's periods are those of base 100, as in every released DINOv3 network."""
    periods = state.get("rope_embed.periods")
    if periods is None:
        return
    count = periods.numel()
    expected = 100 ** (torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(periods.double().flatten(), expected, rtol=1e-2):
        raise UserError("its rotary positions have other periods than those of base 100, which are not supported.")


# -- the registry ------------------------------------------------------------------------------------------------------

BLOCKS = (r"^blocks\.0\.(\d+\.)?norm1\.weight$",)
HF_BLOCKS = (r"^(encoder\.)?layers?\.0\.layernorm_before\.weight$",)
HF_NORM1 = (r"^(model\.)?(encoder\.)?layers?\.0\.norm1\.weight$",)
LS = r"^blocks\.0\.(\d+\.)?ls1\.gamma$"

DINOV2 = Family(
    "dinov2",
    "DINOv2 (facebookresearch/dinov2)",
    has=(*BLOCKS, LS, r"^pos_embed$", r"^mask_token$"),
    lacks=(r"^reg_token$", r"^decoder"),
    rename=from_dinov2,
    dropped=(r"^mask_token$",),
    heads={(384, 12): 6, **VIT_SIZES, (1536, 40): 24},
    size=518,
    model_type="dinov2",
    license="Apache-2.0",
)
DINOV2_REG = replace(
    DINOV2,
    name="dinov2_reg",
    title="DINOv2 with registers (facebookresearch/dinov2)",
    has=(*BLOCKS, r"^register_tokens$", LS, r"^pos_embed$"),
    lacks=(),
    options={"resize": "antialias"},
    model_type="dinov2_with_registers",
)
DINOV3 = Family(
    "dinov3",
    "DINOv3 (facebookresearch/dinov3)",
    has=(*BLOCKS, r"^storage_tokens$"),
    rename=from_dinov3,
    dropped=(r"^mask_token$", r"^rope_embed\.periods$", r"\.bias_mask$", r"^local_cls_norm\."),
    options={"positions": "rope", "norm_eps": 1e-5},
    heads={(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 20, (4096, 40): 32},
    size=256,
    model_type="dinov3_vit",
    license="DINOv3 License (Meta), not open source",
)
MAE = Family(
    "mae",
    "MAE (facebookresearch/mae)",
    has=(*BLOCKS, r"^pos_embed$", r"^decoder"),
    dropped=(r"^mask_token$", r"^decoder"),
    options={"resize": "bicubic"},
    heads=VIT_SIZES,
    license="CC-BY-NC-4.0",
)

FAMILIES: list[Family] = [
    DINOV3,
    DINOV2_REG,
    DINOV2,
    Family(
        "sit",
        "SiT (Atito, Awais, Kittler)",
        has=(*BLOCKS, r"^(rot_token|contrastive_token)$"),
        rename=from_sit,
        dropped=(r"^(rot|contrastive|recons)_(head|w)\b", r"^convTrans\."),
        heads=VIT_SIZES,
    ),
    MAE,
    replace(
        DINOV3,
        name="eva",
        title="DINOv3 in timm's names (Eva)",
        has=(*BLOCKS, r"^blocks\.0\.gamma_1$", r"^reg_token$"),
        lacks=(r"^pos_embed$",),
        rename=dict,
        dropped=(),
        model_type=None,
    ),
    Family(
        "vit",
        "ViT in timm's names (timm, DINO, DeiT, MAE's encoder, SiT version 3)",
        has=(*BLOCKS, r"^pos_embed$"),
        heads={(384, 12): 6, **VIT_SIZES},
        dropped=(r"^mask_token$", r"^(contrastive|rot|recons)_head\.", r"^recons?truction_head\."),
    ),
    replace(
        MAE,
        name="hf_vitmae",
        title="ViTMAE (Hugging Face)",
        has=(*HF_BLOCKS, r"^decoder\."),
        anchor=ANCHORS[1],
        rename=from_hf_vit,
        options={"norm_eps": 1e-12, "resize": "bicubic"},
        model_type="vit_mae",
    ),
    Family(
        "hf_vit",
        "ViT or DINO (Hugging Face)",
        has=HF_BLOCKS,
        anchor=ANCHORS[1],
        rename=from_hf_vit,
        dropped=(r"^pooler\.", r"^mask_token$", r"^decoder\."),
        options={"norm_eps": 1e-12, "resize": "bicubic"},
        heads={(192, 12): 3, (384, 12): 6, **VIT_SIZES},
        statistics=HALF,
        model_type="vit",
        license="Apache-2.0",
    ),
    replace(
        DINOV2_REG,
        name="hf_dinov2_reg",
        title="DINOv2 with registers (Hugging Face)",
        has=(*HF_NORM1, r"^embeddings\.register_tokens$", r"^embeddings\.position_embeddings$"),
        anchor=ANCHORS[1],
        rename=from_hf_dinov2,
    ),
    replace(
        DINOV2,
        name="hf_dinov2",
        title="DINOv2 (Hugging Face)",
        has=(*HF_NORM1, r"^embeddings\.position_embeddings$"),
        lacks=(),
        anchor=ANCHORS[1],
        rename=from_hf_dinov2,
    ),
    replace(
        DINOV3,
        name="hf_dinov3",
        title="DINOv3 (Hugging Face)",
        has=(*HF_NORM1, r"^embeddings\.register_tokens$"),
        anchor=ANCHORS[2],
        rename=from_hf_dinov3,
        dropped=(r"^mask_token$", r"^rope_embeddings\."),
        size=224,
    ),
]
"""In the order in which they are tried: a family with more parts before one that has some of them."""


def recognize(names: Iterable[str], anchor: str) -> Family | None:
    """The first family whose keys these are."""
    names = list(names)

    def any_matches(patterns: Iterable[str]) -> list[bool]:
        return [any(re.search(pattern, name) for name in names) for pattern in patterns]

    for family in FAMILIES:
        if family.anchor == anchor and all(any_matches(family.has)) and not any(any_matches(family.lacks)):
            return family
    return None


def by_name(name: str) -> Family:
    """The row of a name. StopIteration where there is none: options allow only the names of rows."""
    return next(family for family in FAMILIES if family.name == name)
