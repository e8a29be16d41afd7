"""Make a backbone of the package from the first blocks of a run's: weights, and a JSON of where they come from.

    python scripts/make_builtin.py runs/shapes-cpu --name shapes --blocks 3

Writes vit_suite/weights/builtin/NAME.safetensors and NAME.json: the run's config, its recorded training, and the kNN
and mask scores of the shorter backbone. The position embedding, the CLS token and the final norm stay those of the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from vit_suite.attention.localize import Localizer
from vit_suite.attention.localized import localize
from vit_suite.config import DataConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.data.truth import source_truths
from vit_suite.evaluation.knn_scorer import Scorer, accuracies
from vit_suite.models.backbone import Backbone
from vit_suite.reports.results import read_results
from vit_suite.weights.checkpoint import BUILTIN_FOLDER, LoadedBackbone, load_backbone, save_backbone

IMAGES, TESTS = 4000, 1000
SEED = 1
"""Of the generated images that are scored; recipes train on those of seed 0."""
KS = (10, 20, 100, 200)
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def shortened(loaded: LoadedBackbone, blocks: int) -> Backbone:
    """The first `blocks` blocks of a backbone, with its embeddings and its final norm."""
    short = Backbone(replace(loaded.backbone.cfg, depth=blocks))
    kept = short.vit.state_dict()
    state = loaded.backbone.vit.state_dict()
    short.vit.load_state_dict({name: state[name] for name in kept})
    return short.eval()


def scores(loaded: LoadedBackbone) -> dict:
    """kNN and attention masks on generated images of another seed, beside what knows nothing."""
    side = loaded.image_size[0]
    data = ImageDataModule(DataConfig(name="shapes", image_size=side, length=IMAGES, test_length=TESTS), seed=SEED)
    scorer = Scorer(data, KS, 0.07, loaded.image_size, 256, torch.device("cpu"), "fp32", progress=False)
    untrained = loaded.untrained(SEED)
    localizer = Localizer(data.test_source, source_truths(data.test_source), ("attention",), THRESHOLDS)
    found = localize(localizer, {"backbone": loaded, "untrained": untrained}, SEED)
    results = {
        "backbone": scorer.backbone(loaded),
        "untrained": scorer.backbone(untrained),
        "raw pixels": scorer.pixels(),
    }
    return {
        "data": f"generated shapes, seed {SEED}: bank of {IMAGES}, {TESTS} test images",
        "knn": {name: accuracies(result) for name, result in results.items()},
        "masks": found.metrics(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--name", required=True, help="builtin:NAME")
    parser.add_argument("--blocks", type=int, required=True, help="number of blocks that are kept")
    parser.add_argument("--command", required=True, help="the command that trained the run")
    parser.add_argument("--note", required=True, help="how far the training went, on which processor, in what CPU time")
    options = parser.parse_args()
    run = load_backbone(options.run)
    with tempfile.TemporaryDirectory() as folder:
        short = shortened(run, options.blocks)
        digest = save_backbone(short, folder, run.mean, run.std, method=run.meta.get("method"), data="shapes")
        BUILTIN_FOLDER.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / "backbone.safetensors", BUILTIN_FOLDER / f"{options.name}.safetensors")
    loaded = load_backbone(f"builtin:{options.name}")
    config = yaml.safe_load((options.run / "config.yaml").read_text())
    config["run"].pop("output", None)  # a place on this machine
    about = {
        "sha256": digest,
        "made_of": f"the first {options.blocks} of {run.backbone.cfg.depth} blocks of the run below",
        "command": options.command,
        "note": options.note,
        "config": config,
        "training": [entry for entry in read_results(options.run / "results.json") if entry["task"] == "pretrain"],
        "scores": scores(loaded),
    }
    path = BUILTIN_FOLDER / f"{options.name}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about["scores"]["knn"], indent=1), f"\nwritten: {path}")


if __name__ == "__main__":
    main()
