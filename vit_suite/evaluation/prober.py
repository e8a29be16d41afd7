"""Linear heads on one backbone after another under one protocol, for `vit-suite linear`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from torch import Tensor

from vit_suite import distributed
from vit_suite.config import LinearConfig, SupervisedViewsConfig
from vit_suite.config.limits import pair
from vit_suite.data.loader import FileLoader, ResidentLoader, auto_workers
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import Batch, EpochPlan
from vit_suite.data.resident import GIB, to_device
from vit_suite.data.source import ImageSource, ResidentSource
from vit_suite.errors import UserError
from vit_suite.evaluation.features import Features
from vit_suite.evaluation.fewshot import ShotResult, Shots, few_shot_probe
from vit_suite.evaluation.interval import Chance, chance, wilson
from vit_suite.evaluation.linear import (
    FreshBatches,
    ProbeOptions,
    ProbeResult,
    linear_probe,
    linear_probe_on_batches,
    split,
)
from vit_suite.evaluation.linear_heads import Batches, HeadScore
from vit_suite.evaluation.linear_inputs import Feature, Subject, backbone_subject, pixel_subject
from vit_suite.evaluation.linear_protocols import Protocol
from vit_suite.hardware import pick_precision, rank_device
from vit_suite.views.draw import alone
from vit_suite.views.evaluate import view_text
from vit_suite.views.multicrop import MultiCrop, ViewsInWorkers, pick_backend
from vit_suite.weights.checkpoint import LoadedBackbone

Result = ProbeResult | dict[int, ShotResult]


@dataclass(frozen=True)
class Turns(EpochPlan):
    """Every `turns`-th batch of a plan, starting with batch `turn`. Its length is that of the whole plan."""

    turn: int = 0
    turns: int = 1

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return islice(super().batches(epoch, self.turn + start * self.turns), None, None, self.turns)


class Prober:
    """Trains the same heads under the same protocol on one backbone after another.

    Test images are decoded when a winner is to be scored, not before. Ranks share the passes through the backbone. Then
    each rank has the features of all images and trains the same heads in the same batches. That takes seconds and gives
    the numbers of one rank bit for bit; summing gradients over ranks would not.
    """

    def __init__(self, cfg: LinearConfig, data: ImageDataModule, size: list[int], protocol: Protocol):
        self.cfg, self.data, self.size, self.protocol = cfg, data, size, protocol
        self.device = rank_device(cfg.accelerator)
        self.speaks = distributed.rank() == 0
        self.precision = pick_precision(cfg.precision, self.device)
        if isinstance(data.train_source, ResidentSource) and self.device.type == "cuda":
            to_device(data.train_source, self.device)
        self.train = data.bank()
        if self.train.labels is None:
            raise UserError(f"{self.train.title} has no labels, and linear heads learn from some.")
        self.labels: Tensor = self.train.labels
        self.classes = max(len(self.train.classes), int(self.labels.max()) + 1)
        self.options = ProbeOptions(cfg.validation_share, self.classes, self.device, self.speaks)
        self.choosing = False  # whether images were held out for the last subject

    def backbone(self, loaded: LoadedBackbone, features: Sequence[Feature]) -> Result:
        """Heads on a backbone's tokens."""
        network = loaded.backbone.to(self.device)
        return self.probe(backbone_subject(network, features, loaded.mean, loaded.std, self.precision))

    def pixels(self) -> Result:
        """Heads on the normalized pixels."""
        return self.probe(pixel_subject(self.data.cfg.channels, self.size, self.data.mean, self.data.std))

    def probe(self, subject: Subject) -> Result:
        """Train and score heads. UserError when the features do not fit `memory_gb`, or heads cannot train on them."""
        recipe, cfg = self.protocol.recipe, self.cfg
        self.choosing = len(subject.columns) * len(recipe.lr) > 1
        self._check_memory(subject)
        if self.protocol.augment:
            return self._augmented(subject)
        train = self._extract(subject, self.train)
        if cfg.shots:
            shots = Shots(cfg.shots, cfg.draws, self.train.classes)
            return few_shot_probe(train, lambda: self._test(subject), recipe, subject.columns, shots, self.options)
        return linear_probe(train, lambda: self._test(subject), recipe, subject.columns, self.options)

    def _augmented(self, subject: Subject) -> ProbeResult:
        inner, held = self.train, None
        if self.choosing:
            rows, held_rows = split(self.labels, self.cfg.validation_share, self.cfg.seed)
            inner, held = self.train.subset(rows), self._extract(subject, self.train.subset(held_rows))
        recipe = self.protocol.recipe
        batches, count = self._batches(subject, inner, min(recipe.batch_size, len(inner)))
        fresh = FreshBatches(batches, count, subject.shape, len(inner))
        return linear_probe_on_batches(fresh, held, lambda: self._test(subject), recipe, subject.columns, self.options)

    def _batches(self, subject: Subject, source: ImageSource, size: int) -> tuple[Batches, int]:
        """(batches, batches in an epoch) of parts of randomly cropped and flipped images; colors are not changed."""
        seed, device = self.cfg.seed, self.device
        height, width = pair(self.size)
        ratio = [bound * (width / height) for bound in SupervisedViewsConfig().ratio]
        config = SupervisedViewsConfig(global_size=[height, width], ratio=ratio, randaugment=0, erase=0.0)
        views = MultiCrop(config, subject.mean, subject.std)
        plan = Turns(len(source), size, seed, turn=distributed.rank(), turns=distributed.world_size())
        loader: ResidentLoader | FileLoader
        if isinstance(source, ResidentSource):
            loader = ResidentLoader(source, plan)
        else:
            ready = (
                ViewsInWorkers(views, seed, size)
                if pick_backend(config, device.type, ragged=True) == "workers"
                else None
            )
            workers = auto_workers(self.data.cfg.workers, False)
            loader = FileLoader(source, plan, workers, self.data.quarantine, device.type == "cuda", ready)

        def own(epoch: int) -> Iterator[tuple[Tensor, Tensor] | UserError]:
            loader.set_epoch(epoch)
            try:
                for number, (images, labels, _) in enumerate(loader):
                    if isinstance(images, Tensor) or images[0].ndim == 3:
                        images = (
                            images.to(device) if isinstance(images, Tensor) else [image.to(device) for image in images]
                        )
                        images = views(images, alone(len(images), seed, epoch, plan.turn + number * plan.turns))
                    found = subject.embed(images[0])
                    yield (found.cpu(), labels.cpu()) if distributed.active() else (found, labels)
            except UserError as error:  # raised below, on all ranks
                yield error

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            mine = own(epoch)
            for _ in range(-(-len(loader) // plan.turns)):  # a batch of each rank; some have none in the last round
                for part in distributed.gather_objects(next(mine, None)):
                    if isinstance(part, UserError):
                        raise part
                    if part is not None:
                        yield part[0].to(device), part[1].to(device)

        return batches, len(loader)

    def _extract(self, subject: Subject, source: ImageSource) -> Features:
        return subject.extract(
            source, self.size, self.device, self.cfg.batch_size, self.data.threads, progress=self.speaks
        )

    def _test(self, subject: Subject) -> Features:
        return self._extract(subject, self.data.test())

    def _check_memory(self, subject: Subject) -> None:
        kept = 1.0 if not self.protocol.augment else self.cfg.validation_share * self.choosing
        if (need := subject.bytes(round(kept * len(self.train))) / GIB) > self.cfg.memory_gb:
            rows = f"{len(self.train)} training images x {subject.shape[0]} x {subject.shape[1]} numbers"
            remedy = "ask for fewer blocks or poolings, a larger memory_gb" + (
                "." if self.protocol.augment else ", or --augment true."
            )
            raise UserError(
                f"features of {rows} take {need:.3g} GiB, and memory_gb is {self.cfg.memory_gb:g}: {remedy}"
            )

    def chance(self) -> Chance:
        """What guessing reaches on the test images."""
        labels = self.data.test().labels
        assert labels is not None  # `open_scored` has checked
        return chance(labels, self.classes)

    def describe(self) -> dict:
        """Everything that decides the score besides the weights."""
        protocol, data, recipe = self.protocol, self.data, self.protocol.recipe
        test = data.test()
        # The backbone's own: raw pixels have one column, and are probed after it.
        choosing = len(protocol.blocks) * len(protocol.pools) * len(recipe.lr) > 1
        choice = "none: one setting, trained on all training images"
        retrained = "not needed"
        if choosing:
            choice = (
                "winner on the held-out training images by top-1, then cross-entropy; test is read once, after the"
                " choice"
            )
            again = "the winner is trained again on all training images"
            retrained = "the head trained without them is scored" if protocol.augment else again
        few = {
            "shots": self.cfg.shots,
            "draws": self.cfg.draws,
            "spread": "mean and sample standard deviation over draws",
        }
        few["retrained"] = "the winner's heads, which never see the held-out images, are scored"
        return {
            "protocol": protocol.says,
            "data": self.train.name,
            "train": {"split": self.train.split, "images": data.usable(self.train)},
            "test": {"split": test.split, "images": data.usable(test)},
            "left_out": data.left_out(self.train, test),
            "view": view_text(self.size),
            "augment": (
                "random resized crop of 8 to 100% of the area, flip"
                if protocol.augment
                else "none: features are extracted once"
            ),
            "features": "tokens after the final norm, not normalized further, kept in 16 bits",
            "blocks": list(protocol.blocks),
            "pool": list(protocol.pools),
            "head": self.cfg.head,
            "recipe": asdict(recipe),
            "validation_share": self.cfg.validation_share if choosing else 0,
            "choice": choice,
            "retrained": retrained,
            "precision": self.precision,
        } | (few if self.cfg.shots else {})


def as_metrics(result: Result, images: int) -> dict:
    """A result as plain numbers. images: how many were scored, for the 95% interval of top-1.

    Few-shot: the interval is that of the mean over draws; the spread over draws is not in it.
    """
    if isinstance(result, dict):
        return {
            f"shots{n}": {
                "top1": one.top1.as_dict(),
                "top1_interval": list(wilson(one.top1.mean, images)),
                "top5": one.top5.as_dict(),
                **one.setting._asdict(),
                "held_out": _rows(one.held_out),
            }
            for n, one in result.items()
        }
    interval = list(wilson(result.top1, images))
    scores = {"top1": result.top1, "top1_interval": interval, "top5": result.top5, **result.setting._asdict()}
    return scores | {"trained_on": result.trained_on, "held_out": _rows(result.held_out)}


def _rows(scores: Sequence[HeadScore]) -> list[dict]:
    """JSON has no nan: a diverged head's loss is null."""
    finite = [one.loss if math.isfinite(one.loss) else None for one in scores]
    return [
        one.setting._asdict() | {"top1": one.top1, "top5": one.top5, "loss": loss}
        for one, loss in zip(scores, finite, strict=True)
    ]
