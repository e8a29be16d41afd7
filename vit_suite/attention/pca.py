"""Principal components of patch features as colors, as the DINOv2 paper shows them (arXiv 2304.07193, figure 1).

The first three components of the patch tokens, after the final norm, become red, green and blue. One basis for a whole
folder gives alike parts of different images alike colors; a basis of its own shows most of a single image.

An eigenvector has no sign of its own. Here the largest entry of an axis, by its absolute value, is positive, so that
the colors of two runs agree.

Foreground, on wish: the first component of all patches splits them at their mean, and the side with the smaller share
of border patches is the foreground. (The DINOv2 authors chose side and cut by hand, image set by image set.) The three
colors are then the components of the foreground alone.

Axes: n patches, D width, gh x gw grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGES = 256
"""Images that the basis of a folder is computed from, evenly spaced; all where there are fewer."""
PATCHES = 2**15
"""Patches of them, together, evenly spaced within an image: 100 MiB at D = 768."""
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
        if values[-1 - place] > values[-1] * 1e-10:
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
    """At most `most` patches of one image (gh, gw, D), evenly spaced: (n, D) and whether each lies at the border."""
    rows, columns, width = patches.shape
    count = min(most, rows * columns)
    places = torch.arange(count) * (rows * columns) // count
    return patches.reshape(-1, width)[places], border_of(rows, columns).flatten()[places]
