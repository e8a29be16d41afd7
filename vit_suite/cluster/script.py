"""The sbatch script of a job: text that one can read, change and submit by hand. docs/clusters.md gives the reason for
each line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_suite.config.launch import TRAININGS, JobOptions
from vit_suite.errors import UserError, quote

SCRIPT, OPTIONS, RECORD = "launch.sbatch", "launch.yaml", "launch.json"
"""File names in the folder of a job: the script, the resolved options of its command, the submitted job."""
GPU_TYPE = re.compile(r"[A-Za-z0-9_.-]+")
"""How SLURM spells a kind of GPU."""

HEAD = """\
#!/bin/bash{login}
# {command}
# wrote this file, and {submit}
# submits it again.{resumes}

# A job called bash or interactive would be taken for a shell, and its ranks would not find each other.
{name}
# Where the log goes: one file for all starts of a job, because a requeued job would empty it without `append`.
{log}
#SBATCH --open-mode=append
# Relative paths in the options are those of the place where `vit-suite launch` ran.
{where}

# One task per rank, the same number on every machine: Lightning reads --ntasks-per-node, not --ntasks.
{size}
{warning}# {requeue_reason}
#SBATCH --{requeue}
"""

WARNING = """\
# The tasks get SIGUSR1 this many seconds before the time is up, save, and queue again. (B:USR1 would tell only this
# shell.)
#SBATCH --signal=USR1@{seconds}
"""

BODY = """
set -eo pipefail
{prepare}set -u
{run}
{fresh}# `sbatch --export=NONE`, a default on some clusters, would reach srun and take PATH away from the tasks.
unset SLURM_EXPORT_ENV
# Where the ranks meet on the first machine: a port for each job, below those that the kernel hands out.
export MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
# Threads of a rank: its own cores.
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}

{about}status=0
{srun} || status=$?
{again}exit $status
"""

FRESH = """\
# The state of an earlier start would be mistaken for this one's.
rm -f "$run/status.json"
"""

SHIELDED = """\
# A rank that dies ends the others, which would wait for it (kill-on-bad-exit). A rank that is done early does not
# (wait=0). Until the training listens, ranks ignore signals, because SLURM requeues a job that outlives the notice of
# its pre-emption.
"""

AGAIN = """
# A training that is asked to stop saves, says `stopped` in status.json, and queues again by itself. This is for the two
# cases in which it does not: in a container without scontrol, and after the SIGTERM before a pre-emption, because SLURM
# does not requeue a job that ends during that notice. `scancel` ends this shell too, so it never comes here.
if [ $status != 0 ] && grep -qs '"state": "stopped"' "$run/status.json"; then
  scontrol requeue "JOB" && sleep 60 # SLURM ends this shell meanwhile
fi
"""


def sbatch_script(cfg: JobOptions, folder: Path, names: Sequence[str], command: str) -> str:
    """The script of a job.

    Args:
        folder: absolute. The run directory of a training; in a job array the runs are in `folder/NAME`.
        names: the runs of the array in order; empty for a single run.
        command: the command line that wrote the script, for its head.
    """
    array, training = bool(names), cfg.runs() in TRAININGS
    log = str(folder).replace("%", "%%") + ("/slurm-%A_%a.log" if array else "/slurm-%j.log")
    requeue = cfg.requeue and training
    reason = "Nothing starts the job again."
    if requeue:
        reason = "Pre-empted, or on a machine that fails, the job queues again."
    head = HEAD.format(
        login=" -l" if cfg.modules or cfg.conda else "",  # a login shell knows `module` and `conda`
        command=" ".join(command.split()),
        submit=shlex.join(["sbatch", str(folder / SCRIPT)]),
        resumes=" However often its job starts, a run goes on from its last checkpoint." if training else "",
        name=_directive(f"job-name={job_name(cfg, folder)}"),
        log=_directive(f"output={log}"),
        where=_directive(f"chdir={os.getcwd()}"),
        size="\n".join(_directive(words) for words in _size(cfg, len(names))),
        warning=WARNING.format(seconds=cfg.signal_seconds) if training else "",
        requeue="requeue" if requeue else "no-requeue",
        requeue_reason=reason,
    )
    # The last run of an array has the number of the whole array, so a run is named by both numbers.
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    body = BODY.format(
        prepare="".join(f"{line}\n" for line in _prepare(cfg)),
        run=_run_directory(folder, names),
        fresh=FRESH if training else "",
        about=SHIELDED if training else "",
        srun=_srun(cfg),
        again=AGAIN.replace("JOB", job) if requeue else "",
    )
    return head + body


def _prepare(cfg: JobOptions) -> list[str]:
    """Lines of bash that make the environment of the job."""
    lines = [f"module load {shlex.quote(name)}" for name in cfg.modules or []]
    if cfg.conda:
        if cfg.container:
            raise UserError(f"conda {quote(cfg.conda)} does not reach into the container: leave one out.")
        if not cfg.conda.isprintable():
            raise UserError(f"conda: {cfg.conda!r} cannot stand in a line of the script.")
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(cfg.conda)}"]
    return lines + (cfg.setup or [])


def ranks_per_node(cfg: JobOptions) -> int:
    """Processes per machine: one per GPU; on CPUs as many as the options say."""
    return cfg.gpus_per_node or cfg.tasks_per_node or 1


def job_name(cfg: JobOptions, folder: Path) -> str:
    """The name of the job in the queue. UserError for the two names by which Lightning recognizes a shell."""
    if cfg.job_name in ("bash", "interactive"):
        raise UserError(
            f"job_name '{cfg.job_name}' is how Lightning knows a shell, and no ranks would start: choose another."
        )
    return cfg.job_name or f"vit-{folder.name}"


def seconds(time: str) -> int:
    """The seconds of a time in sbatch's spelling: M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS. UserError for other
    words."""
    found = re.fullmatch(r"(?:(\d{1,7})-)?(\d{1,7})(?::(\d\d))?(?::(\d\d))?", time, re.ASCII)
    if not found:
        raise UserError(f"time: expected minutes, H:MM:SS or D-HH:MM:SS, got {quote(time)}.")
    days, second, third = (None if found[part] is None else int(found[part]) for part in (1, 3, 4))
    first = int(found[2])
    if days is None and third is None:  # minutes, and perhaps seconds
        return 60 * first + (second or 0)
    return ((24 * (days or 0) + first) * 60 + (second or 0)) * 60 + (third or 0)


def _size(cfg: JobOptions, runs: int) -> list[str]:
    """Options of sbatch about machines, time and place."""
    late = cfg.signal_seconds + 60 if cfg.runs() in TRAININGS else 0  # SLURM warns up to half a minute early
    if cfg.time is not None and seconds(cfg.time) < late:
        raise UserError(
            f"time {cfg.time} leaves no time to train before the warning of signal_seconds {cfg.signal_seconds}."
        )
    given = {
        "nodes": cfg.nodes,
        "ntasks-per-node": ranks_per_node(cfg),
        **_gpus(cfg),
        "cpus-per-task": cfg.cpus_per_task,
        "mem": cfg.mem,
        "time": cfg.time,
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "array": f"0-{runs - 1}" + (f"%{cfg.at_once}" if cfg.at_once else "") if runs else None,
    }
    return [f"{name}={value}" for name, value in given.items() if value is not None] + [
        word.lstrip("-") for word in cfg.sbatch or []
    ]


def _gpus(cfg: JobOptions) -> dict[str, str]:
    """How the job asks for GPUs: per machine, not per task, because every rank sees all GPUs and takes its own."""
    if not cfg.gpus_per_node:
        if cfg.gpu_type or cfg.gres:
            raise UserError("gpu_type and gres say which GPUs, but gpus_per_node is 0: leave them out.")
        return {}
    if cfg.gpu_type is not None and not GPU_TYPE.fullmatch(cfg.gpu_type):
        raise UserError(f"gpu_type: expected a word such as a100, got {quote(cfg.gpu_type)}; gpus_per_node is apart.")
    count = f"{cfg.gpu_type}:{cfg.gpus_per_node}" if cfg.gpu_type else str(cfg.gpus_per_node)
    return {"gres": f"gpu:{count}"} if cfg.gres else {"gpus-per-node": count}


def _directive(words: str) -> str:
    if not words.isprintable():
        raise UserError(f"{words!r} cannot stand in a line of the script.")
    return f"#SBATCH {shlex.quote('--' + words)}"


def _run_directory(folder: Path, names: Sequence[str]) -> str:
    where = shlex.quote(str(folder))
    if not names:
        return f"run={where}"
    return f"runs=({shlex.join(names)}) # one for each run of the array\nrun={where}/${{runs[$SLURM_ARRAY_TASK_ID]}}"


def _srun(cfg: JobOptions) -> str:
    words = ["srun", "--kill-on-bad-exit=1", "--wait=0"]
    if cfg.cpus_per_task:  # since SLURM 22.05 srun does not take this over from sbatch
        words.append(f"--cpus-per-task={cfg.cpus_per_task}")
    python = cfg.python or ("python" if cfg.container or cfg.conda else sys.executable)
    command = [*shlex.split(cfg.container or ""), python, "-m", "vit_suite", cfg.runs()]
    shield = """ bash -c 'trap "" USR1 TERM; exec "$@"' rank""" if cfg.runs() in TRAININGS else ""
    return f'{shlex.join(words)}{shield} \\\n  {shlex.join(command)} --config "$run/{OPTIONS}"'
