"""`pretrain` with method.name supervised: its scores, its files, resuming, and what is refused."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.commands.conftest import (
    column,
    photographs,  # noqa: F401 (a fixture)
    results,
    rows,
    save_pictures,
    sha256,
    words,
)
from tests.training.test_rundir import stop_after
from vit_suite.config import DataConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.evaluation.features import FeatureOptions, extract_features
from vit_suite.training.scores import OnlineAccuracy
from vit_suite.training.status import read_status
from vit_suite.weights.checkpoint import load_backbone
from vit_suite.weights.head import load_head

DINO_ONLY = ("out_dim", "hidden_dim", "bottleneck_dim", "warmup_teacher_temperature_epochs")
SUPERVISED = {
    "method__name": "supervised",
    **dict.fromkeys([f"method__{name}" for name in DINO_ONLY]),
    "views__local_size": None,
    "views__local_crops": None,
    "method__ema": 0.9,
}
"""The tiny run of conftest.py with this method."""


@pytest.fixture
def supervised(pretrain):
    return lambda output=None, **options: pretrain(output, **(SUPERVISED | options))


@pytest.fixture(scope="session")
def supervised_run(tmp_path_factory):
    """A finished run directory; tests read it and leave it as it is."""
    from vit_suite import cli

    folder = tmp_path_factory.mktemp("supervised") / "run"
    assert cli.main(["pretrain", *words(run__output=folder, **(SUPERVISED | {"trainer__max_epochs": 3}))]) == 0
    return folder


def test_scores_of_a_run(supervised_run):
    entry = results(supervised_run)[0]
    metrics = entry["metrics"]
    assert entry["task"] == "pretrain" and entry["protocol"]["method"] == "supervised"
    assert [epoch for epoch, _ in metrics["val_top1_by_epoch"]] == [1, 2, 3] and metrics["knn_top1"] > 0
    assert (
        metrics["top1"] == pytest.approx(metrics["val_top1"]) and metrics["test_images"] == 40
    )  # all 40 were scored online too
    assert metrics["top1_interval"][0] < metrics["top1"] < metrics["top1_interval"][1]
    assert metrics["chance"]["uniform"] == 10 and metrics["chance"]["largest_class"] >= 10
    assert metrics["top1"] <= metrics["top5"] <= 100 and 0 <= metrics["calibration_error"] <= 1 and metrics["nll"] > 0
    assert column(supervised_run, "val/top5") and len(column(supervised_run, "train/top1")) == 12


def test_the_files_repeat_the_score(supervised_run):
    """Backbone and head, loaded apart, classify as results.json says."""
    loaded = load_backbone(supervised_run)
    head, classes, digest = load_head(supervised_run)
    test = ImageDataModule(DataConfig(name="shapes", image_size=32, length=64, test_length=40)).test_source
    assert digest == loaded.sha256 == results(supervised_run)[0]["sha256"] and classes == list(test.classes)
    features, labels, *_ = extract_features(
        loaded.backbone, test, 32, loaded.mean, loaded.std, options=FeatureOptions(unit=False, precision="fp32")
    )
    accuracy = 100 * (head(features).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(results(supervised_run)[0]["metrics"]["top1"], abs=1e-3)
    checkpoint = load_backbone(supervised_run / "checkpoints" / "last.ckpt")
    assert checkpoint.sha256 == loaded.sha256  # the average, as exported


def test_confusion_matrix(supervised_run):
    table = list(csv.reader((supervised_run / "confusion.csv").open()))
    counts = torch.tensor([[int(cell) for cell in row[1:]] for row in table[1:]])
    metrics = results(supervised_run)[0]["metrics"]
    assert counts.sum() == 40 and 100 * counts.diag().sum() / 40 == pytest.approx(metrics["top1"])
    with Image.open(supervised_run / "confusion.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize("saves", [2, 7])
def test_resume_after_any_step_ends_with_the_same_weights(supervised, supervised_run, monkeypatch, tmp_path, saves):
    options = {"saving__every_steps": 1, "trainer__max_epochs": 3}
    stop_after(monkeypatch, saves)
    assert supervised(**options).status == 1
    assert supervised(**options).status == 0
    assert sha256(tmp_path / "run") == sha256(supervised_run)
    assert column(tmp_path / "run", "train/loss") == column(supervised_run, "train/loss")
    ours, theirs = (results(folder)[-1]["metrics"] for folder in (tmp_path / "run", supervised_run))
    for name in ("val_top1_by_epoch", "knn_top1_by_epoch", "top1", "nll"):
        assert ours[name] == theirs[name]


def test_a_finished_run_says_its_scores_again(supervised, tmp_path):
    first = supervised(trainer__max_epochs=1)
    before = files(tmp_path / "run")
    second = supervised(trainer__max_epochs=1)
    assert second.status == 0 and "is complete: 4 steps" in second.log
    line = next(line for line in first.log.splitlines() if line.startswith("test: top-1"))
    assert line in second.log
    assert files(tmp_path / "run") == before and read_status(tmp_path / "run").state == "done"


def files(folder):
    """What a run directory holds, but for status.json, which has the time."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "status.json"}


def test_accumulated_batches_train_alike(supervised, supervised_run, tmp_path):
    """Views, mixtures and the average are of the step, not of its micro-batches."""
    assert supervised(trainer__accumulate=2, trainer__max_epochs=3).status == 0
    ours, theirs = (load_backbone(folder).backbone.vit.state_dict() for folder in (tmp_path / "run", supervised_run))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.slow
def test_two_ranks_train_as_one(supervised, tmp_path):
    """Mixup, CutMix, RandAugment and erasing included; drop path, which is drawn by each rank for itself, is off."""
    options = SUPERVISED | {"backbone__drop_path": 0, "trainer__max_epochs": 2}
    assert supervised(tmp_path / "one", **options).status == 0
    command = ["pretrain", *words(run__output=tmp_path / "two", trainer__devices=2, **options)]
    done = subprocess.run([sys.executable, "-m", "vit_suite", *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = (load_backbone(tmp_path / name).backbone.vit.state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=0, msg=name)
    assert results(tmp_path / "two")[0]["metrics"]["top1"] == pytest.approx(
        results(tmp_path / "one")[0]["metrics"]["top1"], abs=3
    )


def test_best_follows_the_accuracy(supervised, monkeypatch, tmp_path):
    scores = iter([30.0, 50.0, 40.0])
    monkeypatch.setattr(
        "vit_suite.evaluation.classification.top_accuracy", lambda logits, labels, k: next(scores) if k == 1 else 90.0
    )
    monkeypatch.setattr("vit_suite.training.run.score_test", lambda *_: {})
    assert supervised(trainer__max_epochs=3).status == 0
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == 1 and OnlineAccuracy.metric == "val/top1"


def test_post_norm_mean_pooling_without_a_class_token(supervised, tmp_path):
    options = {
        "backbone__class_token": False,
        "backbone__pool": "mean",
        "backbone__positions": "sincos_2d",
        "backbone__norm": "post",
    }
    assert supervised(trainer__max_epochs=1, **options).status == 0
    assert load_backbone(tmp_path / "run").backbone.cfg.pool == "mean"
    assert results(tmp_path / "run")[0]["metrics"]["top1"] >= 0


# Refused
# ----------------------------------------------------------------------------------------------------------------------


def refused(said, *parts: str) -> None:
    assert said.status == 2 and said.err.count("\n") == 1, said
    for part in parts:
        assert part in said.err, said.err


def test_images_without_labels(supervised, tmp_path):
    save_pictures(tmp_path / "flat", 20)
    said = supervised(data__name="flat", data__root=tmp_path / "flat", data__length=None, data__test_length=None)
    refused(said, "has no labels, and supervised training needs one for each", "--data.name folder")
    assert not (tmp_path / "run").exists()


def test_test_classes_that_are_not_those_of_training(supervised, photographs, tmp_path):  # noqa: F811
    shutil.copytree(photographs, tmp_path / "animals")
    shutil.move(tmp_path / "animals" / "test" / "dark", tmp_path / "animals" / "test" / "dusk")
    options = {
        "data__name": "folder",
        "data__root": tmp_path / "animals",
        "data__length": None,
        "data__test_length": None,
    }
    refused(supervised(**options), "1 class that the train split lacks: dusk", "--evaluate.every_epochs 0")


def test_a_test_split_without_labels(supervised, tmp_path):
    save_pictures(tmp_path / "pictures", 20)
    (tmp_path / "train.txt").write_text("".join(f"pictures/{index:03d}.jpg {index % 2}\n" for index in range(16)))
    (tmp_path / "test.txt").write_text("".join(f"pictures/{index:03d}.jpg\n" for index in range(16, 20)))
    options = {
        "data__name": "list",
        "data__root": tmp_path,
        "data__length": None,
        "data__test_length": None,
        "data__batch_size": 8,
    }
    refused(supervised(**options), "split 'test' of", "has no labels to score", "--evaluate.every_epochs 0")
    said = supervised(evaluate__every_epochs=0, trainer__max_epochs=1, **options)
    assert said.status == 0, said
    assert "top1" not in results(tmp_path / "run")[0]["metrics"] and not (tmp_path / "run" / "confusion.png").exists()


def test_resuming_with_other_classes(supervised, photographs, tmp_path):  # noqa: F811
    shutil.copytree(photographs, tmp_path / "animals")
    options = {
        "data__name": "folder",
        "data__root": tmp_path / "animals",
        "data__length": None,
        "data__test_length": None,
    }
    options |= {"data__batch_size": 8, "trainer__max_epochs": 1}
    assert supervised(**options).status == 0
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "animals" / split / "dark", tmp_path / "animals" / split / "gray")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    said = supervised(**(options | {"trainer__max_epochs": 2}))
    refused(said, "cannot resume: the head of", "has 2 classes and the data 3", "--run.overwrite")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert len(rows(tmp_path / "run")) > 0
