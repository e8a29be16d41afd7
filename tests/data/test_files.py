"""Folders, trees, lists and Tiny-ImageNet, made by hand; every wrong layout gives one UserError that says what was
found."""

import os

import pytest
import torch

from vit_suite.config import DataConfig
from vit_suite.data.registry import open_split, open_test, open_train
from vit_suite.errors import UserError

from .make import config, fails, picture


def test_folder_with_splits(tmp_path):
    root = tmp_path / "pets of mine"
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for number, name in enumerate(("cat", "dög")):
            for i in range(count):
                picture(root / split / name / "deep er" / f"b {i}.png", (number * 100, i, 0))
    (root / "train" / "empty").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    train, test = open_train(config("folder", root)), open_test(config("folder", root))
    assert (train.name, train.split, test.split) == ("pets of mine", "train", "test")
    assert train.classes == ["cat", "dög"] and train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(test) == 2
    assert train.load(4)[:, 0, 0].tolist() == [100, 1, 0]
    assert train.path(4) == str(root / "train" / "dög" / "deep er" / "b 1.png")
    assert open_split(config("folder", root), "validation").split == "val"
    fails(config("folder", root), "no split 'tets'", "Did you mean 'test'?", "train, val, test", split="tets")


def test_folder_test_labels_follow_the_train_classes(tmp_path):
    for name in "abc":
        picture(tmp_path / "train" / name / "1.png")
    picture(tmp_path / "test" / "c" / "1.png")
    test = open_test(config("folder", tmp_path))
    assert test.classes == ["a", "b", "c"] and test.labels.tolist() == [2]
    picture(tmp_path / "test" / "z" / "1.png")
    fails(config("folder", tmp_path), "1 class that the train split lacks: z", split="test")


def test_folder_without_splits_serves_both_ends(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.png")
    cfg = config("folder", tmp_path)
    assert len(open_train(cfg)) == len(open_test(cfg)) == 2 and open_train(cfg).split == "all"
    fails(
        config("folder", tmp_path), "no split 'val'", "class folders without splits", "--data.holdout 0.2", split="val"
    )


def test_folder_with_only_train_cannot_be_scored(tmp_path):
    picture(tmp_path / "train" / "a" / "1.png")
    fails(config("folder", tmp_path), "no split to score", "found train", split=None)


def test_folder_wrong_layouts(tmp_path):
    fails(config("folder", tmp_path / "nowhere"), "does not exist", "VIT_SUITE_DATA", "data.root")
    (tmp_path / "empty").mkdir()
    fails(config("folder", tmp_path / "empty"), "is empty")
    picture(tmp_path / "loose" / "1.png")
    fails(config("folder", tmp_path / "loose"), "no class folders", "1 file (1.png)", "data.name flat")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "b.txt").write_text("x")
    fails(config("folder", tmp_path / "texts"), "no class folders with images", "1 folder (a)")
    fails(config("folder", tmp_path / "texts" / "a" / "b.txt"), "is a file")


def test_no_root_at_all(monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_SUITE_DATA", raising=False)
    fails(DataConfig(name="folder"), "data.root", "VIT_SUITE_DATA")
    monkeypatch.setenv("VIT_SUITE_DATA", str(tmp_path / "gone"))
    fails(DataConfig(name="folder"), "$VIT_SUITE_DATA", "gone", "does not exist")
    picture(tmp_path / "gone" / "a" / "1.png")
    assert len(open_train(DataConfig(name="folder"))) == 1


def test_unknown_name(tmp_path):
    fails(config("cifar01", tmp_path), "unknown data set", "'cifar01'", "Did you mean 'cifar10'?", "tiny_imagenet")


def test_flat_tree(tmp_path):
    for name in ("b.png", "a/1.JPG", "a/b/2.webp", ".hidden/3.png", "a/.4.png"):
        picture(tmp_path / name)
    (tmp_path / "a" / "up").symlink_to(tmp_path)  # a link back up must not loop
    source = open_train(config("flat", tmp_path))
    assert [os.path.relpath(source.path(i), tmp_path) for i in range(len(source))] == ["a/1.JPG", "a/b/2.webp", "b.png"]
    assert source.labels is None and source.classes == [] and source.label(0) == -1
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").write_text("x")
    fails(config("flat", tmp_path / "none"), "no images under", "1 file (a.txt)")


def test_list_of_paths(tmp_path):
    for name in ("one.png", "sub/two three.png", "four.png"):
        picture(tmp_path / name)
    file = tmp_path / "my list.txt"
    file.write_text(f"# a comment\none.png 10\n\nsub/two three.png\t2\n{tmp_path}/four.png\t10\n", encoding="utf-8")
    source = open_train(config("list", file))
    assert source.classes == ["2", "10"] and source.labels.tolist() == [1, 0, 1]  # numbers sort as numbers
    assert (
        source.load(1).shape == (3, 8, 8) and source.path(2) == str(tmp_path / "four.png") and source.name == "my list"
    )
    file.write_text("one.png\nsub/two three.png\n")  # spaces without a tab: the line ends like an image
    assert open_train(config("list", file)).labels is None
    file.write_text("one.png red\nsub/two three.png\n")
    assert open_train(config("list", file)).labels.tolist() == [0, -1]


def test_list_folder_and_bad_lists(tmp_path):
    picture(tmp_path / "x.png")
    picture(tmp_path / "y.png")
    (tmp_path / "train.txt").write_text("x.png\tb\ny.png\tc\n")
    (tmp_path / "val.txt").write_text("x.png\tc\n")
    assert open_test(config("list", tmp_path)).labels.tolist() == [1]  # classes of train
    (tmp_path / "test.txt").write_text("x.png\ta\ny.png\tc\n")  # a would move b and c up by one
    fails(config("list", tmp_path), "1 class that train.txt lacks: a", split="test")
    (tmp_path / "test.txt").unlink()
    (tmp_path / "bad.txt").write_text("nope/1.png\nnope/2.png\n")
    fails(config("list", tmp_path / "bad.txt"), "none of the first 2 paths", "nope/1.png", str(tmp_path))
    (tmp_path / "void.txt").write_text("# nothing\n")
    fails(config("list", tmp_path / "void.txt"), "names no images")
    fails(config("list", tmp_path / "x.png"), "not a readable UTF-8 list")
    fails(config("list", tmp_path / "bad.txt"), "no split 'test'", split="test")


def make_tiny(root):
    wnids = ["n02", "n01"]
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tkoala, koala bear\nn99\tother\n")
    for wnid in wnids:
        lines = []
        for i in range(3):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", size=(64, 64))
            lines.append(f"{wnid}_{i}.JPEG\t{i}\t10\t63\t{20 + i}")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("\n".join(lines) + "\n")
    for i in range(2):
        picture(root / "val" / "images" / f"val_{i}.JPEG", size=(64, 64))
    (root / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn01\t0\t32\t44\t62\nval_1.JPEG\tn02\t52\t55\t57\t59\n"
    )
    return root


def test_tiny_imagenet_layout(tmp_path):
    make_tiny(tmp_path / "data" / "tiny-imagenet-200")
    for root in (tmp_path / "data", tmp_path / "data" / "tiny-imagenet-200"):
        train, val = open_train(config("tiny_imagenet", root)), open_test(config("tiny_imagenet", root))
        assert train.classes == ["koala", "goldfish"] and train.labels.tolist() == [
            0,
            0,
            0,
            1,
            1,
            1,
        ]  # the order of wnids.txt
        assert train.boxes[5].tolist() == [2, 10, 64, 23] and train.boxes.dtype == torch.float32
        assert val.split == "val" and val.labels.tolist() == [1, 0] and val.boxes[0].tolist() == [0, 32, 45, 63]
        assert train.path(5).endswith("train/n01/images/n01_2.JPEG")
        assert train.subset([5]).boxes.tolist() == [[2, 10, 64, 23]]


def test_tiny_imagenet_wrong_layouts(tmp_path):
    root = make_tiny(tmp_path / "tiny-imagenet-200")
    fails(config("tiny_imagenet", tmp_path), "no split 'test'", "train, val", split="test")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n03 0 0 1 1\n")
    fails(config("tiny_imagenet", tmp_path), "val_annotations.txt", "n03", split="val")
    (root / "wnids.txt").write_text("n01\nn07\n")
    fails(config("tiny_imagenet", tmp_path), "is missing", "n07")
    (root / "wnids.txt").unlink()
    fails(
        config("tiny_imagenet", tmp_path),
        "no Tiny-ImageNet under",
        "wnids.txt",
        "1 folder (tiny-imagenet-200)",
        "stanford",
    )


def test_length_is_stratified_and_depends_on_the_seed_alone(tmp_path):
    for name, count in (("a", 40), ("b", 20), ("c", 4)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png", size=(1, 1))
    cfg = config("folder", tmp_path, length=16, test_length=8)
    first, again, other = open_train(cfg, 1), open_train(cfg, 1), open_train(cfg, 2)
    assert torch.bincount(first.labels).tolist() == [10, 5, 1]
    assert first.indices.tolist() == again.indices.tolist() != other.indices.tolist()
    assert len(open_test(cfg)) == 8 and len(open_train(config("folder", tmp_path, length=1000))) == 64
    with pytest.raises(UserError, match="data.length is 0"):
        open_train(config("folder", tmp_path, length=0))


@pytest.mark.real
@pytest.mark.skipif("VIT_SUITE_DATA" not in os.environ, reason="needs VIT_SUITE_DATA")
def test_real_tiny_imagenet():
    source = open_split(DataConfig(name="tiny_imagenet"), "val")
    assert len(source) == 2500 and len(source.classes) == 50 and source.name == "Tiny-ImageNet (50 classes)"
    assert torch.bincount(source.labels).tolist() == [50] * 50
    assert (source.boxes[:, 2:] > source.boxes[:, :2]).all() and source.boxes.max() == 64
    assert all(source.load(i).shape == (3, 64, 64) for i in range(0, 2500, 50))  # some are grayscale on disk


@pytest.mark.real
@pytest.mark.skipif("VIT_SUITE_DATA" not in os.environ, reason="needs VIT_SUITE_DATA")
def test_real_cifar10_jpeg():
    train, test = open_train(DataConfig(name="cifar10", length=500)), open_test(DataConfig(name="cifar10"))
    assert (train.name, test.name) == ("CIFAR-10 (JPEG)",) * 2 and len(test) == 10_000
    assert torch.bincount(train.labels).tolist() == [50] * 10 and train.classes[0] == "airplane"
    images = torch.stack([train.load(i) for i in range(500)]) / 255
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.02)
