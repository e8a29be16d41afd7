"""Exports with options as keywords."""

from __future__ import annotations

from typing import Any

from vit_suite.attention.export import ExportSummary, export_attention
from vit_suite.attention.export_options import ExportOptions


def exported(backbone: Any, images: Any, output: Any, *, mean: Any, std: Any, **options: Any) -> ExportSummary:
    """`export_attention` with `ExportOptions(**options)`."""
    return export_attention(backbone, images, output, mean, std, ExportOptions(**options))
