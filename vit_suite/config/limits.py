"""Limits of options, as annotations of a field. parsing.py checks values against them, and help shows them.

Every number has a largest value: far above what anybody trains with, and low enough that a slip (`--run.seed` with one
digit too many, a size in place of a count) is refused before memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """Limits of a number, or of each number of a list; the length and the order of a list."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    ceiling: float = math.inf
    """A largest value that only catches slips. Help does not show it; the message about a larger number does."""
    length: int | None = None
    rising: bool = False
    """Whether a number of the list may not be below the one before it."""

    def holds(self, value: Any) -> bool:
        """Whether `value` is within the limits. What is neither a number nor a list (None, "auto") always is."""
        if self.length is not None and isinstance(value, list) and len(value) != self.length:
            return False
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) in (int, float)]
        if self.rising and isinstance(value, list) and numbers != sorted(numbers):
            return False
        return all(self.least <= n <= min(self.most, self.ceiling) and self.above < n < self.below for n in numbers)

    def words(self, ceiling: bool = False) -> str:
        """`0 to 64`, `above 0, at most 1`, `2 of them, least first`."""
        most = min(self.most, self.ceiling) if ceiling else self.most
        if math.isfinite(self.least) and math.isfinite(most):
            words = [f"{spell(self.least)} to {spell(most)}"]
        else:
            limits = {"at least": self.least, "above": self.above, "at most": most}
            words = [f"{word} {spell(limit)}" for word, limit in limits.items() if math.isfinite(limit)]
        if math.isfinite(self.below):
            words.append(f"below {spell(self.below)}")
        if self.length:
            words.append(f"{self.length} of them")
        return ", ".join(words + (["least first"] if self.rising else []))


def spell(number: float) -> str:
    """`16,384`, `0.5`, `1`."""
    return f"{number:,}" if isinstance(number, int) else str(number)


@dataclass(frozen=True)
class Place:
    """What an option names on the disk: `~` is expanded in it, and it is checked before anything is imported.

    checkpoint: a file, a folder, or a name such as `timm:NAME`; input: a file or folder that must exist; data: the
    same, or a pattern; folder and file: where a command writes; output: a file, or a folder in its place, by the
    command's other options; config: a YAML file, which its reader checks.
    """

    kind: Literal["checkpoint", "input", "data", "folder", "file", "output", "config"]


Count = Annotated[int, Range(1, ceiling=1_000_000_000)]
Whole = Annotated[int, Range(0, ceiling=1_000_000_000)]
Seed = Annotated[int, Range(0, ceiling=2**32 - 1)]
"""NumPy takes 32 bits."""
Side = Annotated[int, Range(1, ceiling=16_384)]
"""Of an image or a view, in pixels: one of 16,384 x 16,384 takes 3 GiB in fp32."""
Sides = Side | Annotated[list[Side], Range(length=2)]
"""One side of a square, or [height, width]; `pair` makes (height, width) of both."""
Width = Annotated[int, Range(1, ceiling=1_048_576)]
"""Of a layer, or a number of prototypes; DINOv3 has 262,144 of these."""
TokenWidth = Annotated[int, Range(1, ceiling=16_384)]
"""ViT-22B has 6,144."""
Depth = Annotated[int, Range(1, ceiling=1024)]
"""Blocks, or heads of one."""
Channels = Annotated[int, Range(1, ceiling=1024)]
"""Hyperspectral cameras have some hundreds."""
Batch = Annotated[int, Range(1, ceiling=1_048_576)]
"""Images."""
Epochs = Annotated[int, Range(1, ceiling=1_000_000)]
EpochsOrNone = Annotated[int, Range(0, ceiling=1_000_000)]
DecimalEpochs = Annotated[float, Range(0, ceiling=1_000_000)]
Processes = Annotated[int, Range(1, ceiling=1024)]
"""Processes, threads or GPUs of one machine."""
Nodes = Annotated[int, Range(1, ceiling=100_000)]
Minutes = Annotated[float, Range(above=0, ceiling=10_000_000)]
"""19 years."""
Gigabytes = Annotated[float, Range(0, ceiling=1_000_000)]
Norm = Annotated[float, Range(least=0)]
"""Of a gradient; the only number without a largest value."""
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
ShareBelow = Annotated[float, Range(0, below=1)]
"""A share that cannot be all: with it nothing would be left."""
Rate = Annotated[float, Range(0, ceiling=1000)]
"""A learning rate, a weight decay, a weight of a loss; the best known rates are below 100."""
Temperature = Annotated[float, Range(0.001, ceiling=1000)]
"""exp(1 / 0.0014) overflows float64."""
Pair = Annotated[list[Share], Range(length=2, rising=True)]
"""[least, most]"""

Checkpoint = Annotated[str, Place("checkpoint")]
Input = Annotated[str, Place("input")]
DataRoot = Annotated[str, Place("data")]
ConfigFile = Annotated[str, Place("config")]
OutputFolder = Annotated[str, Place("folder")]
OutputFile = Annotated[str, Place("file")]
Output = Annotated[str, Place("output")]


def pair(size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of one or two numbers."""
    values = (size,) if isinstance(size, int) else tuple(int(side) for side in size)
    return values[0], values[-1]


def one_or_two(size: Iterable[int]) -> int | list[int]:
    """The side of a square, or [height, width]."""
    height, width = size
    return height if height == width else [height, width]


def spell_sides(size: int | Iterable[int]) -> str:
    """`16` for a square, `1x16` for height 1 and width 16."""
    height, width = pair(size)
    return str(height) if height == width else f"{height}x{width}"
