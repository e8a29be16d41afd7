"""The order of an epoch, its slices by rank and micro-batch, and resume."""

import numpy as np
import pytest
import torch

from tests.data.make import ids, make_files, resident
from vit_suite.config import DataConfig
from vit_suite.data.loader import FileLoader, ResidentLoader
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import EpochPlan, epoch_order
from vit_suite.errors import UserError


def test_order_is_a_permutation_that_changes_with_epoch_and_seed():
    orders = [epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders) and len({tuple(order) for order in orders}) == 4
    assert epoch_order(1000, 1, 1).tolist() == orders[3]
    positions = np.array([epoch_order(50, 0, epoch).tolist().index(7) for epoch in range(400)])
    assert abs(positions.mean() - 24.5) < 2.2  # uniform over places: standard error 0.72


@pytest.mark.parametrize("world,accumulate", [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (3, 4)])
def test_ranks_and_micro_batches_partition_the_global_batch(world, accumulate):
    total, batch = 100, 12
    order = epoch_order(total, 7, 3)
    plans = [EpochPlan(total, batch, 7, rank, world, accumulate) for rank in range(world)]
    assert {len(plan) for plan in plans} == {8 * accumulate} and plans[0].local * world * accumulate == batch
    seen = [[] for _ in range(8)]
    for number in range(8 * accumulate):
        step, micro = divmod(number, accumulate)
        for plan in plans:
            item = list(plan.batches(3))[number]
            assert (item.step, item.micro, item.epoch) == (step, micro, 3)
            assert (
                item.indices.tolist() == order[step * batch + item.rows.start : step * batch + item.rows.stop].tolist()
            )
            seen[step] += item.indices.tolist()
    assert seen == [
        order[s * batch : (s + 1) * batch].tolist() for s in range(8)
    ]  # in order: micro-batch first, then rank


def test_impossible_batches():
    with pytest.raises(UserError, match="65 is larger than the data set of 64 .* Try data.batch_size 8: 8 steps"):
        EpochPlan(64, 65)
    with pytest.raises(
        UserError, match="does not split evenly over 3 ranks x 2 accumulated micro-batches; 60 or 66 would"
    ):
        EpochPlan(100, 64, world=3, accumulate=2)
    with pytest.raises(UserError, match="batch_size is 0"):
        EpochPlan(100, 0)


@pytest.mark.parametrize("kind,workers", [("memory", 0), ("files", 0), ("files", 2)])
def test_batches_hold_what_their_indices_say(tmp_path, kind, workers):
    source = make_files(tmp_path / "x")
    plan = EpochPlan(23, 6, seed=1)
    loader = ResidentLoader(resident(source), plan) if kind == "memory" else FileLoader(source, plan, workers)
    for epoch in range(2):  # iterating again moves on to the next epoch
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        assert sum(ids(batches), []) == epoch_order(23, 1, epoch)[:18].tolist()
        for images, labels, indices in batches:
            assert images.dtype == torch.uint8 and images.shape == (6, 3, 8, 8)
            assert (
                (images == indices.view(-1, 1, 1, 1)).all()
                and (labels == indices % 2).all()
                and labels.dtype == torch.int64
            )
    loader.set_epoch(5)
    assert ids(loader)[0] == epoch_order(23, 1, 5)[:6].tolist()


@pytest.mark.parametrize("kind,workers", [("memory", 0), ("files", 2)])
def test_resume_in_mid_epoch_gives_the_remaining_batches(tmp_path, kind, workers):
    source = make_files(tmp_path / "x", count=40)

    def make(world=1, rank=0):
        plan = EpochPlan(40, 4, 2, rank, world)
        return ResidentLoader(resident(source), plan) if kind == "memory" else FileLoader(source, plan, workers)

    whole = make()
    whole.set_epoch(1)
    all_batches = ids(whole) + ids(whole)
    first = make()
    first.set_epoch(1)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    assert (state["epoch"], state["step"]) == (1, 4)  # what was handed out, not what workers prefetched
    second = make()
    second.load_state_dict(state)
    second.set_epoch(1)  # Lightning says the epoch again after loading: the position stays
    assert ids(second) + ids(second) == all_batches[4:]
    other = [make(2, rank) for rank in range(2)]  # another number of ranks goes on at the same place
    for loader in other:
        loader.load_state_dict(state)
    assert [a + b for a, b in zip(*map(ids, other), strict=True)] == all_batches[4:10]


def test_state_at_the_end_of_an_epoch_and_refusals(tmp_path):
    source = resident(make_files(tmp_path / "x", count=40))
    loader = ResidentLoader(source, EpochPlan(40, 4, 2))
    list(loader)
    fresh = ResidentLoader(source, EpochPlan(40, 4, 2))
    fresh.load_state_dict(loader.state_dict())
    assert sum(ids(fresh), []) == epoch_order(40, 2, 1).tolist()
    for plan, words in (
        (EpochPlan(40, 8, 2), "data.batch_size 4, now it is 8"),
        (EpochPlan(40, 4, 3), "run.seed 2, now it is 3"),
        (EpochPlan(39, 4, 2), "training images 40, now it is 39"),
    ):
        part = ResidentLoader(source.subset(range(plan.total)), plan)
        with pytest.raises(UserError, match=words):
            part.load_state_dict(loader.state_dict())
    assert all(isinstance(value, int) for value in loader.state_dict().values())


@pytest.mark.parametrize("before,now", [(1, 2), (2, 1)])
def test_micro_batches_may_change_between_epochs_alone(tmp_path, before, now):
    """Lightning counts the micro-batches of the epoch under way, and would take them for others."""
    source = resident(make_files(tmp_path / "x", count=12))
    loader, other = (ResidentLoader(source, EpochPlan(12, 4, accumulate=accumulate)) for accumulate in (before, now))
    iterator = iter(loader)
    for _ in range(before):
        next(iterator)
    with pytest.raises(
        UserError, match=f"within an epoch with another trainer.accumulate \\({before} before, {now} now\\)"
    ):
        other.load_state_dict(loader.state_dict())
    list(iterator)
    other.load_state_dict(loader.state_dict())
    assert other.epoch == 1 and other.position == 0


def test_a_batch_does_not_take_the_order_of_the_epoch_along():
    """Its indices go to a worker with all of the memory that they lie in."""
    batch = next(EpochPlan(10_000, 20).batches(0))
    assert batch.indices.untyped_storage().nbytes() == 20 * 8


@pytest.mark.parametrize("world,accumulate", [(1, 1), (2, 1), (4, 1), (2, 3)])
def test_repeated_augmentation_has_the_images_of_deits_sampler(world, accumulate):
    """In each step; and any number of ranks sees the same rows, whose neighbours are different images."""
    total, batch, repeats = 110, 24, 3
    deit = epoch_order(total, 7, 3).repeat_interleave(repeats)  # which its ranks take in turn: samplers.py RASampler
    plans = [EpochPlan(total, batch, 7, rank, world, accumulate, repeats=repeats) for rank in range(world)]
    parts = [[item.indices for item in plan.batches(3)] for plan in plans]
    alone = torch.stack([item.indices for item in EpochPlan(total, batch, 7, repeats=repeats).batches(3)])
    assert alone.shape == (total // batch, batch)
    for step, rows in enumerate(alone):
        micros = range(step * accumulate, (step + 1) * accumulate)
        assert torch.equal(torch.cat([part[micro] for micro in micros for part in parts]), rows)
        assert torch.equal(rows.sort().values, deit[step * batch : (step + 1) * batch].sort().values)
        assert (rows[1:] != rows[:-1]).all()


def test_repeated_augmentation_is_an_option_that_a_resumed_run_keeps(tmp_path):
    source = resident(make_files(tmp_path / "x", count=40))
    cfg = DataConfig(name="shapes", image_size=16, length=40, batch_size=6, repeats=3)
    assert ImageDataModule(cfg).plan() == EpochPlan(40, 6, repeats=3)
    whole, second = (ResidentLoader(source, EpochPlan(40, 6, 2, repeats=3)) for _ in range(2))
    batches, first = ids(whole), iter(whole)
    next(first)
    second.load_state_dict(whole.state_dict() | {"epoch": 0})
    assert ids(second) == batches[1:]
    with pytest.raises(UserError, match="data.repeats 3, now it is 1"):
        ResidentLoader(source, EpochPlan(40, 6, 2)).load_state_dict(whole.state_dict())
    with pytest.raises(UserError, match="data.repeats 3 is more than data.batch_size 2"):
        EpochPlan(40, 2, repeats=3)
