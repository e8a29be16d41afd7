"""Starting the same command again: resume, refuse, overwrite. Signals and kills are in tests/faults."""

from __future__ import annotations

import pytest
import torch

from tests.commands.conftest import column, results, rows, sha256
from vit_suite.config import VERSION, PretrainConfig
from vit_suite.config.shared import RunOptions
from vit_suite.errors import UserError
from vit_suite.parsing import load_config
from vit_suite.training import rundir
from vit_suite.training.keeper import Keeper
from vit_suite.training.scores import OnlineKNN
from vit_suite.training.status import read_status

THREE = {"trainer__max_epochs": 3}


class Stop(Exception):
    pass


def stop_after(monkeypatch, saves: int) -> None:
    """Break off training with an error when last.ckpt, written `saves` times, is due again."""
    save, seen = Keeper.save, []

    def counting(self, trainer, name):
        if seen.count("last") == saves and name == "last":
            monkeypatch.setattr(Keeper, "save", save)
            raise Stop
        save(self, trainer, name)
        seen.append(name)

    monkeypatch.setattr(Keeper, "save", counting)


def assert_same_as_straight(folder, straight) -> None:
    """Weights to the bit, and metrics as if nothing had happened."""
    assert sha256(folder) == sha256(straight)
    assert [(row["step"], row["knn/top1"]) for row in rows(folder)] == [
        (row["step"], row["knn/top1"]) for row in rows(straight)
    ]
    for name in ("train/loss", "train/lr", "train/center_norm"):
        assert column(folder, name) == column(straight, name)
    assert results(folder)[-1]["metrics"]["knn_top1_by_epoch"] == results(straight)[0]["metrics"]["knn_top1_by_epoch"]


# Resume
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saves", [2, 4, 7])
def test_resume_after_any_step_ends_with_the_same_weights(pretrain, straight_run, monkeypatch, tmp_path, saves):
    """With a checkpoint every step: within the first epoch, at its end, within a later one."""
    stop_after(monkeypatch, saves)
    assert pretrain(saving__every_steps=1, **THREE).status == 1
    assert len(column(tmp_path / "run", "train/loss")) < 12
    said = pretrain(saving__every_steps=1, **THREE)
    assert said.status == 0 and f"resuming {tmp_path}/run/checkpoints/last.ckpt" in said.log
    assert_same_as_straight(tmp_path / "run", straight_run)


def test_resume_drops_the_rows_that_it_logs_again(pretrain, straight_run, monkeypatch, tmp_path):
    """Checkpoints at the ends of epochs only, and a crash two steps later."""
    losses, seen = Keeper.on_train_batch_end, []

    def crash(self, trainer, *rest):
        losses(self, trainer, *rest)
        seen.append(trainer.global_step)
        if len(seen) == 7:
            raise Stop

    monkeypatch.setattr(Keeper, "on_train_batch_end", crash)
    assert pretrain(**THREE).status == 1
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 3, 4, 5]
    assert pretrain(**THREE).status == 0
    assert_same_as_straight(tmp_path / "run", straight_run)


def test_a_crash_while_scoring_loses_nothing(pretrain, straight_run, monkeypatch, tmp_path):
    """The checkpoint after an epoch's last step is written when its score is there, so a resumed run still scores
    it."""
    score, calls = OnlineKNN.score, []

    def crash(self, module):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return score(self, module)

    monkeypatch.setattr(OnlineKNN, "score", crash)
    assert pretrain(saving__every_steps=1, **THREE).status == 1
    assert pretrain(saving__every_steps=1, **THREE).status == 0
    assert_same_as_straight(tmp_path / "run", straight_run)


def test_resume_after_the_time_limit(pretrain, straight_run, tmp_path):
    """In the middle of an epoch, which the resumed run goes on with."""
    limit = {"trainer__max_minutes": 1e-5}
    assert pretrain(**limit, **THREE).status == 0
    metrics = results(tmp_path / "run")[0]["metrics"]
    assert metrics["steps"] == 1 and metrics["knn_top1"] > 0
    said = pretrain(**limit, **THREE)
    assert said.status == 0 and "is complete: 1 step, nothing left to train" in said.log and "max_minutes" in said.log
    assert pretrain(**THREE).status == 0
    assert sha256(tmp_path / "run") == sha256(straight_run)


def test_the_time_limit_waits_for_the_step_under_way(pretrain, tmp_path):
    options = {"trainer__accumulate": 4, "trainer__max_epochs": 3, "evaluate__every_epochs": 0}
    assert pretrain(tmp_path / "straight", **options).status == 0
    assert pretrain(trainer__max_minutes=1e-5, **options).status == 0
    assert results(tmp_path / "run")[0]["metrics"]["steps"] == 1
    assert pretrain(**options).status == 0
    assert sha256(tmp_path / "run") == sha256(tmp_path / "straight")


def test_a_finished_run_says_so_and_stays_as_it_is(pretrain, tmp_path):
    assert pretrain(trainer__max_epochs=1).status == 0

    def content():
        return {
            path: path.read_bytes()
            for path in (tmp_path / "run").rglob("*")
            if path.is_file() and path.name != "status.json"
        }

    before = content()
    said = pretrain(trainer__max_epochs=1)
    assert said.status == 0
    assert (
        f"{tmp_path}/run is complete: 4 steps, nothing left to train" in said.log and "trainer.max_epochs" in said.log
    )
    assert content() == before and read_status(tmp_path / "run").state == "done"


def test_more_epochs_go_on_from_the_end(pretrain, tmp_path):
    assert pretrain(trainer__max_epochs=1).status == 0
    assert pretrain(trainer__max_epochs=2).status == 0
    assert [entry["metrics"]["steps"] for entry in results(tmp_path / "run")] == [4, 8]
    assert len(column(tmp_path / "run", "train/loss")) == 8


def test_two_processes_of_the_same_seed_agree(tiny_run, pretrain, tmp_path):
    assert pretrain().status == 0
    assert sha256(tmp_path / "run") == sha256(tiny_run)
    assert pretrain(tmp_path / "other", run__seed=1).status == 0
    assert sha256(tmp_path / "other") != sha256(tiny_run)


# Refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(pretrain, tmp_path):
    assert pretrain(trainer__max_epochs=1, evaluate__every_epochs=0).status == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("optim__lr", 0.5, "optim.lr 0.005, not 0.5"),
        ("method__out_dim", 128, "method.out_dim 64, not 128"),
        ("data__length", 32, "data.length 64, not 32"),
        ("views__local_crops", 3, "views.local_crops 2, not 3"),
        ("run__seed", 7, "run.seed 0, not 7"),
    ],
)
def test_other_settings_are_refused_by_name(pretrain, finished, option, value, message):
    said = pretrain(trainer__max_epochs=1, evaluate__every_epochs=0, **{option: value})
    assert said.status == 2 and said.err.count("\n") == 1
    assert f"'{finished}' holds a run with {message}. " in said.err and "--run.overwrite" in said.err


@pytest.mark.parametrize(
    ("line", "said"), [("", "the options of an earlier version"), ("version: 1\n", "the options of version 1")]
)
def test_a_run_with_the_options_of_another_version_is_refused(pretrain, finished, tmp_path, line, said):
    """It names what to do, and leaves the run as it is; --run.overwrite starts anew."""
    config = finished / "config.yaml"
    text = config.read_text()
    assert text.startswith(f"version: {VERSION}\n")
    config.write_text(line + text.partition("\n")[2].replace("saving:", "checkpoint:"))
    refused = pretrain(trainer__max_epochs=2, evaluate__every_epochs=0)
    assert refused.status == 2 and refused.err.count("\n") == 1, refused
    assert f"'{finished}' holds a run whose config.yaml has {said}, and this vit-suite has version" in refused.err
    assert "--run.overwrite to start anew" in refused.err and (finished / "checkpoints" / "last.ckpt").exists()
    assert pretrain(trainer__max_epochs=1, evaluate__every_epochs=0, run__overwrite=True).status == 0


def test_a_config_of_another_version_is_refused_and_one_of_this_version_read(finished, tmp_path):
    assert load_config(finished / "config.yaml").run.output == str(finished)
    (tmp_path / "old.yaml").write_text("version: 1\nrun.seed: 3\n")
    with pytest.raises(UserError, match=r"old.yaml:1: version 1: written for other names of the options"):
        load_config(tmp_path / "old.yaml")


def test_overwrite_starts_anew(pretrain, finished):
    (finished / "note.txt").write_text("of the old run")
    assert pretrain(trainer__max_epochs=1, evaluate__every_epochs=0, optim__lr=0.5, run__overwrite=True).status == 0
    assert len(results(finished)) == 1 and not (finished / "note.txt").exists()
    assert len(column(finished, "train/loss")) == 4 and column(finished, "train/lr")[-1] == pytest.approx(
        0.5 * 16 / 256
    )


def test_a_wrong_option_does_not_cost_the_old_run(pretrain, finished):
    before = sha256(finished)
    said = pretrain(run__overwrite=True, data__batch_size=1000)
    assert said.status == 2 and sha256(finished) == before and (finished / "checkpoints" / "last.ckpt").exists()


def damage(kind, path):
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "foreign"])
def test_a_damaged_checkpoint_is_no_silent_restart(pretrain, finished, kind):
    last = finished / "checkpoints" / "last.ckpt"
    (finished / "checkpoints" / "epoch_0001.ckpt").write_bytes(last.read_bytes())
    damage(kind, last)
    before, metrics = last.read_bytes(), (finished / "metrics.csv").read_bytes()
    said = pretrain(trainer__max_epochs=2, evaluate__every_epochs=0)
    assert said.status == 2 and said.err.count("\n") == 1
    assert f"cannot resume: '{last}' is damaged or no checkpoint" in said.err
    assert "epoch_0001.ckpt" in said.err and "--run.overwrite" in said.err
    assert last.read_bytes() == before and (finished / "metrics.csv").read_bytes() == metrics
    # What the message advises works.
    (finished / "checkpoints" / "epoch_0001.ckpt").replace(last)
    assert pretrain(trainer__max_epochs=2, evaluate__every_epochs=0).status == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_run_is_never_touched(pretrain, tmp_path, overwrite):
    precious = tmp_path / "run" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    said = pretrain(run__overwrite=overwrite)
    assert (
        said.status == 2
        and f"'{tmp_path}/run' is not empty and no run directory" in said.err
        and said.err.count("\n") == 1
    )
    assert precious.read_text() == "years of work" and list((tmp_path / "run").iterdir()) == [precious]
    (tmp_path / "run" / "config.yaml").write_text("port: 8080\n")  # a common name
    said = pretrain(run__overwrite=overwrite)
    assert said.status == 2 and "no run directory" in said.err and precious.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way(pretrain, tmp_path, overwrite):
    (tmp_path / "run").write_text("a file")
    said = pretrain(run__overwrite=overwrite)
    assert said.status == 2 and f"run.output '{tmp_path}/run' is a file; expected a directory" in said.err
    said = pretrain(tmp_path / "run" / "deeper" / "still", run__overwrite=overwrite)
    assert said.status == 2 and f"'{tmp_path}/run' is a file" in said.err
    assert (tmp_path / "run").read_text() == "a file"


def test_an_empty_directory_and_one_that_a_failed_start_left(pretrain, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vit-suite-error.log").write_text("of yesterday")
    assert pretrain(trainer__max_steps=1, evaluate__every_epochs=0).status == 0
    assert (tmp_path / "run" / "vit-suite-error.log").read_text() == "of yesterday"


def test_a_run_that_another_rank_starts_meanwhile_is_no_strangers_directory(tmp_path, monkeypatch):
    """Its config appears between two looks of this rank, which starts afresh as that one does."""
    looked = rundir._options

    def look(folder):
        found = looked(folder)
        (folder / "config.yaml").write_text("run.output: here\n")
        (folder / "checkpoints").mkdir()
        return found

    monkeypatch.setattr(rundir, "_options", look)
    assert rundir.check(PretrainConfig(run=RunOptions(output=str(tmp_path)))) is None
