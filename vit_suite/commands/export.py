"""`vit-suite export`: a backbone for timm, Hugging Face, ONNX or torch.export, checked on images, with a model card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vit_suite.config import DataConfig, ExportConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import try_load
from vit_suite.data.registry import open_test
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.files import PARTIAL
from vit_suite.logs import speak
from vit_suite.parsing import read_yaml, resolve
from vit_suite.reports.model_card import model_card
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone
from vit_suite.weights.export.check import largest_errors
from vit_suite.weights.export.formats import FORMATS, ExportOptions, missing

log = logging.getLogger("vit_suite")
IMAGES = 8
"""Images that the check is made on."""


def run(cfg: ExportConfig) -> None:
    """Write `cfg.checkpoint` in `cfg.format`, check it, and put the folder in place."""
    speak()
    row, target = FORMATS[cfg.format], Path(cfg.output)
    check_request(cfg, target)
    loaded = load_backbone(cfg.checkpoint, cfg)
    images, what = images_for_check(cfg, loaded)
    options = ExportOptions(list(dict.fromkeys(cfg.outputs)), cfg.opset)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
    try:
        row.write(loaded, partial, options)
        errors = largest_errors(loaded, row, partial, options, images)
        came_from = Path(cfg.checkpoint) if Path(cfg.checkpoint).is_dir() else None
        card = model_card(loaded, row, target, errors, what, came_from)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp makes folders private
        partial.replace(target)  # an empty folder gives way
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for key, error in errors.items():
        print(f"{key}: largest error {error:.1e}")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{row.name} in {target} ({size / 2**20:.1f} MiB), checked on {what}; README.md says how to load it")


def check_request(cfg: ExportConfig, target: Path) -> None:
    """UserError for what can be told before the checkpoint is read."""
    row = FORMATS[cfg.format]
    if absent := missing(row.needs):
        raise UserError(f"--format {row.name} needs {', '.join(absent)}: pip install 'vit-suite[export]'.")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output '{target}' is not empty: name a new folder.")
    if "attention" in cfg.outputs and cfg.format in ("timm", "huggingface"):
        raise UserError(f"--outputs attention is for onnx, torch and safetensors; {cfg.format} has its own way to ask.")


def images_for_check(cfg: ExportConfig, loaded: LoadedBackbone) -> tuple[Callable[[tuple[int, int]], Tensor], str]:
    """(normalized images of a size, what they are)."""
    source, what = source_for_check(cfg, loaded)
    found = [try_load(source.load, index) for index in range(min(len(source), 4 * IMAGES))]
    raw = [image for image in found if not isinstance(image, DecodeError)][:IMAGES]
    if not raw:
        raise UserError(
            f"none of the first images of {source.title} decodes: name others with --images. The first: {found[0]}"
        )
    return lambda size: eval_view(raw, size, loaded.mean, loaded.std), f"{len(raw)} {what}"


def source_for_check(cfg: ExportConfig, loaded: LoadedBackbone) -> tuple[ImageSource, str]:
    """Images that the user names, else the run's own, else generated ones."""
    channels = loaded.backbone.cfg.channels
    if cfg.images:
        given = cfg.data
        data = DataConfig(
            "flat", cfg.images, value_range=given.value_range, max_pixels=given.max_pixels, frame=given.frame
        )
        data = replace(data, channels=channels)
        return open_test(data, cfg.seed), f"images of {cfg.images}"
    if cfg.data.name:
        source = open_test(cfg.data.whole(channels), cfg.seed)
        return source, f"images of {source.title}"
    config = Path(cfg.checkpoint) / "config.yaml"
    if config.is_file():
        try:
            written = {key[5:]: item for key, item in read_yaml(config).items() if key.startswith("data.")}
            source = open_test(resolve(DataConfig, written), cfg.seed)
            return source, f"images of {source.title}, the run's own data"
        except UserError as error:
            log.info("the run's own data does not open (%s): the check takes generated images", error)
    if channels not in (1, 3):
        raise UserError(
            f"the check needs images of {channels} channels, and generated ones have 1 or 3: give some with --images."
        )
    shapes = replace(DataConfig(), name="shapes", test_length=IMAGES, image_size=64, channels=channels)
    return open_test(shapes, cfg.seed), "generated images"
