"""Batches from files and from memory: bad files, odd sizes, workers."""

import os

import pytest
import torch
from PIL import Image

from tests.data.make import make_files, resident
from vit_suite.data.decode import DecodeError
from vit_suite.data.loader import FileLoader, _Decoder, auto_workers
from vit_suite.data.order import EpochPlan, epoch_order
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.reading import read
from vit_suite.data.resident import make_resident
from vit_suite.data.source import ResidentSource, Subset
from vit_suite.errors import UserError


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
    sent = _Decoder(source).__getitems__(next(plan.batches(0)))
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
    listed = tmp_path / "hopeless.txt"
    with pytest.raises(UserError, match="in a row do not decode.* are listed in .*hopeless.txt"):
        next(iter(FileLoader(hopeless, EpochPlan(4, 4), workers, Quarantine(listed, limit=1.0))))
    assert len(listed.read_text().splitlines()) == 4


def test_wrong_channels_in_a_worker_is_the_same_one_sentence(tmp_path):
    source = make_files(tmp_path / "x")
    source.channels = 5
    words = r"images of set train do not decode .*First: .*has 3 channels, but data.channels is 5\.\)\.$"
    with pytest.raises(UserError, match=words):
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
    assert auto_workers("auto", True) == 0 and auto_workers(3, False) == 3 and 1 <= auto_workers("auto", False) <= 32
    cores = len(os.sched_getaffinity(0))
    assert auto_workers("auto", False, 2 * cores) == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert auto_workers("auto", False, 2 * cores) == 1  # a batch script alone: no cores of its own
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert auto_workers("auto", False, 8) == 6
    with pytest.raises(UserError, match="data.workers is -1"):
        auto_workers(-1, False)


def test_samples_of_a_set_are_not_charged_with_all_its_failures(tmp_path):
    source = make_files(tmp_path / "x", count=100, bad=range(0, 20, 10))
    source.quarantine = Quarantine(limit=0.05)
    for part in (source, source.subset(range(30))):  # 2 of 30 is above 5%, 2 of 100 is not
        bad = [image for _, image in read(part, range(len(part))) if isinstance(image, DecodeError)]
        source.quarantine.report(bad, part.title, len(part))
    assert len(source.quarantine) == 2


def test_get_reports_a_bad_file_and_gives_nothing(tmp_path):
    source = make_files(tmp_path / "x", bad=(2,))
    source.quarantine = Quarantine(limit=0.1)
    assert source.get(2) is None and source.get(5).shape == (3, 8, 8) and len(source.quarantine) == 1
