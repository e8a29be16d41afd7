"""`vit-suite report`: one page on a run, or on several side by side."""

from __future__ import annotations

from pathlib import Path

from vit_suite.config import ReportConfig
from vit_suite.errors import UserError
from vit_suite.reports.report import write_comparison, write_report


def run(cfg: ReportConfig) -> None:
    """Write the page and say where."""
    if not cfg.runs:
        raise UserError("expected a run directory: vit-suite report RUN, or several and --output compare.html")
    if cfg.output and Path(cfg.output).is_dir():
        raise UserError(f"output: '{cfg.output}' is a folder; name a file, such as {cfg.output}/report.html")
    if len(cfg.runs) == 1:
        path = write_report(cfg.runs[0], cfg.output, cfg.images)
    elif cfg.output:
        path = write_comparison(cfg.runs, cfg.output)
    else:
        raise UserError("a comparison of several runs needs --output FILE.html")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, open it in a browser")
