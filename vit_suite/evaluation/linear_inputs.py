"""What a linear head sees of an image: tokens of the last blocks, pooled; or raw pixels.

One forward pass gives every part that any head of a sweep needs, such as the CLS token of the last block and of the
block before, stacked as (B, P, D). The input of a head is some of these columns side by side. So the pass is made once,
and the parts are stored once.

Axes: B images, P parts, D width of a part (of a token), C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vit_suite.errors import UserError
from vit_suite.evaluation.features import FeatureOptions, Features, collect, frozen
from vit_suite.hardware import Precision, autocast
from vit_suite.models.backbone import Backbone

Part = tuple[str, int]
"""("cls", 1): the CLS token of the last block, 2 of the one before; ("mean", 1): its mean patch token; ("register", 0):
the first."""


class Feature(NamedTuple):
    """A head's input: what it sees of each of so many last blocks."""

    pool: str
    blocks: int


PIXELS = Feature("pixels", 0)


@dataclass(frozen=True)
class Subject:
    """What is probed: how images become parts, and which columns of them each feature is."""

    embed: Callable[[Tensor], Tensor]
    """Normalized images (B, C, S, S) -> (B, P, D) in 16 bits, without gradients. UserError when they are not finite."""
    columns: dict[Feature, list[list[int]]]
    """Feature -> the columns of each of its heads; all have as many (only `tokens` has more than one head)."""
    shape: tuple[int, int]
    """(P, D)."""
    mean: Sequence[float]
    std: Sequence[float]

    def extract(
        self,
        source: Any,
        size: Sequence[int],
        device: torch.device,
        batch_size: int,
        workers: int | None = None,
        progress: bool = False,
    ) -> Features:
        """Parts (N, P, D) of every image of `source` under the evaluation view, in memory. workers: as for `read`."""
        title = f"features of {source.split}" if progress else None
        options = FeatureOptions(batch_size, device, workers=workers, title=title)
        return collect(source, (size, self.mean, self.std), self.embed, options)

    def bytes(self, images: int) -> int:
        """Memory that the parts of so many images take."""
        return 2 * images * self.shape[0] * self.shape[1]


def pools_of(backbone: Backbone) -> list[str]:
    """The poolings that a backbone has tokens for."""
    return (["cls", "mean", "cls_mean"] if backbone.has_cls else ["mean"]) + (["tokens"] if registers(backbone) else [])


def registers(backbone: Backbone) -> int:
    """Prefix tokens besides CLS."""
    return backbone.prefix_tokens - int(backbone.has_cls)


def features_of(backbone: Backbone, pools: Iterable[str], blocks: Iterable[int], what: str) -> list[Feature]:
    """Every pooling with every number of blocks, each pair once. UserError for tokens or blocks that the backbone of
    `what` does not have."""
    found: dict[Feature, None] = {}
    for pool in pools:
        if pool not in pools_of(backbone):
            lacks = "registers besides its CLS token" if pool == "tokens" else "CLS token"
            raise UserError(
                f"pool {pool}: the backbone of '{what}' has no {lacks}; it has tokens for"
                f" {', '.join(pools_of(backbone))}."
            )
        for count in blocks:
            if count > backbone.depth:
                raise UserError(f"blocks {count}: the backbone of '{what}' has {backbone.depth}.")
            found[Feature(pool, 1 if pool == "tokens" else count)] = None
    return list(found)


def parts_of(feature: Feature, has_cls: bool, registers: int) -> list[list[Part]]:
    """The parts that each head of a feature sees, in the order of the blocks.

    DINO's eval_linear.py gives ViT-S the feature cls with 4 blocks, and ViT-B cls_mean with 1. SiT's is tokens, with a
    head for each token.
    """
    cls = [("cls", place) for place in range(feature.blocks, 0, -1)]
    if feature.pool == "tokens":
        return [[part] for part in [("cls", 1)] * has_cls + [("register", place) for place in range(registers)]]
    if feature.pool == "mean":
        return [[("mean", place) for _, place in cls]]
    return [cls + [("mean", 1)] * (feature.pool == "cls_mean")]


def backbone_subject(
    backbone: Backbone,
    features: Sequence[Feature],
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision = "fp32",
) -> Subject:
    """The tokens of a frozen backbone. It runs in eval mode, and gets its own mode back after each pass."""
    wanted = {feature: parts_of(feature, backbone.has_cls, registers(backbone)) for feature in features}
    parts = list(dict.fromkeys(part for heads in wanted.values() for head in heads for part in head))
    columns = {feature: [[parts.index(part) for part in head] for head in heads] for feature, heads in wanted.items()}
    deepest = max((place for kind, place in parts if kind != "register"), default=1)

    def embed(images: Tensor) -> Tensor:
        device = next(backbone.parameters()).device
        with frozen(backbone), autocast(precision, device):
            tokens = backbone.tokens(images.to(device), range(backbone.depth - deepest, backbone.depth))
        pick = {
            "cls": lambda place: tokens.blocks[-place][0],
            "mean": lambda place: tokens.blocks[-place][1].float().mean(1),
            "register": lambda place: tokens.registers[:, place],
        }
        rows = torch.stack([pick[kind](place).half() for kind, place in parts], dim=1)
        if not torch.isfinite(rows).all():
            raise UserError("the backbone's features are not finite: its training has diverged.")
        return rows

    return Subject(embed, columns, (len(parts), backbone.dim), mean, std)


def pixel_subject(channels: int, size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Subject:
    """The normalized pixels themselves, which any backbone has to beat."""

    def embed(images: Tensor) -> Tensor:
        return images.flatten(1).unsqueeze(1).half()

    return Subject(embed, {PIXELS: [[0]]}, (1, channels * size[0] * size[1]), mean, std)
