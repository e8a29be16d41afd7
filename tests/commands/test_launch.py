"""`vit-suite launch` without a cluster: the script it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import CPU, squeue
from vit_suite.cluster.script import seconds
from vit_suite.config import FinetuneConfig, KNNConfig, LinearConfig, PretrainConfig
from vit_suite.config.attention import AttentionConfig
from vit_suite.config.embed import EmbedConfig
from vit_suite.parsing import load_config


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def bash_accepts(script: str) -> bool:
    return subprocess.run(["/bin/bash", "-n"], input=script, text=True).returncode == 0


# The script
# ----------------------------------------------------------------------------------------------------------------------


def test_what_slurm_is_asked_for(launch, tmp_path):
    options = (
        "--nodes 4 --gpus-per-node 8 --partition fast --time 1-12:00:00 --cpus-per-task 6 --account us --qos high --mem"
        " 200G"
    )
    said = launch(
        *options.split(), "--sbatch", "constraint=a100", "--exclusive=x", "--dry-run", trainer__accelerator="auto"
    )
    assert said.status == 2  # words of an option carry no dashes
    said = launch(
        *options.split(),
        "--sbatch",
        "constraint=a100",
        "exclusive",
        "--dry-run",
        trainer__accelerator="auto",
        data__batch_size=32,
    )
    assert said.status == 0 and bash_accepts(said.out), said.err
    assert directives(said.out) == [
        "job-name=vit-run",
        f"output={tmp_path}/run/slurm-%j.log",
        "open-mode=append",
        f"chdir={tmp_path}",
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=6",
        "mem=200G",
        "time=1-12:00:00",
        "partition=fast",
        "account=us",
        "qos=high",
        "constraint=a100",
        "exclusive",
        "signal=USR1@90",
        "requeue",
    ]
    assert "srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task=6 bash -c " in said.out
    command = f' rank \\\n  {sys.executable} -m vit_suite pretrain --config "$run/launch.yaml"'
    assert command in said.out and f"\nrun={tmp_path}/run\n" in said.out
    assert not (tmp_path / "run").exists()


def test_underscores_files_and_what_is_left_out(launch, tmp_path):
    (tmp_path / "cluster.yaml").write_text("partition: night\ntime: 24:00:00\nsignal_seconds: 120\nrequeue: no\n")
    said = launch(
        "--config", "cluster.yaml", "--gpus_per_node", 0, "--tasks_per_node", 3, "--dry_run", data__batch_size=18
    )
    given = directives(said.out)
    assert {"partition=night", "time=24:00:00", "signal=USR1@120", "no-requeue", "ntasks-per-node=3"} <= set(given), (
        said.err
    )
    assert not [word for word in given if word.startswith(("gpus", "cpus", "mem", "array", "account", "export"))]
    assert "scontrol requeue" not in said.out and "export=NONE" not in "".join(given)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("90:30", 5430), ("1:02:03", 3723), ("2-3", 183600), ("2-3:04", 183840), ("2-3:04:05", 183845)],
)
def test_times_are_those_of_sbatch(time, expected):
    assert seconds(time) == expected


def test_modules_setup_and_container(launch):
    more = (
        "--modules",
        "cuda/12.4",
        "--setup",
        "export A=1",
        "source env.sh",
        "--container",
        "apptainer exec --nv 'my image.sif'",
    )
    said = launch(*CPU, *more, "--dry-run")
    assert said.out.startswith("#!/bin/bash -l\n")  # a login shell knows `module`
    lines = said.out.splitlines()
    at = lines.index("module load cuda/12.4")
    assert lines[at + 1 : at + 4] == ["export A=1", "source env.sh", "set -u"]  # which scripts of others do not stand
    assert "apptainer exec --nv 'my image.sif' python -m vit_suite pretrain" in said.out and bash_accepts(said.out)


@pytest.mark.parametrize(
    ("asked", "directive"),
    [
        (["--gpu-type", "a100"], "gpus-per-node=a100:2"),
        (["--gpu-type", "a100", "--gres"], "gres=gpu:a100:2"),
        (["--gres"], "gres=gpu:2"),
    ],
)
def test_kinds_of_gpu(launch, asked, directive):
    said = launch("--gpus-per-node", 2, *asked, "--dry-run", trainer__accelerator="auto")
    given = [word for word in directives(said.out) if word.startswith("g")]
    assert given == [directive] and bash_accepts(said.out), said.err


ONCE = """\
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
# Nothing starts the job again.
#SBATCH --no-requeue

set -eo pipefail
module load cuda/12.4
eval "$(conda shell.bash hook)"
conda activate 'my env'
export A=1
set -u
run={folder}
# `sbatch --export=NONE`, a default on some clusters, would reach srun and take PATH away from the tasks.
unset SLURM_EXPORT_ENV
# Where the ranks meet on the first machine: a port for each job, below those that the kernel hands out.
export MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
# Threads of a rank: its own cores.
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}

status=0
srun --kill-on-bad-exit=1 --wait=0 \\
  python -m vit_suite knn --config "$run/launch.yaml" || status=$?
exit $status
"""


def test_a_command_that_runs_once(vit_suite, slurm, tmp_path, monkeypatch):
    """Every line from the machines on: no signal, no requeue, no status.json of a training."""
    monkeypatch.chdir(tmp_path)
    running = squeue(("17", "RUNNING", 0, "1:00", "N/A", "None"))
    slurm(sbatch="echo 17", squeue=running, cat='exec /bin/cat "$@"')
    more = ["--modules", "cuda/12.4", "--conda", "my env", "--setup", "export A=1"]
    said = vit_suite("launch", "knn", *CPU, *more, "--checkpoint", "builtin:shapes", "--k", 3, "--folder", "scores")
    assert said.status == 0, said.err
    script = (tmp_path / "scores" / "launch.sbatch").read_text()
    assert script.endswith(ONCE.format(folder=tmp_path / "scores")) and bash_accepts(script), script
    assert load_config(tmp_path / "scores" / "launch.yaml", cls=KNNConfig).k == [3]
    assert vit_suite("launch", "--status", "scores").out == "scores: running (job 17)\n"


@pytest.mark.parametrize("command", ["linear", "embed", "attention", "finetune"])
def test_every_command_reads_its_options_back(vit_suite, slurm, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    slurm(sbatch="echo 17")
    folder = ["--run.output", "job"] if command == "finetune" else ["--folder", "job"]
    said = vit_suite("launch", command, *CPU, "--checkpoint", "builtin:shapes", *folder)
    assert said.status == 0, said.err
    kinds = {"linear": LinearConfig, "embed": EmbedConfig, "attention": AttentionConfig, "finetune": FinetuneConfig}
    again = load_config(tmp_path / "job" / "launch.yaml", cls=kinds[command])
    assert again.checkpoint == "builtin:shapes"
    assert f"-m vit_suite {command} --config" in (tmp_path / "job" / "launch.sbatch").read_text()
    if command == "finetune":
        assert (again.trainer.devices, again.run.output) == (1, str(tmp_path / "job"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lineer"], "unknown command for a job 'lineer'. Did you mean 'linear'?"),
        (["knn", "--seeds", "1", "2"], "seeds is for trainings (pretrain, finetune): launch knn runs once"),
        (["knn", "--accelerator", "cpu"], "accelerator is cpu, but gpus_per_node is 1"),
        (["knn", "--gpu-type", "a100:2"], "gpu_type: expected a word such as a100, got 'a100:2'"),
        (["knn", "--gpu-type", "a100", *map(str, CPU)], "gpus_per_node is 0"),
        (["knn", "--conda", "e", "--container", "apptainer exec x"], "conda 'e' does not reach into the container"),
        (["knn", "--time", "soon"], "time: expected minutes"),
    ],
)
def test_a_command_that_cannot_be_launched(vit_suite, slurm, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    slurm(sbatch="echo 17")
    said = vit_suite("launch", *words, "--checkpoint", "builtin:shapes", "--folder", "job")
    assert said.status == 2 and message in said.err and said.err.count("\n") == 1, said
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("method", ["dinov2", "mae"])
def test_every_method_is_launched(launch, slurm, tmp_path, method):
    """With the options of its own, which the job reads back."""
    slurm(sbatch="echo 17")
    own = {"dinov2": ["--method.koleo_weight", 0.2], "mae": ["--method.mask_ratio", 0.5]}[method]
    words = ["--method.name", method, *own, "--views.global_size", 32, "--backbone.patch_size", 8]
    words += ["--views.local_size", 16] if method == "dinov2" else []
    words += ["--data.name", "shapes", "--data.batch_size", 16, "--run.output", tmp_path / "run"]
    from vit_suite import cli

    assert cli.main(["launch", *map(str, [*CPU, *words])]) == 0
    again = load_config(tmp_path / "run" / "launch.yaml", cls=PretrainConfig)
    assert getattr(again.method, own[0].partition(".")[2]) == own[1] and again.method.name == method


def test_names_that_a_shell_would_take_apart(launch, tmp_path):
    output = tmp_path / "it's 100% $HOME; rm -rf x"
    said = launch(*CPU, "--dry-run", output=output)
    assert bash_accepts(said.out), said.out
    line = next(line for line in said.out.splitlines() if line.startswith("run="))
    shown = subprocess.run(["/bin/bash", "-c", f'{line}\nprintf %s "$run"'], capture_output=True, text=True).stdout
    assert shown == str(output)
    assert "100%% $HOME; rm -rf x/slurm-%j.log'" in said.out


# What is written and submitted
# -----------------------------------------------------------------------------------------------------


def test_submission(launch, slurm, tmp_path):
    slurm(sbatch='echo "$@" >&2; echo "17;cluster"')
    said = launch(*CPU, "--nodes", 2, "--tasks-per-node", 2, "--cpus-per-task", 3)
    assert said.status == 0, said.err
    assert "job 17: 2 nodes x 2 ranks" in said.out and f"vit-suite launch --status {tmp_path}/run" in said.out
    assert json.loads((tmp_path / "run" / "launch.json").read_text())["job"] == "17"
    assert bash_accepts((tmp_path / "run" / "launch.sbatch").read_text())
    training = load_config(tmp_path / "run" / "launch.yaml", cls=PretrainConfig)
    assert (
        training.trainer.nodes,
        training.trainer.devices,
        training.trainer.accelerator,
        training.trainer.progress,
    ) == (
        2,
        2,
        "cpu",
        False,
    )
    assert training.run.output == str(tmp_path / "run")


def test_what_the_launcher_wrote_does_not_stop_the_training(launch, slurm, vit_suite, tmp_path):
    slurm(sbatch="echo 17")
    assert launch(*CPU, trainer__max_epochs=1, evaluate__every_epochs=0).status == 0
    (tmp_path / "run" / "slurm-17.log").touch()
    assert vit_suite("pretrain", "--config", tmp_path / "run" / "launch.yaml").status == 0
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_seeds_and_sweep(launch, slurm, tmp_path):
    slurm(sbatch="echo 17")
    (tmp_path / "sweep.yaml").write_text("- optim.lr: 1e-3\n- optim: {lr: 2e-3}\n  views.local_crops: 4\n")
    assert launch(*CPU, "--seeds", 3, 5, "--sweep", "sweep.yaml", "--at-once", 2).status == 0
    names = ["000-seed3", "000-seed5", "001-seed3", "001-seed5"]
    assert json.loads((tmp_path / "run" / "launch.json").read_text()) == {"job": "17", "runs": names}
    runs = [load_config(tmp_path / "run" / name / "launch.yaml") for name in names]
    assert [(run.optim.lr, run.run.seed, run.views.local_crops) for run in runs] == [
        (1e-3, 3, 2),
        (1e-3, 5, 2),
        (2e-3, 3, 4),
        (2e-3, 5, 4),
    ]
    assert [Path(run.run.output).name for run in runs] == names
    script = (tmp_path / "run" / "launch.sbatch").read_text()
    assert {"array=0-3%2", f"output={tmp_path}/run/slurm-%A_%a.log"} <= set(directives(script)) and bash_accepts(script)
    part = "\n".join(line for line in script.splitlines() if line.startswith(("runs=", "run=")))
    task = {"SLURM_ARRAY_TASK_ID": "2"}
    shown = subprocess.run(
        ["/bin/bash", "-c", f'{part}\nprintf %s "$run"'], capture_output=True, text=True, env=task
    ).stdout
    assert shown == f"{tmp_path}/run/001-seed3"
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in script


# What the script does
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "array", "requeued"),
    [
        ('echo \'{"state": "stopped"}\' > status.json; exit 143', False, "requeue 17"),
        ('echo \'{"state": "stopped"}\' > status.json; exit 143', True, "requeue 15_1"),
        ('echo \'{"state": "stopped"}\' > status.json; exit 0', False, None),  # it has requeued itself
        ('echo \'{"state": "failed"}\' > status.json; exit 143', False, None),
        ("exit 137", False, None),  # what an earlier start said does not count
        ("kill -USR1 $$; kill -TERM $$; exit 3", False, None),  # signals before the training listens pass it by
    ],
)
def test_who_is_queued_again(launch, slurm, tmp_path, training, array, requeued):
    """The script itself, with stand-ins for srun, scontrol and the training."""
    slurm(
        sbatch="echo 17",
        srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        scontrol='echo "$@" >> "$ASKED"',
    )
    slurm(bash='exec /bin/bash "$@"', sleep="true", grep='exec /bin/grep "$@"', rm='exec /bin/rm "$@"')
    run = tmp_path / "run" / "seed4" if array else tmp_path / "run"
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\ncd {run}\n{training}\n")
    fake.chmod(0o755)
    assert launch(*CPU, "--python", fake, *(["--seeds", 3, 4] if array else [])).status == 0
    (run / "status.json").write_text('{"state": "stopped"}')
    asked = tmp_path / "asked"
    job = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "1", "ASKED": str(asked)}
    done = subprocess.run(
        ["/bin/bash", tmp_path / "run" / "launch.sbatch"], env=os.environ | job, capture_output=True, text=True
    )
    assert done.returncode == int(training.rpartition("exit ")[2]), done.stderr
    assert (asked.read_text().strip() if asked.exists() else None) == requeued
