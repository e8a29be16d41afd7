"""One training at a time in a run directory, and scores that several processes append at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from vit_suite.errors import UserError
from vit_suite.reports.results import append_result, read_results
from vit_suite.training.lock import FILE, SILENT, held, refuse_second

from ..commands.conftest import words

HOLD = """
import sys, time
from pathlib import Path
from vit_suite.training.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def take(folder):
    with held(folder):
        pass


def test_the_second_is_told_host_and_process_of_the_first(tmp_path, holder):
    for call in (take, refuse_second):
        said = refusal(call, tmp_path)
        assert said == (
            f"another training runs in '{tmp_path}': process {holder.pid} on host {socket.gethostname()};"
            " wait for it, stop it, or name another run.output."
        )
    assert refusal(take, tmp_path)  # asking has not freed it


def test_a_crash_frees_the_lock_at_once_and_so_does_the_end(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / FILE).exists()
    refuse_second(tmp_path)
    with held(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / FILE).exists()
    take(tmp_path)


def test_a_lock_of_another_machine_holds_until_it_falls_silent(tmp_path, monkeypatch):
    path = tmp_path / FILE
    path.write_text(json.dumps({"host": "elsewhere", "process": 7, "job": "17"}))
    said = refusal(take, tmp_path)
    assert "process 7 on host elsewhere (SLURM job 17); its last sign of life is 0 s old" in said
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # the same job, which SLURM has put on another machine
    take(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    path.write_text(json.dumps({"host": "elsewhere", "process": 7, "job": None}))
    before = time.time() - SILENT - 1
    os.utime(path, (before, before))
    take(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": 3}'])
def test_a_lock_that_says_nothing_is_taken(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    os.utime(tmp_path / FILE, (0, 0))
    take(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_training_in_a_live_run_is_refused(pretrain, tmp_path, overwrite):
    assert pretrain(trainer__max_epochs=1).status == 0
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        said = pretrain(run__overwrite=overwrite)
        process.kill()
    assert said.status == 2 and said.err.count("\n") == 1
    assert f"another training runs in '{folder}': process {process.pid} on host" in said.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != FILE} == before


def test_ten_processes_lose_no_result(tmp_path):
    path = tmp_path / "results.json"
    code = (
        "import sys\nfrom vit_suite.reports.results import append_result\n"
        "for number in range(5):\n    append_result(sys.argv[1], f'{sys.argv[2]}-{number}', {}, {})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(10)]
    assert [process.wait(timeout=100) for process in processes] == [0] * 10
    tasks = {entry["task"] for entry in read_results(path)}
    assert tasks == {f"{process}-{number}" for process in range(10) for number in range(5)}
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


def test_results_stay_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    append_result(path, "first", {}, {})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        append_result(path, "second", {}, {})
    assert [entry["task"] for entry in read_results(path)] == ["first"]
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


def test_other_images_under_the_same_command_are_refused(vit_suite, tmp_path):
    from PIL import Image

    def draw(classes, count):
        for label in range(classes):
            (tmp_path / "images" / f"c{label}").mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (label * 40, number * 5, 0)).save(
                    tmp_path / "images" / f"c{label}" / f"{number}.png"
                )

    draw(2, 16)
    options = {"data__name": "folder", "data__root": tmp_path / "images", "data__length": None}
    options |= {"data__test_length": None, "data__image_size": None, "optim__warmup_epochs": 0}
    command = ["pretrain", *words(run__output=tmp_path / "run", evaluate__every_epochs=0, **options)]
    assert vit_suite(*command, "--trainer.max_epochs", 1).status == 0
    draw(3, 16)
    said = vit_suite(*command)
    assert said.status == 2 and f"'{tmp_path}/run' holds a run on 32 images in 2 classes, but" in said.err
    assert "has 48 images in 3 classes now. Put the images back to resume" in said.err
    for path in (tmp_path / "images" / "c2").iterdir():
        path.unlink()
    (tmp_path / "images" / "c2").rmdir()
    (tmp_path / "images" / "c1" / "0.png").rename(tmp_path / "images" / "c1" / "z.png")
    said = vit_suite(*command)
    assert said.status == 2 and "the names or classes of the files of" in said.err
    (tmp_path / "images" / "c1" / "z.png").rename(tmp_path / "images" / "c1" / "0.png")
    said = vit_suite(*command)
    assert said.status == 0
    assert "the schedules now span 4 steps, not those of before: the learning rate goes from" in said.log


def test_a_users_fault_in_the_first_step_leaves_nothing(pretrain, tmp_path, monkeypatch):
    from vit_suite.methods.base import Method

    def fail(self):
        raise UserError("optim: these options cannot be")

    monkeypatch.setattr(Method, "configure_optimizers", fail)
    said = pretrain(tmp_path / "a" / "b" / "run")
    assert said.status == 2 and "optim: these options cannot be" in said.err
    assert not list(tmp_path.iterdir())
