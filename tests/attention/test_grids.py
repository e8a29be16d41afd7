"""Which images share a forward pass."""

from dataclasses import dataclass

import torch

from vit_suite.attention.grids import in_batches


@dataclass
class Job:
    name: str
    view: torch.Tensor
    bytes: int = 1


def jobs(text):
    """`a4 b8`: a view of 4 x 4 pixels, then one of 8 x 8."""
    return [Job(word[0], torch.empty(3, int(word[1:]), int(word[1:]))) for word in text.split()]


def names(batches):
    return ["".join(job.name for job in batch) for batch in batches]


def test_images_of_one_grid_share_a_pass_and_leave_when_they_are_enough():
    text = "a4 b8 c4 d8 e4 f4 g8"
    assert names(in_batches(jobs(text), lambda size: 2, 99)) == ["ac", "bd", "ef", "g"]
    assert names(in_batches(jobs(text), lambda size: 3 if size == (4, 4) else 1, 99)) == ["b", "d", "ace", "g", "f"]
    assert names(in_batches(jobs(text), lambda size: 0, 99)) == list("abcdefg")  # one image may exceed the limit


def test_the_fullest_group_leaves_when_too_much_waits():
    assert names(in_batches(jobs("a4 b8 c4 d16 e8"), lambda size: 9, 3)) == ["ac", "be", "d"]


def test_nothing_is_taken_ahead():
    taken = []

    def watched():
        for job in jobs("a4 b4 c4"):
            taken.append(job.name)
            yield job

    next(in_batches(watched(), lambda size: 1, 99))
    assert taken == ["a"]
