"""`vit-suite embed`: the features of every image of a folder, a list or a data set in one file, on one rank or many."""

from __future__ import annotations

from pathlib import Path

from vit_suite import distributed
from vit_suite.attention.export_inputs import is_video, open_pictures
from vit_suite.config import EmbedConfig
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.registry import open_test, set_reading
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.evaluation.embedding import (
    Embedder,
    EmbedOptions,
    EmbedSummary,
    check_output,
    embed,
    kind_of,
    protocol_of,
)
from vit_suite.evaluation.embedding_files import need_pyarrow
from vit_suite.hardware import pick_precision, rank_device
from vit_suite.logs import speak
from vit_suite.models.build import check_image_size
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone


def run(cfg: EmbedConfig) -> None:
    """Write the features of `cfg.images` or `cfg.data` under the backbone of `cfg.checkpoint`."""
    speak()
    output = Path(cfg.output)
    with distributed.launched():
        if output.suffix.lower() == ".parquet":
            need_pyarrow()
        loaded = load_backbone(cfg.checkpoint)
        embedder = make_embedder(cfg, loaded)
        check_output(output, embedder.options.kind, cfg.overwrite)
        source = open_images(cfg, loaded)
        distributed.barrier()  # every rank has checked the output before one writes it
        summary = embed(embedder, source, output, protocol_of(embedder, loaded.sha256, cfg.checkpoint), progress=True)
        if distributed.rank() == 0:
            print(sentence(summary, len(source)))


def make_embedder(cfg: EmbedConfig, loaded: LoadedBackbone) -> Embedder:
    """The backbone with the options that decide its features."""
    device = rank_device(cfg.accelerator)
    size = [cfg.image_size, cfg.image_size] if cfg.image_size else loaded.image_size
    check_image_size(size, loaded.backbone.patch, "image_size")
    options = EmbedOptions(
        kind_of(loaded.backbone, cfg.features, cfg.checkpoint),
        cfg.normalize,
        (size[0], size[1]),
        cfg.batch_size,
        pick_precision(cfg.precision, device),
        cfg.workers,
    )
    return Embedder(loaded.backbone.to(device), loaded.mean, loaded.std, options)


def open_images(cfg: EmbedConfig, loaded: LoadedBackbone) -> ImageSource:
    """The images that the options name, with the channels that the backbone takes. UserError when there is none."""
    channels = loaded.backbone.cfg.channels
    if cfg.images:
        if is_video(cfg.images):
            raise UserError(f"images '{cfg.images}' is a video; expected a folder of images, an image or a list.")
        return set_reading(open_pictures(cfg.images, Path(cfg.output), channels).source, cfg.data)
    if not cfg.data.name:
        raise UserError("no images to embed: give --images FOLDER, or a data set with --data.name")
    return open_test(cfg.data.whole(channels), cfg.seed)


def sentence(summary: EmbedSummary, total: int) -> str:
    """What was written, and what was left out."""
    speed = f"{summary.images_per_second:.1f} a second, {summary.model_share:.0%} of the time in the model"
    lines = [f"{summary.images} images ({speed}): {summary.output}"]
    if summary.resumed:
        lines.append(f"{summary.resumed} of them were ready from an earlier start")
    if summary.failures:
        listed = summary.output.with_suffix(".quarantine.txt")
        listed.unlink(missing_ok=True)
        Quarantine(listed, limit=1.0).report(summary.failures, "the images", total)
        lines.append(f"files that do not decode: {len(summary.failures)}, listed in {listed}")
    return "\n".join(lines)
