"""Few-shot scores: n labeled images of each class, drawn several times; mean and standard deviation over the draws."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit_suite.data.source import stable_seed
from vit_suite.errors import UserError
from vit_suite.evaluation.features import Features, moved
from vit_suite.evaluation.linear import Columns, ProbeOptions, checked_classes, choose, final_score, split
from vit_suite.evaluation.linear_heads import HeadScore, Recipe, Setting, Sweep, fit, score, stored


@dataclass(frozen=True)
class Spread:
    """A score in percent over several draws."""

    values: tuple[float, ...]
    """One for each draw."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1 in the denominator); 0 for a single draw."""
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

    The result depends on the arguments alone. The images of fewer shots are a part of the images of more shots, so a
    curve over shots is smooth.

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
class Shots:
    """Which few images are drawn."""

    counts: Sequence[int]
    """Images of each class; one score for each count."""
    draws: int
    """Random draws for each count."""
    names: Sequence[str] = ()
    """Names of the classes."""


@dataclass(frozen=True)
class ShotResult:
    """The score for one number of shots."""

    setting: Setting
    top1: Spread
    top5: Spread
    held_out: list[HeadScore]
    """Mean over draws for every setting; empty where there was nothing to choose."""


def few_shot_probe(
    train: Features,
    test: Callable[[], Features],
    recipe: Recipe,
    columns: Columns,
    shots: Shots,
    options: ProbeOptions | None = None,
) -> dict[int, ShotResult]:
    """Train heads on few labeled images of `train` (parts (N, P, D)) and score them on `test`: count -> result.

    All draws of a count use one setting: the best on average on held-out training images, which are never drawn. The
    labels of these images choose the setting and do nothing else; with a single setting they are not used. `test` is
    called once, last. UserError as in `draw_shots` and `linear_probe`.
    """
    options = options or ProbeOptions()
    device = torch.device(options.device or "cpu")
    parts, labels = moved(train.features, device), train.labels
    classes = max(checked_classes(labels, options.classes, "training"), len(shots.names))
    several = len(columns) * len(recipe.lr) > 1
    pool, held = split(labels, options.validation_share, recipe.seed) if several else (torch.arange(len(labels)), None)
    where = "training images" + " besides those held out" * several
    chosen = {
        n: [pool[draw_shots(labels[pool], n, d, recipe.seed, shots.names, where)] for d in range(shots.draws)]
        for n in shots.counts
    }

    def trained(rows: Tensor, columns: Columns, lrs: tuple[float, ...]) -> Sweep:
        sweep = Sweep(columns, parts.shape[2], classes, replace(recipe, lr=lrs)).to(device)
        desc = f"{len(rows)} images" if options.progress else None
        return fit(sweep, *stored(parts, labels, rows, recipe.batch_size, recipe.seed), desc)

    winners: dict[int, Setting] = {}
    tables: dict[int, list[HeadScore]] = {n: [] for n in shots.counts}
    for n in shots.counts:
        winners[n] = Setting(recipe.lr[0], *next(iter(columns)))
        if several:
            by_draw = [score(trained(rows, columns, recipe.lr), parts, labels, held) for rows in chosen[n]]
            tables[n] = [_mean(column) for column in zip(*by_draw, strict=True)]
            winners[n] = choose(tables[n]).setting
    found = test()
    results = {}
    for n, winner in winners.items():
        # The winner is trained again: that takes milliseconds, and the heads of all draws may not fit in memory.
        own = {winner.feature: columns[winner.feature]}
        scores = [final_score(trained(rows, own, (winner.lr,)), found, winner) for rows in chosen[n]]
        top1, top5 = Spread(tuple(one.top1 for one in scores)), Spread(tuple(one.top5 for one in scores))
        results[n] = ShotResult(winner, top1, top5, tables[n])
    return results


def _mean(scores: Sequence[HeadScore]) -> HeadScore:
    return HeadScore(
        scores[0].setting, *(statistics.fmean(getattr(one, key) for one in scores) for key in ("top1", "top5", "loss"))
    )
