"""Colors: a perceptual map for attention, and one clear color for each head of a label picture."""

from __future__ import annotations

import colorsys

import numpy as np

# A polynomial of degree 6 in x of 0..1 (constant term first; red, green, blue), fitted to matplotlib's table `inferno`
# by Matt Zucker, https://www.shadertoy.com/view/WlfXRN (public domain). Lightness rises evenly, also in gray and for
# the color-blind.
_INFERNO = (
    (0.0002189403691192265, 0.001651004631001012, -0.01948089843709184),
    (0.1065134194856116, 0.5639564367884091, 3.932712388889277),
    (11.60249308247187, -3.972853965665698, -15.9423941062914),
    (-41.70399613139459, 17.43639888205313, 44.35414519872813),
    (77.162935699427, -33.40235894210092, -81.80730925738993),
    (-71.31942824499214, 32.62606426397723, 73.20951985803202),
    (25.13112622477341, -12.24266895238567, -23.07032500287172),
)


def _table(polynomial: tuple[tuple[float, ...], ...]) -> np.ndarray:
    x = np.linspace(0, 1, 256)[:, None]
    colors = sum(np.asarray(term) * x**power for power, term in enumerate(polynomial))
    return (np.clip(colors, 0, 1) * 255 + 0.5).astype(np.uint8)


INFERNO = _table(_INFERNO)
"""uint8 (256, 3): the color of each level."""
SINGLE = 24
"""Heads that get colors of their own: eight hues in three shades. ViT-g has 24 heads."""


def head_colors(count: int) -> np.ndarray:
    """uint8 (count, 3): a color for each head; a head has the same color whatever `count` is.

    The first eight heads get eight hues, neighbours far apart. The next sixteen get hues in between, in two other
    shades. From the 25th on colors repeat.
    """
    hues = (0, 4, 2, 6, 1, 5, 3, 7)  # eighths of the color circle
    shades = ((0.70, 0.95), (1.0, 0.55), (0.40, 0.80))  # saturation, value
    places = [divmod(i % SINGLE, len(hues)) for i in range(count)]
    colors = [colorsys.hsv_to_rgb((hues[place] + shade / 3) / 8, *shades[shade]) for shade, place in places]
    return (np.array(colors) * 255 + 0.5).astype(np.uint8)
