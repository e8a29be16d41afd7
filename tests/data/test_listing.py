"""What a folder's listing takes, what it leaves out, and that it says so."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from tests.data.make import config, fails, picture
from vit_suite.data import listing
from vit_suite.data.decode import DecodeError
from vit_suite.data.listing import Listing, is_output, undecodable
from vit_suite.data.module import ImageDataModule
from vit_suite.data.registry import open_split, open_test, open_train
from vit_suite.data.source import FileSource
from vit_suite.data.truth import open_truths
from vit_suite.errors import UserError
from vit_suite.files import printable


@pytest.fixture(autouse=True)
def said(caplog):
    """What a command would say on the screen."""
    listing._said.clear()
    caplog.set_level(logging.WARNING, "vit_suite")
    return lambda: "\n".join(record.message for record in caplog.records)


def names(source):
    return [os.path.relpath(source.path(i), source.root) for i in range(len(source))]


def test_endings_that_are_read_and_those_that_are_left_out(tmp_path, said):
    image = Image.new("RGB", (32, 32))
    kinds = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.mpo": "JPEG", "d.tga": "TGA", "e.j2k": "JPEG2000"}
    for name, kind in (kinds | {"noending": "PNG", "f.jpg_large": "JPEG"}).items():
        image.save(tmp_path / name, kind)
    (tmp_path / "IM.0001").write_bytes(bytes(128) + b"DICM" + bytes(40))  # as scanners call their files
    for name in ("g.jxl", "h.JXL", "notes.txt", "table.csv"):
        (tmp_path / name).write_bytes(b"\0")
    source = open_train(config("flat", tmp_path))
    assert names(source) == sorted(kinds)
    assert all(source.load(i).shape == (3, 32, 32) for i in range(len(source)))
    line = said()
    assert "2 .jxl" in line and "1 .jpg_large (looks like JPEG;" in line
    assert "1 .0001 (looks like DICOM; call such files .dcm)" in line
    assert "1 without an ending (looks like PNG;" in line and "txt" not in line and "csv" not in line
    open_train(config("flat", tmp_path))
    assert said() == line  # once


def test_endings_that_are_listed_and_cannot_be_decoded_here(tmp_path, said, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / "b.dcm").write_bytes(b"\0")
    monkeypatch.setattr(listing.importlib.util, "find_spec", lambda name: None)
    assert len(open_train(config("flat", tmp_path))) == 2
    assert "1 .dcm files cannot be decoded here: pip install 'vit-suite[science]'" in said()
    assert undecodable(".png") is None


def test_pipes_broken_links_and_folders_without_permission_go_to_the_quarantine(tmp_path, said, monkeypatch):
    for i in range(20):
        picture(tmp_path / "set" / f"{i:02d}.png", (i, i, i))
    root = tmp_path / "set"
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "loop").symlink_to("loop")
    (root / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(root / "x.jpg")
    (root / "lost+found").mkdir()
    scan = os.scandir
    monkeypatch.setattr(
        listing.os, "scandir", lambda p: denied(p) if str(p).endswith("lost+found") else scan(p)
    )  # root may read everything, so the refusal is played
    quarantine = tmp_path / "quarantine.txt"
    data = ImageDataModule(config("flat", root, max_corrupt=0.3, batch_size=2), quarantine=str(quarantine))
    assert len(data.train_source) == 20 and data.resident
    reasons = dict(line.split("\t") for line in quarantine.read_text().splitlines())
    assert {os.path.basename(path) for path in reasons} == {"self.jpg", "gone.jpg", "x.jpg", "lost+found"}
    assert reasons[f"{root}/x.jpg"] == "is no regular file"
    assert reasons[f"{root}/lost+found"] == "the folder cannot be listed: Permission denied"
    with pytest.raises(UserError, match="of set all do not decode"):
        ImageDataModule(config("flat", root, batch_size=2)).setup()


def denied(path):
    raise PermissionError(13, "Permission denied", str(path))


def test_a_folder_that_is_linked_twice_counts_once(tmp_path, said):
    for i in range(3):
        picture(tmp_path / "set" / "photos" / f"{i}.png", (i, 0, 0))
        picture(tmp_path / "elsewhere" / f"{i}.png", (i, 9, 0))
    root = tmp_path / "set"
    (root / "again").symlink_to("photos")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "up").symlink_to("..")
    source = open_train(config("flat", root))
    assert names(source) == [f"a/{i}.png" for i in range(3)] + [f"photos/{i}.png" for i in range(3)]
    assert "linked folders are also met elsewhere, and count once: again, b, up" in said()


def test_run_directories_and_exports_are_no_images(tmp_path, said):
    for name in ("cat", "dog"):
        for i in range(4):
            picture(tmp_path / name / f"{i}.png", (i, 0, 0))
    picture(tmp_path / "runs" / "one" / "sheets" / "1.png")
    (tmp_path / "runs" / "one" / "config.yaml").write_text("method: {}\n")
    (tmp_path / "runs" / "one" / "metrics.csv").write_text("step\n")
    picture(tmp_path / "attention" / "cat" / "0_mean_overlay.png")
    (tmp_path / "attention" / "manifest.csv").write_text(listing.MANIFEST + "\n")
    folder, flat = open_train(config("folder", tmp_path)), open_train(config("flat", tmp_path))
    assert folder.classes == ["cat", "dog"] and len(folder) == len(flat) == 8
    assert "folders that vit-suite wrote are left out: attention, runs/one" in said()
    assert not is_output(str(tmp_path / "cat"), {"0.png"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.csv").write_text("file,label\n")
    assert not is_output(str(tmp_path / "other"), {"manifest.csv"})


def test_loose_images_beside_class_folders_are_said_or_refused(tmp_path, said):
    for i in range(3):
        picture(tmp_path / "cat" / f"{i}.png")
    picture(tmp_path / "loose.png")
    assert len(open_train(config("folder", tmp_path))) == 3
    assert "1 images directly in" in said() and "belong to no class" in said()
    for i in range(5):
        picture(tmp_path / f"{i}.png")
    fails(config("folder", tmp_path), "only 3 images in class folders", "6 images directly in it", "data.name flat")


def test_a_class_without_a_readable_image_is_named(tmp_path, said):
    for split in ("train", "test"):
        picture(tmp_path / split / "a" / "1.png")
    picture(tmp_path / "test" / "b" / "1.png")
    for empty in ("b", "c"):
        (tmp_path / "train" / empty).mkdir()
    (tmp_path / "train" / "b" / "1.jxl").write_bytes(b"x")
    assert open_train(config("folder", tmp_path)).classes == ["a"]
    assert "2 folders hold no image that is read, and are no classes: b, c" in said() and "1 .jxl" in said()
    fails(config("folder", tmp_path), "train split lacks: b", "hold no image that is read", split="test")


def test_names_that_are_no_utf8_or_hold_control_characters(tmp_path):
    odd = ["caf\udce9", "a\nb", "=1+1", "<script>", 'quo"te', "x\ry"]
    for split in ("train", "test"):
        for name in odd:
            folder = os.path.join(os.fspath(tmp_path), split, name)
            os.makedirs(folder)
            Image.new("RGB", (8, 8)).save(os.path.join(folder, "1\r2.png"))
    train, test = open_train(config("folder", tmp_path)), open_test(config("folder", tmp_path))
    assert train.classes == test.classes == [printable(name) for name in sorted(odd)]
    assert set(train.classes) == {"caf\\xe9", "a\\nb", "=1+1", "<script>", 'quo"te', "x\\ry"}
    assert train.labels.tolist() == test.labels.tolist() == list(range(6))
    assert all("\n" not in name and name.encode("utf-8") for name in train.classes)
    assert all(train.load(i).shape == (3, 8, 8) for i in range(6))


# Lists, and images held out
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,labels",
    [
        ("filename,species\na.png,wren\nb c.png,owl\n", [1, 0]),
        ("species;Image\nwren;a.png\nowl;b c.png\n", [1, 0]),
        ("id,path,label,width\n7,a.png,2,9\n8,b c.png,10,9\n", [0, 1]),
        ("\ufefffilename,label\r\na.png,x\r\nb c.png,\r\n", [0, -1]),
        ("a.png,wren\nb c.png,owl\n", [1, 0]),
        ("filename\na.png\nb c.png\n", None),
    ],
)
def test_csv_with_named_columns(tmp_path, text, labels):
    for name in ("a.png", "b c.png"):
        picture(tmp_path / name)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    source = open_train(config("list", tmp_path / "list.csv"))
    assert names(source) == ["a.png", "b c.png"]
    assert (source.labels is None) if labels is None else source.labels.tolist() == labels


def test_csv_columns_that_say_nothing(tmp_path):
    picture(tmp_path / "a.png")
    for text, words in (
        ("one,two,three\na.png,1,2\n", "has the columns one, two, three: name the one that holds paths filename"),
        ("filename,two,three\na.png,1,2\n", "name the one of the classes label"),
        ("", "names no images"),
    ):
        (tmp_path / "list.csv").write_text(text)
        fails(config("list", tmp_path / "list.csv"), words)


def test_a_list_that_names_an_image_twice_or_does_not_end_a_quotation(tmp_path, said):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "list.csv").write_text("filename,label\na.png,x\nb.png,y\na.png,x\nb.png,x\nc.png,x\n")
    source = open_train(config("list", tmp_path / "list.csv"))
    assert names(source) == ["a.png", "b.png", "c.png"] and source.labels.tolist() == [0, 1, 0]
    assert "2 lines left out, whose image an earlier line names (a.png); 1 of them with another label" in said()
    (tmp_path / "list.csv").write_text('filename,label\n"a.png,x\n' + "b.png,y\n" * 20_000)
    fails(config("list", tmp_path / "list.csv"), "is no CSV that can be read", "a quotation mark left open?")
    (tmp_path / "list.txt").write_text("9" * 400)  # longer than the name of a file can be
    fails(config("list", tmp_path / "list.txt"), "none of the first 1 path in", "First: 999")
    (tmp_path / "list.txt").write_text("a.png\nb\0.png")
    fails(config("list", tmp_path / "list.txt"), "a path with a zero byte")


def test_a_table_with_another_ending(tmp_path):
    """Its first line is no image, and its columns are no class."""
    picture(tmp_path / "a.png")
    for name in ("list.tsv", "list.txt"):
        (tmp_path / name).write_text("filename\tlabel\na.png\tx\n")
        source = open_train(config("list", tmp_path / name))
        assert names(source) == ["a.png"] and source.classes == ["x"]


def test_csv_splits_in_a_folder(tmp_path):
    picture(tmp_path / "a.png")
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("filename,label\na.png,x\n")
    assert open_train(config("list", tmp_path)).labels.tolist() == [0]
    assert open_test(config("list", tmp_path)).split == "test"


def test_holdout_splits_by_class_alike_in_every_command(tmp_path):
    for name, count in (("cat", 20), ("dog", 10)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png", (i, 0, 0))
    cfg = config("folder", tmp_path, holdout=0.2)
    train, test = open_train(cfg, seed=3), open_test(cfg, seed=4)
    assert (train.split, test.split, len(train), len(test)) == ("train", "test", 24, 6)
    assert np.bincount(test.labels).tolist() == [4, 2] and train.classes == test.classes == ["cat", "dog"]
    paths = [{part.path(i) for i in range(len(part))} for part in (train, test)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 30
    other = open_test(config("folder", tmp_path, holdout=0.2, holdout_seed=1))
    assert {other.path(i) for i in range(6)} != paths[1]
    data = ImageDataModule(cfg)
    assert len(data.bank()) == 24 and len(data.test()) == 6 and not data.scored_on_itself
    with pytest.raises(UserError, match="splits train and test, not 'val'"):
        open_split(cfg, "val")
    with pytest.raises(UserError, match="leaves a split empty"):
        open_test(config("folder", tmp_path, holdout=0.01))


def test_holdout_is_refused_where_a_set_has_its_own_split(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "a" / "1.png")
    fails(config("folder", tmp_path, holdout=0.5), "for a set without a split to score", "has 'val'")


def test_walk_gives_failures_not_tracebacks(tmp_path):
    with pytest.raises(OSError):
        list(Listing(tmp_path / "nowhere").walk())
    one = Listing(tmp_path)
    assert list(one.walk("nowhere")) == [] and isinstance(one.failures[0], DecodeError)


@pytest.mark.parametrize("name", ["pipe", "manifest.csv"])
def test_a_pipe_of_any_name_in_a_folder_hangs_nothing(tmp_path, name):
    """The listing looks into files with other endings, and into manifests."""
    picture(tmp_path / "set" / "in" / "1.png")
    os.mkfifo(tmp_path / "set" / "in" / name)
    assert len(open_train(config("flat", tmp_path / "set"))) == 1


def test_pipes_in_place_of_lists_shards_truths_and_masks(tmp_path):
    picture(tmp_path / "images" / "a.png")
    for place in ("shards/train-0.tar", "masks/a.png", "boxes/a.xml", "text/boxes.txt", "list.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / place)
    fails(config("shards", tmp_path / "shards"), "train-0.tar' is no regular file")
    fails(config("list", tmp_path / "list.txt"), "list.txt' is no regular file")
    _, truths = open_truths(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(DecodeError, match="is no regular file"):
        truths.load(0)
    for folder in ("boxes", "text"):
        with pytest.raises(UserError, match="expected a folder of masks or VOC XML"):
            open_truths(tmp_path / "images", tmp_path / folder)
    assert FileSource("x", "all", tmp_path, ["masks/a.png"], 3).content(0) is None
