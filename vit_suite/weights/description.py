"""Options of a backbone that fit given weights: read off the shapes, or checked against them before any building.

A file's description may be wrong or hostile. A depth of 10^9 or a million pixels a side would allocate a network before
the first key is compared. So each dimension has to agree with the tensors, which are in memory already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_suite.config import BackboneConfig
from vit_suite.config.limits import one_or_two
from vit_suite.errors import UserError, nearest
from vit_suite.options import Schema
from vit_suite.weights.families import Family

LARGEST_SIDE = 16384
"""Pixels: the largest side of an image that a description may name if no tensor tells it."""
LONGEST_NAME = 200
"""Characters; timm's longest name has 68."""
ARCHITECTURES = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
"""Attention heads of networks called vit_small, deit_tiny, ... in timm, DINO, MAE and solo-learn."""
LEAST_HEAD, MOST_HEADS = 8, 64
"""Width of a head, and number of heads, within which a message suggests numbers."""


def infer(
    state: Mapping[str, Tensor], family: Family, heads: int, config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Options of the backbone whose weights, in timm's names, are `state`. `config`: config.json beside it, or {}."""
    patch = _shape(state, "patch_embed.proj.weight", 4, source)
    dim, channels, height, width = patch
    if dim % heads:
        raise UserError(
            f"checkpoint '{source}' has tokens of width {dim}, which {heads} heads do not divide: give another number"
            " with --checkpoint_heads."
        )
    registers = _shape(state, "reg_token", 3, source)[1] if "reg_token" in state else 0
    prefix = int("cls_token" in state) + registers
    options: dict[str, Any] = {
        "name": "vit",
        "patch_size": one_or_two((height, width)),
        "dim": dim,
        "depth": depth_of(state, source),
        "heads": heads,
        "registers": registers,
        "class_token": "cls_token" in state,
        "pool": "cls" if "cls_token" in state else "mean",
        "channels": channels,
        "drop_path": 0.0,
        **block_options(state, dim, source),
        **family.options,
    }
    if "pos_embed" not in state:
        return options | {"image_size": [max(1, family.size // side) * side for side in (height, width)]}
    grid = grid_of(state, prefix, config.get("image_size"), (height, width), source)
    options["prefix_positions"] = state["pos_embed"].shape[1] != grid[0] * grid[1]
    return options | {"image_size": [grid[0] * height, grid[1] * width]}


def block_options(state: Mapping[str, Tensor], dim: int, source: str) -> dict[str, Any]:
    """Width and kind of the blocks' MLP, and whether they have LayerScale.

    A SwiGLU holds gate and value as one layer of twice the width (DINOv2), or as two (DINOv3).
    """
    scaled = "blocks.0.ls1.gamma" in state or "blocks.0.gamma_1" in state
    options: dict[str, Any] = {"layer_scale": 1e-5} if scaled else {}  # the first value, which the file replaces
    hidden = _shape(state, "blocks.0.mlp.fc2.weight", 2, source)[1]
    gated = "blocks.0.mlp.fc1_g.weight" in state
    if not gated:
        gated = _shape(state, "blocks.0.mlp.fc1.weight", 2, source)[0] == 2 * hidden
    return options | {"mlp_ratio": hidden / dim, "mlp": "swiglu" if gated else "gelu"}


def depth_of(state: Mapping[str, Tensor], source: str) -> int:
    """Number of blocks, which have to be numbered from 0 without a gap."""
    numbers = block_numbers(state)
    if not numbers or numbers != set(range(len(numbers))):
        raise UserError(f"checkpoint '{source}': its blocks are not numbered 0, 1, 2, ... ({sorted(numbers)[:8]}).")
    return len(numbers)


def block_numbers(state: Mapping[str, Tensor]) -> set[int]:
    """Numbers of the blocks that keys name."""
    return {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d{1,6})\.", name))}


def grid_of(state: Mapping[str, Tensor], prefix: int, size: object, patch: tuple[int, int], source: str) -> list[int]:
    """[h, w] in patches of the position grid, with positions for the `prefix` tokens, CLS alone, or patches alone.

    `size`: what config.json says, [height, width] in pixels. Without it the grid is a square. 25 positions are 4 x 6
    patches and CLS, or 5 x 5 patches.
    """
    tokens = _shape(state, "pos_embed", 3, source)[1]
    counts = (prefix, int("cls_token" in state), 0)
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
        grid = [size[0] // patch[0], size[1] // patch[1]]
        if tokens - grid[0] * grid[1] in counts:
            return grid
    for others in counts:
        side = math.isqrt(max(0, tokens - others))
        if side and side * side == tokens - others:
            return [side, side]
    raise UserError(
        f"checkpoint '{source}' has {tokens} positions for {prefix} tokens and its patches: they are no square grid,"
        " and the file does not say which."
    )


def _shape(state: Mapping[str, Tensor], name: str, dims: int, source: str) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"checkpoint '{source}' holds no '{name}'.")
    shape = tuple(state[name].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"checkpoint '{source}': '{name}' has the shape {shape}; expected {dims} positive dimensions.")
    return shape


# -- heads: no shape tells them ----------------------------------------------------------------------------------------


def find_heads(
    state: Mapping[str, Tensor],
    family: Family,
    asked: int | None,
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    source: str,
) -> tuple[int, str]:
    """(heads, source of that number): the option, the folder's config.json, the training's arguments, or a published
    size.

    Raises:
        UserError: none of them says it, or the option and config.json differ.
    """
    dim = _shape(state, "patch_embed.proj.weight", 4, source)[0]
    told = config.get("num_attention_heads", _model_args(config).get("num_heads"))
    if told is not None and (type(told) is not int or told < 1):
        raise UserError(f"checkpoint '{source}': config.json names {str(told)[:80]!r} heads; expected a whole number.")
    if asked is not None:
        if told is not None and told != asked:
            raise UserError(f"--checkpoint_heads is {asked}, but config.json of '{source}' says {told}.")
        return asked, "--checkpoint_heads"
    if told is not None:
        return told, "config.json"
    if named := _named(said):
        return named, "the training's arguments"
    known = family.heads.get((dim, depth_of(state, source)))
    if known is not None:
        return known, f"the published {dim}-wide, {depth_of(state, source)}-deep network"
    fits = [str(n) for n in range(1, min(dim, MOST_HEADS) + 1) if dim % n == 0 and dim // n >= LEAST_HEAD]
    raise UserError(
        f"checkpoint '{source}' does not say how many attention heads it has, and its width {dim} and depth"
        f" {depth_of(state, source)} are of no published network: give --checkpoint_heads"
        + (f" ({', '.join(fits)} divide the width)." if fits else ".")
    )


def _model_args(config: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = config.get("model_args")
    return arguments if isinstance(arguments, Mapping) else {}


def _named(said: Mapping[str, Any]) -> int | None:
    """Heads by the name of the network in a training's arguments: `arch: vit_small` (DINO), `model: mae_vit_base_...`,
    `backbone: {name: vit_tiny}` (solo-learn)."""
    backbone = said.get("backbone")
    if isinstance(backbone, Mapping):
        backbone = backbone.get("name")
    for name in (said.get("arch"), said.get("model"), backbone):
        if isinstance(name, str) and (found := re.search(r"(?:vit|deit)_(tiny|small|base|large|huge)", name)):
            return ARCHITECTURES[found[1]]
    return None


# -- a description of our own ------------------------------------------------------------------------------------------


def check_own(own: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Options of the backbone that this suite's description names, checked against the weights beside it.

    Raises:
        UserError: an option is unknown, of another type, or contradicts the shapes.
    """
    options = own.get("backbone")
    if not isinstance(options, Mapping):
        raise UserError(f"checkpoint '{source}' describes no backbone: its description holds {', '.join(own)[:80]}.")
    schema = Schema(BackboneConfig)
    checked_options: dict[str, Any] = {}
    for name, value in options.items():
        if name not in schema.options:
            hint = nearest(str(name)[:80], schema.options)
            raise UserError(
                f"checkpoint '{source}' describes a backbone with the unknown option '{str(name)[:80]}'.{hint}"
            )
        option = schema.options[name]
        try:
            if isinstance(value, str) and len(value) > LONGEST_NAME:
                raise ValueError(value)
            checked_options[name] = option.convert(value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            shown = repr(value)[:80]
            raise UserError(
                f"checkpoint '{source}' describes backbone.{name} as {shown}; expected {option.type_name}."
            ) from None
    _against_shapes(checked_options, state, source)
    return checked_options | {"pretrained": False}


def _against_shapes(options: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """UserError unless each dimension that a description names is that of the tensors."""
    if options.get("stem", "patch") == "conv":
        return _against_conv_stem(options, state, source)
    dim, channels, *patch = _shape(state, "patch_embed.proj.weight", 4, source)
    found: dict[str, Any] = {
        "dim": dim,
        "channels": channels,
        "patch_size": patch if isinstance(options.get("patch_size"), list) else patch[0],
        "registers": _shape(state, "reg_token", 3, source)[1] if "reg_token" in state else 0,
    }
    for name, value in found.items():
        said = options.get(name)
        if said is not None and said != value:
            raise UserError(f"checkpoint '{source}' describes backbone.{name} as {said}, but its weights have {value}.")
    depth, blocks = options.get("depth"), len(block_numbers(state))
    if depth is not None and depth > 4 * max(1, blocks):  # a smaller difference is counted key by key
        raise UserError(f"checkpoint '{source}' describes backbone.depth as {depth}, but its weights have {blocks}.")
    hidden = next((t.shape[-1] for name, t in state.items() if name == "blocks.0.mlp.fc2.weight"), None)
    ratio = options.get("mlp_ratio")
    if ratio is not None and hidden is not None and not hidden / 4 <= ratio * dim <= hidden * 4:
        raise UserError(
            f"checkpoint '{source}' describes backbone.mlp_ratio as {ratio:g}, its weights {hidden / dim:g}."
        )
    size = options.get("image_size")
    if size is None:
        return
    if max(size) > LARGEST_SIDE:
        raise UserError(
            f"checkpoint '{source}' describes backbone.image_size as {size}; expected at most {LARGEST_SIDE} a side."
        )
    if "pos_embed" in state:
        patches, tokens = (size[0] // patch[0]) * (size[1] // patch[1]), _shape(state, "pos_embed", 3, source)[1]
        if not patches <= tokens <= patches + 1 + found["registers"]:
            raise UserError(
                f"checkpoint '{source}' describes backbone.image_size as {size}, which are {patches} patches of"
                f" {patch[0]} x {patch[1]} pixels, but its weights have {tokens} positions."
            )


def _against_conv_stem(options: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """`_against_shapes` for a convolutional stem: its first layer tells the channels, the blocks everything else."""
    first = next((t for name, t in state.items() if name.startswith("patch_embed.") and t.ndim == 4), None)
    if first is None or "blocks.0.norm1.weight" not in state:
        raise UserError(f"checkpoint '{source}' describes a convolutional stem, and holds none.")
    found = {
        "channels": first.shape[1],
        "dim": state["blocks.0.norm1.weight"].shape[0],
        "depth": len(block_numbers(state)),
    }
    for name, value in found.items():
        if options.get(name) not in (None, value):
            raise UserError(
                f"checkpoint '{source}' describes backbone.{name} as {options[name]}, but its weights have {value}."
            )
    size, patch = options.get("image_size") or [1, 1], options.get("patch_size") or 16
    if "pos_embed" in state and size[0] * size[1] > 2 * patch * patch * state["pos_embed"].shape[1]:
        raise UserError(f"checkpoint '{source}' describes image_size as {size}, more than it has positions for.")


def check_statistics(own: Mapping[str, Any], options: Mapping[str, Any], source: str) -> None:
    """UserError unless `mean`, `std` and `image_size` of a description have the type and length that the network
    takes."""
    channels = options.get("channels", 3)
    for name, above in (("mean", -math.inf), ("std", 0.0)):
        values = own.get(name)
        numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if values is not None and not (numbers and len(values) == channels and min(values) > above):
            raise UserError(
                f"checkpoint '{source}' describes {name} as {str(values)[:80]}; expected {channels} numbers"
                + (" above 0." if name == "std" else ".")
            )
    size = own.get("image_size")
    sides = isinstance(size, list) and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in size)
    if size is not None and not (sides and len(size) in (0, 2)):
        raise UserError(
            f"checkpoint '{source}' describes image_size as {str(size)[:80]}; expected [height, width] in pixels."
        )
    if size and options.get("image_size") is not None and list(size) != list(options["image_size"]):
        raise UserError(
            f"checkpoint '{source}' describes image_size as {str(size)[:80]},"
            f" its backbone's as {options['image_size']}."
        )
