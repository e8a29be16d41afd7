"""The check that follows an export: the same images through the original and through what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from vit_suite.errors import UserError
from vit_suite.weights.checkpoint import LoadedBackbone
from vit_suite.weights.export.formats import ExportOptions, Format, graph_answers

TOLERANCE = 1e-4
"""Largest difference of two fp32 answers, over all outputs and sizes."""


def sizes_to_check(loaded: LoadedBackbone, row: Format) -> list[tuple[int, int]]:
    """(height, width) in pixels: the native size; if the format takes any size, also a wider and a smaller one."""
    (high, wide), (rows, columns) = loaded.backbone.patch, loaded.backbone.native_grid
    native = (rows * high, columns * wide)
    if not row.any_size:
        return [native]
    wider = ((rows + 1) * high, (columns + 3) * wide)
    smaller = (max(row.least_grid, (rows + 1) // 2) * high, max(row.least_grid, columns - 1) * wide)
    return list(dict.fromkeys([native, wider, smaller]))


def largest_errors(
    loaded: LoadedBackbone,
    row: Format,
    folder: Path,
    options: ExportOptions,
    images_of: Callable[[tuple[int, int]], Tensor],
) -> dict[str, float]:
    """`"32x48 features"` -> largest absolute difference; `images_of` gives normalized images (B, C, h, w) of a size.

    Raises:
        UserError: one is above `TOLERANCE`, or not a number.
    """
    network = row.open(folder, loaded, options)
    backbone = loaded.backbone.eval()
    errors: dict[str, float] = {}
    for size in sizes_to_check(loaded, row):
        images = images_of(size)
        for batch in (images, images[:1]):
            ours, theirs = graph_answers(backbone, batch, options.outputs), network(batch)
            for name, tensor in ours.items():
                if tensor.shape != theirs[name].shape:
                    shapes = f"{tuple(theirs[name].shape)} instead of {tuple(tensor.shape)}"
                    raise UserError(f"--format {row.name}: {name} came out {shapes} at {size[0]} x {size[1]} pixels.")
                error = float((tensor - theirs[name].float()).abs().max())
                key = f"{size[0]}x{size[1]} {name}"
                errors[key] = max(errors.get(key, 0.0), error)
    worst = max(errors, key=lambda key: errors[key])
    if not errors[worst] <= TOLERANCE:
        raise UserError(
            f"--format {row.name}: what was written differs by {errors[worst]:.1e} ({worst}) from the checkpoint, more"
            f" than {TOLERANCE:g}; nothing was kept."
        )
    return errors
