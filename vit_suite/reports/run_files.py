"""What a run directory holds, read for its report: options, metrics, scores, pictures, provenance.

Nothing here needs torch. A run that is still going, or that was stopped, can be read too: what is not there is empty.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vit_suite.config import PretrainConfig
from vit_suite.errors import UserError
from vit_suite.parsing import dump_config, load_config
from vit_suite.reports.results import read_results

Series = list[tuple[float, float]]
"""(step, value) pairs of one metric, in the order of the steps."""


class RunFiles:
    """The files of one run directory.

    Args:
        folder: the run directory; UserError when it holds no `config.yaml`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"'{folder}': no such run directory.")
        if not (self.folder / "config.yaml").is_file():
            raise UserError(f"'{folder}' is no run directory: it holds no config.yaml.")
        self.config: PretrainConfig = load_config(self.folder / "config.yaml")
        self.options = options_of(self.config)
        self.results = read_results(self.folder / "results.json")
        self.status = self._json("status.json")
        self.about = self._json("about.json")
        self.metrics = self._metrics()

    @property
    def name(self) -> str:
        """The run's name, and its folder where that is called otherwise."""
        name, folder = str(self.options.get("run.name") or ""), self.folder.resolve().name
        return name if name in (folder, "") and name else f"{name} ({folder})" if name else folder

    def pictures(self) -> list[tuple[str, Path]]:
        """(title, file) of the pictures that the training drew, the ones that are there."""
        sheets = sorted((self.folder / "reconstructions").glob("*.png"))
        found = [("Where it looks, epoch by epoch", self.folder / "snapshots" / "epochs.png")]
        found += [(f"Reconstructions, {sheets[-1].stem.replace('_', ' ')}", sheets[-1])] if sheets else []
        found += [("Confusion matrix of the head on the test split", self.folder / "confusion.png")]
        return [(title, path) for title, path in found if path.is_file()]

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        series = self.metrics.get(metric)
        return series[-1][1] if series else None

    def best(self, metric: str) -> float | None:
        """The largest value of a metric."""
        series = self.metrics.get(metric)
        return max(value for _, value in series) if series else None

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or of a run that was killed while it wrote
            return {}
        return value if isinstance(value, dict) else {}

    def _metrics(self) -> dict[str, Series]:
        """Column of metrics.csv -> its values by step; columns without any number are left out."""
        path = self.folder / "metrics.csv"
        series: dict[str, Series] = {}
        if not path.is_file():
            return series
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = number(row.get("step"))
                if step is None:
                    continue
                for name, text in row.items():
                    value = number(text)
                    if name not in ("step", "epoch") and value is not None:
                        series.setdefault(name, []).append((step, value))
        return series


def number(text: Any) -> float | None:
    """A finite number from a cell, else None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def flat(options: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Nested options -> dotted keys: `{"optim": {"lr": 1}}` -> `{"optim.lr": 1}`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        key = f"{group}.{name}" if group else str(name)
        found |= flat(value, key) if isinstance(value, Mapping) else {key: value}
    return found


def options_of(config: PretrainConfig) -> dict[str, Any]:
    """A config object as dotted keys, its values as YAML reads them back."""
    return flat(yaml.safe_load(dump_config(config)))


def differences(options: Mapping[str, Any], others: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value here, value there) of every option that differs; None where a side does not have it."""
    keys = [*options, *(key for key in others if key not in options)]
    return [(key, options.get(key), others.get(key)) for key in keys if options.get(key) != others.get(key)]
