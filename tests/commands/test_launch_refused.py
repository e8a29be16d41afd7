"""What `vit-suite launch` refuses, before anything is written."""

from __future__ import annotations

import pytest

from tests.commands.conftest import CPU, squeue


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        (["--partitoin", "x"], {}, "unknown option '--partitoin'. Did you mean '--partition'?"),
        ([], {"optim__lrr": 3}, "Did you mean '--optim.lr'?"),
        (["--time", "tomorrow"], {}, "time: expected minutes, H:MM:SS or D-HH:MM:SS, got 'tomorrow'"),
        (
            ["--time", "\u0661\u0662:00:00"],
            {},
            "time: expected minutes, H:MM:SS or D-HH:MM:SS, got '\u0661\u0662:00:00'",
        ),
        (["--time", "9" * 5000], {}, "(5,000 characters)"),
        (["--time", "2"], {}, "time 2 leaves no time to train before the warning of signal_seconds 90"),
        (["--job-name", "bash"], {}, "job_name 'bash'"),
        (["--nodes", 2], {"trainer__nodes": 3}, "trainer.nodes is 3, but the job has 2 nodes"),
        (["--tasks-per-node", 2], {"trainer__devices": 4}, "trainer.devices is 4, but the job has 2 ranks a node"),
        (["--gpus-per-node", 2], {}, "trainer.accelerator is cpu, but gpus_per_node is 2"),
        (["--gpus-per-node", 2, "--tasks-per-node", 4], {}, "tasks_per_node is 4, but a GPU takes one process"),
        (["--nodes", 3], {}, "data.batch_size 16 (global) does not split evenly over 3 ranks"),
        ([], {"views__global_size": 36}, "views.global_size 36x36 is not divisible by the patch size 8"),
        ([], {"run__overwrite": True}, "run.overwrite would delete the run"),
        ([], {"drill": "kill@3"}, "drill needs no cluster"),
        (["--at-once", 2], {}, "at_once is for job arrays"),
        (["--seeds", 1, 1], {}, "seeds: 1 1: one stands twice"),
        (["--partition", "a\nb"], {}, "cannot stand in a line of the script"),
        (["--sweep", "none.yaml"], {}, "none.yaml: no such config file"),
    ],
)
def test_refused_before_anything_is_written(launch, slurm, tmp_path, launcher, options, message):
    slurm(sbatch="echo 17")
    said = launch(*CPU, *launcher, **options)
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr: 3", "expected a list of options ('- optim.lr: 1e-3'), got a mapping"),
        ("", "got nothing"),
        ("- optim.lr: 1e-3\n- 3", ":2: expected options as 'key: value', got a scalar"),
        ("- optim.lr: 1e-3\n- optim.lrr: 3", ":2: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("- optim.lr: fast", ":1: optim.lr: expected float (at least 0), got 'fast'"),
        ("- method.name: sit", ":1: method.name: a sweep keeps to one method (dino)"),
        ("- run.output: x", ":1: run.output: is the same for all runs of a sweep"),
        ("- nodes: 3", ":1: unknown key 'nodes'"),
        ("- {}\n- data.batch_size: 15", "data.batch_size 15 (global) does not split evenly over 2 ranks"),
    ],
)
def test_every_entry_of_a_sweep_is_checked(launch, slurm, tmp_path, text, message):
    slurm(sbatch="echo 17")
    (tmp_path / "sweep.yaml").write_text(text)
    said = launch(*CPU, "--tasks-per-node", 2, "--sweep", "sweep.yaml")
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_without_slurm(launch, slurm, tmp_path):
    said = launch(*CPU)
    assert said.status == 2 and "no SLURM here (no sbatch on PATH): --dry-run prints" in said.err
    assert not (tmp_path / "run").exists()
    assert launch(*CPU, "--dry-run").status == 0


def test_sbatch_has_the_last_word(launch, slurm, tmp_path):
    slurm(sbatch="echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    said = launch(*CPU, "--partition", "x")
    assert (
        said.status == 2
        and "invalid partition specified: x" in said.err
        and not (tmp_path / "run" / "launch.json").exists()
    )


def test_one_job_a_directory(launch, slurm):
    slurm(sbatch="echo 17", squeue=squeue(("17", "PENDING", 0, "1:00:00", "N/A", "Priority")), cat="exec /bin/cat")
    assert launch(*CPU).status == 0
    said = launch(*CPU)
    assert said.status == 2 and "is pending: `scancel 17` ends it" in said.err
    slurm(squeue=squeue(("17", "FAILED", 0, "0:00", "N/A", "NonZeroExitCode")))
    assert launch(*CPU).status == 0
