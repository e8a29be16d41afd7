"""`vit-suite pretrain`: what a run leaves behind, on every kind of data and setting."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from tests.commands.conftest import column, results, rows, sha256, words
from vit_suite import distributed
from vit_suite.config import TrainerConfig
from vit_suite.errors import UserError
from vit_suite.parsing import load_config
from vit_suite.training.keeper import Keeper
from vit_suite.training.scores import OnlineKNN
from vit_suite.training.trainer import layout
from vit_suite.weights.checkpoint import load_backbone


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


# What a run leaves
# ------------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(tiny_run):
    found = {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()}
    kept = {f"checkpoints/{name}.ckpt" for name in ("last", "best", "epoch_0001", "epoch_0002")}
    assert found == kept | {
        "about.json",
        "config.yaml",
        "metrics.csv",
        "results.json",
        "status.json",
        "backbone.safetensors",
        "backbone.json",
    }


def test_config_reads_back_to_the_options_of_the_run(tiny_run):
    given = words(run__output=tiny_run, saving__keep_every_epochs=1)
    assert load_config(tiny_run / "config.yaml") == load_config(None, given)


def test_metrics(tiny_run):
    steps = [row for row in rows(tiny_run) if row["train/loss"]]
    assert [int(row["step"]) for row in steps] == list(range(8)) and [int(row["epoch"]) for row in steps] == [0] * 4 + [
        1
    ] * 4
    for name in ("loss", "teacher_entropy", "kl", "center_norm", "prototypes_used", "feature_std"):
        values = column(tiny_run, f"train/{name}")
        assert len(values) == 8 and all(map(math.isfinite, values)), name
    for row in steps:
        assert float(row["train/kl"]) == pytest.approx(
            float(row["train/loss"]) - float(row["train/teacher_entropy"]), abs=1e-5
        )
    # lr: 5e-3 for 256 images, 16 in the batch; a warm-up over 4 steps, 0 and the peak included, then a cosine to 1e-6
    peak = 5e-3 * 16 / 256
    expected = [peak * step / 3 for step in range(4)] + [
        1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * s / 4)) / 2 for s in range(4)
    ]
    assert column(tiny_run, "train/lr") == pytest.approx(expected, rel=1e-5)
    decay = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert column(tiny_run, "train/weight_decay") == pytest.approx(decay, rel=1e-5)
    assert [(row["epoch"], row["step"]) for row in rows(tiny_run) if row["knn/top1"]] == [("0", "3"), ("1", "7")]


def test_checkpoints_are_plain_data(tiny_run):
    last, best = (load(tiny_run / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
    assert (last["global_step"], last["hyper_parameters"]["method"]["out_dim"]) == (8, 64)
    assert {"optimizer_states", "loops", "state_dict"} <= best.keys()
    assert [load(tiny_run / "checkpoints" / f"epoch_000{n}.ckpt")["global_step"] for n in (1, 2)] == [4, 8]


def test_exported_backbone_is_the_teacher_of_the_last_step(tiny_run):
    exported = load_backbone(tiny_run)
    described = json.loads((tiny_run / "backbone.json").read_text())
    assert exported.sha256 == described["sha256"] == results(tiny_run)[-1]["sha256"]
    assert (described["step"], described["method"], described["data"], described["image_size"]) == (
        8,
        "dino",
        "shapes",
        [32, 32],
    )
    state = load(tiny_run / "checkpoints" / "last.ckpt")["state_dict"]
    weights = exported.backbone.vit.state_dict()
    assert all(torch.equal(tensor, state[f"teacher.backbone.vit.{name}"]) for name, tensor in weights.items())
    assert not all(torch.equal(tensor, state[f"student.backbone.vit.{name}"]) for name, tensor in weights.items())


def test_results_entry(tiny_run):
    (entry,) = results(tiny_run)
    assert entry["task"] == "pretrain" and entry["protocol"]["method"] == "dino" and entry["protocol"]["knn"]["k"] == 20
    metrics = entry["metrics"]
    assert (metrics["steps"], metrics["epochs"], metrics["images"]) == (8, 2, 128) and metrics["seconds"] > 0
    assert [epoch for epoch, _ in metrics["knn_top1_by_epoch"]] == [1, 2]
    assert [score for _, score in metrics["knn_top1_by_epoch"]] == pytest.approx(column(tiny_run, "knn/top1"), abs=1e-4)
    assert metrics["knn_top1"] == metrics["knn_top1_by_epoch"][-1][1] and 0 < metrics["knn_top1"] < 100
    assert entry["command"] and entry["time"].endswith("Z")


def test_online_score_is_that_of_the_knn_command(tiny_run, vit_suite, tmp_path):
    options = [
        "--data.name",
        "shapes",
        "--data.image_size",
        32,
        "--data.length",
        64,
        "--data.test_length",
        40,
        "--precision",
        "fp32",
    ]
    said = vit_suite("knn", "--checkpoint", tiny_run, *options, "--k", 20, "--output", tmp_path / "scores.json")
    assert said.status == 0
    assert (
        results(tmp_path / "scores.json")[0]["metrics"]["checkpoint"]["k20"]["top1"]
        == results(tiny_run)[0]["metrics"]["knn_top1"]
    )


def test_next_commands_are_named(pretrain, tmp_path):
    said = pretrain(trainer__max_steps=1)
    assert f"vit-suite knn --checkpoint {tmp_path}/run --data.name shapes" in said.log
    assert f"vit-suite attention --checkpoint {tmp_path}/run" in said.log


# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_best_is_the_epoch_with_the_highest_score(pretrain, monkeypatch, tmp_path):
    scores = iter([10.0, 30.0, 20.0, 30.0])
    monkeypatch.setattr(OnlineKNN, "score", lambda self, module: {"knn/top1": next(scores)})
    assert pretrain(trainer__max_epochs=4).status == 0
    assert (
        load(tmp_path / "run" / "checkpoints" / "best.ckpt")["global_step"] == 8
    )  # the first of the two that are equal
    assert column(tmp_path / "run", "knn/top1") == [10, 30, 20, 30]


@pytest.fixture
def saved(monkeypatch):
    """(name, optimizer steps, micro-batches) of every checkpoint written."""
    found, save = [], Keeper.save

    def record(self, trainer, name):
        found.append((name, trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1))
        save(self, trainer, name)

    monkeypatch.setattr(Keeper, "save", record)
    return found


def test_every_steps_and_every_epochs(pretrain, saved, tmp_path):
    options = {"saving__every_steps": 3, "saving__every_epochs": 10, "saving__keep_every_epochs": 2}
    assert pretrain(trainer__max_epochs=4, evaluate__every_epochs=0, **options).status == 0
    assert [(name, step) for name, step, _ in saved] == [
        ("last", 3),
        ("last", 6),
        ("epoch_0002", 8),
        ("last", 9),
        ("last", 12),
        ("last", 15),
        ("epoch_0004", 16),
        ("last", 16),
    ]
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {"last.ckpt", "epoch_0002.ckpt", "epoch_0004.ckpt"}


@pytest.mark.parametrize("option", [{"saving__every_minutes": 1e-9}, {"saving__every_steps": 1}])
def test_no_checkpoint_between_micro_batches(pretrain, saved, option):
    assert pretrain(trainer__accumulate=2, trainer__max_epochs=1, evaluate__every_epochs=0, **option).status == 0
    assert [entry for entry in dict.fromkeys(saved)] == [("last", step, 2 * step) for step in (1, 2, 3, 4)]


def test_without_scores(pretrain, tmp_path):
    assert pretrain(evaluate__every_epochs=0, trainer__max_epochs=1).status == 0
    assert "knn/top1" not in rows(tmp_path / "run")[0] and "knn_top1" not in results(tmp_path / "run")[0]["metrics"]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt"}


def test_scores_every_other_epoch_and_at_the_end(pretrain, tmp_path):
    assert pretrain(evaluate__every_epochs=2, trainer__max_epochs=3).status == 0
    assert [epoch for epoch, _ in results(tmp_path / "run")[0]["metrics"]["knn_top1_by_epoch"]] == [2, 3]


# How long
# ----------------------------------------------------------------------------------------------------------------------


def test_max_steps_ends_training_and_the_schedules(pretrain, tmp_path):
    assert pretrain(trainer__max_steps=6, optim__warmup_epochs=0, trainer__max_epochs=50).status == 0
    assert (
        results(tmp_path / "run")[0]["metrics"]["steps"] == 6
        and load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 6
    )
    peak = 5e-3 * 16 / 256
    expected = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * 5 / 6)) / 2
    assert column(tmp_path / "run", "train/lr")[-1] == pytest.approx(expected, rel=1e-5)


def test_max_minutes(pretrain, tmp_path):
    assert pretrain(trainer__max_minutes=1e-4, trainer__max_epochs=500).status == 0
    metrics = results(tmp_path / "run")[0]["metrics"]
    assert 1 <= metrics["steps"] < 100
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == metrics["steps"]
    assert load_backbone(tmp_path / "run").meta["step"] == metrics["steps"]


# Precision, accumulation, backbones
# --------------------------------------------------------------------------------------------------


def test_bf16_is_close_to_fp32_but_not_it(pretrain, tiny_run, tmp_path):
    assert pretrain(trainer__precision="bf16").status == 0
    ours, theirs = column(tmp_path / "run", "train/teacher_entropy"), column(tiny_run, "train/teacher_entropy")
    assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs


def test_accumulation_keeps_the_batch(pretrain, tiny_run, tmp_path):
    assert pretrain(trainer__accumulate=2).status == 0
    assert results(tmp_path / "run")[0]["metrics"]["steps"] == 8
    assert column(tmp_path / "run", "train/center_norm") == pytest.approx(
        column(tiny_run, "train/center_norm"), rel=1e-3
    )
    assert column(tmp_path / "run", "train/lr") == column(tiny_run, "train/lr")


def test_checkpointing_activations_repeats_the_run(pretrain, tiny_run, tmp_path):
    """To the bit, drop path included; a run may also be resumed with another choice."""
    assert pretrain(backbone__checkpointing=True).status == 0
    assert column(tmp_path / "run", "train/loss") == column(tiny_run, "train/loss") and sha256(
        tmp_path / "run"
    ) == sha256(tiny_run)
    assert "is complete" in pretrain(backbone__checkpointing=False).log


def test_some_crops_at_a_time_repeat_the_run(pretrain, tiny_run, tmp_path):
    """Drop path included, to rounding; a run may also be resumed with another choice."""
    assert pretrain(method__crops_at_once=1).status == 0
    assert column(tmp_path / "run", "train/loss") == pytest.approx(column(tiny_run, "train/loss"), abs=1e-4)
    assert "is complete" in pretrain().log


def test_timm_name_as_backbone(pretrain, tmp_path):
    dims = dict.fromkeys(("backbone__patch_size", "backbone__dim", "backbone__depth", "backbone__heads"))
    options = {"backbone__name": "vit_tiny_patch16_224", "trainer__max_steps": 2, "evaluate__every_epochs": 0}
    assert pretrain(**dims, **options).status == 0
    backbone = load_backbone(tmp_path / "run").backbone
    assert (backbone.dim, backbone.depth, backbone.heads, backbone.patch_size, backbone.native_grid) == (
        192,
        12,
        3,
        16,
        (2, 2),
    )


def test_one_channel(pretrain, tmp_path):
    assert pretrain(data__channels=1, trainer__max_epochs=1).status == 0
    loaded = load_backbone(tmp_path / "run")
    assert loaded.backbone.vit.patch_embed.proj.weight.shape[1] == 1 and len(loaded.mean) == len(loaded.std) == 1
    assert len(column(tmp_path / "run", "knn/top1")) == 1


# More than one process
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_repeat_the_losses_of_one(pretrain, tmp_path):
    """Same global batch, fp32, gloo on CPUs, ranks that Lightning starts itself; more is compared in
    tests/cluster/test_ranks.py."""
    options = {"backbone__drop_path": 0.2, "trainer__max_epochs": 1, "trainer__accumulate": 2, "trainer__log_every": 2}
    assert pretrain(tmp_path / "one", **options).status == 0
    command = ["pretrain", *words(run__output=tmp_path / "two", trainer__devices=2, **options)]
    done = subprocess.run(
        [sys.executable, "-m", "vit_suite", *command], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("global batch 16 = 2 ranks x 2 accumulated x 4 images") == 1  # one rank speaks for both
    assert "sync_dist" not in done.stderr
    for name in ("train/loss", "train/teacher_entropy", "train/center_norm"):
        one, two = column(tmp_path / "one", name), column(tmp_path / "two", name)
        assert len(two) == 2 and two == pytest.approx(one, abs=1e-5)
    assert len(results(tmp_path / "two")) == 1 and len(column(tmp_path / "two", "knn/top1")) == 1
    assert column(tmp_path / "two", "knn/top1") == pytest.approx(column(tmp_path / "one", "knn/top1"), abs=5)


# Launchers
# ----------------------------------------------------------------------------------------------------------------------


def test_nodes_and_devices_follow_the_launcher(monkeypatch):
    assert layout(TrainerConfig(devices=3)) == {}
    monkeypatch.setattr(distributed, "started", lambda: (2, 4))
    assert layout(TrainerConfig()) == layout(TrainerConfig(nodes=2, devices=4)) == {"nodes": 2, "devices": 4}
    with pytest.raises(UserError, match="1 x 8, but 2 x 4 processes were started: leave both out"):
        layout(TrainerConfig(devices=8))


def test_one_process_of_a_slurm_job_of_many_does_not_wait_for_the_others(pretrain, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    said = pretrain()
    assert (
        said.status == 2
        and "a SLURM job of 4 tasks, but this is one process: start it with `srun vit-suite ...`" in said.err
    )
    assert not (tmp_path / "run").exists()
