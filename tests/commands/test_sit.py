"""`pretrain --method.name sit` from the command line: trained, scored, resumed, on two ranks, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .conftest import column, sha256, words

SIT = {
    "method__name": "sit",
    "method__contrastive_dim": 16,
    "method__sheet_every_epochs": 0,
    "views__local_size": None,
    "views__local_crops": None,
    "method__hidden_dim": None,
    "method__out_dim": None,
    "method__bottleneck_dim": None,
    "method__warmup_teacher_temperature_epochs": None,
    "backbone__drop_path": 0,
}
KINDS = {
    "v1": {},
    "v3": {
        "method__rotation": False,
        "method__contrastive": "info_nce",
        "method__contrastive_head": "mlp",
        "method__hidden_dim": 32,
        "method__corruption": "gmml",
        "method__reconstruct": "corrupted",
        "method__decoder": "mlp",
        "method__loss_weights": "fixed",
    },
    "mask": {"method__corruption": "mask", "method__mask_ratio": 0.5, "method__mask_rule": "80/10/10"},
    "causal": {"method__order": "causal", "method__corruption": "none"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_scores_and_exports(kind, pretrain, vit_suite, tmp_path):
    run = tmp_path / "run"
    assert pretrain(**SIT | KINDS[kind], trainer__max_epochs=1).status == 0
    names = {"train/loss", "train/contrastive", "train/reconstruction", "train/psnr", "train/contrastive_accuracy"}
    names |= {"train/rotation_accuracy", "train/weight_rotation"} if kind != "v3" else set()
    for name in names:
        assert len(column(run, name)) == 4, name
    assert 0 < column(run, "knn/top1")[0] <= 100
    for checkpoint in (run, run / "checkpoints" / "last.ckpt"):  # the file and the checkpoint hold the same backbone
        said = vit_suite(
            "knn",
            "--checkpoint",
            checkpoint,
            "--data.name",
            "shapes",
            "--data.image_size",
            32,
            "--data.length",
            64,
            "--data.test_length",
            40,
            "--k",
            5,
            "--output",
            tmp_path / "knn.json",
        )
        assert said.status == 0, said.err
    first, second = (entry["sha256"] for entry in __import__("json").loads((tmp_path / "knn.json").read_text()))
    assert first == second == sha256(run)


def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(pretrain, tmp_path):
    options = SIT | KINDS["v3"] | {"backbone__drop_path": 0.1}
    assert pretrain(tmp_path / "straight", **options, trainer__max_epochs=2).status == 0
    assert (
        pretrain(tmp_path / "halved", **options, trainer__max_epochs=2, trainer__max_minutes=1e-4).status == 0
    )  # stops at once
    assert len(column(tmp_path / "halved", "train/loss")) < 8
    assert pretrain(tmp_path / "halved", **options, trainer__max_epochs=2).status == 0
    assert sha256(tmp_path / "halved") == sha256(tmp_path / "straight")


@pytest.mark.slow
def test_two_ranks_repeat_the_losses_of_one(pretrain, tmp_path):
    """Gathered negatives, corruption from another image, learned weights: the same global batch gives the same
    numbers."""
    options = SIT | {"trainer__max_epochs": 1, "trainer__log_every": 1, "evaluate__every_epochs": 0}
    assert pretrain(tmp_path / "one", **options).status == 0
    command = ["pretrain", *words(run__output=tmp_path / "two", **options | {"trainer__devices": 2})]
    done = subprocess.run(
        [sys.executable, "-m", "vit_suite", *command], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    for name in (
        "train/loss",
        "train/contrastive",
        "train/rotation",
        "train/reconstruction",
        "train/contrastive_accuracy",
    ):
        one, two = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert len(two) == 4 and two[0] == pytest.approx(one[0], abs=1e-5), name
        assert two[:3] == pytest.approx(one[:3], abs=1e-3) or name.endswith("accuracy"), (
            name
        )  # Adam amplifies rounding later on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method__mask_ratio": 1.5}, "--method.mask_ratio: expected float (above 0, below 1), got '1.5'"),
        (
            {"method__corruption": "masc"},
            "--method.corruption: expected one of blocks, gmml, mask, none, got 'masc'. Did you mean 'mask'?",
        ),
        ({"method__corruption": "none", "method__reconstruct": "corrupted"}, "no pixel would count"),
        ({"method__corruption": "gmml", "method__align": 20}, "method.align: expected at most 9"),
        ({"views__local_crops": 2}, "unknown option '--views.local_crops'"),
        ({"method__out_dim": 8}, "unknown option '--method.out_dim'"),
    ],
)
def test_wrong_options_are_one_sentence(options, message, pretrain, tmp_path):
    said = pretrain(**SIT | options)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
