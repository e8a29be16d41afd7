"""`vit-suite attention`: maps, overlays and masks of every image in a folder."""

from __future__ import annotations

from vit_suite.attention.export import ExportSummary, export_attention
from vit_suite.commands.logs import speak
from vit_suite.config import AttentionConfig
from vit_suite.hardware import pick_device
from vit_suite.weights.checkpoint import load_backbone


def run(cfg: AttentionConfig) -> None:
    """Write where `cfg.checkpoint` looks in the images of `cfg.images`."""
    speak()
    loaded = load_backbone(cfg.checkpoint)
    device = pick_device(cfg.accelerator)
    summary = export_attention(
        loaded.backbone.to(device),
        cfg.images,
        cfg.output,
        mean=loaded.mean,
        std=loaded.std,
        formats=cfg.formats,
        threshold=cfg.threshold,
        heads=cfg.heads,
        resize=cfg.resize,
        max_tokens=cfg.max_tokens,
        batch_size=cfg.batch_size,
        upsample=cfg.upsample,
        device=device,
        precision=cfg.precision,
        overwrite=cfg.overwrite,
        progress=True,
    )
    print(sentence(summary))


def sentence(summary: ExportSummary) -> str:
    """What was written, and what was left out."""
    files = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.files.items()))
    lines = [f"{summary.images} images ({summary.images_per_second:.1f} a second): {files} in {summary.output}"]
    if summary.failures:
        lines.append(f"files that do not decode: {len(summary.failures)}, listed in {summary.quarantine}")
    if summary.shrunk:
        lines.append(f"{summary.shrunk} images were shrunk for the backbone; a larger --max_tokens shows more detail")
    if summary.coarse:
        lines.append(f"{summary.coarse} images gave fewer than 16 patches; a larger --resize shows more detail")
    return "\n".join(lines)
