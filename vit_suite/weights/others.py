"""Files of other projects: which of a file's networks is meant, its family, and its weights under timm's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_suite.config import ReadingConfig
from vit_suite.errors import UserError, unknown_name
from vit_suite.weights.description import find_heads, infer
from vit_suite.weights.families import ANCHORS, FAMILIES, HEADS, Family, by_name, recognize
from vit_suite.weights.loaded import LoadedBackbone, fill, finish
from vit_suite.weights.reading import Content, checked

log = logging.getLogger("vit_suite")


def read_state(content: Content, source: str, how: ReadingConfig) -> LoadedBackbone:
    """The network in a file of another project, recognized by its keys."""
    prefix, anchor, others = find_network(content.tensors, how.checkpoint_branch, source)
    names = {name.removeprefix(prefix): name for name in content.tensors if name.startswith(prefix)}
    family = of_model_type(recognize([*names, *content.tensors], anchor), content.config.get("model_type"), source)
    if how.checkpoint_family is not None:
        family = asked_family(how.checkpoint_family, family, content, source)
    if family is None:
        raise UserError(
            f"checkpoint '{source}' holds a patch embedding, but no vision transformer of a known family: its keys are"
            f" like '{next(iter(names))[:80]}'. Known: {', '.join(row.name for row in FAMILIES)}."
        )
    dropped = [*family.dropped, *HEADS]
    left_out = [name for name in names if any(re.search(pattern, name) for pattern in dropped)]
    left_out = [name for name in left_out if not name.endswith("bias_mask")]
    own = {name: content.tensors[full] for name, full in names.items() if name not in left_out}
    own = checked(own, source)
    try:
        state = family.rename(own)
    except UserError as error:
        raise UserError(f"checkpoint '{source}' ({family.title}): {error}") from None
    state = {name: tensor for name, tensor in state.items() if not any(re.search(row, name) for row in family.dropped)}
    heads, who = find_heads(state, family, how.checkpoint_heads, content.config, content.said, source)
    options = infer(state, family, heads, content.config, source) | of_config(content.config, source)
    backbone, report = fill(options, state, left_out, source, how.allow_partial)
    mean, std = of_preprocessor(content.preprocessor, family, source)
    description = {
        "mean": mean,
        "std": std,
        "license": family.license,
        "heads_from": who,
        "network": prefix.rstrip("."),
    }
    counters = {name: content.said[name] for name in ("epoch", "step") if name in content.said}
    if others:
        log.info("%s holds %d networks; taken: '%s'. Others: %s", source, 1 + len(others), prefix, ", ".join(others))
    return finish(backbone, description | counters, source, family=family.name, report=report)


def find_network(tensors: Mapping[str, Tensor], branch: str | None, source: str) -> tuple[str, str, list[str]]:
    """(prefix of the network's keys, its anchor, prefixes of the other networks in the file).

    Of several networks the one that its authors evaluate is taken: an EMA teacher first, then a network without such a
    name, then a momentum copy (MoCo, BYOL) or a student. `branch`, a word of the prefix, chooses another one.

    Raises:
        UserError: there is none, or two are alike.
    """
    found: dict[str, str] = {}
    for anchor in ANCHORS:
        for name in tensors:
            if name == anchor or name.endswith(f".{anchor}"):
                found.setdefault(name.removesuffix(anchor), anchor)
    if not found:
        first = next(iter(tensors), "nothing")
        raise UserError(
            f"checkpoint '{source}' holds no ViT: {len(tensors)} tensors, the first '{first[:80]}', but no"
            " 'cls_token' and 'patch_embed.proj.weight' of a known family."
        )
    prefixes = sorted(found, key=lambda prefix: (rank_of(prefix), len(prefix), prefix))
    if branch is not None:
        prefixes = [prefix for prefix in prefixes if branch in re.split(r"[._]", prefix)]
        if not prefixes:
            raise UserError(
                f"checkpoint '{source}' holds no network '{branch}': --checkpoint_branch is a word of"
                f" {', '.join(sorted(repr(prefix.rstrip('.')) for prefix in found))}."
            )
    if len(prefixes) > 1 and rank_of(prefixes[0]) == rank_of(prefixes[1]):
        names = [repr(prefix.rstrip(".")) for prefix in prefixes]
        raise UserError(
            f"checkpoint '{source}' holds {len(names)} networks, {', '.join(names[:6])}: say which with"
            " --checkpoint_branch and a word that only its name has."
        )
    return (
        prefixes[0],
        found[prefixes[0]],
        [repr(prefix.rstrip(".")) for prefix in sorted(found) if prefix != prefixes[0]],
    )


def rank_of(prefix: str) -> int:
    """Which network of a file is evaluated: the one with the lowest number. See `find_network`."""
    words = set(re.split(r"[._]", prefix))
    if words & {"gram", "student", "online", "momentum", "decoder", "predictor"}:
        return 2
    return 0 if words & {"teacher", "ema"} else 1


def of_model_type(found: Family | None, kind: object, source: str) -> Family | None:
    """The row of the model type `kind` in config.json, if it has the same keys as `found` (ViTMAE's encoder has ViT's);
    UserError if it has others."""
    if kind is None or found is None or found.model_type == kind:
        return found
    for family in FAMILIES:
        if family.model_type == kind and (family.anchor, family.rename) == (found.anchor, found.rename):
            return family
    raise UserError(f"checkpoint '{source}': config.json names the model type {kind!r}, the keys are of {found.title}.")


def asked_family(name: str, found: Family | None, content: Content, source: str) -> Family:
    """The family that --checkpoint_family names; UserError where the keys, or config.json, are of another."""
    if name == "vit-suite":
        raise UserError(f"--checkpoint_family is vit-suite, but '{source}' holds no description of this suite.")
    if name not in [family.name for family in FAMILIES]:
        raise unknown_name("checkpoint family", name, [family.name for family in FAMILIES])
    asked = by_name(name)
    if found is None or found.name != asked.name:
        what = f"of {found.title} (--checkpoint_family {found.name})" if found else "of no known family"
        raise UserError(f"--checkpoint_family is {name} ({asked.title}), but the keys of '{source}' are {what}.")
    return asked


def of_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Options of the backbone that a Hugging Face config.json tells and shapes do not; UserError if it names something
    that is not supported."""
    if not config:
        return {}
    act = config.get("hidden_act", "gelu")
    if act not in ("gelu", "gelu_pytorch_tanh", "silu"):
        raise UserError(f"checkpoint '{source}': config.json names the activation {str(act)[:80]!r}; expected 'gelu'.")
    options: dict[str, Any] = {"mlp": "gelu_tanh"} if act == "gelu_pytorch_tanh" else {}
    if config.get("rope_theta", 100.0) != 100.0:
        raise UserError(f"checkpoint '{source}': config.json names rope_theta {config['rope_theta']}; expected 100.")
    eps = config.get("layer_norm_eps")
    if eps is None:
        return options
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise UserError(f"checkpoint '{source}': config.json names layer_norm_eps {str(eps)[:80]!r}; expected 0 to 1.")
    return options | {"norm_eps": float(eps)}


def of_preprocessor(preprocessor: Mapping[str, Any], family: Family, source: str) -> tuple[list[float], list[float]]:
    """(mean, std) of preprocessor_config.json, else the family's."""
    found = []
    for name, default in zip(("image_mean", "image_std"), family.statistics, strict=True):
        values = preprocessor.get(name, default)
        if not (isinstance(values, list) and values and all(type(v) in (int, float) and 0 <= v <= 10 for v in values)):
            raise UserError(f"checkpoint '{source}': preprocessor_config.json names {name} {str(values)[:80]}.")
        found.append([float(value) for value in values])
    return found[0], found[1]
