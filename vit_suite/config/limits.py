"""Limits of numbers, as annotations of a field: parsing.py checks values against them and help shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Limits of a number, or of each number of a list, and the length of a list. parsing.py checks values and help
    shows it."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    length: int | None = None

    def holds(self, value: Any) -> bool:
        """Whether `value` is within; what is neither a number nor a list (None, "auto") always is."""
        if self.length is not None and isinstance(value, list) and len(value) != self.length:
            return False
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) in (int, float)]
        return all(self.least <= n <= self.most and n > self.above for n in numbers)

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{self.least} to {self.most}"
        limits = {"at least": self.least, "at most": self.most, "above": self.above}
        words = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
        return ", ".join(words + ([f"{self.length} of them"] if self.length else []))


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(0, 1)]
Pair = Annotated[list[Share], Range(length=2)]
