"""Backbones on disk: what `--checkpoint` accepts, and what a run writes.

A backbone file of this suite is `backbone.safetensors` (timm key names) whose metadata, repeated in `backbone.json` for
people, rebuilds the network. Files of others are told by their keys (`weights/families.py`). In both cases an
evaluation guesses nothing: every key of the network has to be in the file and every key of the file explained, the
network is first built without memory (torch's `meta` device) and compared, and no code from a file runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vit_suite.config import BackboneConfig, ReadingConfig
from vit_suite.errors import UserError, unknown_name
from vit_suite.files import write_atomically
from vit_suite.models.backbone import Backbone
from vit_suite.models.lora import merged
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.description import check_own, check_statistics, find_heads, infer
from vit_suite.weights.families import ANCHORS, FAMILIES, HEADS, IMAGENET, Family, by_name, recognize
from vit_suite.weights.reading import SUFFIXES, Content, checked, read_content, read_folder
from vit_suite.weights.report import KeyReport, compare

log = logging.getLogger("vit_suite")
BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
"""Small backbones that come with the package: NAME.safetensors, and NAME.json with config, command and scores."""


@dataclass
class LoadedBackbone:
    """A backbone and what belongs to it."""

    backbone: Backbone
    mean: list[float]
    """Channel means in 0..1 that its images are normalized with."""
    std: list[float]
    image_size: list[int]
    """[height, width] in pixels that it was trained at: the crop of an evaluation."""
    sha256: str
    """Of the weights, by name: the same numbers give the same value whatever file they came from."""
    source: str
    """The path or name that was asked for."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Everything else the file said (method, data set, epoch, ...)."""
    family: str = "vit-suite"
    """The row of `weights/families.py` that its names are of, `timm`, or this suite's own."""
    report: KeyReport | None = None
    """Which keys were taken."""

    def transform(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """The view that scores and exports see: (B, C, h, w), normalized, h x w = `image_size`.

        images: uint8 or float in 0..1, (B, C, H, W), or a list of (C, H_i, W_i) of different sizes.
        """
        return eval_view(images, (self.image_size[0], self.image_size[-1]), self.mean, self.std)

    def untrained(self, seed: int = 0) -> LoadedBackbone:
        """The same architecture with fresh weights: the baseline that a score is read beside."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = Backbone(BackboneConfig(**{**asdict(self.backbone.cfg), "pretrained": False}))
        digest = weights_sha256(fresh.vit.state_dict())
        return LoadedBackbone(
            fresh.eval(), self.mean, self.std, self.image_size, digest, f"untrained:{self.source}", dict(self.meta)
        )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, types and numbers, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_backbone(backbone: Backbone, folder: str | Path, mean: list[float], std: list[float], **meta: object) -> str:
    """Write `backbone.safetensors` and `backbone.json` into `folder`, each atomically; returns the sha256 of the
    weights.

    The metadata is inside the safetensors file too, so either write alone leaves a pair that loads.
    """
    backbone = merged(backbone)
    # clone: safetensors wants contiguous tensors that own their memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.vit.state_dict().items()}
    digest = weights_sha256(state)
    description = {
        "backbone": asdict(backbone.cfg),
        "mean": list(mean),
        "std": list(std),
        "image_size": list(backbone.cfg.image_size or []),
        "sha256": digest,
        **meta,
    }
    folder = Path(folder)
    write_atomically(
        folder / "backbone.safetensors",
        lambda path: save_file(state, path, metadata={"vit_suite": json.dumps(description)}),
    )
    write_atomically(folder / "backbone.json", lambda path: _write_text(path, json.dumps(description, indent=2) + "\n"))
    return digest


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def load_backbone(checkpoint: str | Path, how: ReadingConfig | None = None) -> LoadedBackbone:
    """The backbone of a run directory, a file or folder of a released network, `timm:NAME`, or `builtin:NAME` (comes
    with the package), in eval mode.

    Args:
        how: what the file does not say (heads), which of its networks is meant, and whether a part may be missing.

    Raises:
        UserError: there is no such file, it is truncated, it would run code, it holds NaN, its family is not known or
            not the one asked for, or its keys do not fit.
    """
    text, how = str(checkpoint), how or ReadingConfig()
    if text.startswith("timm:"):
        return _from_timm(text, how)
    if text.startswith(BUILTIN_PREFIX):
        return _from_own(read_content(builtin_path(text), text), text, how)
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        return _said(_from_folder(path, text, how))
    if path.is_dir():
        path = _in_run_directory(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint '{text}' does not exist. Give a run directory, a {', '.join(SUFFIXES)} file, a folder of"
            f" Hugging Face or timm, timm:NAME, or {BUILTIN_PREFIX}NAME ({', '.join(builtin_names()) or 'none'})."
        )
    content = read_content(path, text)
    if content.own is not None:
        return _from_own(content, text, how)
    return _said(_from_state(content, text, how))


def builtin_names() -> list[str]:
    """The backbones that come with the package."""
    return sorted(path.stem for path in BUILTIN_FOLDER.glob("*.safetensors"))


def builtin_path(checkpoint: str) -> Path:
    """The file of `builtin:NAME`. UserError, with the nearest name, when there is none."""
    name, names = checkpoint.removeprefix(BUILTIN_PREFIX), builtin_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f" Did you mean '{BUILTIN_PREFIX}{near[0]}'?" if near else ""
        raise UserError(f"checkpoint '{checkpoint}': the package has no backbone of that name.{hint}")
    return BUILTIN_FOLDER / f"{name}.safetensors"


def _in_run_directory(folder: Path) -> Path:
    for candidate in (folder / "backbone.safetensors", folder / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"'{folder}' is no run directory, nor a folder of a model: it holds neither backbone.safetensors nor"
        " checkpoints/last.ckpt nor config.json."
    )


def fill(
    options: Mapping[str, Any], state: Mapping[str, Tensor], left_out: list[str], source: str, partial: bool = False
) -> tuple[Backbone, KeyReport]:
    """A backbone of `options` with the weights `state` (timm names), and what was taken.

    It is built without memory first: a description that does not fit costs none.

    Raises:
        UserError: options that no network has; or how many keys are missing, unexpected or of another shape, and the
            first of them. With `partial` those stay as they were drawn.
    """
    with torch.device("meta"):
        empty = _build(options, source)
    report = compare(empty.vit.state_dict(), state, left_out)
    if not report.complete and not (partial and report.matched):
        raise UserError(
            f"checkpoint '{source}' does not fit the architecture ({_describe(empty)}): {report.faults()}."
            " --allow_partial takes the keys that fit and leaves the others as they were drawn."
        )
    backbone = _build(options, source)
    backbone.vit.load_state_dict({name: state[name] for name in report.matched}, strict=False)
    if not report.complete:
        log.warning("%s: only %s; the rest is UNTRAINED", source, report)
    return backbone, report


def _describe(backbone: Backbone) -> str:
    cfg = backbone.cfg
    return f"{cfg.name}, patch {cfg.patch_size}, dim {cfg.dim}, depth {cfg.depth}, heads {cfg.heads}"


def _build(options: Mapping[str, Any], source: str) -> Backbone:
    try:
        return Backbone(BackboneConfig(**{**options, "pretrained": False}))
    except TypeError as error:
        raise UserError(f"checkpoint '{source}' describes a backbone with unknown options ({error}).") from None
    except UserError as error:
        raise UserError(f"checkpoint '{source}' describes a backbone that cannot be: {error}") from None


def _finish(backbone: Backbone, description: Mapping[str, Any], source: str, **more: Any) -> LoadedBackbone:
    known = {"backbone", "mean", "std", "image_size", "sha256"}
    backbone = merged(backbone)  # a run's own checkpoint has LoRA's pairs apart
    mean, std = statistics((description.get("mean"), description.get("std")), backbone.cfg.channels)
    return LoadedBackbone(
        backbone.eval(),
        mean,
        std,
        list(description.get("image_size") or backbone.cfg.image_size or []),
        weights_sha256(backbone.vit.state_dict()),
        source,
        {key: value for key, value in description.items() if key not in known},
        **more,
    )


def statistics(given: tuple[Any, Any], channels: int) -> tuple[list[float], list[float]]:
    """(mean, std) for `channels`; ImageNet's where they are not given, and their average for every channel where there
    are not as many."""
    pair = [list(values or default) for values, default in zip(given, IMAGENET, strict=True)]
    mean, std = (values if len(values) == channels else [sum(values) / len(values)] * channels for values in pair)
    return mean, std


# -- our own files -----------------------------------------------------------------------------------------------------


def _from_own(content: Content, source: str, how: ReadingConfig) -> LoadedBackbone:
    own = content.own or {}
    if how.checkpoint_family not in (None, "vit-suite"):
        raise UserError(f"--checkpoint_family is {how.checkpoint_family}, but '{source}' was written by vit-suite.")
    prefix = own.get("prefix", "")
    if not isinstance(prefix, str):
        raise UserError(f"checkpoint '{source}' describes its prefix as {str(prefix)[:80]}; expected text.")
    if "prefix" in own:  # a Lightning checkpoint: the whole method's state
        prefix = f"state_dict.{prefix}"
    named = {name.removeprefix(prefix): value for name, value in content.tensors.items() if name.startswith(prefix)}
    state = checked(named, source)
    options = check_own(own, state, source)
    check_statistics(own, options, source)
    if "prefix" in own:
        options["drop_path"] = 0.0
    if how.checkpoint_heads not in (None, options.get("heads")):
        raise UserError(f"--checkpoint_heads is {how.checkpoint_heads}, but '{source}' says {options.get('heads')}.")
    backbone, report = fill(options, state, [], source, how.allow_partial)
    counters = {name: content.said.get(name) for name in ("epoch", "step")} if "prefix" in own else {}
    description = {name: value for name, value in own.items() if name != "prefix"} | counters
    return _finish(backbone, description, source, report=report)


# -- files of others ---------------------------------------------------------------------------------------------------


def _from_state(content: Content, source: str, how: ReadingConfig) -> LoadedBackbone:
    """A network that its keys tell."""
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
    try:
        state = family.rename(checked(own, source))
    except UserError as error:
        raise UserError(f"checkpoint '{source}' ({family.title}): {str(error).removeprefix('checkpoint ')}") from None
    state = {name: tensor for name, tensor in state.items() if not any(re.search(row, name) for row in family.dropped)}
    heads, who = find_heads(state, family, how.checkpoint_heads, content.config, content.said, source)
    options = infer(state, family, heads, source) | _of_config(content.config, source)
    backbone, report = fill(options, state, left_out, source, how.allow_partial)
    mean, std = _of_preprocessor(content.preprocessor, family, source)
    description = {
        "mean": mean,
        "std": std,
        "licence": family.licence,
        "heads_from": who,
        "network": prefix.rstrip("."),
    }
    counters = {name: content.said[name] for name in ("epoch", "step") if name in content.said}
    if others:
        log.info("%s holds %d networks; taken: '%s'. Others: %s", source, 1 + len(others), prefix, ", ".join(others))
    return _finish(backbone, description | counters, source, family=family.name, report=report)


def find_network(tensors: Mapping[str, Tensor], branch: str | None, source: str) -> tuple[str, str, list[str]]:
    """(prefix of the network's names, its anchor, prefixes of the networks beside it).

    Where there are several, the one that its authors evaluate is taken: an EMA teacher before the network itself, that
    before a momentum copy (MoCo, BYOL) or a student. `branch` is a word of the prefix that decides otherwise.

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
    """0 for what is evaluated first: see `find_network`."""
    words = set(re.split(r"[._]", prefix))
    if words & {"gram", "student", "online", "momentum", "decoder", "predictor"}:
        return 2
    return 0 if words & {"teacher", "ema"} else 1


def of_model_type(found: Family | None, kind: object, source: str) -> Family | None:
    """The row that config.json names, where its keys are those of `found` too (ViTMAE's encoder has the names of ViT);
    UserError where they are not."""
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


def _from_folder(folder: Path, source: str, how: ReadingConfig) -> LoadedBackbone:
    """A folder of Hugging Face (`model_type`) or timm (`architecture`)."""
    content = read_folder(folder, source)
    config = content.config
    if isinstance(config.get("architecture"), str):
        return _from_timm_folder(content, source, how)
    kind = config.get("model_type")
    known = {family.model_type for family in FAMILIES if family.model_type}
    if kind not in known:
        raise UserError(
            f"checkpoint '{source}': config.json names the model type {str(kind)[:80]!r}; expected one of"
            f" {', '.join(sorted(known))}, or a timm architecture."
        )
    return _from_state(content, source, how)


def _of_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Options that a Hugging Face config.json adds to those of the shapes; UserError where it names what is not
    supported."""
    if not config:
        return {}
    act = config.get("hidden_act", "gelu")
    if act not in ("gelu", "silu"):
        raise UserError(f"checkpoint '{source}': config.json names the activation {str(act)[:80]!r}; expected 'gelu'.")
    if config.get("rope_theta", 100.0) != 100.0:
        raise UserError(f"checkpoint '{source}': config.json names rope_theta {config['rope_theta']}; expected 100.")
    eps = config.get("layer_norm_eps")
    if eps is None:
        return {}
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise UserError(f"checkpoint '{source}': config.json names layer_norm_eps {str(eps)[:80]!r}; expected 0 to 1.")
    return {"norm_eps": float(eps)}


def _of_preprocessor(preprocessor: Mapping[str, Any], family: Family, source: str) -> tuple[list[float], list[float]]:
    """(mean, std) of preprocessor_config.json, else the family's."""
    found = []
    for name, default in zip(("image_mean", "image_std"), family.statistics, strict=True):
        values = preprocessor.get(name, default)
        if not (isinstance(values, list) and values and all(type(v) in (int, float) and 0 <= v <= 10 for v in values)):
            raise UserError(f"checkpoint '{source}': preprocessor_config.json names {name} {str(values)[:80]}.")
        found.append([float(value) for value in values])
    return found[0], found[1]


def _said(loaded: LoadedBackbone) -> LoadedBackbone:
    """Say what a file of others was taken for."""
    cfg = loaded.backbone.cfg
    family = next((row.title for row in FAMILIES if row.name == loaded.family), loaded.family)
    log.info(
        "%s: %s; %s; dim %s, depth %s, %s heads (%s), patch %s; mean %s, std %s, %d x %d pixels",
        loaded.source,
        family,
        loaded.report,
        cfg.dim,
        cfg.depth,
        cfg.heads,
        loaded.meta.get("heads_from", "its name"),
        cfg.patch_size,
        [round(value, 3) for value in loaded.mean],
        [round(value, 3) for value in loaded.std],
        *loaded.image_size,
    )
    return loaded


# -- timm --------------------------------------------------------------------------------------------------------------

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


def _from_timm_folder(content: Content, source: str, how: ReadingConfig) -> LoadedBackbone:
    """A folder that `timm.models.save_for_hf` wrote: the architecture by name, its arguments, its weights."""
    arguments = content.config.get("model_args") or {}
    unknown = [name for name in arguments if name not in TIMM_OPTIONS and name not in TIMM_WITHOUT_EFFECT]
    if unknown:
        raise UserError(
            f"checkpoint '{source}': config.json gives timm the argument '{unknown[0][:80]}', unknown here."
        )
    named = {TIMM_OPTIONS[name]: value for name, value in arguments.items() if name in TIMM_OPTIONS}
    size = named.get("image_size")
    if isinstance(size, int):
        named["image_size"] = [size, size]
    state = checked(content.tensors, source)
    left_out = [name for name in state if any(re.match(pattern, name) for pattern in HEADS)]
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    description = {"backbone": {"name": content.config["architecture"], "drop_path": 0.0, **named}}
    options = check_own(description, state, source)
    if how.checkpoint_family not in (None, "timm"):
        raise UserError(f"--checkpoint_family is {how.checkpoint_family}, but '{source}' is a folder of timm.")
    backbone, report = fill(options, state, left_out, source, how.allow_partial)
    published = content.config.get("pretrained_cfg") or {}
    statistic: dict[str, Any] = {
        name: list(published[name]) for name in ("mean", "std") if isinstance(published.get(name), list)
    }
    check_statistics(statistic, {"channels": backbone.cfg.channels}, source)
    said = statistic | {"licence": published.get("license") or "not said", "heads_from": "config.json"}
    return _finish(backbone, said, source, family="timm", report=report)


def _from_timm(source: str, how: ReadingConfig) -> LoadedBackbone:
    name = source.removeprefix("timm:")
    if how.checkpoint_family not in (None, "timm"):
        raise UserError(f"--checkpoint_family is {how.checkpoint_family}, but '{source}' is timm's.")
    backbone = _pretrained(name, source)
    checked(backbone.vit.state_dict(), source)
    data: dict[str, Any] = getattr(backbone.vit, "pretrained_cfg", {})
    description = {"mean": list(data.get("mean", IMAGENET[0])), "std": list(data.get("std", IMAGENET[1]))}
    return _finish(backbone, description | {"licence": data.get("license") or "not said"}, source, family="timm")


def _pretrained(name: str, source: str) -> Backbone:
    try:
        return Backbone(BackboneConfig(name=name, drop_path=0.0, pretrained=True))
    except UserError:
        raise
    except Exception as error:  # hub clients raise many types when there is no network or no weights
        raise UserError(
            f"'{source}': timm could not provide the weights ({str(error).splitlines()[0][:160]})."
        ) from error
