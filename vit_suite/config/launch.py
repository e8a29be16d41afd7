"""`vit-suite launch`: what SLURM is asked for, beside the options of the command that the job runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vit_suite.config.attention import AttentionConfig
from vit_suite.config.embed import EmbedConfig
from vit_suite.config.evaluate import KNNConfig, LinearConfig
from vit_suite.config.finetune import FinetuneConfig
from vit_suite.config.limits import ConfigFile, Count, Input, Nodes, OutputFolder, Processes, Range, Seed
from vit_suite.config.pretrain import PretrainConfig
from vit_suite.errors import unknown_name


@dataclass(kw_only=True)
class JobOptions:
    """What SLURM is asked for."""

    nodes: Nodes = 1
    """Machines; becomes trainer.nodes."""
    gpus_per_node: Annotated[int, Range(0, ceiling=1024)] = 1
    """GPUs of a machine, a process each; becomes trainer.devices. 0 = CPUs only."""
    gpu_type: str | None = None
    """Kind of GPU as the cluster calls it (a100, h100): the job asks for --gpus-per-node=TYPE:N."""
    gres: bool = False
    """Ask for GPUs by --gres=gpu:TYPE:N, on clusters that do not know --gpus-per-node."""
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
    """Lines of bash before the command: `export NAME=VALUE`, `source FILE`."""
    conda: str | None = None
    """Conda environment to activate: its name, or its folder. Its `python` then runs the command."""
    container: str | None = None
    """Words before the command that run it in a container: `apptainer exec --nv IMAGE`."""
    python: str | None = None
    """Python interpreter of the job. When not given: the one that runs this command; `python` in a container or conda
    environment."""
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
    """Say how the job in this directory is: queued, running (and how far), pre-empted, done or failed. Every other
    option is ignored."""
    folder: OutputFolder | None = None
    """Where the script and the log go. For a training this is run.output; for other commands jobs/COMMAND when not
    given."""

    def runs(self) -> str:
        """The command of the job: the `command` of each class below."""
        typed: Any = self
        return typed.command

    @classmethod
    def for_words(cls, words: Sequence[str]) -> type:
        """The options of `launch COMMAND`: these and those of the command. UserError for a command that no job runs."""
        command = words[1] if words[:1] == ["--command"] and len(words) > 1 else "pretrain"
        if command not in LAUNCHED:
            raise unknown_name("command for a job", command, LAUNCHED)
        return LAUNCHED[command]


@dataclass
class LaunchConfig(PretrainConfig, JobOptions):
    """Write a SLURM script for a training and submit it. The options of `pretrain` mean what they mean there, those of
    the launcher have no group; both may stand in YAML, also in two files (`--config recipe.yaml cluster.yaml`). The job
    saves and queues again before its time is up and when it is pre-empted, and goes on where it was. `launch COMMAND`
    does the same for finetune, and submits knn, linear, embed or attention as a job that runs once."""

    command: Literal["pretrain"] = "pretrain"
    """What the job runs: the first word after `launch`."""


@dataclass
class LaunchFinetuneConfig(FinetuneConfig, JobOptions):
    """Write a SLURM script for a fine-tuning and submit it. Its options are those of `finetune` and of `launch`."""

    command: Literal["finetune"] = "finetune"
    """What the job runs: the first word after `launch`."""


@dataclass
class LaunchKNNConfig(KNNConfig, JobOptions):
    """Submit `knn` as a SLURM job. Its options are those of `knn` and of `launch`."""

    command: Literal["knn"] = "knn"
    """What the job runs: the first word after `launch`."""


@dataclass
class LaunchLinearConfig(LinearConfig, JobOptions):
    """Submit `linear` as a SLURM job. Its options are those of `linear` and of `launch`."""

    command: Literal["linear"] = "linear"
    """What the job runs: the first word after `launch`."""


@dataclass
class LaunchEmbedConfig(EmbedConfig, JobOptions):
    """Submit `embed` as a SLURM job. Its options are those of `embed` and of `launch`."""

    command: Literal["embed"] = "embed"
    """What the job runs: the first word after `launch`."""


@dataclass
class LaunchAttentionConfig(AttentionConfig, JobOptions):
    """Submit `attention` as a SLURM job. Its options are those of `attention` and of `launch`."""

    command: Literal["attention"] = "attention"
    """What the job runs: the first word after `launch`."""


LAUNCHED: dict[str, type] = {
    "pretrain": LaunchConfig,
    "finetune": LaunchFinetuneConfig,
    "knn": LaunchKNNConfig,
    "linear": LaunchLinearConfig,
    "embed": LaunchEmbedConfig,
    "attention": LaunchAttentionConfig,
}
"""Command -> the options of the job that runs it."""
TRAININGS = ("pretrain", "finetune")
"""Commands with a run directory: their jobs save, queue again and go on."""
