"""Localization scores of several backbones under one protocol, beside what a centered box and the whole image reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit_suite.attention.localize import Localizer, Looked, without_model
from vit_suite.data.source import stable_seed
from vit_suite.errors import UserError
from vit_suite.evaluation.localization import Baselines, Score, score
from vit_suite.weights.checkpoint import LoadedBackbone

TITLES = {"attention": "", "lost": "LOST", "tokencut": "TokenCut"}
"""Method -> the name of its row. Attention has three rows, which `score` names."""


@dataclass
class Localized:
    """Scores of backbones under one protocol."""

    localizer: Localizer
    scores: dict[str, dict[str, Score]]
    """Backbone -> row -> score. The first backbone is the one that was asked about; the others stand beside it."""
    baselines: Baselines
    looked: Looked
    """What the last pass left behind; all backbones see the same images."""
    choosing: Tensor
    """bool (N,): the images that choose thresholds and heads; the others are scored."""

    def metrics(self) -> dict[str, Any]:
        """The scores, for results.json."""
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

    def protocol(self) -> dict[str, Any]:
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
                "of the best fixed size on the scored images themselves: an upper bound for a fixed centered box"
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
    """Score every backbone on the localizer's images. A random half, drawn with `seed`, chooses thresholds and heads;
    the other half is scored. UserError below two images.
    """
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
    sizes = {index: looked.sizes[index] for index in scored}
    return Localized(localizer, scores, without_model(localizer.truths, sizes), looked, choosing)
