"""Interactive curves and maps of a report, drawn by bokeh and carried inside the page.

bokeh and not plotly, because every report carries its library: bokeh.min.js is 1.3 MB, plotly.min.js 4.8 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d, HoverTool
from bokeh.models.annotations import Legend
from bokeh.palettes import Category10, Category20, Turbo256
from bokeh.plotting import figure

from vit_suite.reports.run_files import Series

MOST_POINTS = 1500
"""Points of a drawn curve; a longer one is thinned, its last point kept."""
FIRST = ("knn/top1", "val/top1", "train/loss")
"""Metrics that are drawn before all others."""
TOOLS = "pan,box_zoom,wheel_zoom,reset,save"


def ordered(metrics: Mapping[str, Series]) -> list[str]:
    """Names of the metrics: scores and the loss first, then by name."""
    return sorted(metrics, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def thinned(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of at most `MOST_POINTS` points, evenly chosen."""
    points = np.asarray(series, dtype=np.float64)
    if len(points) > MOST_POINTS:
        points = points[np.unique(np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int))]
    return points[:, 0], points[:, 1]


def curve(metric: str, runs: Mapping[str, Series], names: Sequence[str]) -> figure:
    """One metric against the optimizer step, a line for each run that has it, with the values under the mouse.

    names: all runs of the page, so that a run has one color in all charts; with several, each chart names its lines.
    """
    width, height = 480, 260
    plot = figure(title=metric, width=width, height=height, tools=TOOLS, x_axis_label="optimizer step")
    plot.toolbar.autohide = True
    level = max((abs(value) for series in runs.values() for _, value in series if math.isfinite(value)), default=0.0)
    plot.y_range = DataRange1d(default_span=0.2 * level or 1.0)  # of a constant curve, which bokeh gives a span of 2
    colors = Category10[10]
    lines: Any = []
    for run, series in runs.items():
        steps, values = thinned(series)
        source = ColumnDataSource({"step": steps, "value": values, "run": [run] * len(steps)})
        color = colors[names.index(run) % len(colors)]
        line = plot.line("step", "value", source=source, line_width=2, color=color)
        dots = plot.scatter("step", "value", source=source, size=4, color=color, alpha=1.0 if len(steps) < 80 else 0.0)
        lines.append((run, [line, dots]))
    tips = [("step", "@step{0,0}"), (metric, "@value{0.0000}")]
    plot.add_tools(HoverTool(tooltips=([("run", "@run")] if len(names) > 1 else []) + tips, mode="vline"))
    if len(names) > 1:
        looks: dict[str, Any] = {"label_text_font_size": "8pt", "spacing": 0, "padding": 4}
        legend = Legend(items=lines, click_policy="hide", **looks)
        plot.add_layout(legend, "below")
        plot.height = height + 24 * len(runs)
    return plot


def scatter(
    places: np.ndarray, names: Sequence[str], labels: Sequence[str], thumbnails: Sequence[str], title: str
) -> figure:
    """A 2-D map (N, 2) of images: a dot each, colored by label, its picture under the mouse.

    `thumbnails` are data URIs. Names and labels are shown as text, whatever they hold.
    """
    plot = figure(title=title, width=500, height=460, tools=TOOLS)
    plot.toolbar.autohide = True
    kinds = sorted(set(labels))
    palette: Sequence[str]
    if len(kinds) <= 10:
        palette = Category10[10]
    elif len(kinds) <= 20:
        palette = Category20[20]
    else:
        palette = [Turbo256[index * 255 // (len(kinds) - 1)] for index in range(len(kinds))]
    named = 1 < len(kinds) <= 20
    color = {kind: palette[index] for index, kind in enumerate(kinds)}
    data = {
        "x": places[:, 0],
        "y": places[:, 1],
        "name": list(names),
        "label": list(labels),
        "picture": list(thumbnails),
        "color": [color[label] for label in labels],
    }
    style: dict[str, Any] = {"source": ColumnDataSource(data), "size": 8, "color": "color", "alpha": 0.8}
    dots = plot.scatter("x", "y", **(style | ({"legend_group": "label"} if named else {})))
    if named:
        plot.add_layout(plot.legend[0], "right")
        for name, value in {"label_text_font_size": "8pt", "padding": 2, "spacing": 0}.items():
            setattr(plot.legend, name, value)
    tip = '<div><img src="@picture" style="max-width:96px;image-rendering:pixelated"><br>@label<br>@name</div>'
    plot.add_tools(HoverTool(renderers=[dots], tooltips=tip))
    plot.grid.visible = False
    return plot
