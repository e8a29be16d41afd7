"""kNN scores of one backbone after another under one protocol, for `vit-suite knn` and `demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vit_suite.data.module import ImageDataModule
from vit_suite.evaluation.features import FeatureOptions, Features, extract_features, pick_rows, raw_pixel_features
from vit_suite.evaluation.fewshot import Spread, draw_shots
from vit_suite.evaluation.interval import wilson
from vit_suite.evaluation.knn import KNNOptions, KNNResult, knn_classify
from vit_suite.hardware import AskedPrecision, pick_precision
from vit_suite.models.backbone import Backbone
from vit_suite.views.evaluate import view_text
from vit_suite.weights.checkpoint import LoadedBackbone

Shots = dict[int, list[KNNResult]]
"""Number of shots -> a result for each draw."""


class Scorer:
    """Scores one backbone after another by kNN, on the same images under the same protocol.

    Ranks share the bank, and all get the results.
    """

    def __init__(
        self,
        data: ImageDataModule,
        ks: Sequence[int],
        temperature: float,
        image_size: Sequence[int],
        batch_size: int,
        device: torch.device,
        precision: AskedPrecision,
        progress: bool = True,
    ):
        self.data, self.bank, self.test, self.device = data, data.bank(), data.test(), device
        self.ks, self.temperature, self.image_size = list(ks), temperature, list(image_size)
        title = "features" if progress else None
        self.options = FeatureOptions(batch_size, device, pick_precision(precision, device), data.threads, title)
        self.mean, self.std = data.mean, data.std
        self.representation = ""
        """Of the backbone that was scored last."""

    @property
    def classes(self) -> int:
        """Classes that the bank's images can have."""
        labels = self.bank.labels
        return max(len(self.bank.classes), 1 + int(labels.max()) if labels is not None and len(labels) else 0)

    def features(self, loaded: LoadedBackbone) -> tuple[Features, Features]:
        """Features of bank and test: the backbone's representation, L2-normalized."""
        network = loaded.backbone.to(self.device)
        self.representation = representation(network)
        common = (self.image_size, loaded.mean, loaded.std)
        bank = extract_features(network, self.bank, *common, replace(self.options, shared=True))
        return bank, extract_features(network, self.test, *common, self.options)

    def pixel_features(self) -> tuple[Features, Features]:
        """Features of bank and test: the normalized pixels themselves, which a backbone has to beat."""
        common = (self.image_size, self.mean, self.std)
        options = replace(self.options, title=None)
        bank = raw_pixel_features(self.bank, *common, replace(options, shared=True))
        return bank, raw_pixel_features(self.test, *common, options)

    def backbone(self, loaded: LoadedBackbone) -> KNNResult:
        """The vote with a backbone's features."""
        return self.vote(*self.features(loaded))

    def pixels(self) -> KNNResult:
        """The vote with raw pixels."""
        return self.vote(*self.pixel_features())

    def vote(self, bank: Features, test: Features) -> KNNResult:
        """The vote of the whole bank."""
        vote = KNNOptions(ks=self.ks, temperature=self.temperature, device=self.device)
        return knn_classify(*bank[:2], *test[:2], options=vote, rows=bank.rows)

    def few_shot(self, features: tuple[Features, Features], shots: Sequence[int], draws: int, seed: int) -> Shots:
        """Votes of small banks, with `shots` images of each class, drawn `draws` times from the features of the whole
        bank. UserError as in `draw_shots`."""
        bank, test = features
        drawn = {n: [draw_shots(bank.labels, n, draw, seed, self.bank.classes) for draw in range(draws)] for n in shots}
        return {n: [self.vote(pick_rows(bank, rows), test) for rows in banks] for n, banks in drawn.items()}

    def protocol(self) -> dict:
        """Everything that decides the score besides the weights."""
        return {
            "data": self.bank.name,
            "bank": {"split": self.bank.split, "images": self.data.usable(self.bank)},
            "test": {"split": self.test.split, "images": self.data.usable(self.test)},
            "left_out": self.data.left_out(self.bank, self.test),
            "features": f"{self.representation}, L2-normalized",
            "view": view_text(self.image_size),
            "k": self.ks,
            "temperature": self.temperature,
            "vote": "exp(cosine / temperature)",
            "precision": self.options.precision,
        }


def representation(backbone: Backbone) -> str:
    """What a backbone answers with, for results.json."""
    what = "CLS token" if backbone.cfg.pool == "cls" else "mean of the patch tokens"
    return f"{what} after the final norm"


def accuracies(result: KNNResult) -> dict[str, dict[str, Any]]:
    """{"k20": {"top1": percent, "top1_interval": [low, high], "top5": percent}}.

    The key has the k that was asked for; `used_k` stands beside it where the bank was smaller.
    """
    return {
        f"k{k}": {
            "top1": result.top1[k],
            "top1_interval": list(wilson(result.top1[k], result.queries)),
            "top5": result.top5[k],
        }
        | ({"used_k": result.used_k[k]} if result.used_k[k] != k else {})
        for k in result.top1
    }


def spreads(results: Sequence[KNNResult]) -> dict[int, tuple[Spread, Spread]]:
    """k -> (top-1, top-5) over draws."""
    ks = results[0].top1
    return {k: (Spread(tuple(r.top1[k] for r in results)), Spread(tuple(r.top5[k] for r in results))) for k in ks}


def shots_metrics(shots: Shots) -> dict:
    """{"shots5": {"k20": {"top1": {"mean", "std", "draws"}, "top1_interval": [low, high], "top5": ...}}}.

    The interval is that of the mean on the number of test images; the spread over draws is not in it. `used_k` stands
    beside the scores where the bank was smaller.
    """
    return {
        f"shots{n}": {
            f"k{k}": {
                "top1": top1.as_dict(),
                "top1_interval": list(wilson(top1.mean, results[0].queries)),
                "top5": top5.as_dict(),
            }
            | ({"used_k": used} if (used := results[0].used_k[k]) != k else {})
            for k, (top1, top5) in spreads(results).items()
        }
        for n, results in shots.items()
    }
