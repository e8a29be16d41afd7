"""Backbones on disk: what `--checkpoint` accepts, and what a run writes.

A backbone file is `backbone.safetensors` (timm key names) whose metadata, repeated in `backbone.json` for people,
rebuilds the network: an evaluation never guesses an architecture, and never runs code from a file
(`weights_only=True`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.models.backbone import Backbone

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SUFFIXES = (".ckpt", ".safetensors", ".pth", ".pt")
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
    meta: dict = field(default_factory=dict)
    """Everything else the file said (method, data set, epoch, ...)."""

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
    # clone: safetensors wants contiguous tensors that own their memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.vit.state_dict().items()}
    digest = weights_sha256(state)
    description = {
        "backbone": asdict(backbone.cfg),
        "mean": list(mean),
        "std": list(std),
        "image_size": list(backbone.cfg.image_size),
        "sha256": digest,
        **meta,
    }
    folder = Path(folder)
    write_atomically(
        folder / "backbone.safetensors",
        lambda path: save_file(state, path, metadata={"vit_suite": json.dumps(description)}),
    )
    write_atomically(folder / "backbone.json", lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))
    return digest


def load_backbone(checkpoint: str | Path) -> LoadedBackbone:
    """The backbone of a run directory, a Lightning `.ckpt`, a `.safetensors`, a DINO-release `.pth`, `timm:NAME`, or
    `builtin:NAME` (comes with the package), in eval mode.

    Raises:
        UserError: there is no such file, it is truncated or no checkpoint, or its keys do not fit the architecture it
        names.
    """
    text = str(checkpoint)
    if text.startswith("timm:"):
        return _from_timm(text)
    if text.startswith(BUILTIN_PREFIX):
        return _from_safetensors(builtin_path(text), text)
    path = Path(text)
    if path.is_dir():
        path = _in_run_directory(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint '{text}' does not exist. Give a run directory, a {', '.join(SUFFIXES)} file, timm:NAME,"
            f" or {BUILTIN_PREFIX}NAME ({', '.join(builtin_names()) or 'none'})."
        )
    if path.suffix == ".safetensors":
        return _from_safetensors(path, text)
    if path.suffix in SUFFIXES:
        return _from_pickle(path, text)
    raise UserError(f"checkpoint '{text}' is not one of {', '.join(SUFFIXES)}, nor a run directory.")


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
    raise UserError(f"'{folder}' is no run directory: it holds neither backbone.safetensors nor checkpoints/last.ckpt.")


def fill(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` (timm names) into the backbone; every key must match.

    Raises:
        UserError: how many keys are missing, unexpected or of another shape, and the first of them.
    """
    own = backbone.vit.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or reshaped:
        parts = []
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
            if names:
                first = names[0]
                shapes = (
                    f" ({tuple(state[first].shape)} in the file, {tuple(own[first].shape)} here)"
                    if what == "of another shape"
                    else ""
                )
                parts.append(f"{len(names)} {what}, first '{first}'{shapes}")
        raise UserError(
            f"checkpoint '{source}' does not fit the architecture ({_describe(backbone)}): {'; '.join(parts)}."
        )
    backbone.vit.load_state_dict(state)


def _describe(backbone: Backbone) -> str:
    cfg = backbone.cfg
    return f"{cfg.name}, patch {cfg.patch_size}, dim {cfg.dim}, depth {cfg.depth}, heads {cfg.heads}"


def _finish(backbone: Backbone, description: dict, source: str) -> LoadedBackbone:
    known = {"backbone", "mean", "std", "image_size", "sha256"}
    return LoadedBackbone(
        backbone.eval(),
        list(description.get("mean", IMAGENET_MEAN)),
        list(description.get("std", IMAGENET_STD)),
        list(description.get("image_size", backbone.cfg.image_size)),
        weights_sha256(backbone.vit.state_dict()),
        source,
        {key: value for key, value in description.items() if key not in known},
    )


def _build(options: dict, source: str) -> Backbone:
    try:
        return Backbone(BackboneConfig(**{**options, "pretrained": False}))
    except TypeError as error:
        raise UserError(f"checkpoint '{source}' describes a backbone with unknown options ({error}).") from error


def _from_safetensors(path: Path, source: str) -> LoadedBackbone:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint '{source}' is truncated or no safetensors file ({error}).") from error
    if "vit_suite" in metadata:
        description = json.loads(metadata["vit_suite"])
        backbone = _build(description["backbone"], source)
        fill(backbone, state, source)
        return _finish(backbone, description, source)
    return _from_plain_state(state, source)


def _from_pickle(path: Path, source: str) -> LoadedBackbone:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for the ways a file can be broken
        cause = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint '{source}' is truncated, or no checkpoint of plain tensors ({cause}).") from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint '{source}' holds a {type(content).__name__}, not weights.")
    if "pytorch-lightning_version" in content:
        return _from_lightning(content, source)
    for key in (
        "teacher",
        "model",
        "state_dict",
    ):  # how releases wrap their weights; the teacher is what DINO evaluates
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return _from_plain_state(content, source)


def _from_lightning(content: Mapping, source: str) -> LoadedBackbone:
    description = content.get("vit_suite")
    if not description:
        raise UserError(
            f"checkpoint '{source}' is a Lightning checkpoint of another project: it holds no vit-suite backbone."
        )
    prefix = description["prefix"]
    state = {
        name.removeprefix(prefix): tensor for name, tensor in content["state_dict"].items() if name.startswith(prefix)
    }
    backbone = _build({**description["backbone"], "drop_path": 0.0}, source)
    fill(backbone, state, source)
    extra = {
        "mean": description["mean"],
        "std": description["std"],
        "epoch": content.get("epoch"),
        "step": content.get("global_step"),
    }
    return _finish(backbone, extra, source)


def _from_plain_state(state: Mapping, source: str) -> LoadedBackbone:
    """A bare ViT state dict, as DINO releases it: the dimensions are read off the shapes; heads have 64 dimensions, as
    in every release."""
    tensors = {
        re.sub(r"^(module\.)?(backbone\.)?", "", str(name)): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    tensors = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise UserError(f"checkpoint '{source}' holds no ViT: {len(tensors)} tensors, but no '{absent[0]}'.")
    patch = tensors["patch_embed.proj.weight"]
    dim, channels, side = patch.shape[0], patch.shape[1], patch.shape[-1]
    if dim % 64:
        raise UserError(
            f"checkpoint '{source}' does not say how many heads it has, and its width {dim} is no multiple of a"
            " release's 64."
        )
    grid = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    cfg = BackboneConfig(
        name="vit",
        patch_size=side,
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        heads=dim // 64,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        image_size=[grid * side, grid * side],
        channels=channels,
        drop_path=0.0,
    )
    backbone = Backbone(cfg)
    fill(backbone, tensors, source)
    return _finish(backbone, {}, source)


def _from_timm(source: str) -> LoadedBackbone:
    name = source.removeprefix("timm:")
    backbone = _pretrained(name, source)
    data = backbone.vit.pretrained_cfg
    description = {"mean": list(data.get("mean", IMAGENET_MEAN)), "std": list(data.get("std", IMAGENET_STD))}
    return _finish(backbone, description, source)


def _pretrained(name: str, source: str) -> Backbone:
    try:
        return Backbone(BackboneConfig(name=name, drop_path=0.0, pretrained=True))
    except UserError:
        raise
    except Exception as error:  # hub clients raise many types when there is no network or no weights
        raise UserError(
            f"'{source}': timm could not provide the weights ({str(error).splitlines()[0][:160]})."
        ) from error
