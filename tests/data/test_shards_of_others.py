"""What other people's shards hold: names with dots, links, labels from 1, an index that lies."""

import logging
import os
import tarfile

import numpy as np
import pytest

from vit_suite.data import shards as shards_module
from vit_suite.data.registry import open_train

from .make import config, fails, tar


def names_of(source):
    return [os.path.basename(source.path(i)) for i in range(len(source))]


def test_keys_with_dots_count_as_they_are_meant(tmp_path, caplog):
    dotted = [(f"IMG.202{i}.png", (i, 0, 0)) for i in range(3)] + [
        (f"IMG.202{i}.cls", str(i).encode()) for i in range(3)
    ]
    tar(tmp_path / "a" / "0.tar", dotted)
    source = open_train(config("shards", tmp_path / "a"))
    assert names_of(source) == ["IMG.2020.png", "IMG.2021.png", "IMG.2022.png"] and source.labels.tolist() == [0, 1, 2]
    fields = [("a.png", (1, 0, 0)), ("a.seg.png", (9, 9, 9)), ("a.cls", b"1.0"), ("a.jpg", b"x")]
    tar(tmp_path / "b" / "0.tar", fields)
    with caplog.at_level(logging.WARNING, "vit_suite"):
        source = open_train(config("shards", tmp_path / "b"))
    assert names_of(source) == ["a.png"] and source.labels.tolist() == [1]  # 1.0 is 1; a.seg.png is a field
    assert "1 images are left out" in caplog.text and "a.jpg" in caplog.text


def test_links_within_a_shard_are_followed_and_broken_ones_counted(tmp_path, caplog):
    path = tar(tmp_path / "0.tar", [("x/a.png", (7, 0, 0)), ("x/a.cls", b"0")])
    with tarfile.open(path, "a") as file:
        for name, target, kind in (
            ("x/b.png", "x/a.png", tarfile.LNKTYPE),
            ("x/c.png", "a.png", tarfile.SYMTYPE),
            ("x/d.png", "gone.png", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    with caplog.at_level(logging.WARNING, "vit_suite"):
        source = open_train(config("shards", tmp_path))
    assert names_of(source) == ["a.png", "b.png", "c.png"]
    assert all(int(source.load(i)[0, 0, 0]) == 7 for i in range(3))
    assert "1 images are left out" in caplog.text and "d.png" in caplog.text


def test_labels_that_begin_at_1_are_said(tmp_path, caplog):
    tar(tmp_path / "0.tar", [("a.png", (0, 0, 0)), ("a.cls", b"1"), ("b.png", (0, 0, 0)), ("b.cls", b"2")])
    with caplog.at_level(logging.WARNING, "vit_suite"):
        source = open_train(config("shards", tmp_path))
    assert len(source.classes) == 3 and "begin at 1: the classes below have no images" in caplog.text


@pytest.mark.parametrize("size", [2**40, 2**62, -1])
def test_an_index_that_points_outside_of_its_shard(shards, size):
    open_train(config("shards", shards))
    with np.load(shards / "index.npz") as stored:
        arrays = {key: stored[key].copy() for key in stored.files}
    arrays["sizes"][0] = size
    np.savez(shards / "index.npz", **arrays)
    fails(config("shards", shards), "is damaged, or no index of shards", "delete it")


def test_a_descriptor_is_opened_in_the_process_that_reads(shards):
    source = open_train(config("shards", shards))
    before = source.content(0)
    mine = shards_module._open(source._shard(0), False, os.getpid()).number
    read, write = os.pipe()
    child = os.fork()
    if not child:  # closes what it opened itself, and nothing of its parent's
        found = source.content(0) == before
        other = shards_module._open(source._shard(0), False, os.getpid()).number
        os.write(write, b"1" if found and other != mine else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1" and source.content(0) == before
