"""SIGKILL, and everything a process cannot answer: the same command again ends with the same weights.
scripts/kill_drill.py does many."""

from __future__ import annotations

import random
import re
import signal
import time

import pytest

from tests.commands.conftest import FOLDER, photographs  # noqa: F401 (a fixture)
from tests.commands.test_sit import KINDS, SIT
from tests.commands.test_supervised import SUPERVISED
from tests.faults.conftest import assert_same, checkpoint, results, sha256, start, wait_for_checkpoint, words
from vit_suite.errors import UserError
from vit_suite.training import rundir
from vit_suite.training.drill import Event, parse
from vit_suite.training.keeper import Keeper
from vit_suite.training.status import read_status
from vit_suite.training.stop import DRILL

LONG = {"trainer__max_epochs": 12, "saving__every_steps": 1, "evaluate__every_epochs": 4}
DINOV2 = {
    "method__name": "dinov2",
    "method__centering": "sinkhorn_knopp",
    "method__gram_weight": 1.0,
    "method__gram_from": 3,
    "method__gram_every": 2,
}
MAE = {
    "method__name": "mae",
    "method__decoder": "cross",
    "method__decoder_dim": 16,
    "method__decoder_depth": 2,
    "method__decoder_heads": 2,
    "method__out_dim": None,
    "method__hidden_dim": None,
    "method__bottleneck_dim": None,
    "method__warmup_teacher_temperature_epochs": None,
    "views__local_size": None,
    "views__local_crops": None,
}
METHODS = {"dino": {}, "dinov2": DINOV2, "mae": MAE, "sit": SIT | KINDS["v3"], "supervised": SUPERVISED}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_a_random_moment(pretrain, tmp_path, method):
    """With a checkpoint a step, so that many a moment falls into the writing of one."""
    options = LONG | METHODS[method]
    assert pretrain(tmp_path / "straight", **options).status == 0
    child = start(tmp_path / "run", **options)
    wait_for_checkpoint(child, tmp_path / "run")
    pause = random.uniform(0, 0.8)
    time.sleep(pause)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    done = checkpoint(tmp_path / "run")["global_step"]
    print(f"killed {pause:.3f} s after the first checkpoint, {done} steps done")
    assert read_status(tmp_path / "run").state == "running"
    said = pretrain(**options)
    assert said.status == 0 and f"last.ckpt, {done} steps done" in said.log
    assert_same(tmp_path / "run", tmp_path / "straight", lost_rows=1)


class Killed(BaseException):
    """Ends a training in this process as abruptly as Python allows."""


@pytest.mark.parametrize("files", [False, True], ids=["in memory", "from files, views in workers"])
@pytest.mark.parametrize("method", ["dino", "dinov2", "mae", "sit v1", "supervised"])
def test_every_method_goes_on_from_mid_epoch(pretrain, photographs, monkeypatch, tmp_path, method, files):  # noqa: F811
    """Weights, EMA, center, the uncertainties of SiT's losses, optimizer: between two checkpoints, in the second
    epoch."""
    options = METHODS.get(method, SIT | KINDS["v1"]) | {"trainer__max_epochs": 3, "saving__every_steps": 2}
    if files:
        options |= FOLDER | {
            "data__root": photographs,
            "data__workers": 1,
            "views__backend": "workers",
            "trainer__max_epochs": 3,
        }
    assert pretrain(tmp_path / "straight", **options).status == 0
    after = Keeper.on_train_batch_end

    def kill(self, trainer, *rest):
        after(self, trainer, *rest)
        if trainer.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_batch_end", kill)
        with pytest.raises(Killed):
            pretrain(**options)
    assert checkpoint(tmp_path / "run")["global_step"] == 4
    assert pretrain(**options).status == 0
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_killed_before_the_first_checkpoint_starts_anew(pretrain, monkeypatch, tmp_path):
    options = {"trainer__max_epochs": 2}
    assert pretrain(tmp_path / "straight", **options).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_batch_end", lambda self, trainer, *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pretrain(**options)
    assert (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "checkpoints").exists()
    said = pretrain(**options)
    assert said.status == 0 and "resuming" not in said.log
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("name", ["best", "last"])
def test_killed_between_the_checkpoints_of_an_epoch_and_while_writing_one(pretrain, monkeypatch, tmp_path, name):
    options = {"trainer__max_epochs": 3}
    assert pretrain(tmp_path / "straight", **options).status == 0

    def kill(self, trainer, which):
        if which == name and trainer.global_step == 4:
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            (self.folder / "checkpoints" / f"{which}.ckpt.partial").write_bytes(b"half of it")
            raise Killed
        save(self, trainer, which)

    save = Keeper.save
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "save", kill)
        with pytest.raises(Killed):
            pretrain(**options)
    assert pretrain(**options).status == 0
    assert_same(tmp_path / "run", tmp_path / "straight")
    ours, theirs = ((tmp_path / place / "checkpoints" / "best.ckpt").exists() for place in ("run", "straight"))
    assert ours == theirs


def test_killed_while_an_old_run_is_deleted(pretrain, monkeypatch, tmp_path):
    """What is left is still known for a run, and the same command deletes the rest."""
    one = {"trainer__max_epochs": 1, "evaluate__every_epochs": 0}
    assert pretrain(**one).status == 0

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_atomically", kill)
        with pytest.raises(Killed):
            pretrain(run__overwrite=True, run__seed=1, **one)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert pretrain(run__overwrite=True, run__seed=1, **one).status == 0
    assert len(results(tmp_path / "run")) == 1


def test_overwriting_spares_the_files_of_the_job_that_does_it(pretrain, tmp_path):
    one = {"trainer__max_steps": 1, "evaluate__every_epochs": 0}
    (tmp_path / "run").mkdir()
    for name in ("launch.sbatch", "launch.json", "slurm-17.log"):
        (tmp_path / "run" / name).write_text("of the job")
    assert pretrain(**one).status == 0
    assert pretrain(run__overwrite=True, **one).status == 0
    assert (
        (tmp_path / "run" / "slurm-17.log").read_text()
        == (tmp_path / "run" / "launch.sbatch").read_text()
        == "of the job"
    )


# Drill
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_drill(vit_suite, pretrain, tmp_path):
    """In the seventh step six are done and four are in the checkpoint, so two are done twice."""
    options = {"saving__every_steps": 4, "evaluate__every_epochs": 0, "run__overwrite": True}
    assert pretrain(tmp_path / "straight", **options).status == 0
    said = vit_suite("pretrain", *words(run__output=tmp_path / "run", **options), "--drill", "kill@7,preempt@2")
    assert said.status == 0
    assert "drill preempt@2: 2 steps were done, 2 are in the checkpoint; starting again" in said.log
    assert "drill kill@7: 6 steps were done, 4 are in the checkpoint; starting again" in said.log
    assert (
        f"drill preempt@2,kill@7: finished, 2 steps done twice; sha256 of the weights {sha256(tmp_path / 'run')}"
        in said.log
    )
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preempt@0", "drill 'preempt@0': expected preempt@STEP with a step from 1"),
        ("kill@", "drill 'kill@': expected kill@STEP"),
        ("kill@-3", "drill 'kill@-3': expected kill@STEP"),
        ("preemt@3", "unknown kind of drill 'preemt'. Did you mean 'preempt'? Known: preempt, kill"),
        ("kill@3,", "unknown kind of drill ''"),
        ("kill@3,preempt@3", "drill 'kill@3,preempt@3': one event a step"),
    ],
)
def test_drills_that_are_none(vit_suite, tmp_path, text, message):
    said = vit_suite("pretrain", *words(run__output=tmp_path / "run"), "--drill", text)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_drill_beyond_the_end(pretrain, monkeypatch, tmp_path):
    """Said by the training that should take it, before its directory appears."""
    monkeypatch.setenv(DRILL, "kill@9")
    said = pretrain()
    assert said.status == 2 and "drill kill@9: the training has 8 steps; name a step from 1 to 8" in said.err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(DRILL, "preempt@5")
    assert pretrain().status == 75
    said = pretrain()
    assert said.status == 2 and "the training has 8 steps and 5 of them are done; name a step from 6 to 8" in said.err


def test_a_drill_under_a_launcher(vit_suite, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    said = vit_suite("pretrain", *words(run__output=tmp_path / "run"), "--drill", "kill@2")
    assert said.status == 2 and "without torchrun or srun" in said.err


def test_events_come_in_the_order_of_steps():
    assert parse("kill@50, preempt@37") == [Event("preempt", 37), Event("kill", 50)]
    with pytest.raises(UserError, match=re.escape("kill@²")):
        parse("kill@²")
