"""The formats of `vit-suite export`: one row each. A row writes a folder, and loads it again by the means of those who
will use it, for the check that follows every export.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vit_suite.errors import UserError
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone, save_backbone
from vit_suite.weights.export.graph import Output, Traceable
from vit_suite.weights.export.huggingface import write_huggingface
from vit_suite.weights.export.timm_folder import write_timm

LEAST_GRID = 2
"""Patches along a side of a graph's smallest image: torch.export makes a side of 1 a constant of the graph."""
LEAST_OPSET, LARGEST_OPSET = 18, 25
"""ONNX operator sets: torch's exporter writes from 18 on, and its checker knows those of the onnx package."""

Answers = dict[str, Tensor]
"""Output -> what a network says, on the CPU in fp32."""
Network = Callable[[Tensor], Answers]
"""Normalized images (B, C, H, W) -> answers."""


@dataclass
class ExportOptions:
    """What the graph formats (onnx, torch) answer, and how."""

    outputs: list[Output] = field(default_factory=lambda: ["features"])
    opset: int = LEAST_OPSET


@dataclass(frozen=True)
class Format:
    """One way for a backbone to leave."""

    name: str
    write: Callable[[LoadedBackbone, Path, ExportOptions], None]
    """Fill an empty folder. UserError where the network does not fit the format."""
    open: Callable[[Path, LoadedBackbone, ExportOptions], Network]
    """The network in the folder, as its users load it."""
    any_size: bool
    """Whether it gives this suite's numbers at every image size; else at the native one alone, since its users resize
    positions by another rule."""
    loading: str
    """How to load it, in at most three lines of Python; {folder} is replaced."""
    least_grid: int = 1
    """Patches along a side of the smallest image that it takes."""
    needs: tuple[str, ...] = ()
    """Packages beyond those of the suite."""


def missing(wanted: tuple[str, ...]) -> list[str]:
    """Packages that are not installed."""
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def graph_answers(backbone: Any, images: Tensor, outputs: list[Output]) -> Answers:
    """What this suite itself says of the images."""
    found: Answers = {}
    with torch.no_grad():
        tokens = backbone.tokens(images)
        for name in outputs:
            if name == "features":
                found[name] = backbone(images)
            elif name == "patches":
                found[name] = tokens.patches
            else:
                found[name] = backbone.last_attention(images, slice(0, 1))[:, :, 0, backbone.prefix_tokens :]
    return {name: tensor.float().cpu() for name, tensor in found.items()}


# -- safetensors -------------------------------------------------------------------------------------------------------


def write_safetensors(loaded: LoadedBackbone, folder: Path, options: ExportOptions) -> None:
    save_backbone(loaded.backbone, folder, loaded.mean, loaded.std, **loaded.meta)


def open_safetensors(folder: Path, loaded: LoadedBackbone, options: ExportOptions) -> Network:
    backbone = load_backbone(folder).backbone
    return lambda images: graph_answers(backbone, images, options.outputs)


# -- timm --------------------------------------------------------------------------------------------------------------


def open_timm(folder: Path, loaded: LoadedBackbone, options: ExportOptions) -> Network:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    prefix = loaded.backbone.prefix_tokens

    def answer(images: Tensor) -> Answers:
        with torch.no_grad():
            tokens = model.forward_features(images)
            pooled = model.forward_head(tokens)
        return {name: pooled if name == "features" else tokens[:, prefix:] for name in options.outputs}

    return answer


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without the progress bars and advice of other libraries."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def open_huggingface(folder: Path, loaded: LoadedBackbone, options: ExportOptions) -> Network:
    """By transformers' AutoModel; without transformers, by this suite's own names."""
    if missing(("transformers",)):
        again = load_backbone(folder).backbone
        return lambda images: graph_answers(again, images, options.outputs)
    with silence():
        transformers: Any = importlib.import_module("transformers")
        model = transformers.AutoModel.from_pretrained(folder).eval()
    prefix, pool = loaded.backbone.prefix_tokens, loaded.backbone.cfg.pool

    def answer(images: Tensor) -> Answers:
        with torch.no_grad():
            tokens = model(pixel_values=images).last_hidden_state
        features = tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(dim=1)
        return {name: features if name == "features" else tokens[:, prefix:] for name in options.outputs}

    return answer


# -- graphs ------------------------------------------------------------------------------------------------------------


def trace(loaded: LoadedBackbone, options: ExportOptions) -> torch.export.ExportedProgram:
    """The backbone as a graph of any batch, and of any image size that the patch divides."""
    backbone = loaded.backbone.eval()
    network, (high, wide) = Traceable(backbone, options.outputs).eval(), backbone.patch
    height, width = backbone.native_grid
    if min(height, width) < LEAST_GRID:
        raise UserError(
            f"a network of {height} x {width} patches cannot be exported as a graph, which needs at least {LEAST_GRID}"
            f" x {LEAST_GRID}: take --format safetensors, timm or huggingface."
        )
    dim = torch.export.Dim
    rows, columns = dim("rows", min=LEAST_GRID), dim("columns", min=LEAST_GRID)
    sizes = {0: dim("batch", min=1), 2: high * rows, 3: wide * columns}
    # Not the native grid: a trace of equal or fitting sides would take them for one.
    images = torch.zeros(2, backbone.cfg.channels, (height + 2) * high, (width + 1) * wide)
    with silence(), torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes={"images": sizes}, strict=False)


def write_torch(loaded: LoadedBackbone, folder: Path, options: ExportOptions) -> None:
    torch.export.save(trace(loaded, options), folder / "model.pt2")


def open_torch(folder: Path, loaded: LoadedBackbone, options: ExportOptions) -> Network:
    model = torch.export.load(folder / "model.pt2").module()

    def answer(images: Tensor) -> Answers:
        with torch.no_grad():
            return dict(zip(options.outputs, model(images), strict=True))

    return answer


def write_onnx(loaded: LoadedBackbone, folder: Path, options: ExportOptions) -> None:
    if not LEAST_OPSET <= options.opset <= LARGEST_OPSET:
        raise UserError(
            f"--opset is {options.opset}; torch's exporter writes ONNX operator sets {LEAST_OPSET} to {LARGEST_OPSET}."
        )
    program = trace(loaded, options)
    with silence(), contextlib.redirect_stdout(io.StringIO()):
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=options.opset,
            input_names=["images"],
            output_names=list(options.outputs),
            verbose=False,
        )
        if written is None:
            raise RuntimeError("torch's exporter returned no ONNX program")
        written.save(str(folder / "model.onnx"))


def open_onnx(folder: Path, loaded: LoadedBackbone, options: ExportOptions) -> Network:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Answers:
        found = session.run(list(options.outputs), {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(options.outputs, found, strict=True)}

    return answer


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "safetensors",
            write_safetensors,
            open_safetensors,
            any_size=True,
            loading="from vit_suite import load_backbone\nbackbone = load_backbone('{folder}').backbone",
        ),
        Format(
            "timm",
            lambda loaded, folder, _: write_timm(loaded, folder),
            open_timm,
            any_size=False,
            loading="import timm\nmodel = timm.create_model('local-dir:{folder}', pretrained=True).eval()",
        ),
        Format(
            "huggingface",
            lambda loaded, folder, _: write_huggingface(loaded, folder),
            open_huggingface,
            any_size=False,
            loading="from transformers import AutoModel\nmodel = AutoModel.from_pretrained('{folder}').eval()\n"
            "tokens = model(pixel_values=images).last_hidden_state",
        ),
        Format(
            "onnx",
            write_onnx,
            open_onnx,
            any_size=True,
            loading="import onnxruntime\nsession = onnxruntime.InferenceSession('{folder}/model.onnx')\n"
            "features = session.run(None, {{'images': images}})[0]",
            least_grid=LEAST_GRID,
            needs=("onnx", "onnxscript", "onnxruntime"),
        ),
        Format(
            "torch",
            write_torch,
            open_torch,
            any_size=True,
            least_grid=LEAST_GRID,
            loading="import torch\nmodel = torch.export.load('{folder}/model.pt2').module()\n"
            "features = model(images)[0]",
        ),
    )
}
"""Name -> row. A new format is a pair of functions and a row here."""
