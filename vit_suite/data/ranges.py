"""One value range for a whole set: `data.value_range auto` looks at its files before it reads them.

10- or 12-bit pictures are usually stored in 16 bits. A file alone cannot tell a dark 12-bit picture from a bright
10-bit one, but the set can.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from vit_suite.data.decode import FRAMES, DecodeError, count_frames, may_be_wide, read_wide
from vit_suite.data.listing import say_once
from vit_suite.data.pixels import BITS, ValueRange, Wide, depth
from vit_suite.data.source import FileSource, ImageSource, Subset
from vit_suite.errors import UserError
from vit_suite.files import printable

FIRST, PROBES = 64, 512
"""Files that are looked at, spread over the set. All `PROBES` are read only if some of the first hold values wider than
8 bits."""


def settle(source: ImageSource, train: Callable[[], ImageSource] | None = None) -> None:
    """Give `source` (files or shards), whose `reading` is as the user wants it, its value range if that is auto.

    `train` opens the training split of the same set, if `source` is another split. Both splits must have one range:
    with two, the same picture would have two brightnesses. A range narrower than the type can hold is logged once.
    """
    say_frames(source)
    if source.reading.value_range.mode != "auto":
        return
    most, kind, count = largest(source)
    if not count:
        return
    title = source.title
    if train is not None:
        try:
            other = train()
            other.reading = source.reading
            trained = largest(other)
            if trained[2]:
                (most, kind, count), title = trained, other.title
        except UserError:  # the set has no training split
            pass
    bits = depth(most)
    if bits is None:
        return  # more than 16 bits: the decoder refuses each file and names data.value_range
    source.reading = source.reading._replace(value_range=ValueRange("auto", 0, 2**bits - 1))
    if bits < BITS[-1]:
        say_once(
            f"{title}: the {count} files looked at hold {kind} values up to {most:.0f}: read as {bits} bits, 0 to"
            f" {2**bits - 1}. data.value_range 0 {2 ** BITS[-1] - 1} reads them as 16 bits."
        )


def say_frames(source: ImageSource) -> None:
    """Log once which page or frame of a file is read, if some of a sample of the set hold several."""
    found: dict[str, int] = {}
    picks = [index for index in _spread(len(source), FIRST) if source.path(index).lower().endswith(FRAMES)]
    for index in picks:
        base, place = _of_base(source, index)
        frames = count_frames(base.path(place), None if isinstance(base, FileSource) else base.content(place))
        stacked = source.channels not in (1, 3) and frames == source.channels and not source.reading.frame
        if frames > 1 and not stacked:
            found[base.path(place)] = frames
    if found:
        path, frames = next(iter(found.items()))
        which = f"frame {source.reading.frame}" if source.reading.frame else "the first"
        say_once(
            f"{source.title}: {len(found)} of the {len(picks)} files looked at hold several pages or frames"
            f" ({printable(os.path.basename(path))} has {frames}): {which} of each is read (data.frame)."
        )


def _of_base(source: ImageSource, index: int) -> tuple[ImageSource, int]:
    """(the source behind all subsets, the number of the image in it)."""
    while isinstance(source, Subset):
        index = int(source.indices[index])
        source = source.base
    return source, index


def largest(source: ImageSource) -> tuple[float, np.dtype, int]:
    """(largest value, type, number of files) over those files of a sample of the set that hold unsigned integers wider
    than 8 bits. The number is 0 if there are none. Signed and floating point files, and DICOM files that name their own
    window, do not count."""
    most, kind, count = 0.0, np.dtype(np.uint16), 0
    for picks in (_spread(len(source), FIRST), _spread(len(source), PROBES)):
        if len(picks) > FIRST and not count:
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
    source, index = _of_base(source, index)
    if not may_be_wide(path := source.path(index)):
        return None
    content = None if isinstance(source, FileSource) else source.content(index)
    if content is None and not isinstance(source, FileSource):
        return None
    try:
        return read_wide(path, content, source.channels, source.reading)
    except DecodeError:
        return None


def _spread(total: int, count: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, total - 1, min(count, total))}) if total else []
