"""metrics.csv in the run directory. A resumed run continues it, where Lightning's CSVLogger would start a new file.

Rows after the checkpoint of the resumed run are dropped, because it logs those steps again.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from vit_suite.files import write_atomically


class _Continued(ExperimentWriter):
    def __init__(self, log_dir: str, steps_done: int):
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < steps_done]
        if not kept:
            path.unlink()
            return
        self.metrics_keys = list(kept[0])
        if len(kept) < len(rows):
            write_atomically(path, lambda temporary: self._write(temporary, kept))

    def _write(self, path: Path, rows: list[dict[str, str]]) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

    def _check_log_dir_exists(self) -> None:
        """Keep the file of the interrupted run; Lightning's method warns that the folder exists."""


class MetricsLogger(CSVLogger):
    """Writes `FOLDER/metrics.csv`, one row per logged step. Rows of the first `steps_done` steps are kept."""

    def __init__(self, folder: str | Path, steps_done: int = 0):
        super().__init__(save_dir=str(folder), name="", version="")
        self.steps_done = steps_done

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir, self.steps_done)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """The run directory's config.yaml holds them."""
