"""`vit-suite launch`: what SLURM is asked for, beside the options of the training it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vit_suite.config.limits import ConfigFile, Count, Input, Nodes, Processes, Range, Seed
from vit_suite.config.pretrain import PretrainConfig


@dataclass
class LaunchConfig(PretrainConfig):
    """Write a SLURM script for a training and submit it. The options of `pretrain` mean what they mean there, those of
    the launcher have no group; both may stand in YAML, also in two files (`--config recipe.yaml cluster.yaml`). The job
    saves and queues again before its time is up and when it is pre-empted, and goes on where it was."""

    nodes: Nodes = 1
    """Machines; becomes trainer.nodes."""
    gpus_per_node: Annotated[int, Range(0, ceiling=1024)] = 1
    """GPUs of a machine, a process each; becomes trainer.devices. 0 = train on CPUs."""
    tasks_per_node: Processes | None = None
    """Processes on a machine when gpus_per_node is 0; 1 when not given."""
    cpus_per_task: Processes | None = None
    """Cores of a process, for its threads and its data.workers; what the cluster gives when not given."""
    mem: str | None = None
    """Memory of a machine as sbatch spells it: 64G; what the cluster gives when not given."""
    time: str | None = None
    """Longest time of one start, after which the job queues again: minutes, H:MM:SS or D-HH:MM:SS; the partition's when
    not given."""
    partition: str | None = None
    """Partition; the cluster's default when not given."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    sbatch: list[str] | None = None
    """Further options of sbatch without their dashes: `--sbatch constraint=a100 exclusive`."""
    job_name: str | None = None
    """Name in the queue; that of the run directory when not given."""
    signal_seconds: Annotated[int, Range(1, 65535)] = 90
    """Seconds before the end of its time at which the job is told (SIGUSR1) to save: longer than a step, a score and a
    checkpoint take."""
    requeue: bool = True
    """Queue again after pre-emption, the end of the time or the loss of a node, until the training is done."""
    modules: list[str] | None = None
    """Environment modules to load."""
    setup: list[str] | None = None
    """Lines of bash before the training: `export NAME=VALUE`, `source FILE`."""
    container: str | None = None
    """Words before the training's command that run it in a container: `apptainer exec --nv IMAGE`."""
    python: str | None = None
    """Python interpreter of the job; the one that runs this command when not given, in a container `python`."""
    seeds: list[Seed] | None = None
    """A job array with a run for each run.seed of the list, in OUTPUT/seedN."""
    sweep: ConfigFile | None = None
    """A job array with a run for each entry of this YAML file (a list of options), in OUTPUT/000 and so on; with seeds,
    for all pairs."""
    at_once: Count | None = None
    """Most runs of an array at one time."""
    dry_run: bool = False
    """Check the options and print the script; write and submit nothing."""
    status: Input | None = None
    """Say how the run in this directory is: queued, running (where it is), pre-empted, done or failed. Every other
    option is ignored."""
