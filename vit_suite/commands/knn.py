"""`vit-suite knn`: weighted kNN of a frozen backbone, a table on the screen and an entry in results.json."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from vit_suite.commands.logs import speak
from vit_suite.config import DataConfig, KNNConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.data.resident import GIB
from vit_suite.errors import UserError
from vit_suite.evaluation.features import Features, extract_features, raw_pixel_features
from vit_suite.evaluation.knn import KNNResult, knn_classify
from vit_suite.hardware import pick_device, pick_precision
from vit_suite.models.backbone import check_image_size
from vit_suite.reports.results import append_result, read_results, table
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone

log = logging.getLogger("vit_suite")


def run(cfg: KNNConfig) -> None:
    """Score `cfg.checkpoint`, beside its untrained self and raw pixels with `baselines`."""
    speak()
    loaded = load_backbone(cfg.checkpoint)
    size = [cfg.image_size, cfg.image_size] if cfg.image_size else loaded.image_size
    check_image_size(size, loaded.backbone.patch_size, "image_size")
    path = results_path(cfg)
    read_results(path)  # says now whether it can be appended to
    data = open_data(cfg, loaded)
    scorer = Scorer(data, cfg.k, cfg.temperature, size, cfg.batch_size, pick_device(cfg.accelerator), cfg.precision)
    results = {"checkpoint": scorer.backbone(loaded)}
    if cfg.baselines:
        results["untrained"] = scorer.backbone(loaded.untrained(cfg.seed))
        need = 4 * data.cfg.channels * size[0] * size[1] * (len(scorer.bank) + len(scorer.test)) / GIB
        if need <= cfg.data.memory_gb:
            results["raw pixels"] = scorer.pixels()
        else:
            log.info("raw pixels are left out: they take %.1f GiB, and data.memory_gb is %g", need, cfg.data.memory_gb)
    print(f"{data.name}: top-1 % of {len(scorer.test)} images, bank of {len(scorer.bank)}, temperature {cfg.temperature}")
    print(accuracy_table(results))
    metrics = {name: accuracies(result) for name, result in results.items()}
    protocol = scorer.protocol() | {"checkpoint": cfg.checkpoint, "trained_on": loaded.meta, "data_options": asdict(data.cfg)}
    append_result(path, "knn", metrics, protocol, loaded.sha256)
    print(f"appended to {path}")


def results_path(cfg: KNNConfig) -> Path:
    """The file the scores are appended to."""
    folder = Path(cfg.checkpoint) if Path(cfg.checkpoint).is_dir() else Path()
    return Path(cfg.output) if cfg.output else folder / "results.json"


def open_data(cfg: KNNConfig, loaded: LoadedBackbone) -> ImageDataModule:
    """The images of `cfg.data` with the channels that the backbone takes; UserError when they cannot be scored."""
    channels = loaded.backbone.cfg.channels
    if cfg.data.channels not in (channels, DataConfig.channels):
        raise UserError(f"data.channels is {cfg.data.channels}, but the backbone of '{cfg.checkpoint}' takes {channels}.")
    options = replace(cfg.data, channels=channels, batch_size=1)  # the global batch belongs to training; here one image fills it
    if channels not in (1, 3):  # no data set has published statistics for these
        options = replace(options, mean=options.mean or loaded.mean, std=options.std or loaded.std)
    data = ImageDataModule(options, seed=cfg.seed)
    if data.train_source.labels is None:
        raise UserError(f"{data.name} has no labels, and kNN needs some: score on class folders or another labelled data set.")
    if data.scored_on_itself:
        raise UserError(
            f"{data.name} would be scored on the images that vote, split '{data.test_source.split}': each would find itself. "
            "Choose another split with data.train_split or data.test_split, or sort a folder into ROOT/train and ROOT/test."
        )
    return data


class Scorer:
    """kNN of one backbone after another on the same images under the same protocol."""

    def __init__(
        self,
        data: ImageDataModule,
        ks: Sequence[int],
        temperature: float,
        image_size: Sequence[int],
        batch_size: int,
        device: torch.device,
        precision: str,
        progress: bool = True,
    ):
        self.bank, self.test = data.bank(), data.test()
        self.ks, self.temperature, self.image_size = list(ks), temperature, list(image_size)
        self.options = {"batch_size": batch_size, "device": device, "precision": pick_precision(precision, device), "progress": progress}
        self.mean, self.std = data.mean, data.std

    def backbone(self, loaded: LoadedBackbone) -> KNNResult:
        """Of the CLS token after the final norm."""
        network = loaded.backbone.to(self.options["device"])
        network.set_fused_attention(self.options["device"].type != "cpu")
        bank, test = (
            extract_features(network, source, self.image_size, loaded.mean, loaded.std, **self.options) for source in (self.bank, self.test)
        )
        return self._vote(bank, test)

    def pixels(self) -> KNNResult:
        """Of the normalised pixels themselves: what a backbone has to beat."""
        options = {"batch_size": self.options["batch_size"]}
        bank, test = (raw_pixel_features(source, self.image_size, self.mean, self.std, **options) for source in (self.bank, self.test))
        return self._vote(bank, test)

    def _vote(self, bank: Features, test: Features) -> KNNResult:
        return knn_classify(*bank[:2], *test[:2], ks=self.ks, temperature=self.temperature, device=self.options["device"])

    def protocol(self) -> dict:
        """Everything that decides the score besides the weights."""
        return {
            "data": self.bank.name,
            "bank": {"split": self.bank.split, "images": len(self.bank)},
            "test": {"split": self.test.split, "images": len(self.test)},
            "features": "CLS token after the final norm, L2-normalised",
            "view": f"shorter side to 256/224 of {self.image_size}, centre crop; images of that size as they are",
            "k": self.ks,
            "temperature": self.temperature,
            "vote": "exp(cosine / temperature)",
            "precision": self.options["precision"],
        }


def accuracies(result: KNNResult) -> dict[str, dict[str, float]]:
    """{"k20": {"top1": percent, "top5": percent}}; k as it was asked for, `used_k` beside it where the bank was smaller."""
    return {
        f"k{k}": {"top1": result.top1[k], "top5": result.top5[k]} | ({"used_k": result.used_k[k]} if result.used_k[k] != k else {})
        for k in result.top1
    }


def accuracy_table(results: dict[str, KNNResult]) -> str:
    """A row for each result, a column for each k."""
    ks = list(next(iter(results.values())).top1)
    used = next(iter(results.values())).used_k
    header = ["kNN top-1 %", *(f"k={k}" if used[k] == k else f"k={k} (bank has {used[k]})" for k in ks)]
    return table(header, [[name, *(result.top1[k] for k in ks)] for name, result in results.items()])
