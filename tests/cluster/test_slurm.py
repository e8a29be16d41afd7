"""Jobs under a real SLURM: two nodes x two ranks on this machine, warned, pre-empted, requeued, broken; each ends as if
nothing were."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.cluster.local_slurm import Cluster, missing, rank_pid
from tests.commands.conftest import column, sha256, words
from vit_suite import cli
from vit_suite.cluster.slurm import OVER
from vit_suite.training.status import read_status

pytestmark = [
    pytest.mark.alone,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
STEPS = 24
RUN = {
    "trainer__max_epochs": 6,
    "evaluate__every_epochs": 3,
    "saving__every_epochs": 6,
    "saving__every_steps": 5,
}


class Started(NamedTuple):
    cluster: Cluster
    straight: Path
    """A run that nothing interrupts."""
    limited: tuple[str, Path]
    """Job and run of one that is not done when its time is up; it sleeps most of the time, beside the others."""


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder)
    before = {name: os.environ.get(name) for name in cluster.variables}
    os.environ.update(cluster.variables)
    try:
        straight, limited = folder / "a straight run", folder / "limited"
        job = cluster.launch(limited, "--time", 4, "--signal_seconds", 60, pause=8, **RUN)
        cluster.finish(cluster.launch(straight, **RUN))
        yield Started(cluster, straight, (job, limited))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        cluster.stop()


def resumed_at(log: str) -> list[int]:
    """The steps done at each start that went on from a checkpoint."""
    return [int(step) for step in re.findall(r"resuming .*last\.ckpt, (\d+) steps done", log)]


def status(folder: Path, capsys) -> str:
    capsys.readouterr()
    assert cli.main(["launch", "--status", str(folder)]) == 0
    return capsys.readouterr().out


def test_two_nodes_train(started, capsys):
    assert len(column(started.straight, "train/loss")) == STEPS and read_status(started.straight).state == "done"
    assert "done, step 24 of 24, kNN" in status(started.straight, capsys)
    log = next(started.straight.glob("slurm-*.log")).read_text()
    assert "Traceback" not in log and "Warning" not in log and log.count("done: 24 steps") == 1


def test_a_bare_requeue_loses_little(started, tmp_path, capsys):
    cluster, run = started.cluster, tmp_path / "run"
    job = cluster.launch(run, pause=0.5, **RUN)
    seen = cluster.wait_for_step(job, run, 3)
    assert re.search(r"run: running: step \d+ of 24, \d+ images/s, .* left", status(run, capsys))
    with pytest.raises(AssertionError):  # two jobs in one directory
        cluster.launch(run, **RUN)
    assert f"job {job} in '{run}' is running" in capsys.readouterr().err
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, "the queue", lambda state: state["JobState"] == "PENDING")
    assert "run: pre-empted, waits to go on (BeginTime" in status(run, capsys)
    assert cluster.finish(job)["Restarts"] == "1"
    assert resumed_at(cluster.log(job))[0] >= seen - RUN["saving__every_steps"]
    assert sha256(run) == sha256(started.straight)


def test_pre_emption(started, tmp_path, capsys):
    cluster, run = started.cluster, tmp_path / "run"
    job = cluster.launch(run, "--partition", "spot", pause=0.5, **RUN)
    seen = cluster.wait_for_step(job, run, 3)
    place = ["--partition=local", "--nodes=2", "--exclusive", "--nodelist", ",".join(cluster.nodes(job))]
    urgent = cluster.call("sbatch", "--parsable", "--output=/dev/null", *place, "--wrap", "sleep 3").strip()
    cluster.wait(job, "the queue", lambda state: state["JobState"] == "PENDING" and state["Restarts"] == "1")
    assert "pre-empted, waits to go on" in status(run, capsys)
    cluster.finish(urgent)
    cluster.finish(job)
    log = cluster.log(job)
    print(log)
    assert "stopped by SIGUSR1 at step" in log and resumed_at(log)[0] >= seen
    assert sha256(run) == sha256(started.straight)


def test_a_rank_and_then_a_node_that_die(started, tmp_path):
    cluster, run = started.cluster, tmp_path / "run"
    job = cluster.launch(run, pause=0.5, **RUN)
    seen = cluster.wait_for_step(job, run, 6)
    killed = time.monotonic()
    os.kill(rank_pid(job, 3), signal.SIGKILL)
    state = cluster.wait(job, "its end", lambda state: state["JobState"] in OVER)
    assert state["JobState"] == "FAILED" and time.monotonic() - killed < 30  # nothing waits for the dead
    job = cluster.launch(run, pause=0.5, **RUN)
    cluster.wait_for_step(job, run, 11)
    assert resumed_at(cluster.log(job))[0] >= seen - RUN["saving__every_steps"]
    node = cluster.nodes(job)[1]
    cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    cluster.wait(job, "the queue", lambda state: state["Restarts"] == "1")
    subprocess.run(
        ["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True
    )  # refused where it is back already
    cluster.finish(job)
    assert sha256(run) == sha256(started.straight)


def test_an_array_over_seeds(started, tmp_path, capsys):
    """One run is asked to end by SIGTERM to its tasks alone, which SLURM sends before a pre-emption where it does not
    send the user's signal. The other is warned: it is the last of the array and has the array's own number, and
    requeued by that all would start again."""
    cluster, run = started.cluster, tmp_path / "sweep"
    job = cluster.launch(run, "--nodes", 1, "--seeds", 0, 1, pause=0.5, **RUN)
    for seed, name in enumerate(("TERM", "USR1")):
        seen = cluster.wait_for_step(f"{job}_{seed}", run / f"seed{seed}", 3)
        cluster.call("scancel", f"--signal={name}", f"{job}_{seed}")
        cluster.wait(f"{job}_{seed}", "the queue", lambda state: state["Restarts"] == "1")
        assert f"stopped by SIG{name}" in cluster.log(f"{job}_{seed}") and read_status(run / f"seed{seed}").step >= seen
    for seed in range(2):
        assert cluster.finish(f"{job}_{seed}")["Restarts"] == "1"
        assert len(resumed_at(cluster.log(f"{job}_{seed}"))) == 1
        assert len(column(run / f"seed{seed}", "train/loss")) == STEPS
    assert sha256(run / "seed0") != sha256(run / "seed1")
    lines = status(run, capsys).splitlines()
    assert [
        line.endswith(f"(job {job}_{seed})") and "done, step 24 of 24" in line for seed, line in enumerate(lines)
    ] == [True, True]


def test_one_config_under_three_launchers(started, tmp_path):
    """Alone, by torchrun and by srun: nothing in the file says how many ranks there are."""
    options = words(run__output="unused", trainer__max_epochs=1, evaluate__every_epochs=0)
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump({key[2:]: yaml.safe_load(value) for key, value in zip(options[::2], options[1::2], strict=True)})
    )
    command = ["-m", "vit_suite", "pretrain", "--config", str(file), "--run.output"]
    starts = {
        "python": [sys.executable],
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            "--nproc-per-node=2",
        ],
        "srun": ["srun", "--nodes=2", "--ntasks-per-node=2", "--job-name=train", sys.executable],
    }
    for name, words_ in starts.items():
        done = subprocess.run([*words_, *command, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert column(tmp_path / name, "train/loss") == pytest.approx(
            column(tmp_path / "python", "train/loss"), abs=1e-5
        )


def test_without_srun_there_is_a_message(started, tmp_path):
    """One process in a job of four tasks would wait for the others until its time is up."""
    command = " ".join([sys.executable, "-m", "vit_suite", "pretrain", *words(run__output=tmp_path / "run")])
    log = tmp_path / "log"
    job = started.cluster.call(
        "sbatch", "--parsable", "-J", "x", "-N2", "--ntasks-per-node=2", "-o", log, "--wrap", command
    ).strip()
    state = started.cluster.wait(job, "its end", lambda state: state["JobState"] == "FAILED")
    assert state["ExitCode"] == "2:0" and "start it with `srun vit-suite ...`" in log.read_text()


def test_the_time_limit(started):
    """Of four minutes. SLURM looks every 30 s whom to warn, so this comes 150 to 180 s after the start."""
    job, run = started.limited
    restarts = int(started.cluster.finish(job)["Restarts"])
    log = started.cluster.log(job)
    assert restarts >= 1 and "stopped by SIGUSR1 at step" in log, log
    assert f"job {job} is back in the queue" in log and len(resumed_at(log)) >= 1
    assert sha256(run) == sha256(started.straight)
