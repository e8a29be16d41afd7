"""`vit-suite pretrain` on files: all sizes, without labels, damaged, odd."""

from __future__ import annotations

import pytest

from tests.commands.conftest import FLAT, FOLDER, column, picture, results, rows, save_pictures, sha256
from vit_suite.data.listing import walk_images


def test_photographs_of_all_sizes(pretrain, photographs, tmp_path):
    digests = []
    for workers in (0, 2):
        folder = tmp_path / f"run{workers}"
        said = pretrain(folder, data__root=photographs, data__workers=workers, **FOLDER)
        assert said.status == 0 and "animals train: 24 images, 2 classes, from files" in said.log
        assert results(folder)[0]["metrics"]["steps"] == 3 and len(column(folder, "knn/top1")) == 1
        digests.append(sha256(folder))
    assert digests[0] == digests[1]  # how many processes decode does not matter


def test_unlabeled_images_train_without_scores_and_say_so(pretrain, photographs, tmp_path):
    said = pretrain(data__root=photographs / "train", **FLAT | {"data__batch_size": 8, "trainer__max_epochs": 1})
    assert said.status == 0
    assert "train has no labels: no kNN during training; the best checkpoint is the last" in said.log
    assert "knn/top1" not in rows(tmp_path / "run")[0]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt"}


def test_folder_without_splits_is_not_scored_on_itself(pretrain, photographs, tmp_path):
    said = pretrain(data__root=photographs / "train", **FOLDER)
    assert said.status == 0 and "has no split of its own to score: no scores during training" in said.log
    assert "knn/top1" not in rows(tmp_path / "run")[0]


@pytest.mark.parametrize("sizes", [((24, 32),), ((24, 32), (32, 24))], ids=["in memory", "from files"])
def test_a_damaged_file_is_listed_and_the_run_goes_on(pretrain, sizes, tmp_path):
    save_pictures(tmp_path / "data", 120, sizes)
    broken = tmp_path / "data" / "007.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    options = FLAT | {"data__root": tmp_path / "data", "trainer__max_epochs": 1, "views__local_crops": 0}
    for overwrite in (False, True):  # an emptied directory lists it again
        said = pretrain(run__overwrite=overwrite, **options)
        assert said.status == 0, said.err
        lines = (tmp_path / "run" / "quarantine.txt").read_text().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{broken}\t") and len(lines[0]) > len(str(broken)) + 5
    assert len(results(tmp_path / "run")) == 1


@pytest.mark.parametrize("sizes", [((24, 32),), ((24, 32), (32, 24))], ids=["in memory", "from files"])
def test_too_many_damaged_files_stop_the_run(pretrain, sizes, tmp_path):
    save_pictures(tmp_path / "data", 120, sizes)
    for name in ("007", "050", "099"):
        (tmp_path / "data" / f"{name}.jpg").write_bytes(b"")
    options = FLAT | {
        "data__root": tmp_path / "data",
        "data__workers": 0,
        "trainer__max_epochs": 1,
        "views__local_crops": 0,
    }
    said = pretrain(**options)
    assert said.status == 2 and said.err.count("\n") == 1
    assert "of the 120 images of data all do not decode" in said.err and "data.max_corrupt allows 1.0%" in said.err
    assert f"listed in {tmp_path}/run/quarantine.txt" in said.err and "the file is empty" in said.err
    assert "007.jpg" in (tmp_path / "run" / "quarantine.txt").read_text() or len(sizes) == 2
    # What that start left behind is in nobody's way.
    assert pretrain(**options, data__max_corrupt=0.05).status == 0
    assert len((tmp_path / "run" / "quarantine.txt").read_text().splitlines()) == 3


def test_files_that_are_odd_but_images(pretrain, tmp_path):
    """Alpha, gray, palette, a 3-pixel-wide strip, an upright phone picture: all train."""
    root = tmp_path / "odd" / "deep er"
    root.mkdir(parents=True)
    for index, mode in enumerate(("RGBA", "L", "P", "CMYK", "RGB", "LA", "1", "I;16")):
        image = picture(index, 20 + index, 40)
        image = (
            image.convert("L").convert("I").point(lambda v: v * 256).convert("I;16")
            if mode == "I;16"
            else image.convert(mode)
        )
        image.save(root / f"{index} é.{'jpg' if mode in ('CMYK', 'RGB') else 'png'}")
    picture(20, 400, 3).save(root / "strip.png")
    upright = picture(21, 30, 60)
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(root / "phone.JPG", exif=exif)
    assert len(list(walk_images(tmp_path / "odd"))) == 10
    assert pretrain(data__root=tmp_path / "odd", **FLAT | {"data__batch_size": 5, "trainer__max_epochs": 1}).status == 0
    assert not (tmp_path / "run" / "quarantine.txt").exists()
