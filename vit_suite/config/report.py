"""`vit-suite report`: runs to a page."""

from __future__ import annotations

from dataclasses import dataclass, field

from vit_suite.config.limits import Input, OutputFile, Whole


@dataclass
class ReportConfig:
    """Write the report of a run, `vit-suite report RUN`, or compare runs, `vit-suite report A B C --output
    compare.html`. The page is one file that works without a network."""

    runs: list[Input] = field(default_factory=list)
    """Run directories."""
    output: OutputFile | None = None
    """The page; RUN/report.html when not given. A comparison needs one."""
    images: Whole = 500
    """Test images on the map of embeddings; 0 leaves the map out."""
