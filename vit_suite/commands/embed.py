"""`vit-suite embed`: the features of every image of a folder, a list or a data set in one file, on one rank or many."""

from __future__ import annotations

from pathlib import Path

from vit_suite import distributed
from vit_suite.config import EmbedConfig
from vit_suite.data.inputs import open_images
from vit_suite.data.quarantine import Quarantine
from vit_suite.errors import counted
from vit_suite.evaluation.embedding import EmbedSummary, check_output, embed, make_embedder, protocol_of
from vit_suite.evaluation.embedding_files import need_pyarrow
from vit_suite.logs import speak
from vit_suite.weights.checkpoint import load_backbone


def run(cfg: EmbedConfig) -> None:
    """Write the features of `cfg.images` or `cfg.data` under the backbone of `cfg.checkpoint`."""
    speak()
    output = Path(cfg.output)
    with distributed.launched():
        if output.suffix.lower() == ".parquet":
            need_pyarrow()
        loaded = load_backbone(cfg.checkpoint, cfg)
        embedder = make_embedder(cfg, loaded)
        check_output(output, embedder.options.kind, cfg.overwrite)
        source = open_images(cfg.images, cfg.data, output, loaded.backbone.cfg.channels, cfg.seed)
        distributed.barrier()  # every rank has checked the output before one writes it
        protocol = protocol_of(embedder, source, loaded.sha256, cfg.checkpoint)
        summary = embed(embedder, source, output, protocol, progress=True)
        if distributed.rank() == 0:
            print(sentence(summary, len(source)))
            Quarantine(limit=cfg.data.max_corrupt).report(summary.failures, "the images", len(source))


def sentence(summary: EmbedSummary, total: int) -> str:
    """What was written, and what was left out."""
    speed = f"{summary.images_per_second:.1f} a second, {summary.model_share:.0%} of the time in the model"
    lines = [f"{counted(summary.images, 'image')} ({speed}): {summary.output}"]
    if summary.resumed:
        lines.append(f"{summary.resumed} of them were ready from an earlier start")
    if summary.failures:
        listed = summary.output.with_suffix(".quarantine.txt")
        listed.unlink(missing_ok=True)
        Quarantine(listed, limit=1.0).report(summary.failures, "the images", total)
        lines.append(f"files that do not decode: {len(summary.failures)}, listed in {listed}")
    return "\n".join(lines)
