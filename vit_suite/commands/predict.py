"""`vit-suite predict`: the class of every image by the head of a fine-tuned run, as a CSV file, on one rank or many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vit_suite import distributed
from vit_suite.config import PredictConfig
from vit_suite.data.inputs import open_images
from vit_suite.data.quarantine import Quarantine
from vit_suite.errors import counted
from vit_suite.evaluation.embedding import Embedder, EmbedOptions
from vit_suite.evaluation.predict import Prediction, check_table, open_head, predict, write_predictions
from vit_suite.hardware import pick_precision, rank_device
from vit_suite.logs import speak
from vit_suite.models.build import check_image_size
from vit_suite.weights.checkpoint import load_backbone

SHOWN = 8
"""Classes that are counted on the screen."""


def run(cfg: PredictConfig) -> None:
    """Write the classes of the images of `cfg.images` or `cfg.data`."""
    speak()
    output = Path(cfg.output)
    with distributed.launched():
        check_table(output, cfg.overwrite)
        loaded = load_backbone(cfg.checkpoint)
        head = open_head(cfg.checkpoint, loaded)
        size = [cfg.image_size, cfg.image_size] if cfg.image_size else loaded.image_size
        check_image_size(size, loaded.backbone.patch, "image_size")
        device = rank_device(cfg.accelerator)
        options = EmbedOptions(
            loaded.backbone.cfg.pool,
            False,
            (size[0], size[1]),
            cfg.batch_size,
            pick_precision(cfg.precision, device),
            cfg.workers,
        )
        embedder = Embedder(loaded.backbone.to(device), loaded.mean, loaded.std, options)
        source = open_images(cfg.images, cfg.data, output, loaded.backbone.cfg.channels, cfg.seed, "name classes of")
        found, failures = predict(embedder, head, source, cfg.top, progress=True)
        if distributed.rank() == 0:
            write_predictions(output, found, source, head.classes)
            print(sentence(found, head.classes, output))
            listed = output.with_suffix(".quarantine.txt")
            listed.unlink(missing_ok=True)
            if failures := [*source.failures, *failures]:
                Quarantine(listed, limit=1.0).report(failures, "the images", len(source))
                print(f"files that do not decode: {len(failures)}, listed in {listed}")
                Quarantine(limit=cfg.data.max_corrupt).report(failures, "the images", len(source))


def sentence(found: Sequence[Prediction], classes: Sequence[str], output: Path) -> str:
    """How many images got a class, and the most frequent classes."""
    counts = Counter(one.numbers[0] for one in found).most_common()
    shown = ", ".join(f"{classes[number]} {count}" for number, count in counts[:SHOWN])
    rest = f", {len(counts) - SHOWN} more classes" if len(counts) > SHOWN else ""
    return f"{counted(len(found), 'image')} in {output}: {shown}{rest}"
