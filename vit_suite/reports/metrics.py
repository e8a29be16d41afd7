"""metrics.csv in the run directory, continued by a resumed run (Lightning's CSVLogger starts a new file)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment


class _Continued(ExperimentWriter):
    def __init__(self, log_dir: str):
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """The file of the interrupted run stays."""


class MetricsLogger(CSVLogger):
    """Writes `FOLDER/metrics.csv`, one row a logged step."""

    def __init__(self, folder: str | Path):
        super().__init__(save_dir=str(folder), name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Continued(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """The run directory's config.yaml holds them."""
