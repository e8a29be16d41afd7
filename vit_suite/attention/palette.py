"""Colors: perceptual maps for attention, one clear color a head for labels."""

from __future__ import annotations

import colorsys

import numpy as np

# Degree-6 polynomials in x of 0..1 (constant term first; red, green, blue), fitted to matplotlib's tables of the same
# name by Matt Zucker, https://www.shadertoy.com/view/WlfXRN (public domain). Lightness rises evenly, also in gray and
# for the color-blind.
_POLYNOMIALS = {
    "inferno": (
        (0.0002189403691192265, 0.001651004631001012, -0.01948089843709184),
        (0.1065134194856116, 0.5639564367884091, 3.932712388889277),
        (11.60249308247187, -3.972853965665698, -15.9423941062914),
        (-41.70399613139459, 17.43639888205313, 44.35414519872813),
        (77.162935699427, -33.40235894210092, -81.80730925738993),
        (-71.31942824499214, 32.62606426397723, 73.20951985803202),
        (25.13112622477341, -12.24266895238567, -23.07032500287172),
    ),
    "viridis": (
        (0.2777273272234177, 0.005407344544966578, 0.3340998053353061),
        (0.1050930431085774, 1.404613529898575, 1.384590162594685),
        (-0.3308618287255563, 0.214847559468213, 0.09509516302823659),
        (-4.634230498983486, -5.799100973351585, -19.33244095627987),
        (6.228269936347081, 14.17993336680509, 56.69055260068105),
        (4.776384997670288, -13.74514537774601, -65.35303263337234),
        (-5.435455855934631, 4.645852612178535, 26.3124352495832),
    ),
}


def _table(name: str) -> np.ndarray:
    x = np.linspace(0, 1, 256)[:, None]
    colors = sum(np.asarray(term) * x**power for power, term in enumerate(_POLYNOMIALS[name]))
    return (np.clip(colors, 0, 1) * 255 + 0.5).astype(np.uint8)


TABLES = {name: _table(name) for name in _POLYNOMIALS}
"""Color maps by name: uint8 (256, 3)."""


def head_colors(count: int) -> np.ndarray:
    """uint8 (count, 3): a color for each head, the same whatever `count`.

    Eight hues, neighbours far apart, in three shades with hues in between; from the 25th on (no known ViT has more
    heads) they repeat.
    """
    hues, shades = (
        (0, 4, 2, 6, 1, 5, 3, 7),
        ((0.70, 0.95), (1.0, 0.55), (0.40, 0.80)),
    )  # eighths of the circle; saturation, value
    places = [divmod(i % 24, 8) for i in range(count)]
    colors = [colorsys.hsv_to_rgb((hues[place] + shade / 3) / 8, *shades[shade]) for shade, place in places]
    return (np.array(colors) * 255 + 0.5).astype(np.uint8)
