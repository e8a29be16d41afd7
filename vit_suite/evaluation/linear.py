"""Linear evaluation of frozen features. Held-out TRAINING images choose a setting, which is scored once, on test.

The published protocols of DINO and SiT report the best epoch on the test split, that of DINOv2 the best setting on it.
We do neither: heads are scored after their last epoch, and `test` is a function that is called once, after the choice.

Axes: N images, P parts, D width of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit_suite.data.source import stratified
from vit_suite.errors import UserError
from vit_suite.evaluation.features import Features, moved
from vit_suite.evaluation.linear_heads import Batches, HeadScore, Recipe, Setting, Sweep, fit, score, stored
from vit_suite.evaluation.linear_inputs import Feature

Columns = Mapping[Feature, Sequence[Sequence[int]]]
PLAIN = Feature("features", 0)
"""The name of features that are given as they are, (N, D)."""


@dataclass(frozen=True)
class ProbeOptions:
    """How a probe runs, besides the recipe of its heads."""

    validation_share: float = 0.1
    """Share of the training images, class by class, that chooses the winner."""
    classes: int | None = None
    """The largest training label + 1 when None."""
    device: torch.device | str | None = None
    """Where heads train; the features' own device when None."""
    progress: bool = False


@dataclass(frozen=True)
class FreshBatches:
    """Training batches of augmented images, which differ from epoch to epoch."""

    batches: Batches
    per_epoch: int
    """Batches of an epoch."""
    shape: tuple[int, int]
    """(P, D) of an image's parts."""
    images: int
    """Images of an epoch."""


@dataclass(frozen=True)
class ProbeResult:
    """The winner's score on test, in percent."""

    setting: Setting
    top1: float
    top5: float
    held_out: list[HeadScore]
    """Scores of every setting on held-out training images; empty where there was nothing to choose."""
    trained_on: int
    """Images that the scored head was trained on."""


def linear_probe(
    train: Features,
    test: Features | Callable[[], Features],
    recipe: Recipe,
    columns: Columns | None = None,
    options: ProbeOptions | None = None,
) -> ProbeResult:
    """Choose a learning rate and an input on held-out images of `train`, train the winner on all of `train`, and score
    it on `test`.

    Args:
        train: labels with features (N, D), or with parts (N, P, D) and `columns`.
        test: the same of other images, or a function that gives them; it is called once, last.
        recipe: how heads train. The choice is between its learning rates and between the `columns`.
        columns: feature -> columns of each of its heads.

    Raises:
        UserError: an image without a label, a test label that is no class of training, no head that converged.
    """
    options = options or ProbeOptions()
    parts, labels, columns = _as_parts(train, columns)
    classes = checked_classes(labels, options.classes, "training")
    device = torch.device(options.device) if options.device is not None else parts.device
    parts = moved(parts, device)
    held_out: list[HeadScore] = []
    everything = torch.arange(len(parts))
    winner = Setting(recipe.lr[0], *next(iter(columns)))
    if len(columns) * len(recipe.lr) > 1:
        inner, held = split(labels, options.validation_share, recipe.seed)
        sweep = _sweep(columns, parts, classes, recipe, device)
        fit(sweep, *stored(parts, labels, inner, recipe.batch_size, recipe.seed), "sweep" if options.progress else None)
        held_out = score(sweep, parts, labels, held)
        winner = choose(held_out).setting
    final = _sweep({winner.feature: columns[winner.feature]}, parts, classes, replace(recipe, lr=(winner.lr,)), device)
    bar = "winner" if options.progress else None
    fit(final, *stored(parts, labels, everything, recipe.batch_size, recipe.seed), bar)
    return _result(final_score(final, test, winner), held_out, len(parts))


def linear_probe_on_batches(
    train: FreshBatches,
    held: Features | None,
    test: Callable[[], Features],
    recipe: Recipe,
    columns: Columns,
    options: ProbeOptions,
) -> ProbeResult:
    """The same on augmented images. `options` must name `classes` and `device`.

    All heads train in one pass over the epochs. The winner on `held` is scored as it is, because training it again on
    all images would need all passes through the backbone again. `held` is None where there is nothing to choose.
    """
    if options.classes is None or options.device is None:
        raise ValueError("batches do not say how many classes there are and where heads train: name both in `options`")
    sweep = Sweep(columns, train.shape[1], options.classes, recipe).to(options.device)
    fit(sweep, train.batches, train.per_epoch, "heads" if options.progress else None)
    held_out = [] if held is None else score(sweep, held.features, held.labels)
    winner = choose(held_out).setting if held_out else sweep.settings[0]
    return _result(final_score(sweep, test, winner), held_out, train.images)


def final_score(sweep: Sweep, test: Features | Callable[[], Features], setting: Setting) -> HeadScore:
    """Score the head of `setting` on the test split. UserError when the head has diverged.

    This is the only place that asks for the test images.
    """
    found = test() if callable(test) else test
    checked_classes(found.labels, sweep.classes, "test")
    parts = found.features if found.features.ndim == 3 else found.features.unsqueeze(1)
    result = score(sweep, parts, found.labels)[sweep.settings.index(setting)]
    if not math.isfinite(result.loss):
        raise UserError(f"the head with lr {setting.lr:g} has diverged; give a smaller lr.")
    return result


def _result(final: HeadScore, held_out: list[HeadScore], images: int) -> ProbeResult:
    return ProbeResult(final.setting, final.top1, final.top5, held_out, images)


def choose(scores: Sequence[HeadScore]) -> HeadScore:
    """The highest top-1; of equals the lowest cross-entropy. UserError when every head has diverged."""
    good = [found for found in scores if math.isfinite(found.loss)]
    if not good:
        raise UserError(f"all {len(scores)} heads have diverged; give smaller learning rates with lr.")
    return max(good, key=lambda found: (found.top1, -found.loss))


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training images (inner, held): `held` is a stratified share. UserError when either would be empty."""
    if len(labels) < 2:
        raise UserError(f"{len(labels)} training image cannot be split into one part that trains and one that chooses.")
    count = min(max(1, round(share * len(labels))), len(labels) - 1)
    held = stratified(labels, len(labels), count, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held] = False
    return rest.nonzero().squeeze(1), held


def checked_classes(labels: Tensor, classes: int | None, what: str) -> int:
    """The number of classes. UserError for images without a label and for labels beyond `classes`."""
    unlabeled = int((labels < 0).sum())
    if unlabeled:
        raise UserError(f"{unlabeled} of {len(labels)} {what} images have no label, and linear evaluation needs one.")
    most = int(labels.max()) + 1
    if classes is not None and most > classes:
        raise UserError(
            f"the {what} images have a label {most - 1}, but the training images have {classes} classes, 0 to"
            f" {classes - 1}."
        )
    return classes or most


def _as_parts(train: Features, columns: Columns | None) -> tuple[Tensor, Tensor, Columns]:
    if train.features.ndim == 3 and columns is not None:
        return train.features, train.labels, columns
    if train.features.ndim == 2 and columns is None:
        return train.features.unsqueeze(1), train.labels, {PLAIN: [[0]]}
    raise ValueError("give features (N, D), or parts (N, P, D) with the columns of each feature")


def _sweep(columns: Columns, parts: Tensor, classes: int, recipe: Recipe, device: torch.device) -> Sweep:
    return Sweep(columns, parts.shape[2], classes, recipe).to(device)
