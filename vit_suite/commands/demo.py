"""`vit-suite demo`: the whole road once, offline, on generated images whose classes and objects are known."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from vit_suite.attention.export import export_attention
from vit_suite.attention.export_options import ExportOptions
from vit_suite.attention.localize import Localizer
from vit_suite.commands.knn import Scorer, accuracies, accuracy_table
from vit_suite.commands.localize import localize
from vit_suite.config import (
    BackboneConfig,
    DataConfig,
    DemoConfig,
    DINOConfig,
    EvaluateConfig,
    OptimConfig,
    PretrainConfig,
    RunOptions,
    TrainerConfig,
    ViewsConfig,
)
from vit_suite.data.module import ImageDataModule
from vit_suite.data.source import ImageSource
from vit_suite.data.truth import source_truths
from vit_suite.hardware import pick_device
from vit_suite.logs import speak
from vit_suite.reports.results import append_result
from vit_suite.training.run import train
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone

log = logging.getLogger("vit_suite")

IMAGE, PATCH = 48, 8
THRESHOLD = 0.6
SHOWN = 16


def recipe(cfg: DemoConfig) -> PretrainConfig:
    """A DINO run of minutes on two CPU cores: configs/dino/cifar10_cpu.yaml for smaller networks and more prototypes a
    class."""
    return PretrainConfig(
        method=DINOConfig(
            out_dim=512,
            hidden_dim=256,
            bottleneck_dim=64,
            head_batch_norm=True,
            freeze_last_layer_epochs=0,
            teacher_temperature=0.04,
            momentum_teacher=0.99,
            koleo_weight=0.05,
        ),
        backbone=BackboneConfig(patch_size=PATCH, dim=96, depth=3, heads=3, drop_path=0.0),
        data=DataConfig(
            name="shapes",
            image_size=IMAGE,
            length=cfg.images,
            test_length=cfg.test_images,
            batch_size=min(128, cfg.images),
        ),
        views=ViewsConfig(global_size=IMAGE, local_size=IMAGE // 2, local_crops=2, blur=[0.0, 0.0, 0.0]),
        optim=OptimConfig(lr=2e-3, warmup_epochs=2, weight_decay_end=0.04),
        trainer=TrainerConfig(max_epochs=cfg.epochs, max_minutes=cfg.minutes, progress=cfg.progress, devices=1),
        evaluate=EvaluateConfig(every_epochs=5),
        run=RunOptions(name="demo", output=cfg.output, seed=cfg.seed, overwrite=cfg.overwrite),
    )


def run(cfg: DemoConfig) -> None:
    """Train, score beside the baselines, draw, and name the next commands."""
    speak()
    pretrain = recipe(cfg)
    log.info("1/3 DINO on %d generated images, at most %.1f minutes", cfg.images, cfg.minutes)
    if not train(pretrain):
        return
    folder = Path(cfg.output)
    loaded = load_backbone(folder)
    data = ImageDataModule(pretrain.data, seed=cfg.seed)
    log.info("2/3 scores, beside the same backbone untrained")
    show_knn(loaded, data, cfg.seed, folder)
    show_masks(loaded, data.test_source, cfg.seed, folder)
    log.info("3/3 pictures of %d test images", SHOWN)
    draw(loaded, data.test_source, folder)
    print(f"\nscores: {folder}/results.json   pictures: {folder}/attention   curves: {folder}/metrics.csv")
    print("next, on images of your own (source .venv/bin/activate puts vit-suite on the path):")
    print("  vit-suite pretrain --config configs/dino/cifar10_cpu.yaml --data.root DIR      DINO on CIFAR-10")
    print(f"  vit-suite attention --checkpoint {folder} --images DIR --output OUT --resize {IMAGE}")
    print(f"  vit-suite knn --checkpoint {folder} --data.name folder --data.root DIR --image_size {IMAGE}")


def show_knn(loaded: LoadedBackbone, data: ImageDataModule, seed: int, folder: Path) -> None:
    """kNN of the trained backbone, the untrained one, and raw pixels."""
    scorer = Scorer(data, (10, 20, 100, 200), 0.07, loaded.image_size, 256, pick_device(), "auto", progress=False)
    results = {
        "trained": scorer.backbone(loaded),
        "untrained": scorer.backbone(loaded.untrained(seed)),
        "raw pixels": scorer.pixels(),
    }
    print(f"\n{accuracy_table(results)}\n")
    append_result(
        folder / "results.json",
        "knn",
        {name: accuracies(r) for name, r in results.items()},
        scorer.protocol(),
        loaded.sha256,
    )


def show_masks(loaded: LoadedBackbone, source: ImageSource, seed: int, folder: Path) -> None:
    """Attention masks against the true objects."""
    localizer = Localizer(source, source_truths(source), ("attention",), (THRESHOLD,), device=pick_device())
    found = localize(localizer, {"trained": loaded, "untrained": loaded.untrained(seed)}, seed)
    print(f"{found.text()}\n")
    append_result(folder / "results.json", "localize", found.metrics(), found.protocol(), loaded.sha256)


def draw(loaded: LoadedBackbone, source: ImageSource, folder: Path) -> None:
    """Some test images as files, and what the backbone looks at in them."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for index in range(min(SHOWN, len(source))):
        picture = Image.fromarray(source.load(index).permute(1, 2, 0).numpy())
        picture.save(images / f"{index:02d}_{source.classes[source.label(index)]}.png")
    export_attention(
        loaded.backbone,
        images,
        folder / "attention",
        loaded.mean,
        loaded.std,
        ExportOptions(overwrite=True),
    )
