"""`vit-suite attention`: maps, overlays and masks of every image of a folder, a list, a video or a data set, on one
rank or many."""

from __future__ import annotations

from dataclasses import fields, replace

from vit_suite import distributed
from vit_suite.attention.export import ExportSummary, export_attention
from vit_suite.attention.export_options import ExportOptions
from vit_suite.attention.formats import attentive
from vit_suite.attention.maps import require_cls
from vit_suite.config import AttentionConfig
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.registry import open_test
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, counted
from vit_suite.hardware import rank_device
from vit_suite.logs import speak
from vit_suite.reports.gallery import write_gallery
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone


def run(cfg: AttentionConfig) -> None:
    """Write where `cfg.checkpoint` looks in the images of `cfg.images` or `cfg.data`."""
    speak()
    with distributed.launched():
        loaded = load_backbone(cfg.checkpoint, cfg)
        if attentive(cfg.formats) or cfg.gallery:
            require_cls(loaded.backbone)
        device = rank_device(cfg.accelerator)
        images = cfg.images or open_data(cfg, loaded)
        given = {field.name: getattr(cfg, field.name) for field in fields(ExportOptions) if hasattr(cfg, field.name)}
        size = None if cfg.image_size == "own" else cfg.image_size
        options = replace(ExportOptions(**given | {"image_size": size}), reading=cfg.data, progress=True)
        if cfg.gallery:
            options = replace(options, formats=[*cfg.formats, "npz"])
        summary = export_attention(loaded.backbone.to(device), images, cfg.output, loaded.mean, loaded.std, options)
        if distributed.rank() == 0:
            print(sentence(summary, cfg))
            total = summary.images + len(summary.failures)
            Quarantine(limit=cfg.data.max_corrupt).report(summary.failures, "the images", total)
            if cfg.gallery:
                source = images if isinstance(images, ImageSource) else None
                print(f"gallery: {write_gallery(cfg.output, source, summary.reading)}")


def open_data(cfg: AttentionConfig, loaded: LoadedBackbone) -> ImageSource:
    """The scored split of `cfg.data`, with the channels that the backbone takes."""
    if not cfg.data.name:
        raise UserError("no images to look at: give --images FOLDER, or a data set with --data.name")
    return open_test(cfg.data.whole(loaded.backbone.cfg.channels), cfg.seed)


def sentence(summary: ExportSummary, cfg: AttentionConfig) -> str:
    """What was written, what was left out, and which option would show more."""
    files = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.files.items()))
    speed = f"{summary.images_per_second:.1f} a second, {summary.model_share:.0%} of the time in the model"
    lines = [f"{counted(summary.images, 'image')} ({speed}): {files} in {summary.output}, listed in manifest.csv"]
    if summary.failures:
        lines.append(f"files that do not decode: {len(summary.failures)}, listed in {summary.quarantine}")
    if cfg.clip_artifacts is not None:
        lines.append(
            f"{summary.artifacts} patches were artifacts (norm above {cfg.clip_artifacts:g} times the median) and got"
            " their neighbours' median"
        )
    if summary.reduced:
        lines.append(
            f"{summary.reduced} images were drawn at {cfg.draw_side} pixels, masks and labels at their own size; a"
            " larger --draw_side shows more detail"
        )
    if summary.shrunk:
        lines.append(f"{summary.shrunk} images were shrunk for the backbone; a larger --max_tokens shows more detail")
    if summary.coarse:
        lines.append(f"{summary.coarse} images gave fewer than 16 patches; a larger --image_size shows more detail")
    return "\n".join(lines)
