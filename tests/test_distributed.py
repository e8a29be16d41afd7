from __future__ import annotations

import subprocess
import sys

import pytest

from vit_suite import distributed

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
)
SLURM = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
STEP = SLURM | {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def launcher(monkeypatch):
    """What the launcher says when the environment holds these variables alone."""

    def call(**variables):
        for name in (
            *NAMES,
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_ID",
            "SLURM_STEP_NODELIST",
            "SLURM_STEP_NUM_NODES",
            "LOCAL_WORLD_SIZE",
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return distributed._from_launcher()

    return call


def test_what_started_the_processes(launcher):
    assert launcher() == {} == launcher(RANK="0", WORLD_SIZE="1")
    assert launcher(RANK="1", WORLD_SIZE="2") == {"init_method": "env://"}
    assert launcher(**SLURM) == {}  # a batch script without srun is one process, whatever SLURM_NTASKS says
    assert launcher(**STEP) == {"init_method": "tcp://node07:23640", "rank": 3, "world_size": 4}
    assert launcher(**STEP, MASTER_ADDR="host", MASTER_PORT="99")["init_method"] == "tcp://host:99"
    assert launcher(**STEP | {"SLURM_STEP_ID": "3"})["init_method"] == "tcp://node07:23641"
    assert distributed.local_rank() == 1
    assert launcher(**STEP, RANK="5", WORLD_SIZE="8", LOCAL_RANK="6") == {
        "init_method": "env://"
    }  # torchrun under srun
    assert distributed.local_rank() == 6


def test_one_process_needs_no_group(launcher):
    launcher()
    with distributed.launched():
        distributed.barrier()
        assert (distributed.rank(), distributed.world_size(), distributed.active()) == (0, 1, False)


AGAIN = """
import time
from vit_suite import distributed
rank = 0
for turn in range(2):
    time.sleep(rank)  # the other rank waits; the address that it finds must not be that of the first group
    with distributed.launched():
        distributed.barrier()
        rank = distributed.rank()
"""


@pytest.mark.slow
def test_a_process_has_one_group_after_another():
    """torchrun keeps what the ranks of the first group said of themselves."""
    job = ["--nproc-per-node", "2", "--standalone", "--no-python", sys.executable, "-c", AGAIN]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *job], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused" not in done.stderr


def test_what_is_done_apart_is_done_as_rank_0_of_1(launcher, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    assert (distributed.rank(), distributed.world_size(), distributed.active()) == (3, 4, True)
    with pytest.raises(KeyError), distributed.apart():
        assert (distributed.rank(), distributed.world_size(), distributed.active()) == (0, 1, False)
        assert distributed.gather_objects("mine") == ["mine"]
        raise KeyError
    assert (distributed.rank(), distributed.world_size(), distributed.active()) == (3, 4, True)


def test_how_many_were_started(launcher):
    launcher()
    assert distributed.started() is None
    launcher(**SLURM)  # a batch script without srun
    assert distributed.started() is None
    launcher(**STEP, SLURM_STEP_NUM_NODES="2")
    assert distributed.started() == (2, 2)
    launcher(**STEP, SLURM_STEP_NUM_NODES="2", RANK="5", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")  # torchrun under srun
    assert distributed.started() == (1, 8)
    launcher(WORLD_SIZE="2", LOCAL_RANK="1")  # started by Lightning itself, which knows
    assert distributed.started() is None
