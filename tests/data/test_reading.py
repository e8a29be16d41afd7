"""The one way from numbers to images: order, distance, failures as values."""

import threading

import pytest
import torch

from tests.data.make import make_files
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import prefetch, read


def test_prefetch_keeps_order_and_its_distance():
    running, most, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        return item * item

    taken = []
    for value in prefetch(work, range(50), ahead=5, workers=3):
        with lock:
            running -= 1
        taken.append(value)
    assert taken == [i * i for i in range(50)]
    assert most <= 6

    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda item: 1 // item, [1, 0, 1], ahead=2))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_read_gives_every_index_in_order_and_failures_as_values(tmp_path, workers):
    source = make_files(tmp_path / "x", bad=(2, 17))
    indices = [5, 2, 22, 17, 0, 1, 3, 4, 6]
    found = list(read(source, indices, workers=workers, block=2))
    assert [index for index, _ in found] == indices
    assert [index for index, image in found if isinstance(image, DecodeError)] == [2, 17]
    assert all(int(image[0, 0, 0]) == index for index, image in found if isinstance(image, torch.Tensor))


def test_what_comes_after_decoding_may_fail_for_one_image(tmp_path):
    source = make_files(tmp_path / "x", count=4)

    def then(index, image):
        if index == 2:
            raise DecodeError("truth", "of the wrong size")
        return index, int(image[0, 0, 0])

    found = dict(read(source, range(4), workers=2, then=then))
    assert found[2].reason == "of the wrong size" and [found[i] for i in (0, 1, 3)] == [(0, 0), (1, 1), (3, 3)]


def test_without_threads_nothing_is_read_ahead(tmp_path):
    loaded = []

    class Source:
        def load(self, index):
            loaded.append(index)
            return index

    images = read(Source(), range(9), workers=0, block=1)
    assert next(images) == (0, 0) and loaded == [0]
