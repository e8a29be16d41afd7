"""`vit-suite make_shards`: what it writes, that it is whole or not there, and what it refuses. Images:
tests/data/conftest.py."""

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.data.conftest import make_shards
from vit_suite.config import DataConfig
from vit_suite.data import pack
from vit_suite.data.decode import decode
from vit_suite.data.registry import open_split, open_test, open_train
from vit_suite.data.source import ArraySource

from .make import config, fails


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_shards_hold_the_images_and_labels_of_the_folder(loose, made):
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["classes.txt", "index.npz", *(f"train-{i:06d}.tar" for i in range(9)), *(f"val-{i:06d}.tar" for i in range(3))]
    )
    for split in ("train", "val"):
        files, packed = open_split(config("folder", loose), split), open_split(config("shards", made), split)
        assert (packed.name, packed.split, packed.classes) == ("photos", split, ["ant", "bee", "cat"]) and len(
            packed
        ) == len(files)
        theirs = {Path(files.path(i)).stem.replace(".", "_"): i for i in range(len(files))}
        mine = [theirs[Path(packed.path(i)).stem.split("-")[1]] for i in range(len(packed))]
        assert sorted(mine) == list(range(len(files))) and mine != sorted(mine)  # all of them, shuffled
        for i, j in enumerate(mine):
            assert packed.content(i) == Path(files.path(j)).read_bytes()  # not encoded again
            assert torch.equal(packed.load(i), files.load(j)) and packed.label(i) == files.label(j)
    assert open_test(config("shards", made)).split == "val" and len(open_train(config("shards", made, length=30))) == 30


def test_equal_input_gives_equal_bytes(loose, made, tmp_path):
    def convert(name, *more):
        assert make_shards(loose, tmp_path / name, *more) == 0
        return tmp_path / name

    assert digests(convert("again", "--shard_images", "8")) == digests(made)
    other = convert("other", "--shard_images", "8", "--seed", "1")
    assert digests(other)["train-000000.tar"] != digests(made)["train-000000.tar"]
    kept = open_train(config("shards", convert("kept", "--keep_order", "--splits", "train")))
    assert kept.labels.tolist() == [0] * 24 + [1] * 24 + [2] * 24 and not list((tmp_path / "kept").glob("val*"))


def test_sizes_of_shards(tmp_path):
    def parts(*sizes, limit=10**9, count=10**9):
        return [
            [name for ((name, _),) in part]
            for part in pack.split_up(([(i, bytes(s))] for i, s in enumerate(sizes)), limit, count)
        ]

    end, one = tarfile.RECORDSIZE, 1024  # of a member of 1 to 512 bytes, its header included
    assert parts(512, 1, 300, limit=end + 2 * one) == [[0, 1], [2]] and parts(512, 513, 1, limit=end + 2 * one) == [
        [0],
        [1],
        [2],
    ]
    assert (
        parts(1, 9000, 1, limit=end + one) == [[0], [1], [2]]
        and parts(*[1] * 5, count=2) == [[0, 1], [2, 3], [4]]
        and parts() == []
    )


def test_images_without_files_become_png_or_npy():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 6), dtype=np.uint8)
    for images, channels in ((pixels[:, :3], 3), (pixels[:, :1], 1), (pixels, 4)):
        (name, content), *label = pack.sample(ArraySource("set", "train", images, channels, ["a", "b"], [1, -1]), 0, 7)
        assert name == f"00000007-train.{'png' if channels < 4 else 'npy'}" and label == [("00000007-train.cls", b"1")]
        assert (decode(name, channels, content) == images[0]).all()
    assert len(pack.sample(ArraySource("set", "train", pixels, 4, ["a", "b"], [1, -1]), 1, 0)) == 1  # no label, no .cls


def test_the_converter_refuses(loose, shards, capsys, tmp_path):
    def says(*more, output=shards, name="folder", root=loose):
        capsys.readouterr()
        assert make_shards(root, output, *more, name=name) == 2
        return capsys.readouterr().err

    before = digests(shards)
    assert "holds 14 files (classes.txt, ...)" in says() and "no split 'vall'. Did you mean 'val'?" in says(
        "--splits", "vall"
    )
    assert "does not exist" in says(root=tmp_path / "gone", output=tmp_path / "new") and not (tmp_path / "new").exists()
    assert "that the train split lacks" not in says() and digests(shards) == before
    assert make_shards(shards, tmp_path / "recut", "--keep_order", name="shards") == 0
    assert open_train(config("shards", tmp_path / "recut")).content(70) == open_train(config("shards", shards)).content(
        70
    )
    assert make_shards(loose, shards, "--overwrite") == 0
    assert len(digests(shards)) == 4 and len(open_train(config("shards", shards))) == 72
    (shards / "letter.txt").write_text("mine")
    assert "other things than shards (letter.txt)" in says("--overwrite") and len(digests(shards)) == 5


def test_a_conversion_that_breaks_off_leaves_the_old_set(loose, shards, monkeypatch, tmp_path):
    before = digests(shards)
    for function in ("write_tar", "open_index"):
        with monkeypatch.context() as patch:
            patch.setattr(pack, function, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert make_shards(loose, shards, "--overwrite") == 130
        assert digests(shards) == before
    replace = os.replace

    def stop(source, target):
        if Path(target) == shards / "train-000002.tar":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:  # in the middle of moving: no half set passes for a whole
        patch.setattr(os, "replace", stop)
        assert make_shards(loose, shards, "--overwrite", "--shard_images", "5") == 130
    fails(config("shards", shards), "is missing, but index.npz names it")


def test_what_cannot_be_read_is_listed_and_the_rest_is_written(tmp_path, capsys):
    for i in range(5):
        (tmp_path / "s").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "s" / f"{i}.png")
    (tmp_path / "s" / "x.png").symlink_to("gone")
    (tmp_path / "s" / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "s" / "pipe.png")
    assert make_shards(tmp_path / "s", tmp_path / "o", name="flat") == 0
    said = capsys.readouterr()
    assert "5 images in 1 shard," in said.out and "3 files could not be read and are left out" in said.err
    assert all(name in said.err for name in ("x.png", "self.png", "pipe.png"))
    assert len(open_split(DataConfig(name="shards", root=str(tmp_path / "o")), "train")) == 5


def test_class_names_that_are_no_utf8_or_hold_a_newline_or_spaces(tmp_path):
    for name in ("caf\udce9", "a\nb", " ", "b "):
        folder = os.path.join(os.fspath(tmp_path), "s", name)
        os.makedirs(folder)
        Image.new("RGB", (8, 8)).save(os.path.join(folder, "1.png"))
    assert make_shards(tmp_path / "s", tmp_path / "o") == 0
    assert (tmp_path / "o" / "classes.txt").read_text() == "\\x20\na\\nb\nb\\x20\ncaf\\xe9\n"
    source = open_split(DataConfig(name="shards", root=str(tmp_path / "o")), "train")
    assert source.classes == ["\\x20", "a\\nb", "b\\x20", "caf\\xe9"]
    assert sorted(source.labels.tolist()) == [0, 1, 2, 3]
