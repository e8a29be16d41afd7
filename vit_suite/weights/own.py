"""This suite's own files: `backbone.safetensors` with its description, and the network in a Lightning checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from vit_suite.config import ReadingConfig
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.models.backbone import Backbone
from vit_suite.models.lora import merged
from vit_suite.weights.description import check_own, check_statistics
from vit_suite.weights.loaded import LoadedBackbone, fill, finish, weights_sha256
from vit_suite.weights.reading import Content, checked


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


def read_own(content: Content, source: str, how: ReadingConfig) -> LoadedBackbone:
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
    return finish(backbone, description, source, report=report)
