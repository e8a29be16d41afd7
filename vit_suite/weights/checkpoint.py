"""Backbones on disk: what `--checkpoint` accepts, and what a run writes.

A backbone file of this suite is `backbone.safetensors` (timm key names) whose metadata, repeated in `backbone.json` for
people, rebuilds the network. Files of other projects are recognized by their keys (`weights/families.py`). Nothing is
guessed: every key of the network must be in the file, and every key of the file must be known. The network is first
built without memory (torch's `meta` device) and compared. No code from a file runs.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from vit_suite.config import ReadingConfig
from vit_suite.errors import UserError
from vit_suite.weights.families import FAMILIES
from vit_suite.weights.loaded import LoadedBackbone, weights_sha256
from vit_suite.weights.others import read_state
from vit_suite.weights.own import read_own, save_backbone
from vit_suite.weights.reading import SUFFIXES, read_content, read_folder
from vit_suite.weights.timm_weights import read_timm, read_timm_folder

__all__ = ["BUILTIN_FOLDER", "LoadedBackbone", "load_backbone", "save_backbone", "weights_sha256"]

log = logging.getLogger("vit_suite")
BUILTIN_PREFIX = "builtin:"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
"""Small backbones that come with the package: NAME.safetensors, and NAME.json with config, command and scores."""


def load_backbone(checkpoint: str | Path, how: ReadingConfig | None = None) -> LoadedBackbone:
    """The backbone of a run directory, a file or folder of a released network, `timm:NAME`, or `builtin:NAME` (comes
    with the package), in eval mode.

    Args:
        how: what the file itself does not say: attention heads, which of its networks is meant, whether keys may be
            missing.

    Raises:
        UserError: there is no such file, it is truncated, it would run code, it holds NaN, its family is not known or
            not the one asked for, or its keys do not fit.
    """
    text, how = str(checkpoint), how or ReadingConfig()
    if text.startswith("timm:"):
        return read_timm(text, how)
    if text.startswith(BUILTIN_PREFIX):
        return read_own(read_content(builtin_path(text), text), text, how)
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        return _said(read_model_folder(path, text, how))
    if path.is_dir():
        path = _in_run_directory(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint '{text}' does not exist. Give a run directory, a {', '.join(SUFFIXES)} file, a folder of"
            f" Hugging Face or timm, timm:NAME, or {BUILTIN_PREFIX}NAME ({', '.join(builtin_names()) or 'none'})."
        )
    content = read_content(path, text)
    if content.own is not None:
        return read_own(content, text, how)
    return _said(read_state(content, text, how))


def read_model_folder(folder: Path, source: str, how: ReadingConfig) -> LoadedBackbone:
    """A folder of Hugging Face (`model_type`) or timm (`architecture`)."""
    content = read_folder(folder, source)
    config = content.config
    if isinstance(config.get("architecture"), str):
        return read_timm_folder(content, source, how)
    kind = config.get("model_type")
    known = {family.model_type for family in FAMILIES if family.model_type}
    if kind not in known:
        raise UserError(
            f"checkpoint '{source}': config.json names the model type {str(kind)[:80]!r}; expected one of"
            f" {', '.join(sorted(known))}, or a timm architecture."
        )
    return read_state(content, source, how)


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


def _said(loaded: LoadedBackbone) -> LoadedBackbone:
    """Log how a file of another project was read."""
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
