"""Order, rank slices, resume, replacement of bad files, and the data module under a real Trainer."""

import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from vit_suite.config import DataConfig
from vit_suite.data.decode import Quarantine
from vit_suite.data.loader import EvaluationLoader, FileLoader, ResidentLoader, _Decoder, auto_workers
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import EpochPlan, epoch_order
from vit_suite.data.resident import make_resident
from vit_suite.data.source import FileSource, ResidentSource, Subset
from vit_suite.errors import UserError


def make_files(folder, count=23, bad=(), sizes=((8, 8),)):
    """Image i holds the value i everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", sizes[i % len(sizes)], (i, i, i)).save(folder / f"{i:03d}.png")
        if i in bad:
            (folder / f"{i:03d}.png").write_bytes(b"" if i % 2 else b"not an image")
    return FileSource(
        "set", "train", folder, [f"{i:03d}.png" for i in range(count)], 3, ["a", "b"], [i % 2 for i in range(count)]
    )


def resident(source):
    return make_resident(source, True, 1.0, Quarantine(limit=1.0))


def ids(batches):
    return [batch[2].tolist() for batch in batches]


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
    with pytest.raises(UserError, match="batch_size 65 is larger than the data set of 64"):
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


def test_ragged_images_come_as_a_list(tmp_path):
    source = make_files(tmp_path / "x", sizes=((8, 6), (5, 9)))
    images, _, indices = next(iter(FileLoader(source, EpochPlan(23, 12))))
    assert isinstance(images, list) and {tuple(image.shape) for image in images} == {(3, 6, 8), (3, 9, 5)}
    assert all((image == index).all() for image, index in zip(images, indices.tolist(), strict=True))
    assert make_resident(source, "auto", 1.0, Quarantine()) is None
    with pytest.raises(UserError, match="data.resident is true, but set train holds images of different sizes"):
        make_resident(source, True, 1.0, Quarantine())


def test_a_worker_sends_images_of_many_sizes_as_one_tensor(tmp_path):
    """Each tensor on its way holds a file open: with 1,024 allowed, a batch of 512 single images never arrived."""
    source = make_files(tmp_path / "x", sizes=((8, 6), (5, 9)))
    plan = EpochPlan(23, 23)
    sent = _Decoder(source, replace=True).__getitems__(next(plan.batches(0)))
    assert sum(isinstance(part, torch.Tensor) for part in (*sent[0], *sent[1:])) == 3  # pixels, labels, indices
    loader = FileLoader(source, plan, workers=1)
    ((images, _, indices),) = list(loader)
    loader.close()
    assert len(images) == 23 and all(
        torch.equal(image, source.load(int(i))) for image, i in zip(images, indices, strict=True)
    )


def test_one_odd_size_beyond_the_probes_keeps_the_set_in_files(tmp_path):
    source = make_files(tmp_path / "x", count=200)
    Image.new("RGB", (9, 9)).save(tmp_path / "x" / "101.png")
    assert make_resident(source, "auto", 1.0, Quarantine()) is None


def test_memory_limit(tmp_path):
    source = make_files(tmp_path / "x")
    assert make_resident(source, "auto", 23 * 192 / 2**30, Quarantine()).images.shape == (23, 3, 8, 8)
    assert make_resident(source, "auto", 22 * 192 / 2**30, Quarantine()) is None
    assert make_resident(source, False, 1.0, Quarantine()) is None
    with pytest.raises(UserError, match="data.memory_gb is 1e-09"):
        make_resident(source, True, 1e-9, Quarantine())


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_in_workers_are_replaced_alike_and_listed(tmp_path, workers):
    source = make_files(tmp_path / "x", bad=(3, 4, 11))
    file = tmp_path / "run" / "quarantine.txt"
    quarantine = Quarantine(file, limit=0.2)
    loader = FileLoader(source, EpochPlan(23, 23), workers, quarantine)
    runs = [next(iter(loader)) for _ in range(2)]
    loader.set_epoch(0)
    again = next(iter(loader))
    assert runs[0][2].tolist() == again[2].tolist()
    for (images, labels, indices), epoch in zip(runs, range(2), strict=True):
        assert images.shape == (23, 3, 8, 8) and (images[:, 0, 0, 0] == indices).all() and (labels == indices % 2).all()
        wanted = epoch_order(23, 0, epoch)
        moved = (wanted != indices).nonzero().flatten()
        assert sorted(wanted[moved].tolist()) == [3, 4, 11] and not {3, 4, 11} & set(indices.tolist())
    replaced = [dict(zip(epoch_order(23, 0, e).tolist(), runs[e][2].tolist(), strict=True)) for e in range(2)]
    assert [replaced[0][i] for i in (3, 4, 11)] == [
        replaced[1][i] for i in (3, 4, 11)
    ]  # by index, not by place in the epoch
    assert sorted(line.split("\t")[0][-7:] for line in file.read_text().splitlines()) == [
        "003.png",
        "004.png",
        "011.png",
    ]
    assert "0 bytes" in file.read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_files_stop_with_a_user_error(tmp_path, workers):
    source = make_files(tmp_path / "x", bad=range(5))
    with pytest.raises(UserError) as caught:
        list(FileLoader(source, EpochPlan(23, 23), workers, Quarantine(tmp_path / "q.txt", limit=0.2)))
    assert "5 of the 23 images of set train" in str(caught.value) and "Traceback" not in str(caught.value)
    hopeless = make_files(tmp_path / "y", count=4, bad=range(4))
    with pytest.raises(UserError, match="in a row do not decode"):
        next(iter(FileLoader(hopeless, EpochPlan(4, 4), workers, Quarantine(limit=1.0))))


def test_wrong_channels_in_a_worker_is_the_same_one_sentence(tmp_path):
    source = make_files(tmp_path / "x")
    source.channels = 5
    with pytest.raises(UserError, match="^'.*png' .*has 3 channels, but data.channels is 5.$"):
        next(iter(FileLoader(source, EpochPlan(23, 23), 1)))


def test_resident_leaves_bad_files_out(tmp_path):
    source = make_files(tmp_path / "x", bad=(0, 7))
    quarantine = Quarantine(tmp_path / "q.txt", limit=0.1)
    held = make_resident(source, "auto", 1.0, quarantine)
    assert len(held) == 21 and len(quarantine) == 2 and len((tmp_path / "q.txt").read_text().splitlines()) == 2
    assert (held.images[:, 0, 0, 0] == held.base.indices).all() and (held.labels == held.base.indices % 2).all()
    assert held.path(0).endswith("001.png")
    with pytest.raises(UserError, match="2 of the 23 images"):
        make_resident(source, "auto", 1.0, Quarantine(limit=0.05))


def test_evaluation_drops_bad_files(tmp_path):
    source = make_files(tmp_path / "x", bad=(2,))
    source.quarantine = Quarantine(limit=0.1)
    got = ids(EvaluationLoader(source, 4, workers=0))
    assert sum(got, []) == [i for i in range(23) if i != 2] and len(source.quarantine) == 1
    assert source.get(2) is None and source.get(5).shape == (3, 8, 8)
    held = resident(source)
    images, labels, indices = list(EvaluationLoader(held, 8))[-1]
    assert (
        len(held) == 22 and indices.tolist() == [16, 17, 18, 19, 20, 21] and (images[:, 0, 0, 0] == indices + 1).all()
    )


def test_samples_of_a_set_are_not_charged_with_all_its_failures(tmp_path):
    source = make_files(tmp_path / "x", count=100, bad=range(0, 20, 10))
    source.quarantine = Quarantine(limit=0.05)
    list(EvaluationLoader(source, 10))
    list(EvaluationLoader(source.subset(range(0, 30)), 10))  # 2 of 30 is above 5%, 2 of 100 is not
    assert len(source.quarantine) == 2


def test_transform_runs_on_a_micro_batch_with_its_place(tmp_path):
    source = make_files(tmp_path / "x", sizes=((8, 6), (5, 9)))

    def transform(images, batch):
        return torch.tensor([[batch.epoch, batch.step, batch.micro, batch.rows.start, len(images)]])

    loader = FileLoader(source, EpochPlan(23, 8, rank=1, world=2, accumulate=2), transform=transform)
    assert torch.cat([images for images, _, _ in loader]).tolist() == [
        [0, 0, 0, 2, 2],
        [0, 0, 1, 6, 2],
        [0, 1, 0, 2, 2],
        [0, 1, 1, 6, 2],
    ]


def test_subset_of_a_resident_set_is_resident(tmp_path):
    held = resident(make_files(tmp_path / "x"))
    part = held.subset([5, 2])
    assert (
        isinstance(part, ResidentSource)
        and part.images[:, 0, 0, 0].tolist() == [5, 2]
        and part.labels.tolist() == [1, 0]
    )
    assert part.path(1).endswith("002.png") and isinstance(part.base, Subset)


def test_workers(monkeypatch):
    assert auto_workers("auto", True) == 0 and auto_workers(3, False) == 3 and 1 <= auto_workers("auto", False) <= 8
    cores = len(os.sched_getaffinity(0))
    assert auto_workers("auto", False, 2 * cores) == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert auto_workers("auto", False, 2 * cores) == 1  # a batch script alone: no cores of its own
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert auto_workers("auto", False, 8) == 6
    with pytest.raises(UserError, match="data.workers is -1"):
        auto_workers(-1, False)


# -- the module --------------------------------------------------------------------------------------------------------


def folder_set(root, count=12, size=(8, 8)):
    for split in ("train", "test"):
        for name in ("a", "b"):
            make_files(root / split / name, count, sizes=(size,))
    return root


def test_module_from_python(tmp_path):
    data = ImageDataModule(
        DataConfig(name="folder", root=str(folder_set(tmp_path / "pets")), batch_size=8, test_length=10)
    )
    images, labels, indices = next(iter(data.train_dataloader()))
    assert (
        images.shape == (8, 3, 8, 8)
        and set(labels.tolist()) == {0, 1}
        and (labels == data.train_source.labels[indices]).all()
    )
    assert data.resident and data.classes == ["a", "b"] and data.name == "pets" and data.mean == [0.485, 0.456, 0.406]
    assert len(data.test_source) == 10 and len(data.bank(6)) == 6 and len(data.bank()) == 24 and len(data.test(0)) == 10
    assert torch.bincount(data.bank(6).labels).tolist() == [3, 3]
    assert sum(ids(data.test_dataloader()), []) == list(range(10))
    assert data.to("cpu")


def test_images_without_a_label_train_but_neither_vote_nor_are_scored(tmp_path):
    make_files(tmp_path, 6)
    names = sorted(path.name for path in tmp_path.iterdir())
    for split in ("train", "test"):
        lines = [f"{name}\t{'ab'[i % 2]}" if i < 4 else name for i, name in enumerate(names)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    data = ImageDataModule(DataConfig(name="list", root=str(tmp_path), batch_size=2))
    assert len(data.train_source) == 6 and len(data.test_source) == 6
    for part in (data.bank(), data.test(0), data.bank(5)):
        assert part.labels.tolist() == [0, 1, 0, 1] and len(part) == 4
    assert len(data.bank(2)) == 2


def test_module_errors(tmp_path):
    root = folder_set(tmp_path / "pets")
    with pytest.raises(UserError, match="batch_size 25 is larger than the data set of 24"):
        ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=25)).setup()
    with pytest.raises(UserError, match="1 ranks x 3 accumulated"):
        ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=8), accumulate=3).setup()
    with pytest.raises(UserError, match="unknown data set"):
        ImageDataModule(DataConfig(name="foldr"))
    (root / "train" / "a" / "000.png").write_bytes(b"x")
    data = ImageDataModule(
        DataConfig(name="folder", root=str(root), batch_size=8), quarantine=str(tmp_path / "run" / "quarantine.txt")
    )
    with pytest.raises(UserError, match="1 of the 24 images of pets train do not decode"):
        data.setup()
    assert "000.png\t" in (tmp_path / "run" / "quarantine.txt").read_text()


class Recorder(pl.LightningModule):
    """Trains one number and writes down the indices it is shown; stops after `stop` batches."""

    def __init__(self, stop=None):
        super().__init__()
        self.weight, self.seen, self.stop = torch.nn.Parameter(torch.zeros(())), [], stop

    def training_step(self, batch, batch_idx):
        images, labels, indices = batch
        self.seen.append((self.current_epoch, indices.tolist()))
        return self.weight * images.float().mean()

    def on_train_batch_end(self, *_):
        if self.stop and len(self.seen) == self.stop:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/mid.ckpt")
            self.trainer.should_stop = True
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, root, model, checkpoint=None, resident="auto", accumulate=1, epochs=3):
    data = ImageDataModule(DataConfig(name="folder", root=str(root), batch_size=8, resident=resident, workers=1))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        default_root_dir=str(tmp_path),
    )
    try:
        trainer.fit(model, data, ckpt_path=checkpoint)
    except (KeyboardInterrupt, SystemExit):
        pass
    return model.seen


@pytest.mark.parametrize("resident", ["auto", False])
def test_trainer_resumes_in_mid_epoch_with_the_same_batches(tmp_path, resident):
    root = folder_set(tmp_path / "pets")
    whole = fit(tmp_path, root, Recorder(), resident=resident)
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sum((indices for epoch, indices in whole if epoch == 2), []) == epoch_order(24, 0, 2).tolist()
    for stop in (2, 3, 4):  # within an epoch, at its end, after its first batch
        before = fit(tmp_path, root, Recorder(stop), resident=resident)
        after = fit(tmp_path, root, Recorder(), checkpoint=f"{tmp_path}/mid.ckpt", resident=resident)
        assert before + after == whole, stop


def test_trainer_accumulation_sees_the_same_global_batches(tmp_path):
    root = folder_set(tmp_path / "pets")
    whole, split = fit(tmp_path, root, Recorder(), epochs=1), fit(tmp_path, root, Recorder(), accumulate=2, epochs=1)
    assert [indices for _, indices in whole] == [split[i][1] + split[i + 1][1] for i in range(0, 6, 2)]


@pytest.mark.real
@pytest.mark.skipif("VIT_SUITE_DATA" not in os.environ, reason="needs VIT_SUITE_DATA")
def test_real_tiny_imagenet_from_files_equals_memory():
    common = {"name": "tiny_imagenet", "train_split": "val", "batch_size": 64, "length": 200}
    files = ImageDataModule(DataConfig(resident=False, workers=2, **common), seed=3)
    held = ImageDataModule(DataConfig(resident=True, **common), seed=3)
    assert held.resident and not files.resident
    for one, two in zip(files.train_dataloader(), held.train_dataloader(), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])
