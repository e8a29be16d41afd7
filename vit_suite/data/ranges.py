"""One value range for a whole set: `data.value_range auto` looks at its files before it reads them.

10- or 12-bit pictures are usually stored in 16 bits. A file alone cannot tell a dark 12-bit picture from a bright
10-bit one, but the set can.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vit_suite.data.decode import DecodeError, may_be_wide, read_wide
from vit_suite.data.listing import say_once
from vit_suite.data.pixels import ValueRange, Wide, depth
from vit_suite.data.source import FileSource, ImageSource, Subset
from vit_suite.errors import UserError

FIRST, PROBES = 64, 512
"""Files looked at, spread over the set: all `PROBES` only where the first ones hold values wider than 8 bits."""


def settle(source: ImageSource, wanted: ValueRange, train: Callable[[], ImageSource] | None = None) -> None:
    """Give `source` (files or shards) its value range.

    `train` opens the training split of the same set, where that is another one: both splits must get one range, or the
    same picture would have two brightnesses. What was taken is said once, where it is less than the type can hold.
    """
    source.value_range = wanted
    if wanted.mode != "auto":
        return
    most, kind, count = largest(source)
    if not count:
        return
    title = source.title
    if train is not None:
        try:
            other = train()
            other.max_pixels = source.max_pixels
            trained = largest(other)
            if trained[2]:
                (most, kind, count), title = trained, other.title
        except UserError:  # the set has no training split
            pass
    bits = depth(most)
    if bits is None:
        return  # each file says by itself that it needs a range
    source.value_range = ValueRange("auto", 0, 2**bits - 1)
    if most < np.iinfo(kind).max // 2:
        say_once(
            f"{title}: the {count} files looked at hold {kind} values up to {most:.0f}: read as {bits} bits, 0 to"
            f" {2**bits - 1}. data.value_range 0 {np.iinfo(np.uint16).max} reads them as 16 bits."
        )


def largest(source: ImageSource) -> tuple[float, np.dtype, int]:
    """(largest value, type, number) of the files whose integers are wider than 8 bits, of a sample of the set; number 0
    where there are none, or where they are signed, floating point, or name their own window."""
    most, kind, count = 0.0, np.dtype(np.uint16), 0
    for round_, picks in enumerate((_spread(len(source), FIRST), _spread(len(source), PROBES))):
        if round_ and not count:
            break
        for index in picks:
            wide = _wide(source, index)
            if wide is None or wide.values.dtype.kind not in "iu" or wide.window is not None:
                continue
            low, high = wide.extremes()
            if low >= 0 and wide.values.dtype != np.int8:
                declared = 2**wide.bits - 1 if wide.bits else 0
                most, kind, count = max(most, high, declared), wide.values.dtype, count + 1
    return most, kind, count


def _wide(source: ImageSource, index: int) -> Wide | None:
    while isinstance(source, Subset):
        index = int(source.indices[index])
        source = source.base
    if not may_be_wide(path := source.path(index)):
        return None
    content = None if isinstance(source, FileSource) else source.content(index)
    if content is None and not isinstance(source, FileSource):
        return None
    try:
        return read_wide(path, content, source.channels, source.max_pixels)
    except DecodeError:
        return None


def _spread(total: int, count: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, total - 1, min(count, total))}) if total else []
