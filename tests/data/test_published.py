"""Published sets, written here in their real on-disk formats and read by torchvision's own code.

Only checksums are patched: a hand-made file cannot have the published md5.
"""

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision import datasets

from vit_suite.data.published import CIFAR10_CLASSES
from vit_suite.data.registry import open_split, open_test, open_train
from vit_suite.errors import UserError

from .make import config, fails, picture


def without_checksums(monkeypatch, cls):
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cls, name, [[file, None] for file, _ in getattr(cls, name)])
    if hasattr(cls, "meta"):
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})


def pickled(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    without_checksums(monkeypatch, datasets.CIFAR10)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        rows = images[4 * i : 4 * i + 4].reshape(4, 3072)
        pickled(folder / name, {"data": rows, "labels": [(4 * i + k) % 10 for k in range(4)], "batch_label": "x"})
    pickled(folder / "batches.meta", {"label_names": CIFAR10_CLASSES, "num_vis": 3072})
    return tmp_path, images


def test_cifar10_pickles(cifar10):
    root, images = cifar10
    for place in (root, root / "cifar-10-batches-py"):
        train, test = open_train(config("cifar10", place)), open_test(config("cifar10", place))
        assert (train.name, len(train), test.split, len(test)) == ("CIFAR-10", 20, "test", 4)
        assert train.classes == CIFAR10_CLASSES and train.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert (train.load(7).numpy() == images[7]).all() and (test.load(3).numpy() == images[23]).all()
    gray = open_train(config("cifar10", root, channels=1)).load(0)
    assert gray.shape == (1, 32, 32)
    assert abs(float(gray.double().mean()) - np.tensordot(images[0].mean((1, 2)), [0.299, 0.587, 0.114], 1)) < 0.01
    with pytest.raises(UserError, match="CIFAR-10 has 3 channels, but data.channels is 4"):
        open_train(config("cifar10", root, channels=4)).load(0)
    fails(config("cifar10", root), "no split 'val'", "train, test", split="val")


def test_cifar10_damaged_pickle(cifar10):
    root, _ = cifar10
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"\x80\x02}q")
    fails(config("cifar10", root), "CIFAR-10 not found, or damaged", "cifar-10-batches-py", "data.download=true")


def test_cifar10_class_folders_are_named_by_their_files(tmp_path):
    for place in (tmp_path / "cifar10", tmp_path / "other"):
        for split in ("train", "test"):
            for i, name in enumerate(CIFAR10_CLASSES):
                picture(place / split / name / "0000.jpg", (i, i, i), (32, 32))
    for root in (tmp_path, tmp_path / "cifar10", tmp_path / "other"):
        source = open_train(config("cifar10", root))
        assert (
            source.name == "CIFAR-10 (JPEG)" and source.labels.tolist() == list(range(10)) and source.split == "train"
        )
    assert open_test(config("cifar10", tmp_path)).split == "test"
    (tmp_path / "other" / "train" / "zebra").mkdir()  # eleven classes: not CIFAR-10, whatever it is
    fails(
        config("cifar10", tmp_path / "other"),
        "CIFAR-10 not found",
        "2 folders (test, train)",
        "ROOT/cifar10/{train,test}/CLASS",
    )


def test_cifar100_pickles(tmp_path, monkeypatch):
    without_checksums(monkeypatch, datasets.CIFAR100)
    names = [f"thing{i:03d}" for i in range(100)]
    images = np.random.default_rng(1).integers(0, 256, (6, 3072), dtype=np.uint8)
    for file, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        count = len(images[rows])
        labels = [99 - i for i in range(count)]
        pickled(
            tmp_path / "cifar-100-python" / file,
            {"data": images[rows], "fine_labels": labels, "coarse_labels": [0] * count},
        )
    pickled(tmp_path / "cifar-100-python" / "meta", {"fine_label_names": names, "coarse_label_names": ["x"] * 20})
    train = open_train(config("cifar100", tmp_path))
    assert train.labels.tolist() == [99, 98, 97, 96] and train.classes == names and train.name == "CIFAR-100"
    assert (open_test(config("cifar100", tmp_path)).load(1).numpy().reshape(-1) == images[5]).all()


def test_stl10_binaries(tmp_path, monkeypatch):
    without_checksums(monkeypatch, datasets.STL10)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = np.random.default_rng(2).integers(0, 256, (7, 3, 96, 96), dtype=np.uint8)
    for file, rows in (("train_X", slice(0, 3)), ("test_X", slice(3, 5)), ("unlabeled_X", slice(5, 7))):
        (folder / f"{file}.bin").write_bytes(images[rows].transpose(0, 1, 3, 2).tobytes())  # stored column by column
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 3]))  # labels count from 1
    (folder / "test_y.bin").write_bytes(bytes([2, 2]))
    (folder / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    train = open_train(config("stl10", tmp_path))
    assert train.labels.tolist() == [0, 9, 2] and train.classes[9] == "c9" and train.image_size == (96, 96)
    assert (train.load(1).numpy() == images[1]).all()
    assert open_split(config("stl10", tmp_path), "unlabeled").labels is None
    both = open_split(config("stl10", tmp_path), "train+unlabeled")
    assert both.labels.tolist() == [0, 9, 2, -1, -1] and (both.load(4).numpy() == images[6]).all()
    fails(config("stl10", tmp_path), "no split 'unlabled'", "Did you mean 'unlabeled'?", split="unlabled")


def test_food101_meta(tmp_path):
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        listed = {name: [f"{name}/{n}" for n in numbers] for name in ("waffles", "apple_pie")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for name in listed:
            for n in numbers:
                picture(base / "images" / name / f"{n}.jpg", size=(12, 9))
    train = open_train(config("food101", tmp_path))
    assert train.classes == ["apple_pie", "waffles"] and train.labels.tolist() == [1, 1, 0, 0]
    assert train.path(0) == str(base / "images" / "waffles" / "1.jpg") and train.load(0).shape == (3, 9, 12)
    assert len(open_test(config("food101", tmp_path))) == 2


def test_oxford_pets_lists(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "annotations" / "trainval.txt").write_text(
        "Abyssinian_100 1 1 1\namerican_bulldog_1 2 2 1\nAbyssinian_101 1 1 1\n"
    )
    (base / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\namerican_bulldog_7 2 2 1\n")
    for name in ("Abyssinian_100", "american_bulldog_1", "Abyssinian_101", "Abyssinian_1", "american_bulldog_7"):
        picture(base / "images" / f"{name}.jpg")
    train = open_train(config("oxford_pets", tmp_path))
    assert train.classes == ["Abyssinian", "American Bulldog"] and train.labels.tolist() == [0, 1, 0]
    assert open_split(config("oxford_pets", tmp_path), "trainval").split == "train"
    assert open_test(config("oxford_pets", tmp_path)).path(1).endswith("american_bulldog_7.jpg")
    fails(config("oxford_pets", tmp_path), "no split 'val'", split="val")


def test_flowers102_mat_files(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io", reason="torchvision reads .mat files with scipy")
    base = tmp_path / "flowers-102"
    base.mkdir()
    scipy_io.savemat(base / "imagelabels.mat", {"labels": np.array([[5, 102, 1, 7]], dtype=np.uint8)})
    scipy_io.savemat(
        base / "setid.mat", {"trnid": np.array([[2, 1]]), "valid": np.array([[3]]), "tstid": np.array([[4, 3]])}
    )
    monkeypatch.setattr(
        datasets.Flowers102, "_file_dict", {k: (v[0], None) for k, v in datasets.Flowers102._file_dict.items()}
    )
    for i in range(1, 5):
        picture(base / "jpg" / f"image_{i:05d}.jpg", size=(10 + i, 9))
    train = open_train(config("flowers102", tmp_path))
    assert train.labels.tolist() == [101, 4] and train.load(0).shape == (3, 9, 12) and len(train.classes) == 102
    assert open_test(config("flowers102", tmp_path)).labels.tolist() == [6, 0]


def test_flowers102_without_scipy_says_so(tmp_path, monkeypatch):
    base = tmp_path / "flowers-102"
    picture(base / "jpg" / "image_00001.jpg")
    for name in ("imagelabels.mat", "setid.mat"):
        (base / name).write_bytes(b"x")
    monkeypatch.setattr(
        datasets.Flowers102, "_file_dict", {k: (v[0], None) for k, v in datasets.Flowers102._file_dict.items()}
    )
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    fails(config("flowers102", tmp_path), "Flowers-102", "scipy", "pip install")


def test_imagenet_folders_with_and_without_meta(tmp_path):
    for split in ("train", "val"):
        for number, wnid in enumerate(("n01440764", "n01443537")):
            picture(tmp_path / split / wnid / f"{split}_{number}.JPEG", (number, 0, 0))
    train, val = open_train(config("imagenet", tmp_path)), open_test(config("imagenet", tmp_path))
    assert train.classes == ["n01440764", "n01443537"] and val.split == "val" and val.labels.tolist() == [0, 1]
    torch.save(
        ({"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}, ["n01440764"]), tmp_path / "meta.bin"
    )
    named = open_train(config("imagenet", tmp_path))
    assert named.classes == ["tench", "goldfish"] and named.path(1) == train.path(1) and named.labels.tolist() == [0, 1]


def test_imagenet_elsewhere_and_wrong(tmp_path):
    picture(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train" / "n01" / "1.JPEG")
    picture(
        tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.JPEG"
    )  # as the archive unpacks: unsorted
    assert len(open_train(config("imagenet", tmp_path))) == 1
    fails(
        config("imagenet", tmp_path), "ImageNet val", "sorted into class folders", "1 file (ILSVRC2012_val", split=None
    )
    (tmp_path / "void" / "x").mkdir(parents=True)
    fails(
        config("imagenet", tmp_path / "void"), "no ImageNet train split", "ROOT/train/WNID", "1 folder (x)", "account"
    )
    fails(config("imagenet", tmp_path / "void", download=True), "account")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "flowers102", "food101", "oxford_pets", "imagenet"])
def test_wrong_root_is_one_sentence_with_the_layout(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "stuff").mkdir()
    fails(config(name, tmp_path), "expected ROOT/", "1 folder (stuff) and 1 file (notes.txt)", str(tmp_path))
    fails(config(name, tmp_path / "stuff"), "is empty")
    fails(config(name, tmp_path / "nothing"), "does not exist")


def test_failed_download_is_a_user_error(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    fails(
        config("cifar10", tmp_path / "new", download=True), "CIFAR-10 could not be downloaded", "network is unreachable"
    )


def test_one_of_many_processes_downloads(cifar10, tmp_path_factory, monkeypatch):
    """Threads stand for processes here: a lock on a file keeps either apart."""
    complete, fetched = cifar10[0] / "cifar-10-batches-py", []
    root = tmp_path_factory.mktemp("shared") / "data"

    def fetch(*_, **__):
        fetched.append(root)
        for path in sorted(complete.iterdir()):  # slowly: whoever does not wait finds half of it
            time.sleep(0.02)
            (root / complete.name).mkdir(exist_ok=True)
            (root / complete.name / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: open_train(config("cifar10", root, download=True)), range(4)))
    assert len(fetched) == 1
    assert [len(source) for source in sources] == [20] * 4
