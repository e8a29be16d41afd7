"""Sets in tar files: what the reader makes of ours and of other people's, the order by shards, and whatever can be
wrong with them.

On real Tiny-ImageNet images where $VIT_SUITE_DATA has them, else on generated JPEGs.
"""

import io
import json
import logging
import os
import shutil
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import column, sha256, words
from vit_suite import cli
from vit_suite.data import shard_index
from vit_suite.data.decode import DecodeError
from vit_suite.data.loader import FileLoader
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import EpochPlan, epoch_order, shard_order
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.reading import read
from vit_suite.data.registry import open_split, open_test, open_train
from vit_suite.data.shards import OPEN, ShardSource
from vit_suite.errors import UserError
from vit_suite.training.keeper import Keeper

from .make import config, fails, picture, tar


def loader(root, world=1, rank=0, workers=0, order="shards", window=2, batch=12, seed=5):
    source = open_train(config("shards", root, order=order))
    plan = EpochPlan(len(source), batch, seed, rank, world, 1, window if order == "shards" else 0, source.shards)
    return FileLoader(source, plan, workers)


def ids(batches):
    return [batch[2].tolist() for batch in batches]


# Order, ranks, resume
# ---------------------------------------------------------------------------------------------------------------


def test_order_by_shards():
    shard = torch.repeat_interleave(
        torch.arange(20), torch.randint(1, 90, (20,), generator=torch.Generator().manual_seed(0))
    )
    total = len(shard)
    orders = [shard_order(shard, 3, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(order.sort().values.tolist() == list(range(total)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4 and torch.equal(shard_order(shard, 3, 1, 1), orders[3])
    for order in orders:
        seen = shard[order].tolist()
        ends = {s: (seen.index(s), total - seen[::-1].index(s)) for s in range(20)}
        assert max(sum(a <= place < b for a, b in ends.values()) for place in range(total)) == 3  # open at a time
        first = list(dict.fromkeys(seen))
        assert first != sorted(first) and sum(a != b for a, b in pairwise(seen)) > total / 3  # mixed within a window
    assert torch.equal(shard_order(shard, 20, 4, 2), epoch_order(total, 4, 2))
    firsts = torch.tensor([int(shard[shard_order(shard, 1, 0, epoch)[0]]) for epoch in range(400)])
    assert torch.bincount(firsts, minlength=20).float().std() < 9  # each shard comes first as often: 4.4 expected


@pytest.mark.parametrize("order", ["shuffle", "shards"])
def test_any_number_of_ranks_sees_the_same_global_batches(made, order):
    whole = ids(loader(made, order=order))
    assert len(whole) == 6 and len(set(sum(whole, []))) == 72
    for world in (2, 4):
        parts = [ids(loader(made, world, rank, order=order)) for rank in range(world)]
        assert [sum(batch, []) for batch in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_within_a_shard_goes_on_with_the_same_images(made, workers):
    whole = loader(made, workers=workers)
    straight = list(whole) + list(whole)
    first = loader(made, workers=workers)
    iterator = iter(first)
    for _ in range(4):  # 48 images: in a window of 16, after its first shards
        next(iterator)
    second = loader(made, workers=workers)
    second.load_state_dict(first.state_dict())
    resumed = list(second) + list(second)
    assert len(resumed) == 8 and ids(resumed) == ids(straight)[4:]
    for one, two in zip(resumed, straight[4:], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for other, now in ((loader(made, window=3), 3), (loader(made, order="shuffle"), 0)):
        with pytest.raises(UserError, match=rf"data.shard_window \(0 for data.order shuffle\) 2, now it is {now}"):
            other.load_state_dict(first.state_dict())


def test_shards_are_read_one_window_after_the_other(made, monkeypatch):
    read, content = [], ShardSource.content
    monkeypatch.setattr(
        ShardSource, "content", lambda self, index: read.append(int(self.shards[index])) or content(self, index)
    )
    list(loader(made, window=3))
    assert len(read) == 72 and all(len(set(read[start : start + 24])) == 3 for start in (0, 24, 48))


def test_no_more_than_so_many_files_are_open(tmp_path):
    for number in range(OPEN + 6):
        tar(tmp_path / f"{number:06d}.tar", [("a.png", (number, 0, 0))])
    source = open_train(config("shards", tmp_path))
    assert [int(source.load(i)[0, 0, 0]) for i in range(len(source))] == list(range(OPEN + 6))
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    assert sum(os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.islink(link)) == OPEN


class Stop(Exception):
    pass


def test_a_resumed_run_ends_with_the_weights_of_a_straight_one(made, monkeypatch, tmp_path):
    def pretrain(folder):
        return cli.main(["pretrain", *words(**options, run__output=tmp_path / folder)])

    own = {
        "name": "shards",
        "root": made,
        "order": "shards",
        "shard_window": 2,
        "resident": False,
        "workers": 1,
        "batch_size": 24,
    }
    options = {f"data__{key}": value for key, value in own.items()} | {
        f"data__{key}": None for key in ("image_size", "length", "test_length")
    }
    options |= {"saving__every_steps": 1, "evaluate__every_epochs": 0}
    assert pretrain("straight") == 0 and len(column(tmp_path / "straight", "train/loss")) == 6
    end, seen = Keeper.on_train_batch_end, []

    def crash(self, *rest):
        seen.append(1)
        if len(seen) == 5:  # in the second epoch, before its second step is saved
            raise Stop
        end(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_batch_end", crash)
        assert pretrain("resumed") == 1
    assert pretrain("resumed") == 0
    assert column(tmp_path / "resumed", "train/loss") == column(tmp_path / "straight", "train/loss")
    assert sha256(tmp_path / "resumed") == sha256(tmp_path / "straight")


# Shards of others
# -------------------------------------------------------------------------------------------------------------------


def test_webdataset_reads_ours(made):
    webdataset = pytest.importorskip("webdataset", reason="needs the webdataset package")
    source = open_train(config("shards", made))
    samples = list(webdataset.WebDataset([str(path) for path in sorted(made.glob("train-*.tar"))], shardshuffle=False))
    assert [sample["jpeg"] for sample in samples] == [source.content(i) for i in range(len(source))]
    assert [int(sample["cls"]) for sample in samples] == source.labels.tolist()


def test_ours_reads_webdatasets(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs the webdataset package")
    tiny = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=2, verbose=0) as sink:
        for i in range(5):
            sink.write(
                {
                    "__key__": f"säm/{i:03d}" + "x" * 120 * (i == 3),
                    "png": tiny + i,
                    "seg.png": tiny,
                    "cls": i % 3,
                    "json": {"label": 9},
                }
            )
    source = open_split(config("shards", tmp_path), "train")
    assert source.labels.tolist() == [0, 1, 2, 0, 1] and source.classes == ["0", "1", "2"]
    assert [int(source.load(i)[0, 0, 0]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert source.path(2) == f"{tmp_path}/train-0001.tar/säm/002.png"


def test_layouts(tmp_path):
    for name in (
        "a/imagenet1k-train-0000.tar",
        "a/imagenet1k-train-0001.tar",
        "a/imagenet1k-validation-00.tar",
        "b/train/0.tar",
        "b/val/0.tar",
    ):
        tar(
            tmp_path / name,
            [
                ("x.jpg.txt", b"no image"),
                ("x.PNG", (len(name), 0, 0)),
                ("x.json", b'{"label": 1}'),
                ("y.webp", (1, 0, 0)),
            ],
        )
    for root in (tmp_path / "a", tmp_path / "b"):
        train, val = open_train(config("shards", root)), open_test(config("shards", root))
        assert (train.split, val.split, len(val)) == ("train", "val", 2) and train.labels[:2].tolist() == [1, -1]
    (tmp_path / "b" / "classes.txt").write_text("red\nblue\n")
    assert open_train(config("shards", tmp_path / "b")).classes == ["red", "blue"]  # beside the folders of the splits
    fails(config("shards", tmp_path / "a"), "no split 'vla'", "Did you mean 'val'?", "train, val", split="vla")
    some = open_train(config("shards", tmp_path / "a" / "imagenet1k-train-{0001..0001}.tar"))
    assert len(some) == 2 and "train-0001.tar/" in some.path(0)
    assert len(open_train(config("shards", tmp_path / "a" / "*-train-*.tar"))) == 4
    assert len(open_train(config("shards", tmp_path / "a" / "imagenet1k-train-{0000..0001}.tar"))) == 4
    one = open_train(config("shards", tar(tmp_path / "c" / "part.tar", [("x.png", (1, 2, 3))])))
    assert (one.split, one.labels, one.classes) == ("all", None, []) and open_test(
        config("shards", tmp_path / "c")
    ).split == "all"


def test_labels(tmp_path):
    def labels(*members):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        tar(
            tmp_path / "x" / "0.tar",
            [(f"{key}.png", (0, 0, 0)) for key in "abc"] + [member for member in members if member],
        )
        if classes:
            (tmp_path / "x" / "classes.txt").write_text(classes)
        return config("shards", tmp_path / "x")

    classes = ""
    assert open_train(
        labels(("a.cls", b" 2\n"), ("c.json", b'{"cls": 0}'), ("b.json", b'{"caption": "x"}'))
    ).labels.tolist() == [2, -1, 0]
    fails(labels(("a.cls", b"dog")), "label 'dog'", "name the classes, one a line", "x/classes.txt")
    fails(labels(("a.json", b"{")), "0.tar/a.json' is not readable text of a label")
    fails(labels(("a.json", b'{"label": [1]}')), "a.json' has the label [1]; expected a number or a word")
    classes = "dog\ncat\n"
    source = open_train(labels(("a.cls", b"cat"), ("b.cls", b"0")))
    assert source.labels.tolist() == [1, 0, -1] and source.classes == ["dog", "cat"]
    fails(labels(("a.cls", b"2")), "have the label 2, but", "names 2 classes")
    fails(labels(("a.cls", b"cow")), "label 'cow', which", "classes.txt' does not have")


def test_an_index_is_made_on_first_use(shards, monkeypatch, caplog):
    made = (shards / "index.npz").read_bytes()
    (shards / "index.npz").unlink()
    with caplog.at_level(logging.INFO, "vit_suite"):
        open_train(config("shards", shards))
        assert len(open_test(config("shards", shards))) == 24
    assert "headers of 9 shards" in caplog.text and "headers of 3 shards" in caplog.text
    assert (shards / "index.npz").read_bytes() == made
    monkeypatch.setattr(shard_index, "scan", None)  # from here on nothing is read again
    assert len(open_train(config("shards", shards))) == 72


def test_a_folder_that_cannot_be_written(shards, monkeypatch, caplog):
    (shards / "index.npz").unlink()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shard_index, "write_atomically", refuse)
    assert len(open_train(config("shards", shards))) == 72
    assert "index.npz cannot be written (Read-only file system): every start reads the headers" in caplog.text


# Bad input
# ----------------------------------------------------------------------------------------------------------------------


def test_nothing_to_read(tmp_path):
    fails(config("shards", tmp_path), "is empty")
    (tmp_path / "a.tgz").write_bytes(b"x")
    fails(config("shards", tmp_path), "no shards in", "1 file (a.tgz)", ".tgz have to be unpacked")
    for address in ("s3://bucket/train-{000..127}.tar", "pipe:curl x", "https://a.b/c.tar"):
        fails(config("shards", address), "is an address", "local or network disk")
    fails(config("shards", tmp_path / "gone" / "a-{0..3}.tar"), "gone' does not exist")
    tar(tmp_path / "t-0.tar", [])
    fails(config("shards", tmp_path / "t-{0..3}.tar"), "names 4 shards, but t-1.tar and 2 more does not exist")
    fails(config("shards", tmp_path), "the 1 shards", "are empty")
    tar(tmp_path / "u" / "0.tar", [("a.jp3", b"x"), ("a.cls", b"1")])
    fails(config("shards", tmp_path / "u"), "u/0.tar' holds no images", "found .cls, .jp3")
    picture(tmp_path / "w" / "train" / "a" / "1.png")
    data = ImageDataModule(config("folder", tmp_path / "w", order="shards", batch_size=1))
    with pytest.raises(UserError, match="data.order shards needs data.name shards; folder"):
        data.setup()


@pytest.mark.parametrize("cut", ["data", "header", "end", "middle", "empty", "text"])
def test_a_shard_that_is_not_whole(shards, cut):
    path = shards / "train-000004.tar"
    content = path.read_bytes()
    with tarfile.open(path) as file:
        last = file.getmembers()[-2]
    spoilt = {
        "data": content[: last.offset_data + 10],
        "header": content[: last.offset + 100],
        "end": content[: last.offset],  # whole members, no end mark
        "middle": content[: last.offset] + b"x" * 512 + content[last.offset + 512 :],
        "empty": b"",
        "text": b"<html>404 not found</html>" * 100,
    }
    path.write_bytes(spoilt[cut])
    if cut != "middle":  # as long as before
        fails(
            config("shards", shards),
            "train-000004.tar' has",
            "cut off, or was written again",
            f"delete '{shards}/index.npz'",
        )
    (shards / "index.npz").unlink()
    fails(config("shards", shards), "train-000004.tar' is not a whole uncompressed tar file")


def test_shards_that_are_gone_or_written_again(shards):
    source = open_train(config("shards", shards))
    (shards / "train-000007.tar").rename(shards / "moved")
    fails(config("shards", shards), "train-000007.tar' is missing, but index.npz names it")
    with pytest.raises(UserError, match="train-000007.tar' cannot be read: No such file"):
        source.load(60)
    shutil.copy(shards / "train-000006.tar", shards / "train-000007.tar")
    length = (shards / "moved").stat().st_size
    os.truncate(
        shards / "train-000007.tar", length
    )  # as long as the one in the index: zeros at the end of tar files are usual
    with pytest.raises(
        UserError, match="train-000007.tar' was written again since it was indexed .*delete '.*index.npz'"
    ):
        open_train(config("shards", shards)).load(60)
    (shards / "index.npz").write_bytes(b"PK not an index")
    fails(config("shards", shards), "index.npz' is damaged")


def test_images_that_do_not_decode_are_listed(tmp_path):
    good = [(f"{i:02d}.png", (i, 0, 0)) for i in range(20)]
    tar(tmp_path / "set" / "train-0.tar", [*good, ("bad.jpg", b"not an image"), ("void.png", b"")])
    source = open_split(config("shards", tmp_path / "set"), "train")
    for index, reason in ((20, "cannot identify image file the file"), (21, "empty")):
        with pytest.raises(DecodeError, match=reason):
            source.load(index)
    quarantine = Quarantine(tmp_path / "quarantine.txt", limit=0.2)
    batches = list(FileLoader(source, EpochPlan(22, 11), 0, quarantine))
    assert all(
        int(image[0, 0, 0]) == index
        for images, _, indices in batches
        for image, index in zip(images, indices, strict=True)
    )
    lines = (tmp_path / "quarantine.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == [
        f"{tmp_path}/set/train-0.tar/{name}" for name in ("bad.jpg", "void.png")
    ]
    assert [index for index, image in read(source, range(22)) if not isinstance(image, DecodeError)] == list(range(20))


def test_arrays_and_tiffs_are_decoded_from_memory(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)
    buffers = {"a.npy": io.BytesIO(), "b.tif": io.BytesIO()}
    np.save(buffers["a.npy"], pixels)
    Image.fromarray(pixels.transpose(1, 2, 0), "RGBA").save(buffers["b.tif"], "TIFF")
    tar(tmp_path / "0.tar", [(name, buffer.getvalue()) for name, buffer in buffers.items()])
    source = open_train(config("shards", tmp_path, channels=4))
    assert (source.load(0).numpy() == pixels).all() and (source.load(1).numpy() == pixels).all()


def test_held_in_memory_and_written_down(made):
    data = ImageDataModule(config("shards", made, order="shards", shard_window=1, batch_size=8))
    assert (
        data.resident and len({int(data.train_source.shards[i]) for i in next(iter(data.train_dataloader()))[2]}) == 1
    )
    assert json.dumps(data.train_dataloader().state_dict()) and data.train_dataloader().state_dict()["window"] == 1
