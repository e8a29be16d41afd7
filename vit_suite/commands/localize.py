"""`vit-suite localize`: what a backbone finds, beside its untrained self, a centerd box and the whole image."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.attention.localize import Localizer, Looked, without_model
from vit_suite.commands.data_of import results_path
from vit_suite.config import LocalizeConfig
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.registry import open_test, set_reading
from vit_suite.data.source import ImageSource, stable_seed
from vit_suite.data.truth import Truths, open_truths, source_truths
from vit_suite.errors import UserError
from vit_suite.evaluation.localization import Baselines, Score, score
from vit_suite.hardware import pick_precision, rank_device
from vit_suite.logs import speak
from vit_suite.reports.results import append_result, table
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone

log = logging.getLogger("vit_suite")

TITLES = {"attention": "", "lost": "LOST", "tokencut": "TokenCut"}
"""Method -> its row; attention has three."""


def run(cfg: LocalizeConfig) -> None:
    """Score `cfg.checkpoint` against truth, on one rank or many."""
    speak()
    with distributed.launched():
        loaded = load_backbone(cfg.checkpoint, cfg)
        if "attention" in cfg.method and not loaded.backbone.has_cls:
            raise UserError(
                f"'{cfg.checkpoint}' has no CLS token, so no attention to score: use --method lost tokencut, which need"
                " none."
            )
        path = results_path(cfg)
        source, truths = open_images(cfg, loaded.backbone.cfg.channels)
        device = rank_device(cfg.accelerator)
        localizer = Localizer(
            source,
            truths,
            list(dict.fromkeys(cfg.method)),
            sorted(set(cfg.threshold)),
            None if cfg.image_size == "own" else cfg.image_size,
            cfg.max_tokens,
            cfg.batch_size,
            device,
            pick_precision(cfg.precision, device),
            progress=True,
        )
        check = Quarantine(limit=cfg.data.max_corrupt)
        total = len(source) + len(source.failures)
        check.report(list(source.failures), source.title, total)
        found = localize(localizer, {"checkpoint": loaded, "untrained": loaded.untrained(cfg.seed)}, cfg.seed)
        check.report(found.looked.failures, source.title, total)
        if distributed.rank() == 0:
            if failures := [*source.failures, *found.looked.failures]:
                log.warning("%d images or truths cannot be used, first %s", len(failures), failures[0])
            print(found.text())
            protocol = found.protocol() | {
                "checkpoint": cfg.checkpoint,
                "trained_on": loaded.meta,
                "options": asdict(cfg),
            }
            append_result(path, "localize", found.metrics(), protocol, loaded.sha256)
            print(f"appended to {path}")


def open_images(cfg: LocalizeConfig, channels: int) -> tuple[ImageSource, Truths]:
    """The images to score and where their objects are; UserError when there is no truth."""
    if cfg.images is not None:
        if cfg.truth is None:
            raise UserError(
                "images need a truth to be scored against: give --truth, a folder of masks or a file of boxes."
            )
        if cfg.data.name:
            raise UserError(
                f"both images and data.name {cfg.data.name} are given; expected a folder with its truth, or a data set."
            )
        source, truths = open_truths(cfg.images, cfg.truth, cfg.mask_values, channels, cfg.box_origin)
        return set_reading(source, cfg.data), truths
    if cfg.truth is not None:
        raise UserError("truth is given without images; data sets bring their own.")
    if not cfg.data.name:
        raise UserError(
            "nothing to score: give --images DIR --truth DIR_OR_FILE, or a data set with --data.name tiny_imagenet or"
            " shapes."
        )
    found = open_test(cfg.data.whole(channels), cfg.seed)
    brought = source_truths(found)
    if brought is None:
        raise UserError(
            f"{found.name} has neither masks nor boxes: use tiny_imagenet or shapes, or --images DIR --truth"
            " DIR_OR_FILE."
        )
    return found, brought


@dataclass
class Localized:
    """Scores of backbones under one protocol."""

    localizer: Localizer
    scores: dict[str, dict[str, Score]]
    """Backbone -> row -> score; the first is what is asked about, the others are read beside it."""
    baselines: Baselines
    looked: Looked
    """What the last pass left behind; all see the same images."""
    choosing: Tensor
    """bool (N,)."""

    def text(self) -> str:
        """What was scored, and the tables."""
        masks = self.localizer.truths.kind == "masks"
        count, scored = len(self.choosing), int((~self.choosing).sum())
        lines = [
            f"{self.localizer.truths.title}: {scored} images scored, {count - scored} others chose thresholds and heads"
        ]
        if self.looked.empty:
            lines.append(f"{self.looked.empty} images without an object are left out")
        measured = ["Jaccard %", "pointing %"] if masks else ["box IoU %", "CorLoc %", "pointing %"]
        rows = []
        for name, one in self._rows():
            chosen = ["" if value is None else str(value) for value in (one.threshold, one.head, one.pointing_head)]
            values = [one.overlap, one.pointing] if masks else [one.overlap, one.found, one.pointing]
            rows.append([name, *values, *chosen])
        lines.append(table(["", *measured, "threshold", "head", "pointing head"], rows))
        sweeps = [[name, *one.sweep] for name, one in self._rows() if one.sweep]
        if sweeps and len(self.localizer.thresholds) > 1:
            lines.append("\n" + table([f"{measured[0]} at threshold", *map(str, self.localizer.thresholds)], sweeps))
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, Score]]:
        rows = [
            (row if name == next(iter(self.scores)) else f"{name}: {row}", one)
            for name, found in self.scores.items()
            for row, one in found.items()
        ]
        return [*rows, ("center box", self.baselines.center_box), ("whole image", self.baselines.whole_image)]

    def metrics(self) -> dict:
        """For results.json."""
        kind = self.localizer.truths.kind
        named: dict[str, dict[str, Any]] = {
            name: {row: one.named(kind) for row, one in rows.items()} for name, rows in self.scores.items()
        }
        named |= {
            "center_box": self.baselines.center_box.named(kind),
            "whole_image": self.baselines.whole_image.named(kind),
        }
        named["center_box"]["size"] = self.baselines.sizes
        return named

    def protocol(self) -> dict:
        """Everything that decides the scores besides the weights."""
        how = self.localizer
        return {
            "truth": how.truths.title,
            "images": len(self.choosing),
            "scored": int((~self.choosing).sum()),
            "left_out": {"without_object": self.looked.empty, "not_decoded": len(self.looked.failures)},
            "not_used": [str(one) for one in [*how.source.failures, *self.looked.failures]],
            "chosen": (
                "thresholds and heads by mean overlap (the pointing head by hits) on the images that are not scored"
            ),
            "center_box": (
                "of the best fixed size on the scored images themselves: an upper bound for a fixed centerd box"
            ),
            "methods": list(how.methods),
            "thresholds": list(how.thresholds),
            "mask": (
                "attention: patches of the top share of the mass; its largest region gives the box. LOST, TokenCut: the"
                " seed's region"
            ),
            "shorter_side": how.shorter or "own",
            "max_tokens": how.max_tokens,
            "precision": how.precision,
        }


def localize(localizer: Localizer, backbones: dict[str, LoadedBackbone], seed: int = 0) -> Localized:
    """Every backbone on the localizer's images; a half drawn with `seed` chooses, the other is scored. UserError below
    two images."""
    scores = {}
    for name, loaded in backbones.items():
        loaded.backbone.to(localizer.device)
        looked = localizer.look(loaded.backbone, loaded.mean, loaded.std)
        count = len(looked.sizes)
        if count < 2:
            raise UserError(f"{localizer.truths.title}: only {count} image shows an object; scores need at least 2.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(stable_seed("localize", seed)))
        choosing = torch.zeros(count, dtype=torch.bool)
        choosing[order[: count // 2]] = True
        rows = ((TITLES[method], score(found, choosing)) for method, found in looked.found.items())
        scores[name] = {row or title: one for title, found in rows for row, one in found.items()}
    scored = [index for index, chooses in zip(looked.sizes, choosing.tolist(), strict=True) if not chooses]
    return Localized(
        localizer, scores, without_model(localizer.truths, {i: looked.sizes[i] for i in scored}), looked, choosing
    )
