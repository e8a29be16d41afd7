"""Few-shot scores: n labeled images of each class, several random draws of them, mean and standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit_suite.data.source import stable_seed
from vit_suite.errors import UserError
from vit_suite.evaluation.features import Features
from vit_suite.evaluation.linear import Columns, checked_classes, choose, final_score, moved, split
from vit_suite.evaluation.linear_heads import HeadScore, Recipe, Setting, Sweep, fit, score, stored


@dataclass(frozen=True)
class Spread:
    """Percent, one value a draw."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Of the sample (n - 1); 0 for a single draw."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}"

    def as_dict(self) -> dict:
        """For results.json."""
        return {"mean": self.mean, "std": self.std, "draws": list(self.values)}


def draw_shots(
    labels: Tensor, shots: int, draw: int, seed: int = 0, classes: Sequence[str] = (), where: str = "training images"
) -> Tensor:
    """Sorted indices of `shots` images of each class; labels (N,) from 0.

    Depends on the arguments alone. Draws with fewer shots are part of those with more, so that a curve over shots is
    smooth.

    Raises:
        UserError: a class of `classes` (or of those in `labels`) has fewer images; the message names the one with the
        fewest.
    """
    count = max(len(classes), int(labels.max()) + 1 if len(labels) else 0)
    sizes = torch.bincount(labels, minlength=count)
    if int(sizes.min()) < shots:
        least = int(sizes.argmin())
        name = f"'{classes[least]}'" if least < len(classes) else str(least)
        raise UserError(f"shots {shots} is more than class {name} has labeled {where}: {int(sizes[least])}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(stable_seed("shots", seed, draw)))
    grouped = order[torch.argsort(labels[order], stable=True)]  # class by class, in random order within one
    starts = sizes.cumsum(0) - sizes
    return torch.cat([grouped[start : start + shots] for start in starts.tolist()]).sort().values


@dataclass(frozen=True)
class ShotResult:
    """Of one number of shots."""

    setting: Setting
    top1: Spread
    top5: Spread
    held_out: list[HeadScore]
    """Of every setting, mean over draws; empty where there was nothing to choose."""


def few_shot_probe(
    train: Features,
    test: Callable[[], Features],
    recipe: Recipe,
    *,
    columns: Columns,
    shots: Sequence[int],
    draws: int,
    names: Sequence[str] = (),
    holdout: float = 0.1,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[int, ShotResult]:
    """Heads on few labeled images of `train` (parts (N, P, D)), scored on `test`, for each number of shots.

    One setting serves all draws of a number of shots: the best on average on a held-out share of the training images,
    which the draws
    do not touch. So those labels choose a setting, and nothing else; with one setting they are not used. `test` is
    called once, last.
    names: of the classes. UserError as in `draw_shots` and `linear_probe`.
    """
    parts, labels = moved(train.features, torch.device(device)), train.labels
    classes = max(checked_classes(labels, None, "training"), len(names))
    several = len(columns) * len(recipe.lr) > 1
    pool, held = split(labels, holdout, recipe.seed) if several else (torch.arange(len(labels)), None)
    where = "training images" + " besides those held out" * several
    chosen = {n: [pool[draw_shots(labels[pool], n, d, recipe.seed, names, where)] for d in range(draws)] for n in shots}

    def trained(rows: Tensor, columns: Columns, lrs: tuple[float, ...]) -> Sweep:
        sweep = Sweep(columns, parts.shape[2], classes, replace(recipe, lr=lrs)).to(device)
        desc = f"{len(rows)} images" if progress else None
        return fit(sweep, *stored(parts, labels, rows, recipe.batch_size, recipe.seed), desc)

    winners: dict[int, Setting] = {}
    tables: dict[int, list[HeadScore]] = {n: [] for n in shots}
    for n in shots:
        winners[n] = Setting(recipe.lr[0], *next(iter(columns)))
        if several:
            scores = [score(trained(rows, columns, recipe.lr), parts, labels, held) for rows in chosen[n]]
            tables[n] = [_mean(column) for column in zip(*scores, strict=True)]
            winners[n] = choose(tables[n]).setting
    found = test()
    results = {}
    for n in shots:
        # Trained again rather than kept: a head takes milliseconds, all heads of all draws may not fit in memory.
        columns_of_winner = {winners[n].feature: columns[winners[n].feature]}
        scores = [
            final_score(trained(rows, columns_of_winner, (winners[n].lr,)), found, winners[n]) for rows in chosen[n]
        ]
        spreads = [Spread(tuple(getattr(one, key) for one in scores)) for key in ("top1", "top5")]
        results[n] = ShotResult(winners[n], *spreads, tables[n])
    return results


def _mean(scores: Sequence[HeadScore]) -> HeadScore:
    return HeadScore(
        scores[0].setting, *(statistics.fmean(getattr(one, key) for one in scores) for key in ("top1", "top5", "loss"))
    )
