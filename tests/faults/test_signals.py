"""SIGUSR1, SIGTERM, SIGINT: the step under way is finished and saved, the exit status says which it was, and the same
command goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.faults.conftest import assert_same, checkpoint, column, results, start, wait_for_checkpoint, words
from vit_suite import signals
from vit_suite.signals import Signals
from vit_suite.training import drill
from vit_suite.training.keeper import Keeper
from vit_suite.training.scores import OnlineKNN
from vit_suite.training.status import read_status
from vit_suite.training.stop import DRILL

pytestmark = pytest.mark.alone
THREE = {"trainer__max_epochs": 3}
STATUS = {signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Three epochs of four steps that nothing interrupted."""
    from vit_suite import cli

    folder = tmp_path_factory.mktemp("straight") / "run"
    assert cli.main(["pretrain", *words(run__output=folder, **THREE)]) == 0
    return folder


@pytest.fixture
def interrupted(pretrain, monkeypatch):
    """`interrupted(signal, step, **options)`: the tiny run gets the signal in the middle of the step, from within its
    own process."""

    def call(number, step, **options):
        handlers = {each: signal.getsignal(each) for each in STATUS}
        with monkeypatch.context() as patch:
            patch.setenv(DRILL, f"preempt@{step}")
            patch.setitem(drill.SIGNALS, "preempt", number)
            said = pretrain(**options)
        assert {each: signal.getsignal(each) for each in STATUS} == handlers  # what a notebook had is back
        return said

    return call


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGUSR1, 1), (signal.SIGUSR1, 6), (signal.SIGTERM, 7), (signal.SIGINT, 3), (signal.SIGUSR1, 8)],
    ids=lambda value: getattr(value, "name", value),
)
def test_stops_after_the_step_and_goes_on(pretrain, interrupted, straight, tmp_path, number, step):
    """In the first step, in mid-epoch, and in the last step of an epoch, whose score is not lost."""
    said = interrupted(number, step, **THREE)
    assert said.status == STATUS[number]
    assert (
        said.err == f"vit-suite: stopped by {number.name} at step {step}, checkpoint saved; the same command goes on\n"
    )
    assert checkpoint(tmp_path / "run")["global_step"] == step
    assert (
        len(column(tmp_path / "run", "train/loss")) == step and len(column(tmp_path / "run", "knn/top1")) == step // 4
    )
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.step, status.max_steps, status.epoch) == (
        "stopped",
        number.name,
        step,
        12,
        step // 4,
    )
    assert not (tmp_path / "run" / "results.json").exists()
    said = pretrain(**THREE)
    assert said.status == 0 and f"last.ckpt, {step} steps done" in said.log
    assert_same(tmp_path / "run", straight)
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.step, status.epoch) == ("done", None, 12, 3)


def test_a_signal_in_the_last_step_is_too_late(interrupted, straight, tmp_path):
    assert interrupted(signal.SIGTERM, 12, **THREE).status == 0
    assert_same(tmp_path / "run", straight)


def test_waits_for_all_micro_batches_of_the_step(pretrain, interrupted, tmp_path):
    """A checkpoint between them would lose the gradients gathered so far."""
    options = {"trainer__accumulate": 2, "trainer__max_epochs": 2, "evaluate__every_epochs": 0}
    assert pretrain(tmp_path / "straight", **options).status == 0

    class Early(drill.Drill):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if (trainer.global_step, batch_idx) == (5, 2):  # the first micro-batch of the second epoch's second step
                os.kill(os.getpid(), signal.SIGTERM)

        def on_before_optimizer_step(self, *_):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drill, "Drill", Early)
        assert interrupted(signal.SIGTERM, 5, **options).status == 143
    assert checkpoint(tmp_path / "run")["global_step"] == 6
    assert pretrain(**options).status == 0
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_status_while_training_and_after_a_failure(pretrain, monkeypatch, tmp_path):
    seen, score = [], OnlineKNN.score

    def failing(self, module):
        seen.append(read_status(tmp_path / "run"))
        if len(seen) == 2:
            raise RuntimeError("the disk is full")
        return score(self, module)

    monkeypatch.setattr(OnlineKNN, "score", failing)
    assert pretrain(**THREE).status == 1
    first, second = seen
    assert (first.state, first.step, first.max_steps, first.epoch, first.knn, first.job) == (
        "running",
        4,
        12,
        1,
        None,
        None,
    )
    assert second.step == 8 and second.knn == pytest.approx(column(tmp_path / "run", "knn/top1")[0], abs=1e-4)
    assert second.images_per_second > 0 and second.seconds_left == pytest.approx(
        4 * 16 / second.images_per_second, abs=0.06
    )
    assert abs(second.updated - time.time()) < 60
    failed = read_status(tmp_path / "run")
    assert (failed.state, failed.reason, failed.step) == ("failed", "RuntimeError: the disk is full", 8)


def test_results_and_export_that_a_kill_at_the_end_left_out_are_made_up(pretrain, monkeypatch, tmp_path):
    """After the last checkpoint, before the exported backbone and results.json."""
    options = {"trainer__max_epochs": 2}
    assert pretrain(tmp_path / "straight", **options).status == 0

    export = Keeper.export

    def killed(self, trainer, module):
        if trainer.global_step == 8:
            raise RuntimeError("killed")
        export(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "export", killed)
        assert pretrain(**options).status == 1
    assert checkpoint(tmp_path / "run")["global_step"] == 8 and not (tmp_path / "run" / "results.json").exists()
    assert pretrain(**options).status == 0
    assert_same(tmp_path / "run", tmp_path / "straight", lost_rows=1)
    assert pretrain(**options).status == 0 and len(results(tmp_path / "run")) == 1


# SLURM
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(monkeypatch, tmp_path):
    """`scontrol(status)` puts a command of that name on PATH that notes its words and ends so; returns the file of
    notes."""

    def call(status: int):
        folder, notes = tmp_path / "bin", tmp_path / "notes"
        folder.mkdir()
        (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {notes}\necho refused >&2\nexit {status}\n')
        (folder / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return notes

    return call


def test_a_warned_job_queues_again(interrupted, scontrol, monkeypatch, tmp_path):
    notes = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr("vit_suite.training.stop.DRILL", "NO_DRILL")  # which never requeues
    said = interrupted(signal.SIGUSR1, 2, **THREE)
    assert said.status == 0 and said.err.endswith("checkpoint saved; job 42 is back in the queue\n")
    assert notes.read_text() == "requeue 42\n"
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason, status.job) == ("stopped", "SIGUSR1", "42")


def test_a_run_of_a_job_array_queues_itself_alone(interrupted, scontrol, monkeypatch):
    notes = scontrol(1)
    for name, value in (("SLURM_JOB_ID", "45"), ("SLURM_ARRAY_JOB_ID", "42"), ("SLURM_ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vit_suite.training.stop.DRILL", "NO_DRILL")
    said = interrupted(signal.SIGUSR1, 2, **THREE)
    assert notes.read_text() == "requeue 42_3\n"
    assert said.status == 75 and "job 42_3 could not be requeued: refused" in said.log  # and SLURM sees a failure


def test_a_cancelled_job_does_not_queue_again(interrupted, scontrol, monkeypatch):
    notes = scontrol(0)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr("vit_suite.training.stop.DRILL", "NO_DRILL")
    assert interrupted(signal.SIGTERM, 2, **THREE).status == 143 and not notes.exists()


def test_a_requeued_job_does_not_overwrite_its_own_work(pretrain, interrupted, straight, monkeypatch, tmp_path):
    said = interrupted(signal.SIGUSR1, 6, run__overwrite=True, **THREE)
    assert said.err.endswith("checkpoint saved; the same command without overwrite goes on\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    said = pretrain(run__overwrite=True, **THREE)
    assert said.status == 0 and "last.ckpt, 6 steps done" in said.log
    assert_same(tmp_path / "run", straight)


# Handlers
# ----------------------------------------------------------------------------------------------------------------------


def test_a_repeated_signal(monkeypatch):
    """At once it is an echo of the first, later it is impatience. SIGUSR1 stays a warning."""
    with Signals() as noted:
        noted.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert noted.noted == signal.SIGUSR1
    with Signals() as noted:
        noted.listen()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.noted == signal.SIGINT
        monkeypatch.setattr(signals, "ECHO", -1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(signals, "ECHO", 0)
    with Signals() as noted:  # a run that hangs after a warning
        noted.listen()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert noted.noted == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_before_training_sigterm_and_ctrl_c_are_what_they_were():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals():
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        assert callable(signal.getsignal(signal.SIGUSR1))
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_loader_workers_live_as_long_as_their_main_process():
    """The main process needs them for its current step, however long that takes; without it they end."""
    worker = (
        "import time; from vit_suite import signals; signals.GRACE = 1; signals.outlive(); print('ready', flush=True);"
        " time.sleep(60)"
    )
    main = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {worker!r}]);"
        " print(child.pid, flush=True); child.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", main], stdout=subprocess.PIPE, text=True)
    with process.stdout as out:
        pid = int(out.readline())
        assert out.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(pid, number)
        time.sleep(2.5)  # two looks
        os.kill(pid, 0)
        process.kill()
        process.wait()
        assert out.read() == ""  # which ends when the worker, the last to hold the pipe, has ended


def test_sigterm_in_a_long_step_waits_for_the_step(pretrain, monkeypatch, tmp_path):
    """A step that is longer than a worker's GRACE is finished and saved, though the workers got the signal too."""
    monkeypatch.setattr(signals, "GRACE", 1)
    long = {"evaluate__every_epochs": 0, "data__resident": False, "data__workers": 1, "data__name": "folder"}
    images = tmp_path / "images" / "train" / "a"
    images.mkdir(parents=True)
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{index:02d}.png")
    seen = []

    class Slow(drill.Drill):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step + 1 == self.event.step:
                seen.extend(multiprocessing.active_children())
                for process in seen:
                    os.kill(process.pid, signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(3)
                assert all(process.is_alive() for process in seen)

    monkeypatch.setattr(drill, "Drill", Slow)
    monkeypatch.setenv(DRILL, "preempt@2")
    said = pretrain(data__root=tmp_path / "images", trainer__max_epochs=3, **long)
    assert seen and said.status == 143 and "stopped by SIGTERM at step 2, checkpoint saved" in said.err
    assert checkpoint(tmp_path / "run")["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_process_of_its_own(pretrain, tmp_path, number):
    """Whose loader workers hear the signal too, as they do of Ctrl-C in a terminal and in some clusters."""
    long = {"saving__every_steps": 1, "evaluate__every_epochs": 0, "data__resident": False, "data__workers": 1}
    child = start(tmp_path / "run", trainer__max_epochs=4000, **long)
    wait_for_checkpoint(child, tmp_path / "run")
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert found
    for worker in map(int, found):
        os.kill(worker, number)
    time.sleep(0.2)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == STATUS[number] and err.splitlines()[-1].startswith(
        f"vit-suite: stopped by {number.name} at step "
    )
    assert "Traceback" not in err
    done = checkpoint(tmp_path / "run")["global_step"]
    assert done >= 1 and f"at step {done}," in err
    said = pretrain(trainer__max_epochs=done // 4 + 1, **long)
    assert said.status == 0 and f"last.ckpt, {done} steps done" in said.log


@pytest.mark.slow
def test_all_ranks_stop_after_the_step_in_which_one_hears_the_signal(tmp_path):
    """`preempt` reaches the last rank alone; a rank that went on by itself would wait for the other for ever."""
    command = [sys.executable, "-m", "vit_suite", "pretrain", *words(run__output=tmp_path / "run", trainer__devices=2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {DRILL: "preempt@6"})
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("stopped by SIGUSR1 at step 6, checkpoint saved") == 1 and "Traceback" not in done.stderr
    assert checkpoint(tmp_path / "run")["global_step"] == 6
