"""Hours and memory before the first step: said in one line, right in size, and without a trace in the training."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.conftest import vit_suite, words  # noqa: F401 (a fixture)
from vit_suite import cli, registry
from vit_suite.commands.pretrain import next_commands
from vit_suite.parsing import load_config
from vit_suite.training import forecast
from vit_suite.training.forecast import Forecast
from vit_suite.training.progress import Length

BATCH_NORM = {"method__head_batch_norm": True, "trainer__max_epochs": 1, "evaluate__every_epochs": 0}
SELDOM = {"trainer__log_every": 20}  # an epoch has 4 steps


def test_it_is_said_and_changes_nothing(tmp_path, vit_suite, recwarn):  # noqa: F811
    """Weights, BatchNorm statistics, center and drop path are those of a training without it, to the bit. The run with
    `SELDOM` logs at the end of its epoch, without a word of Lightning's."""
    quiet = vit_suite("pretrain", *words(run__output=tmp_path / "quiet", **BATCH_NORM))
    options = BATCH_NORM | SELDOM | {"trainer__progress": True}
    said = vit_suite("pretrain", *words(run__output=tmp_path / "said", **options))
    assert quiet.status == said.status == 0 and "of training:" not in quiet.log
    assert re.search(r"about \d+ s of training: 4 steps of 16 images, .* s each.* GiB are free", said.log)
    first, second = (load_file(tmp_path / name / "backbone.safetensors") for name in ("quiet", "said"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    rows = list(csv.DictReader((tmp_path / "said" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["3"]
    assert not [warning for warning in recwarn if "logging interval" in str(warning.message)]
    resumed = vit_suite("pretrain", *words(run__output=tmp_path / "said", **options))
    assert "of training:" not in resumed.log


@pytest.mark.parametrize(
    ("computing", "memory", "minutes", "expected"),
    [
        (0.5, 2**30, None, "about 17 minutes of training: 1,000 steps of 32 images, 1 s each (0.5 s of it reading)"),
        (1.0, 2**34, None, "It will not fit: try --data.batch_size 8"),
        (1.0, 2**30, 5, "trainer.max_minutes 5 ends it before that."),
        (100.0, 2**30, 1, "trainer.max_minutes 1 is over within the first step, which is finished first."),
        (100.0, 2**30, None, "That is long for a CPU"),
    ],
)
def test_what_is_too_much_is_a_warning(monkeypatch, caplog, computing, memory, minutes, expected):
    monkeypatch.setattr(forecast, "free_memory", lambda: 2**33)
    with caplog.at_level("INFO", "vit_suite"):
        Forecast([], Length(32, 10, 1000), 1, minutes).say(computing, 0.5, memory)
    (record,) = caplog.records
    assert expected in record.getMessage()
    assert (record.levelname == "INFO") == ("17 minutes" in expected)


def test_photographs_are_read_for_a_second_at_most(monkeypatch):
    clock = iter(range(0, 100))
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(clock) * 0.6)

    class Slow:
        def __len__(self):
            return 100

        def load(self, index):
            return index

    images, _ = forecast.some_images(Slow(), 64)
    assert 2 <= len(images) <= 4


@pytest.mark.parametrize(("busy", "each"), [(1, "0.64"), (20, "13")])
def test_what_is_paid_once_is_not_taken_for_the_time_of_images(monkeypatch, caplog, busy, each):
    """A first pass of 0.9 s for two images, and 0.01 s an image from then on, make steps of 0.64 s. On a machine where
    all takes `busy` times as long the passes are the same, and the steps longer by that."""
    counts = []

    def trial(trainer, module, images):
        counts.append(len(images))
        work = 0.9 if len(counts) == 1 else 0.01 * len(images)
        return forecast.Trial(len(images), busy * work, work, 0)

    monkeypatch.setattr(forecast, "trial", trial)
    monkeypatch.setattr(forecast, "memory_of", lambda *_: 2**20)
    monkeypatch.setattr(forecast, "some_images", lambda *_: ([0] * 64, 0.0))
    module = SimpleNamespace(device=torch.device("cpu"))
    with caplog.at_level("INFO", "vit_suite"):
        Forecast([], Length(64, 10, 100), 1, None).on_train_start(SimpleNamespace(world_size=1, global_step=0), module)
    assert counts == [2, 2, 4, 8, 16, 32] and f"100 steps of 64 images, {each} s each" in caplog.text


def test_the_next_commands_of_an_unlabeled_tree_need_no_labels():
    """Each parses; what scores names a folder to fill in, and holds a share of it out."""
    cfg = load_config(None, {"data.name": "flat", "data.root": "two words"})
    commands = [shlex.split(line, comments=True) for line in next_commands(cfg, Path("runs/a"))]
    assert [line[0] for line in commands] == ["attention", "embed", "knn"]
    for name, *typed in commands:
        options = load_config(None, typed, registry.load(cli.COMMANDS[name].config))
        assert options.data.root == ("CLASSES" if name == "knn" else "two words")
    assert options.data.holdout == 0.2


def test_the_next_commands_of_a_classifier_hold_out_what_it_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("head.safetensors").touch()
    cfg = load_config(None, {"data.name": "folder", "data.root": "here", "data.holdout": 0.25})
    first, second, _ = next_commands(cfg, Path())
    assert first == "predict --checkpoint . --images IMAGES --output ./labels.csv"
    assert second == "knn --checkpoint . --data.name folder --data.root here --data.holdout 0.25 --baselines"
