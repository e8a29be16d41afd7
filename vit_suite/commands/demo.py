"""`vit-suite demo`: the whole road once, offline, on generated images whose classes and objects are known."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image

from vit_suite.attention.export import export_attention
from vit_suite.attention.export_options import ExportOptions
from vit_suite.attention.localize import Localizer
from vit_suite.attention.localized import Localized, localize
from vit_suite.attention.maps import attention_maps
from vit_suite.attention.overview import Shown, overview
from vit_suite.attention.render import as_picture
from vit_suite.config import (
    BackboneConfig,
    DataConfig,
    DemoConfig,
    EvaluateConfig,
    PretrainConfig,
    RunOptions,
    SupervisedConfig,
    SupervisedOptimConfig,
    SupervisedViewsConfig,
    TrainerConfig,
)
from vit_suite.data.module import ImageDataModule
from vit_suite.data.shapes import CLASSES
from vit_suite.data.source import ImageSource
from vit_suite.data.truth import source_truths
from vit_suite.evaluation.knn import KNNResult
from vit_suite.evaluation.knn_scorer import Scorer, accuracies
from vit_suite.hardware import pick_device
from vit_suite.logs import speak
from vit_suite.reports.gallery import write_gallery
from vit_suite.reports.results import append_result, table
from vit_suite.training import rundir
from vit_suite.training.run import train
from vit_suite.training.start import adopt
from vit_suite.views.multicrop import normalize_
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone

log = logging.getLogger("vit_suite")

BUILTIN = "builtin:shapes"
IMAGE = 48
KS = (10, 20, 100, 200)
TEMPERATURE = 0.07  # of the kNN vote, DINO's
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of a head's mass that are tried; images that are not scored choose one of them."""
DRAWN = 16
"""Test images that are drawn one by one."""
SIDE = 192
"""Pixels of a drawn image's side: 48 are too few to look at."""
OVERVIEW = 8
"""Images of the one picture."""


CHANCE = 100 / len(CLASSES)

KNN_MEANS = """kNN: of {count} test images, the percentage whose k most similar training images vote for the right
one of ten outlines."""
MASKS_MEAN = """Jaccard: of the pixels in mask or object, the percentage that are in both. Pointing: the percentage of
images where the most attended patch lies on the object. Other images chose the head and the mass to keep."""
NEXT = """
look at:  {folder}/overview.png (eight images at a glance), {folder}/attention/index.html (all maps, with a slider)
numbers:  {folder}/results.json, {folder}/metrics.csv

next, with a folder of your own (source .venv/bin/activate puts vit-suite on the path):
  vit-suite pretrain --config sit/own_cpu --data.root DIR --run.output runs/mine
  vit-suite attention --checkpoint runs/mine --images DIR --output maps --gallery
  vit-suite knn --checkpoint runs/mine --data.name folder --data.root CLASSES --baselines"""


def recipe(cfg: DemoConfig) -> PretrainConfig:
    """A supervised training of minutes on two CPU cores. It starts from the builtin backbone; the labels are the ten
    outlines."""
    return PretrainConfig(
        method=SupervisedConfig(label_smoothing=0.1, mixup=0.0, cutmix=0.0, ema=0.99),
        backbone=BackboneConfig(drop_path=0.0),  # the rest is that of the backbone it starts from
        data=DataConfig(
            name="shapes",
            image_size=IMAGE,
            length=cfg.images,
            test_length=cfg.test_images,
            batch_size=min(128, cfg.images),
        ),
        views=SupervisedViewsConfig(global_size=IMAGE, crop="padded", randaugment=0, erase=0.0),
        optim=SupervisedOptimConfig(lr=2e-3, warmup_epochs=0.5, clip=1.0, clip_mode="global"),
        trainer=TrainerConfig(max_epochs=cfg.epochs, max_minutes=cfg.minutes, progress=cfg.progress, devices=1),
        evaluate=EvaluateConfig(every_epochs=0),
        start=BUILTIN,
        run=RunOptions(name="demo", output=cfg.output, seed=cfg.seed, overwrite=cfg.overwrite),
    )


def run(cfg: DemoConfig) -> None:
    """Look with the builtin backbone, train one, score both beside baselines, draw, and say what to do next."""
    speak()
    pretrain, shipped, folder = recipe(cfg), load_backbone(BUILTIN), Path(cfg.output)
    rundir.check(adopt(pretrain, shipped))  # before anything is computed: the folder may hold something else
    data = ImageDataModule(pretrain.data, seed=cfg.seed)
    scorer = Scorer(data, KS, TEMPERATURE, shipped.image_size, 256, pick_device(), "auto", progress=False)
    log.info("1/4 the backbone that comes along, %s, on %d generated images", BUILTIN, cfg.test_images)
    first = scorer.backbone(shipped)
    log.info("it names the outline of %.1f%% by their 20 nearest neighbours; chance is %g%%", first.top1[20], CHANCE)
    log.info("2/4 training it on with the labels of %d more images, at most %.1f minutes", cfg.images, cfg.minutes)
    if not train(pretrain, shipped):
        return
    log.info("3/4 scores")
    trained = load_backbone(folder)
    others = {"trained here": trained, "untrained": trained.untrained(cfg.seed)}
    results = {name: scorer.backbone(loaded) for name, loaded in others.items()}
    results |= {"raw pixels": scorer.pixels(), "shipped": first}
    show_knn(results, scorer, trained.sha256, folder)
    found = show_masks(others | {"shipped": shipped}, data.test_source, cfg.seed, folder)
    log.info("4/4 pictures")
    draw(trained, data.test_source, folder)
    show_overview(trained, found, data.test_source, folder)
    print(NEXT.format(folder=folder))


def show_knn(results: dict[str, KNNResult], scorer: Scorer, sha256: str, folder: Path) -> None:
    """Print the table of kNN, and add an entry to results.json, under the weights that were trained here."""
    rows = [[name, *result.top1.values()] for name, result in results.items()]
    rows.append(["chance", *[CHANCE] * len(KS)])
    header = ["kNN top-1 %", *(f"k={k}" for k in KS)]
    print(f"\n{KNN_MEANS.format(count=len(scorer.test))}\n\n{table(header, rows)}\n")
    metrics = {name: accuracies(result) for name, result in results.items()} | {"chance": CHANCE}
    append_result(folder / "results.json", "knn", metrics, scorer.protocol(), sha256)


def show_masks(backbones: dict[str, LoadedBackbone], source: ImageSource, seed: int, folder: Path) -> Localized:
    """Print the table of attention masks against the true objects. The first backbone is the one trained here."""
    truths = source_truths(source)
    if truths is None:
        raise RuntimeError("generated images have masks")
    localizer = Localizer(source, truths, ("attention",), THRESHOLDS, device=pick_device())
    found = localize(localizer, backbones, seed)
    rows = []
    for name, scores in found.scores.items():
        for row in ("fixed head", "mean map"):
            one = scores[row]
            rows.append([f"{name}: {row}", one.overlap, one.pointing, f"{one.threshold:.0%}"])
    for name, one in (("center box", found.baselines.center_box), ("whole image", found.baselines.whole_image)):
        rows.append([name, one.overlap, one.pointing, ""])
    print(f"{MASKS_MEAN}\n\n{table(['', 'Jaccard %', 'pointing %', 'mass kept'], rows)}")
    trained = next(iter(backbones.values()))
    append_result(folder / "results.json", "localize", found.metrics(), found.protocol(), trained.sha256)
    return found


def show_overview(trained: LoadedBackbone, found: Localized, source: ImageSource, folder: Path) -> None:
    """overview.png: the first scored images, what the fixed head sees in them, its mask, and the truth."""
    chosen = next(iter(found.scores.values()))["fixed head"]
    scored = [index for index, chooses in zip(found.looked.sizes, found.choosing.tolist(), strict=True) if not chooses]
    images = torch.stack([source.load(index) for index in scored[:OVERVIEW]])
    normalized = normalize_(images.float() / 255, trained.mean, trained.std)
    maps = attention_maps(trained.backbone.cpu(), normalized)[:, chosen.head]
    truths = [source.mask(index).numpy() for index in scored[:OVERVIEW]]
    shown = [Shown(as_picture(one.numpy()), heat, truth) for one, heat, truth in zip(images, maps, truths, strict=True)]
    threshold = chosen.threshold
    if threshold is None:
        raise RuntimeError("a fixed head has a threshold")
    overview(shown, threshold).save(folder / "overview.png")


def draw(loaded: LoadedBackbone, source: ImageSource, folder: Path) -> None:
    """Some test images as files, what the backbone looks at in each, and a page of them all."""
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for index in range(min(DRAWN, len(source))):
        picture = Image.fromarray(as_picture(source.load(index).numpy()))
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(images / f"{index:02d}_{source.classes[source.label(index)]}.png")
    export_attention(
        loaded.backbone,
        images,
        folder / "attention",
        loaded.mean,
        loaded.std,
        ExportOptions(formats=("overlay", "mask", "npz"), image_size=IMAGE, upsample="bilinear", overwrite=True),
    )
    write_gallery(folder / "attention")
