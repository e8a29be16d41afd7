"""Tables of scores as the commands print them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from vit_suite.attention.localized import Localized
from vit_suite.errors import counted
from vit_suite.evaluation.fewshot import Spread
from vit_suite.evaluation.interval import wilson
from vit_suite.evaluation.knn import KNNResult
from vit_suite.evaluation.knn_scorer import Shots, spreads
from vit_suite.evaluation.linear_heads import HeadScore, Setting
from vit_suite.evaluation.localization import Score
from vit_suite.evaluation.prober import Prober, Result
from vit_suite.reports.results import table

log = logging.getLogger("vit_suite")


def left_out(failures: list[str]) -> str:
    """One line about the files that a score was measured without; empty when there are none."""
    if not failures:
        return ""
    do, are = ("does", "is") if len(failures) == 1 else ("do", "are")
    files = counted(len(failures), "file")
    return f"{files} {do} not decode and {are} left out, listed in the entry; the first: {failures[0]}"


# kNN
# ----------------------------------------------------------------------------------------------------------------------


def accuracy_table(results: dict[str, KNNResult]) -> str:
    """A row for each result and one for its 95% intervals, a column for each k."""
    first = next(iter(results.values()))
    used = first.used_k
    header = ["kNN top-1 %", *(f"k={k}" if used[k] == k else f"k={k} (bank has {used[k]})" for k in first.top1)]
    rows: list[list[Any]] = []
    for name, result in results.items():
        rows.append([name, *result.top1.values()])
        rows.append(["  95% interval", *(interval(top1, result.queries) for top1 in result.top1.values())])
    return table(header, rows)


def interval(percent: float, images: int) -> str:
    """`59.8-64.1`: the 95% interval of a score in percent on so many images."""
    low, high = wilson(percent, images)
    return f"{low:.1f}-{high:.1f}"


def shots_table(few: dict[str, Shots]) -> str:
    """A row for each result and number of shots, a column for each k; a bank smaller than k votes as a whole."""
    rows = [
        [f"{name}, {n} a class", *(str(top1) for top1, _ in spreads(results).values())]
        for name, shots in few.items()
        for n, results in shots.items()
    ]
    results = next(iter(next(iter(few.values())).values()))[0]
    return table(["kNN top-1 %", *(f"k={k}" for k in results.top1)], rows)


# Linear heads
# ----------------------------------------------------------------------------------------------------------------------


def linear_report(results: dict[str, Result], prober: Prober) -> str:
    """Title, a row for each result, and the held-out scores that the checkpoint's winner was chosen from."""
    rows, tables = [], []
    cfg, train, test = prober.cfg, prober.train, prober.data.test()
    count, scored = prober.data.usable(train), prober.data.usable(test)
    for name, result in results.items():
        for label, one in (
            [(f", {n} a class", one) for n, one in result.items()] if isinstance(result, dict) else [("", result)]
        ):
            rows.append(
                [
                    f"{name}{label}",
                    *(str(s) if isinstance(s, Spread) else s for s in (one.top1, one.top5)),
                    interval(one.top1.mean if isinstance(one.top1, Spread) else one.top1, scored),
                    *_cells(one.setting),
                ]
            )
            if name == "checkpoint" and one.held_out:
                tables.append(sweep_table(one.held_out, f"held out{label}, top-1 %"))
                warn_of_edge(one.held_out, one.setting)
    images = f"{cfg.draws} draws from the {count} images" if cfg.shots else f"{count} images"
    title = f"{train.name}: {cfg.head} heads on {images} of {train.split}, scored on {scored} of {test.split}"
    columns = [f"protocol {cfg.protocol}", "top-1 %", "top-5 %", "top-1 95%", "lr", "blocks", "pool"]
    return "\n\n".join([f"{title}; {prober.chance()}\n{table(columns, rows)}", *tables])


def _cells(setting: Setting) -> list[str]:
    return [f"{setting.lr:g}", str(setting.blocks), setting.pool]


def sweep_table(scores: Sequence[HeadScore], title: str) -> str:
    """A row for each input, a column for each learning rate."""
    rates = list(dict.fromkeys(one.setting.lr for one in scores))
    rows = []
    for feature in dict.fromkeys(one.setting.feature for one in scores):
        cells = [
            one.top1 if math.isfinite(one.loss) else "diverged" for one in scores if one.setting.feature == feature
        ]
        rows.append([f"{feature.pool}, {feature.blocks} block{'s' * (feature.blocks != 1)}", *cells])
    return table([title, *(f"lr {rate:g}" for rate in rates)], rows)


def warn_of_edge(scores: Sequence[HeadScore], winner: Setting) -> None:
    """Say when the best learning rate may lie beyond those that were tried."""
    rates = {one.setting.lr for one in scores}
    if len(rates) > 1 and winner.lr in (min(rates), max(rates)):
        which, more = ("smallest", "smaller") if winner.lr == min(rates) else ("largest", "larger")
        log.warning(
            "the winner's lr %g is the %s of the sweep: a %s one may score higher (--lr)", winner.lr, which, more
        )


# Localization
# ----------------------------------------------------------------------------------------------------------------------


def localization_report(found: Localized) -> str:
    """What was scored, and the tables: a row for each backbone and way of choosing, then the baselines."""
    masks = found.localizer.truths.kind == "masks"
    count, scored = len(found.choosing), int((~found.choosing).sum())
    lines = [
        f"{found.localizer.truths.title}: {counted(scored, 'image')} scored, {count - scored} others chose thresholds"
        " and heads"
    ]
    if found.looked.empty:
        lines.append(f"{found.looked.empty} images without an object are left out")
    measured = ["Jaccard %", "pointing %"] if masks else ["box IoU %", "CorLoc %", "pointing %"]
    rows = []
    for name, one in _localized_rows(found):
        chosen = ["" if value is None else str(value) for value in (one.threshold, one.head, one.pointing_head)]
        values = [one.overlap, one.pointing] if masks else [one.overlap, one.found, one.pointing]
        rows.append([name, *values, *chosen])
    lines.append(table(["", *measured, "threshold", "head", "pointing head"], rows))
    sweeps = [[name, *one.sweep] for name, one in _localized_rows(found) if one.sweep]
    if sweeps and len(found.localizer.thresholds) > 1:
        lines.append("\n" + table([f"{measured[0]} at threshold", *map(str, found.localizer.thresholds)], sweeps))
    return "\n".join(lines)


def _localized_rows(found: Localized) -> list[tuple[str, Score]]:
    first = next(iter(found.scores))
    rows = [
        (row if name == first else f"{name}: {row}", one)
        for name, scores in found.scores.items()
        for row, one in scores.items()
    ]
    return [*rows, ("center box", found.baselines.center_box), ("whole image", found.baselines.whole_image)]
