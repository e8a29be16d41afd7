"""A file of weights -> its tensors by name, and whatever else it says. No code from a file ever runs.

A `.pth` is a pickle, which is a program: `torch.load(weights_only=True)` runs none of it but tensors and plain
containers. `PLAIN` adds the classes that hold nothing but values and stand in public checkpoints (main_dino.py saves
its `argparse.Namespace`). Everything else is refused by its name.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy._core.multiarray as np_multiarray
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vit_suite.errors import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
PLAIN: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    (np_multiarray.scalar, "numpy._core.multiarray.scalar"),
    (np_multiarray.scalar, "numpy.core.multiarray.scalar"),
]
"""Classes that a pickle may name besides torch's own list: each holds values and does nothing."""
DEEPEST = 8
"""Levels of dictionaries that are searched for tensors; public checkpoints have at most 3."""
SLACK = 1 << 20
"""Bytes that an archive may unpack to beyond its own size; a larger one is no file of torch.save."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Content:
    """What a file holds."""

    tensors: dict[str, Tensor]
    """By dotted name: `teacher.backbone.blocks.0.norm1.weight`."""
    own: dict[str, Any] | None = None
    """The description that this suite writes beside its weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json of a Hugging Face or timm folder."""
    preprocessor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json of a Hugging Face folder."""
    said: dict[str, Any] = field(default_factory=dict)
    """Plain values of a training checkpoint: its arguments, epoch and step."""


def read_content(path: Path, source: str) -> Content:
    """What the file at `path` holds; `source` names it in messages.

    Raises:
        UserError: there is no such file, it is no checkpoint, it is truncated, or it would run code.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"checkpoint '{source}' is not one of {', '.join(SUFFIXES)}, nor a folder of a run or a model.")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint '{source}' is truncated: it holds 0 bytes. Copy or download it again.")
    if path.suffix == ".safetensors":
        return read_safetensors(path, source)
    loaded = read_pickle(path, source)
    if not isinstance(loaded, Mapping):
        raise UserError(f"checkpoint '{source}' holds a {type(loaded).__name__}, not weights.")
    tensors = dict(_tensors(loaded))
    _check_sizes(tensors, path, source)
    own = loaded.get("vit_suite")
    if own is not None and not isinstance(own, dict):
        raise UserError(f"checkpoint '{source}' describes its backbone by a {type(own).__name__}, not a dictionary.")
    return Content(tensors, own, said=_said(loaded))


def read_folder(folder: Path, source: str) -> Content:
    """The weights of a Hugging Face or timm folder: `config.json` beside one file of weights, or several (shards)."""
    config = read_json(folder / "config.json", source)
    names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if not names and index is not None:
        listed = read_json(index, source).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise UserError(f"checkpoint '{source}': {index.name} lists no files of weights.")
        names = sorted(set(listed.values()))
        if away := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise UserError(f"checkpoint '{source}' is incomplete: {index.name} lists '{away[0]}', which is not there.")
    if not names:
        raise UserError(
            f"checkpoint '{source}' holds config.json, but neither model.safetensors nor pytorch_model.bin."
        )
    parts = [read_content(folder / name, f"{source}/{name}") for name in names]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    preprocessor = folder / "preprocessor_config.json"
    return Content(tensors, None, config, read_json(preprocessor, source) if preprocessor.is_file() else {})


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A JSON file that holds a dictionary."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint '{source}': {path.name} is no JSON ({_short(error)}).") from None
    if not isinstance(content, dict):
        raise UserError(f"checkpoint '{source}': {path.name} holds a {type(content).__name__}, not a dictionary.")
    return content


def read_safetensors(path: Path, source: str) -> Content:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"checkpoint '{source}' is truncated or no safetensors file ({_short(error)}).") from None
    if "vit_suite" not in metadata:
        return Content(tensors)
    try:
        own = json.loads(metadata["vit_suite"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"checkpoint '{source}': its description is no JSON ({_short(error)}).") from None
    if not isinstance(own, dict):
        raise UserError(f"checkpoint '{source}' describes its backbone by a {type(own).__name__}, not a dictionary.")
    return Content(tensors, own)


def read_pickle(path: Path, source: str) -> Any:
    """The content of a `torch.save` file, of this or an older form, as plain data."""
    _check_archive(path, source)
    try:
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; a file that cannot be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for the ways to be broken
        raise UserError(f"checkpoint '{source}' {_why(path, error)}") from None


def _check_archive(path: Path, source: str) -> None:
    """A torch.save file is a zip archive that packs nothing; one that unpacks to more than its size is a trap."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch.load says what is wrong
    if unpacked > path.stat().st_size + SLACK:
        raise UserError(
            f"checkpoint '{source}' is {path.stat().st_size:,} bytes and unpacks to {unpacked:,}: torch.save packs"
            " nothing, so this is no file of it."
        )


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch.load refuses, and what its owner can do."""
    text = re.sub(r"\x1b\[\d+m", "", str(error))
    keep = "torch.save({'state_dict': model.state_dict()}, 'weights.pth')"
    if found := re.search(r"(?:[Uu]nsupported (?:global: )?GLOBAL|instantiate class|class) ([\w.]+\.[\w.]+)", text):
        return (
            f"is refused: it holds a '{found[1].rstrip('.')}', and loading that would run code. Its owner can convert"
            f" it, where the file is trusted: {keep} keeps the tensors alone."
        )
    if "TorchScript" in text:
        return f"is a TorchScript program, not weights. Its owner can convert it: {keep} after torch.jit.load."
    if "legacy .tar" in text:
        return (
            "is an old torch.save file (a tar archive, before PyTorch 0.4), which cannot be read without running code."
            f" Its owner can convert it with torch.load(..., weights_only=False), then {keep}."
        )
    start = path.read_bytes()[:64] if path.stat().st_size < 64 else path.open("rb").read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`."
    if start.startswith(b"\x80") and not isinstance(error, EOFError) and "EOF" not in text:
        return (
            "is an old file: a plain pickle, not written by torch.save, which cannot be read without running code. Its"
            f" owner can convert it with pickle.load, then {keep}."
        )
    if start.startswith((b"PK", b"\x80")):
        return "is truncated: its end is missing. Copy or download it again."
    text = " ".join(start.decode("ascii", "replace").split())
    if text and text.isprintable() and start.isascii():
        return f"is no checkpoint but text, which begins with '{text[:40]}'."
    return f"is no checkpoint: it begins with {start[:16]!r}, which no torch.save file does."


def _tensors(content: Mapping, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of everything in nested dictionaries but the optimizer's state."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and depth < DEEPEST and "optim" not in str(name):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def _said(content: Mapping) -> dict[str, Any]:
    """What a training checkpoint says besides weights: arguments (DINO, MAE, Lightning) and counters."""
    said: dict[str, Any] = {}
    for name in ("args", "hyper_parameters", "config", "cfg"):
        value = content.get(name)
        if isinstance(value, argparse.Namespace):
            said |= vars(value)
        elif isinstance(value, Mapping):
            said |= value
    counters = {"epoch": content.get("epoch"), "step": content.get("global_step", content.get("iteration"))}
    return said | {name: value for name, value in counters.items() if type(value) is int}


def _check_sizes(tensors: Mapping[str, Tensor], path: Path, source: str) -> None:
    """A tensor of a pickle may repeat few bytes over any shape; the numbers here have to be in the file."""
    held = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise UserError(f"checkpoint '{source}': '{name[:80]}' is no plain tensor ({tensor.layout}).")
        if tensor.numel() * tensor.element_size() > held:
            raise UserError(
                f"checkpoint '{source}': '{name[:80]}' claims the shape {tuple(tensor.shape)}, which is larger than the"
                f" file of {held:,} bytes."
            )


def checked(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors in fp32.

    Raises:
        UserError: a tensor holds NaN or infinity, or is of a type that weights do not have.
    """
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):  # BatchNorm counts
            found[name] = tensor
            continue
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"checkpoint '{source}': '{name[:80]}' is {kind}; expected weights of 16, 32 or 64-bit float."
            )
        found[name] = tensor.float()
    bad = [name for name, tensor in found.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise UserError(
            f"checkpoint '{source}' holds NaN or infinity in {len(bad)} of {len(found)} tensors, first '{bad[0][:80]}':"
            " its training diverged, or the file is damaged."
        )
    return found


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
