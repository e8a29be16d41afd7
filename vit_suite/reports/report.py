"""The report of one run, or the comparison of several, as one HTML file that works from disk.

A section shows what the training or a score has measured and left in the run directory. Only the map of test embeddings
is computed here, from the exported backbone.
"""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vit_suite import recipes
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError, counted
from vit_suite.files import write_atomically
from vit_suite.parsing import load_config
from vit_suite.reports import page
from vit_suite.reports.run_files import RunFiles, differences, flat, options_of
from vit_suite.weights.checkpoint import load_backbone

log = logging.getLogger("vit_suite")

TRAININGS = ("pretrain", "finetune")
"""Tasks of results.json that a training writes."""
OWN = ("run.", "data.root", "logger.")
"""Options that differ from run to run without meaning anything: left out of differences."""


def write_report(folder: str | Path, output: str | Path | None = None, images: int = 500, further: bool = True) -> Path:
    """Write the report of the run in `folder` to `output` (`folder/report.html`); returns its path.

    images: number of test images on the map of embeddings; 0 leaves the map out. further: draw UMAP or t-SNE beside
    PCA, which takes seconds. UserError when `folder` is no run.
    """
    run = RunFiles(folder)
    path = Path(output) if output else run.folder / "report.html"
    charts = curves([run])
    points, near, remark = embedding_sections(run, images, further)
    script, divs, library = embedded([*charts, *points])
    maps = "".join(divs[len(charts) :])
    sections = [
        ("In short", page.tiles(in_short(run)) + baseline_note(run)),
        ("Scores, each with its protocol", scores(run)),
        ("Curves", f'<div class="grid">{"".join(divs[: len(charts)])}</div>'),
        *((title, page.picture(file)) for title, file in run.pictures()),
        ("Map of test images", (f'<div class="grid">{maps}</div>' if maps else "") + remark),
        ("Nearest test images", near),
        ("Options that differ from the recipe", recipe_differences(run)),
        ("Where it comes from", provenance(run)),
    ]
    subtitle = f"{run.options.get('method.name', '?')} on {run.options.get('data.name', '?')}; {state(run)}"
    return _write(path, page.page(run.name, subtitle, sections, library, script))


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that sets several runs side by side: scores, curves over each other, options that differ."""
    runs = [RunFiles(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} [{place + 1}]" for place, name in enumerate(names)]
    script, divs, library = embedded(curves(runs, names))
    first = runs[0].options
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.options) if not key.startswith(OWN)]
    differ = [key for key in keys if any(run.options.get(key) != first.get(key) for run in runs)]
    named = list(zip(names, runs, strict=True))
    values = [score_values(run) for run in runs]
    scored = [
        [score, *(found.get(score) for found in values)] for score in dict.fromkeys(key for v in values for key in v)
    ]
    options = [[key, *(run.options.get(key) for run in runs)] for key in differ]
    sections = [
        ("Runs", page.table(["run", *COMPARED], [[name, *compared(run)] for name, run in named])),
        ("Scores", page.table(["score", *names], scored)),
        ("Curves", f'<div class="grid">{"".join(divs)}</div>'),
        ("Options that differ", page.table(["option", *names], options) or "<p>None.</p>"),
    ]
    return _write(Path(output), page.page("Comparison", ", ".join(names), sections, library, script))


def _write(path: Path, document: str) -> Path:
    write_atomically(path, lambda temporary: temporary.write_text(document, encoding="utf-8", errors="replace"))
    return path


# Parts of a page
# ----------------------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[RunFiles], names: Sequence[str] | None = None) -> list[Any]:
    """A chart a metric, with a line for each run that has it."""
    from vit_suite.reports.curves import curve, ordered

    names = list(names or [run.name for run in runs])
    named = list(zip(names, runs, strict=True))
    together = ordered({metric: series for run in runs for metric, series in run.metrics.items()})
    return [
        curve(metric, {name: run.metrics[metric] for name, run in named if metric in run.metrics}, names)
        for metric in together
    ]


def embedded(charts: Sequence[Any]) -> tuple[str, list[str], str]:
    """(script that draws, a div a chart, the library itself); all empty without charts."""
    if not charts:
        return "", [], ""
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, divs = components(tuple(charts))
    return script, list(divs), Resources(mode="inline", components=["bokeh"]).render()


def training_entry(run: RunFiles) -> Mapping[str, Any]:
    """The newest entry of results.json that a training wrote; empty while there is none."""
    return next((entry for entry in reversed(run.results) if entry.get("task") in TRAININGS), {})


def in_short(run: RunFiles) -> dict[str, str]:
    """The figures that one looks for first."""
    found: dict[str, str] = {}
    for metric, name in (("val/top1", "top-1 of the head, %"), ("knn/top1", "kNN top-1, %")):
        if (last := run.last(metric)) is not None:
            found[name] = f"{last:.1f}"
            if (best := run.best(metric)) is not None and best > last:
                found[f"{name}, best epoch"] = f"{best:.1f}"
    if (loss := run.last("train/loss")) is not None:
        found["loss"] = f"{loss:.4g}"
    metrics = training_entry(run).get("metrics", {})
    for key, name in (("steps", "optimizer steps"), ("epochs", "epochs"), ("images", "images seen")):
        if key in metrics:
            found[name] = f"{metrics[key]:,}"
    if rate := run.status.get("images_per_second"):
        found["images/s at the end"] = f"{rate:,.0f}"
    if seconds := metrics.get("seconds"):
        found["time of the last start"] = f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"
    return found


def baseline_note(run: RunFiles) -> str:
    """How to read the kNN beside what an untrained network and raw pixels reach, where that is not in the scores."""
    if any("raw pixels" in str(entry.get("metrics", {})) for entry in run.results) or run.last("knn/top1") is None:
        return ""
    words = ["vit-suite", "knn", "--checkpoint", str(run.folder)]
    for option in ("data.name", "data.root", "data.holdout"):
        words += [f"--{option}", str(value)] if (value := run.options.get(option)) else []
    command = shlex.join([*words, "--baselines"])
    return f"<p>To see what an untrained network and raw pixels reach: <code>{page.escape(command)}</code></p>"


def state(run: RunFiles) -> str:
    """Whether the run is done, going, stopped or failed, and at which step."""
    status = run.status
    if not status:
        return "no status"
    reason = f": {status['reason']}" if status.get("reason") else ""
    return f"{status.get('state', '?')} at step {status.get('step', '?')} of {status.get('max_steps', '?')}{reason}"


def score_values(run: RunFiles) -> dict[str, float]:
    """Task and score -> value, for every single number in results.json. A task that was scored again is `knn [2]`."""
    found: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for entry in run.results:
        task = str(entry.get("task", "?"))
        seen[task] += 1
        task += f" [{seen[task]}]" if seen[task] > 1 else ""
        for name, value in flat(entry.get("metrics", {})).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{task}: {name}"] = value
    return found


def scores(run: RunFiles) -> str:
    """Every entry of results.json: its numbers, and folded its protocol and command."""
    parts = []
    for entry in run.results:
        numbers = [
            [name, "{:.1f} to {:.1f}".format(*value) if name.endswith("_interval") else value]
            for name, value in flat(entry.get("metrics", {})).items()
            if name.endswith("_interval") or (isinstance(value, (int, float, str)) and not isinstance(value, bool))
        ]
        protocol = yaml.safe_dump(entry.get("protocol", {}), sort_keys=False, allow_unicode=True)
        details = f"{protocol}\nweights sha256 {entry.get('sha256')}\n{entry.get('time')}\n{entry.get('command')}"
        parts.append(
            f"<h3>{page.escape(str(entry.get('task', '?')))}</h3>"
            + page.table(["score", "value"], numbers)
            + page.folded("protocol, weights, command", page.text(details))
        )
    return "".join(parts)


def embedding_sections(run: RunFiles, images: int, further: bool) -> tuple[list[Any], str, str]:
    """(maps, rows of neighbours, a remark) of test images; empty with the reason where there can be none."""
    if not images or not (run.folder / "backbone.safetensors").is_file():
        return [], "", "" if not images else "<p>No backbone was exported yet.</p>"
    from vit_suite.reports.curves import scatter
    from vit_suite.reports.embedding import embed, neighbours

    try:
        data = ImageDataModule(run.config.data, seed=run.config.run.seed)
        try:
            source = data.test(images)
        except UserError:  # a set without a split of its own to score
            source = data.bank(images)
        found = embed(load_backbone(run.folder), source, further)
    except UserError as error:
        return [], "", f"<p>No map: {page.escape(str(error))}</p>"
    titles = {"PCA": f"PCA, {100 * found.explained:.0f}% of the variance"}
    maps = [
        scatter(places, found.names, found.labels, found.thumbnails, titles.get(kind, kind))
        for kind, places in found.places.items()
    ]
    captions = [label or name for label, name in zip(found.labels, found.names, strict=True)]
    rows = [[(found.thumbnails[i], captions[i]) for i in (query, *near)] for query, near in neighbours(found.features)]
    colored = ", colored by class" if any(found.labels) else ""
    count = counted(len(found.names), "image")
    remark = f"<p>{count} of {page.escape(source.title)}{colored}; the mouse shows the image.</p>"
    return maps, page.strips(rows) + "<p>The framed image, then those nearest to it by cosine.</p>", remark


def recipe_differences(run: RunFiles) -> str:
    """What the run changed of the recipe that its command names, else of its method's defaults."""
    name, options = recipe_of(run)
    try:
        base = options_of(load_config(name, options))
    except UserError as error:
        return f"<p>The recipe cannot be read: {page.escape(str(error))}</p>"
    rows = [list(row) for row in differences(run.options, base) if not row[0].startswith(OWN)]
    said = f"recipe {name}" if name else f"defaults of {run.options.get('method.name', 'the method')}"
    everything = yaml.safe_dump(run.options, sort_keys=False, allow_unicode=True)
    return (
        (page.table(["option", "this run", said], rows) or f"<p>None: the run is the {page.escape(said)}.</p>")
        + page.folded("all options", page.text(everything))
    )  # fmt: skip


def recipe_of(run: RunFiles) -> tuple[str | None, dict[str, Any]]:
    """(recipe or config file behind `--config` in the run's command, options that choose its defaults)."""
    words = shlex.split(command(run)) if command(run) else []
    if "--config" in words[:-1]:
        word = words[words.index("--config") + 1]
        if word.removeprefix("configs/").removesuffix(".yaml") in recipes.names() or Path(word).is_file():
            return word, {}
    return None, {"method.name": run.options.get("method.name", "dino")}


def command(run: RunFiles) -> str:
    """The command that started the run."""
    return str(run.about.get("command") or training_entry(run).get("command") or "")


def provenance(run: RunFiles) -> str:
    """Data, hardware, versions, git state, and the one command that repeats the run."""
    facts = [[name.replace("_", " "), value] for name, value in flat(run.about).items() if name != "command"]
    return page.table(["", ""], facts) + (page.text(command(run)) if command(run) else "")


COMPARED = ("method", "data", "state", "kNN top-1, last", "kNN top-1, best", "head top-1", "loss", "images", "images/s")
"""Columns of the comparison."""


def compared(run: RunFiles) -> list[Any]:
    """A row of the comparison."""
    metrics: Mapping[str, Any] = training_entry(run).get("metrics", {})
    return [
        run.options.get("method.name"),
        run.options.get("data.name"),
        state(run),
        run.last("knn/top1"),
        run.best("knn/top1"),
        run.last("val/top1"),
        run.last("train/loss"),
        metrics.get("images"),
        run.status.get("images_per_second"),
    ]
