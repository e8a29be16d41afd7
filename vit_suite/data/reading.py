"""The one way from numbers to decoded images. Training, scores, pictures and sets held in memory all call `try_load`.

    for index, image in read(source, range(len(source)), workers=4):
        ...    # image: uint8 (C, H, W), or the DecodeError of a file that holds no image

Who runs it in parallel differs, because the work behind it differs:

- training: worker processes (`loader.py`), because views made beside the images hold Python's lock;
- features, localization, sets held in memory: threads here, because JPEG decoding leaves Python and a thread hands a
  tensor over without a copy;
- the attention export: its own threads, each of which decodes, computes and draws a block of images (`workers=0` here).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor

from vit_suite.data.decode import DecodeError
from vit_suite.hardware import cores

BLOCK = 16
"""Images that a thread takes at a time. To hand over one small image costs as much as to decode it."""
MOST_THREADS = 8
"""Most decoding threads by default: beyond it they wait for the disk or for each other."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def try_load(load: Callable[[int], Result], index: int) -> Result | DecodeError:
    """`load(index)`; a DecodeError is returned instead of raised, because one bad file must not end a batch."""
    try:
        return load(index)
    except DecodeError as error:
        return error


def read(
    source: Any,
    indices: Iterable[int],
    *,
    workers: int | None = None,
    ahead: int = 2 * BLOCK,
    block: int = BLOCK,
    then: Callable[[int, Tensor], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """(index, image or DecodeError) for every index, in order.

    source: an `ImageSource` (anything with `load`). workers: threads; 0 = in the caller's thread, None = the cores, at
    most `MOST_THREADS`. ahead: images decoded beyond the one that was taken. block: images a thread takes at a time.
    then: `(index, image) -> result`, run in the same thread; its result takes the place of the image, and a DecodeError
    that it raises counts like one of the file.
    """

    def one(index: int) -> Any:
        image = source.load(index)
        return image if then is None else then(index, image)

    def several(part: Sequence[int]) -> list[tuple[int, Any]]:
        return [(index, try_load(one, index)) for index in part]

    numbers = iter(indices)
    blocks = iter(lambda: list(islice(numbers, block)), [])
    for part in prefetch(several, blocks, ahead=-(-ahead // block), workers=workers):
        yield from part


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, workers: int | None = None
) -> Iterator[Result]:
    """`map(function, items)` in order, computed by threads, never more than `ahead` results beyond the one taken.

    workers: as for `read`.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers or min(MOST_THREADS, cores()), thread_name_prefix="decode") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # the consumer stopped early, or an item failed: do not decode what nobody will take
            for future in pending:
                future.cancel()
