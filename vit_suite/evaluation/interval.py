"""How far to trust a score: its 95% interval on a finite number of test images, and what guessing would reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""The normal distribution holds 95% of its mass within so many standard deviations."""


def wilson(percent: float, images: int) -> tuple[float, float]:
    """95% interval (low, high) in percent of a score that was measured on `images` independent images.

    Wilson's score interval (1927, JASA 22, p. 209): unlike score +- 2 sqrt(p (1 - p) / n) it stays within 0..100 and
    holds for small n. It says how much the score would move on other test images of the same kind; it does not hold the
    spread over seeds. ValueError for no images.
    """
    if images < 1:
        raise ValueError("a score of no images has no interval")
    share, square = percent / 100, Z95 * Z95
    center = (share + square / (2 * images)) / (1 + square / images)
    half = Z95 * math.sqrt(share * (1 - share) / images + square / (4 * images * images)) / (1 + square / images)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


class Chance(NamedTuple):
    """What answers without looking reach, in percent of the test images."""

    uniform: float
    """A random class: 100 / classes."""
    largest: float
    """Always the class that most test images have."""
    classes: int

    def as_dict(self) -> dict[str, float]:
        """For results.json."""
        return {"uniform": self.uniform, "largest_class": self.largest}

    def __str__(self) -> str:
        """`chance is 10.00% (10 classes); the largest class alone gives 12.50%`"""
        text = f"chance is {self.uniform:.2f}% ({self.classes} classes)"
        if self.largest > 1.05 * self.uniform:  # classes of one size need no second number
            text += f"; the largest class alone gives {self.largest:.2f}%"
        return text


def chance(labels: Tensor, classes: int) -> Chance:
    """The chance level of test labels (N,), each from 0 to classes - 1."""
    counts = torch.bincount(labels.flatten().cpu(), minlength=classes)
    return Chance(100 / classes, 100 * int(counts.max()) / max(1, len(labels)), classes)


def bank_remarks(ks: Sequence[int], labels: Tensor) -> list[str]:
    """Sentences about values of k that a kNN bank with these labels (N,) is too small for."""
    bank, largest = len(labels), int(torch.bincount(labels.cpu()).max()) if len(labels) else 0
    above = [k for k in ks if k > bank]
    crowded = [k for k in ks if 2 * largest < k <= bank]
    said = []
    if above:
        said.append(
            f"k {' '.join(map(str, above))}: the bank has only {bank} images, so all of them vote; take a smaller --k"
        )
    if crowded:
        said.append(
            f"k {' '.join(map(str, crowded))}: no class has more than {largest} images in the bank, so most voters are"
            " of other classes; take a smaller --k"
        )
    return said
