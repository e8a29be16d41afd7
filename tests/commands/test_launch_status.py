"""`vit-suite launch --status` without a cluster: what it says of a job, with a stand-in for squeue."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.commands.conftest import squeue

STATUS = {
    "state": "running",
    "step": 37,
    "max_steps": 100,
    "epoch": 3,
    "images_per_second": 1234.5,
    "knn": 41.2,
    "seconds_left": 3900.0,
    "waiting": None,
    "updated": 0.0,
    "job": "17",
    "reason": None,
}


@pytest.fixture
def ask(vit_suite, slurm, tmp_path):
    """`ask(entry, state=...)`: the answer of --status where squeue lists `entry` and status.json says `state` and so
    on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "launch.json").write_text('{"job": "17", "runs": []}')

    def call(*entries, **status):
        slurm(
            squeue=squeue(*entries) if entries else "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
        )
        slurm(cat='exec /bin/cat "$@"')
        if status:
            (tmp_path / "run" / "status.json").write_text(json.dumps(STATUS | status))
        said = vit_suite("launch", "--status", tmp_path / "run")
        assert said.status == 0, said.err
        return said.out.strip().removeprefix(f"{tmp_path}/run: ").removesuffix(" (job 17)")

    return call


def test_status_in_the_queue(ask):
    assert (
        ask(("17", "PENDING", 0, "1:00:00", "2030-01-02T03:04:05", "Priority"))
        == "queued (Priority, from 2030-01-02 03:04:05)"
    )
    assert ask(("17", "RUNNING", 0, "59:00", "N/A", "None")) == "running, no step yet; 59:00 until the job's time is up"
    waits = ask(("17", "PENDING", 2, "1:00:00", "N/A", "BeginTime"), state="stopped", reason="SIGUSR1")
    assert waits == "pre-empted, waits to go on (BeginTime), step 37 of 100, kNN 41.20%"
    runs = ask(("17", "RUNNING", 2, "UNLIMITED", "N/A", "None"), state="running")
    assert runs == "running: step 37 of 100, 1234 images/s, kNN 41.20%, 65 min left"


@pytest.mark.parametrize(
    ("state", "status", "answer"),
    [
        ("COMPLETED", {"state": "done"}, "done, step 37"),
        ("FAILED", {"state": "failed", "reason": "RuntimeError: x"}, "failed (RuntimeError: x), step 37"),
        ("TIMEOUT", {"state": "running"}, "failed (timeout), step 37"),
        ("CANCELLED", {"state": "running"}, "failed (cancelled), step 37"),
        (None, {"state": "done"}, "done, step 37"),
        (None, {"state": "stopped"}, "stopped, goes on when it is started again, step 37"),
        (None, {"state": "running"}, "failed: ended without a word, last heard of"),
        (None, {}, "ended before its first step"),
    ],
)
def test_status_of_the_ended(ask, state, status, answer):
    entries = [("17", state, 0, "0:00", "N/A", "None")] if state else []
    assert ask(*entries, **status).startswith(answer)


def test_status_without_slurm(vit_suite, slurm, tmp_path):
    (tmp_path / "run").mkdir()
    said = vit_suite("launch", "--status", tmp_path / "run")
    assert said.status == 2 and "holds neither a launched job (launch.json) nor the status.json of a run" in said.err
    (tmp_path / "run" / "status.json").write_text(json.dumps(STATUS))
    said = vit_suite("launch", "--status", tmp_path / "run")
    assert (
        "running: step 37 of 100" in said.out
        and "last heard of" in said.out
        and "job" not in said.out.removeprefix(str(tmp_path))
    )


def test_status_of_an_array(vit_suite, slurm, tmp_path):
    (tmp_path / "launch.json").write_text('{"job": "17", "runs": ["seed0", "seed1"]}')
    entries = ("17_1", "PENDING", 0, "1:00", "N/A", "Resources"), ("17_0", "RUNNING", 0, "UNLIMITED", "N/A", "None")
    slurm(squeue=squeue(*entries), cat='exec /bin/cat "$@"')
    lines = vit_suite("launch", "--status", tmp_path).out.splitlines()
    assert lines == [
        f"{tmp_path}/seed0: running, no step yet (job 17_0)",
        f"{tmp_path}/seed1: queued (Resources) (job 17_1)",
    ]


def test_status_answers_at_once(tmp_path):
    """--status imports no torch: one asks often."""
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    code = (
        "import sys; from vit_suite import cli; cli.main(['launch', '--status', sys.argv[1]]); print('torch' in"
        " sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.stdout.endswith("False\n"), done
