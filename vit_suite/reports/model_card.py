"""README.md of an exported backbone: what it is, what it was trained on, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_suite.reports.results import read_results
from vit_suite.weights.checkpoint import LoadedBackbone
from vit_suite.weights.export.formats import Format

SHOWN_SCORES = 12


def model_card(
    loaded: LoadedBackbone, row: Format, folder: Path, errors: Mapping[str, float], images: str, run: Path | None
) -> str:
    """The text of the card. `images` says what the check was made on; `run` is the run directory it came from."""
    cfg = loaded.backbone.cfg
    parameters = sum(parameter.numel() for parameter in loaded.backbone.parameters())
    parts = [
        f"# {loaded.source}",
        f"A vision transformer of {parameters / 1e6:.1f} M parameters: width {cfg.dim}, {cfg.depth} blocks, {cfg.heads}"
        f" heads, patches of {cfg.patch_size} pixels, {cfg.channels} channels, {loaded.image_size[0]} x"
        f" {loaded.image_size[1]} pixels. Format: {row.name}. Written by vit-suite.",
        "## How to load it",
        f"```python\n{row.loading.format(folder=folder)}\n```",
        f"Images are scaled to 0..1 and normalized with mean {rounded(loaded.mean)} and std {rounded(loaded.std)}."
        + ("" if row.any_size else " At other sizes this format resizes positions by a rule of its own."),
        "## Check",
        f"Largest absolute difference to the original, fp32, on {images}:",
        table(["size and output", "largest error"], [[key, f"{value:.1e}"] for key, value in errors.items()]),
        "## Origin",
        *origin(loaded, run),
    ]
    if run is not None and (scores := score_rows(run, loaded.sha256)):
        parts += ["## Scores", table(["task", "score", "protocol"], scores)]
    return "\n\n".join(parts) + "\n"


def origin(loaded: LoadedBackbone, run: Path | None) -> list[str]:
    """Recipe, data and license, as far as the run directory or the file tells them."""
    lines = [f"Weights: sha256 {loaded.sha256}, by name. Family: {loaded.family}."]
    kept = {name: value for name, value in loaded.meta.items() if isinstance(value, str | int | float)}
    if kept:
        lines.append("The file says: " + ", ".join(f"{name} {value}" for name, value in kept.items()) + ".")
    lines.append(f"License of the weights it started from: {license_of(loaded, run)}.")
    about = read_about(run)
    if data := about.get("data"):
        lines.append(f"Data: {data.get('name')}, {data.get('images')} images, fingerprint {data.get('fingerprint')}.")
    if run is not None and (run / "config.yaml").is_file():
        lines.append(f"Recipe:\n\n```yaml\n{(run / 'config.yaml').read_text(encoding='utf-8').strip()}\n```")
    return lines


def license_of(loaded: LoadedBackbone, run: Path | None) -> str:
    """Of the start weights: as the file or the run's about.json says."""
    return str(read_about(run).get("start_license") or loaded.license)


def read_about(run: Path | None) -> dict[str, Any]:
    """about.json of a run; empty where there is none that reads."""
    try:
        content = json.loads((run / "about.json").read_text(encoding="utf-8")) if run else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def score_rows(run: Path, sha256: str) -> list[list[str]]:
    """Rows of results.json that were scored on these weights."""
    rows = []
    for entry in read_results(run / "results.json"):
        if entry.get("sha256") != sha256:
            continue
        protocol = entry.get("protocol", {})
        said = {name: protocol[name] for name in ("data", "view", "k", "temperature", "split") if name in protocol}
        for name, value in flat(entry.get("metrics", {})).items():
            if "top1" in name and "by_epoch" not in name:
                rows.append([str(entry.get("task")), f"{name} {value:.2f}", json.dumps(said)[:200]])
    return rows[-SHOWN_SCORES:]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics by dotted name; numbers alone."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
