"""Format `pca`: principal components of patch features as colors, as in the DINOv2 paper (arXiv 2304.07193, figure 1).

The first three components of the patch tokens, after the final norm, become red, green and blue. With one basis for a
whole folder, similar parts of different images get similar colors. With a basis for each image, a single image shows
most detail.

An eigenvector has no sign of its own. Here the entry of an axis with the largest absolute value is positive, so that
the colors of two runs agree.

The foreground is optional. The first component of all patches splits them at their mean; the side that holds the
smaller share of the border patches is the foreground. (The DINOv2 authors chose side and cut by hand for each set of
images.) The three colors are then the components of the foreground alone.

Axes: n patches, D width, gh x gw grid, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_suite.attention.drawing import Seen
from vit_suite.attention.png import write_png

IMAGES = 256
"""Number of images, evenly spaced, that the basis of a folder is computed from; all images of a smaller folder."""
PATCHES = 2**15
"""Number of patches of all these images together, evenly spaced within an image: 100 MiB at D = 768."""
FLAT = 1e-10
"""An eigenvalue below this share of the largest one is rounding: the patches have no such direction."""
TAILS = (0.01, 0.99)
"""Quantiles of a component that become the darkest and the brightest color."""
COLORS = 3


@dataclass(frozen=True)
class Basis:
    """Three axes and where their colors begin and end."""

    mean: Tensor
    """(D,) float64."""
    axes: Tensor
    """(3, D) float64, unit length; zeros where the patches fill fewer directions."""
    limits: Tensor
    """(3, 2) float64: values of a component that become 0 and 1."""
    cut: tuple[Tensor, Tensor] | None
    """(mean (D,), axis (D,)) float64: a patch is foreground where (patch - mean) . axis is above 0."""

    def colors(self, patches: Tensor) -> Tensor:
        """Patch tokens (gh, gw, D) -> float32 (3, gh, gw), mostly within 0..1."""
        found = (patches.double() - self.mean) @ self.axes.T  # (gh, gw, 3)
        least, most = self.limits[:, 0], self.limits[:, 1]
        span = torch.where(most > least, most - least, torch.ones_like(most))
        return ((found - least) / span).movedim(-1, 0).float()

    def foreground(self, patches: Tensor) -> Tensor | None:
        """Patch tokens (gh, gw, D) -> float32 (gh, gw), above 0 in the foreground; None where nothing was cut."""
        return None if self.cut is None else ((patches.double() - self.cut[0]) @ self.cut[1]).float()


def basis_of(patches: Tensor, border: Tensor, foreground: bool = False) -> Basis:
    """The basis of patch tokens (n, D). border: bool (n,), whether a patch lies at the edge of its image."""
    patches = patches.double()
    cut = None
    if foreground:
        mean, axis = patches.mean(0), _axes(patches, 1)[0]
        front = (patches - mean) @ axis > 0
        if front[border].double().mean() > front[~border].double().mean():
            front, axis = ~front, -axis
        cut = (mean, axis)
        patches = patches[front] if front.any() else patches
    axes = _axes(patches, COLORS)
    values = (patches - patches.mean(0)) @ axes.T
    ordered = values.sort(0).values
    places = [round(tail * (len(ordered) - 1)) for tail in TAILS]
    return Basis(patches.mean(0), axes, torch.stack([ordered[place] for place in places], dim=1), cut)


def _axes(patches: Tensor, count: int) -> Tensor:
    """The first principal axes (count, D) of (n, D), of the sign that the module describes."""
    centered = patches - patches.mean(0)
    small = len(centered) < centered.shape[1]  # the smaller of the two Gram matrices has the same eigenvalues
    values, vectors = torch.linalg.eigh(centered @ centered.T if small else centered.T @ centered)
    axes = patches.new_zeros(count, patches.shape[1])
    for place in range(min(count, len(values))):
        if values[-1 - place] > values[-1] * FLAT:
            axis = vectors[:, -1 - place]
            axis = centered.T @ axis if small else axis
            axis = axis / axis.norm()
            axes[place] = axis * axis[axis.abs().argmax()].sign()
    return axes


def border_of(rows: int, columns: int) -> Tensor:
    """bool (rows, columns): the outermost patches of a grid."""
    border = torch.zeros(rows, columns, dtype=torch.bool)
    border[[0, -1]] = True
    border[:, [0, -1]] = True
    return border


def sampled(patches: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` patches of one image (gh, gw, D), evenly spaced: (n, D), and bool (n,) whether each lies at the
    border."""
    rows, columns, width = patches.shape
    count = min(most, rows * columns)
    places = torch.arange(count) * (rows * columns) // count
    return patches.reshape(-1, width)[places], border_of(rows, columns).flatten()[places]


def write_components(path: Path, seen: Seen) -> None:
    """Write the components of a picture's patches at the size that it is drawn at."""
    write_png(path, components(seen))


def components(seen: Seen) -> np.ndarray:
    """The components at the drawn size: uint8 (H, W, 3), black outside the foreground."""
    assert seen.colors is not None
    fine = seen.drawing.fine(seen.colors, seen.drawn).clamp(0, 1)
    if seen.front is not None:
        fine = fine * (seen.drawing.fine(seen.front[None], seen.drawn) > 0)
    return (fine * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
