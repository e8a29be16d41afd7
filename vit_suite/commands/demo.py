"""`vit-suite demo`: the whole road once, offline, on generated images whose classes and objects are known."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image

from vit_suite.attention.export import export_attention
from vit_suite.attention.maps import attention_maps, mass_mask, mean_map, upsample
from vit_suite.commands.knn import Scorer, accuracies, accuracy_table
from vit_suite.commands.logs import speak
from vit_suite.commands.pretrain import train
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
from vit_suite.evaluation.localization import LocalizationScores, baseline_scores, best_center_box, choose_head, score_masks
from vit_suite.hardware import pick_device
from vit_suite.reports.results import append_result, table
from vit_suite.views.evaluate import eval_view
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone

log = logging.getLogger("vit_suite")

IMAGE, PATCH = 48, 8
THRESHOLD = 0.6
SHOWN = 16


def recipe(cfg: DemoConfig) -> PretrainConfig:
    """A DINO run of minutes on two CPU cores: configs/dino/cifar10_cpu.yaml for smaller networks and more prototypes a class."""
    return PretrainConfig(
        method=DINOConfig(
            out_dim=512,
            hidden_dim=256,
            bottleneck_dim=64,
            head_batch_norm=True,
            freeze_last_layer_epochs=0,
            teacher_temperature=0.04,
            momentum_teacher=0.99,
            koleo_weight=0.1,
        ),
        backbone=BackboneConfig(patch_size=PATCH, dim=96, depth=3, heads=3, drop_path=0.0),
        data=DataConfig(name="shapes", image_size=IMAGE, length=cfg.images, test_length=cfg.test_images, batch_size=min(128, cfg.images)),
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
    results = {"trained": scorer.backbone(loaded), "untrained": scorer.backbone(loaded.untrained(seed)), "raw pixels": scorer.pixels()}
    print(f"\n{accuracy_table(results)}\n")
    append_result(folder / "results.json", "knn", {name: accuracies(r) for name, r in results.items()}, scorer.protocol(), loaded.sha256)


def show_masks(loaded: LoadedBackbone, source: ImageSource, seed: int, folder: Path) -> None:
    """Jaccard index of attention masks; the fixed head and the centre box are chosen on one half of the images, scored on the other."""
    truth = torch.stack([source.mask(index) for index in range(len(source))])
    half = len(source) // 2
    box = best_center_box(truth[:half])
    scores = {"trained": mask_scores(loaded, source, truth, half), "untrained": mask_scores(loaded.untrained(seed), source, truth, half)}
    baselines = baseline_scores(truth[half:], box)
    rows = [[name, *(value for _, value in score.items())] for name, score in scores.items()]
    print(table(["mask Jaccard %", "best head", "fixed head", "mean map"], rows))
    print("  without a model: " + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in baselines.items()) + "\n")
    metrics = {name: dict(s.items()) | {"head": s.head, "heads": list(s.heads)} for name, s in scores.items()} | baselines
    protocol = {
        "data": source.title,
        "scored": f"images {half} to {len(source) - 1}; fixed head and centre box chosen on the others",
        "threshold": THRESHOLD,
        "attention": "last block, CLS row, nearest upsampling",
        "center_box": list(box),
    }
    append_result(folder / "results.json", "masks", metrics, protocol, loaded.sha256)


@torch.no_grad()
def mask_scores(loaded: LoadedBackbone, source: ImageSource, truth: torch.Tensor, half: int) -> LocalizationScores:
    """Masks that hold the top 60% of each head's attention, against the true objects."""
    device = next(loaded.backbone.parameters()).device
    masks, means = [], []
    for start in range(0, len(source), 256):
        images = torch.stack([source.load(index) for index in range(start, min(start + 256, len(source)))])
        views = eval_view(images, IMAGE, loaded.mean, loaded.std).to(device)
        maps = attention_maps(loaded.backbone, views).cpu()  # (B, h, gh, gw)
        masks.append(upsample(mass_mask(maps, THRESHOLD).float(), (IMAGE, IMAGE)) > 0.5)
        means.append(upsample(mass_mask(mean_map(maps), THRESHOLD).float(), (IMAGE, IMAGE)) > 0.5)
    heads, mean = torch.cat(masks), torch.cat(means)
    head = choose_head(heads[:half], truth[:half])
    return score_masks(heads[half:], truth[half:], mean[half:].squeeze(1), head)


def draw(loaded: LoadedBackbone, source: ImageSource, folder: Path) -> None:
    """Some test images as files, and what the backbone looks at in them."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for index in range(min(SHOWN, len(source))):
        picture = Image.fromarray(source.load(index).permute(1, 2, 0).numpy())
        picture.save(images / f"{index:02d}_{source.classes[source.label(index)]}.png")
    export_attention(
        loaded.backbone, images, folder / "attention", mean=loaded.mean, std=loaded.std, formats=("overlay", "mask"), overwrite=True
    )
