"""The sbatch script of a training: text that one can read, change and submit by hand. docs/clusters.md says what each
line is there for."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_suite.config import LaunchConfig
from vit_suite.errors import UserError, quote

SCRIPT, OPTIONS, RECORD = "launch.sbatch", "launch.yaml", "launch.json"
"""Names in a run directory: the script, the options of the training (resolved), the submitted job."""

HEAD = """\
#!/bin/bash{login}
# {command}
# wrote this file, and {submit}
# submits it again. However often its job starts, a run goes on from its last checkpoint.

# A job called bash or interactive would be taken for a shell, and its ranks would not find each other.
{name}
# Where the log goes: one file for all starts of a job, because a requeued job would empty it without `append`.
{log}
#SBATCH --open-mode=append
# Relative paths in the options are those of the place where `vit-suite launch` ran.
{where}

# A task a rank, so many on every machine: Lightning counts them by --ntasks-per-node, not by --ntasks.
{size}
# The tasks hear SIGUSR1 so many seconds before the time is up, save, and queue again. (B:USR1 would tell this shell
# alone.)
#SBATCH --signal=USR1@{warning}
# {requeue_reason}
#SBATCH --{requeue}
"""

BODY = """
set -eo pipefail
{prepare}set -u
{run}
# The state of an earlier start would be mistaken for this one's.
rm -f "$run/status.json"
# `sbatch --export=NONE`, a default on some clusters, would reach srun and take PATH away from the tasks.
unset SLURM_EXPORT_ENV
# Where the ranks meet on the first machine: a port for each job, below those that the kernel hands out.
export MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
# Threads of a rank: its own cores.
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}

# A rank that dies ends the others, which would wait for it (kill-on-bad-exit); one that is done early does not
# (wait=0). Signals pass a rank by until it listens, instead of ending it: SLURM requeues a job that outlives the notice
# of its pre-emption.
status=0
{srun} || status=$?
{again}exit $status
"""

AGAIN = """
# Asked to stop, the training saves, says `stopped` in status.json and queues again by itself; here it could not (a
# container without scontrol), or the request was the SIGTERM before a pre-emption, and SLURM does not requeue a job
# that ends during that notice. `scancel` ends this shell too and never comes here.
if [ $status != 0 ] && grep -qs '"state": "stopped"' "$run/status.json"; then
  scontrol requeue "JOB" && sleep 60 # SLURM ends this shell meanwhile
fi
"""


def sbatch_script(cfg: LaunchConfig, folder: Path, names: Sequence[str], command: str) -> str:
    """The script of a job whose run directory is `folder` (absolute), or of a job array with runs in `folder/NAME`.

    `names`: runs of the array in order; empty for a single run. `command`: what wrote the script, for its head.
    """
    array = bool(names)
    log = str(folder).replace("%", "%%") + ("/slurm-%A_%a.log" if array else "/slurm-%j.log")
    head = HEAD.format(
        login=" -l" if cfg.modules else "",  # a login shell knows `module`
        command=" ".join(command.split()),
        submit=shlex.join(["sbatch", str(folder / SCRIPT)]),
        name=_directive(f"job-name={job_name(cfg, folder)}"),
        log=_directive(f"output={log}"),
        where=_directive(f"chdir={os.getcwd()}"),
        size="\n".join(_directive(words) for words in _size(cfg, len(names))),
        warning=cfg.signal_seconds,
        requeue="requeue" if cfg.requeue else "no-requeue",
        requeue_reason="Pre-empted, or on a machine that fails, the job queues again."
        if cfg.requeue
        else "Nothing starts the job again.",
    )
    job = (
        "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    )  # an array's last run has the id of the whole array
    body = BODY.format(
        prepare="".join(
            f"{line}\n"
            for line in [*(f"module load {shlex.quote(name)}" for name in cfg.modules or []), *(cfg.setup or [])]
        ),
        run=_run_directory(folder, names),
        srun=_srun(cfg),
        again=AGAIN.replace("JOB", job) if cfg.requeue else "",
    )
    return head + body


def ranks_per_node(cfg: LaunchConfig) -> int:
    """Processes on a machine: one for each GPU, or those that were asked for on CPUs."""
    return cfg.gpus_per_node or cfg.tasks_per_node or 1


def job_name(cfg: LaunchConfig, folder: Path) -> str:
    """The name in the queue. UserError for the two by which Lightning knows a shell."""
    if cfg.job_name in ("bash", "interactive"):
        raise UserError(
            f"job_name '{cfg.job_name}' is how Lightning knows a shell, and no ranks would start: choose another."
        )
    return cfg.job_name or f"vit-{folder.name}"


def seconds(time: str) -> int:
    """Of a time as sbatch spells it: M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS. UserError for anything else."""
    found = re.fullmatch(r"(?:(\d{1,7})-)?(\d{1,7})(?::(\d\d))?(?::(\d\d))?", time, re.ASCII)
    if not found:
        raise UserError(f"time: expected minutes, H:MM:SS or D-HH:MM:SS, got {quote(time)}.")
    days, second, third = (None if found[part] is None else int(found[part]) for part in (1, 3, 4))
    first = int(found[2])
    if days is None and third is None:  # minutes, and perhaps seconds
        return 60 * first + (second or 0)
    return ((24 * (days or 0) + first) * 60 + (second or 0)) * 60 + (third or 0)


def _size(cfg: LaunchConfig, runs: int) -> list[str]:
    """Options of sbatch about machines, time and place."""
    if cfg.time is not None and seconds(cfg.time) < cfg.signal_seconds + 60:  # SLURM warns up to half a minute early
        raise UserError(
            f"time {cfg.time} leaves no time to train before the warning of signal_seconds {cfg.signal_seconds}."
        )
    given = {
        "nodes": cfg.nodes,
        "ntasks-per-node": ranks_per_node(cfg),
        "gpus-per-node": cfg.gpus_per_node
        or None,  # not gpus-per-task: every rank sees all GPUs of its machine and takes its own
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


def _directive(words: str) -> str:
    if not words.isprintable():
        raise UserError(f"{words!r} cannot stand in a line of the script.")
    return f"#SBATCH {shlex.quote('--' + words)}"


def _run_directory(folder: Path, names: Sequence[str]) -> str:
    where = shlex.quote(str(folder))
    if not names:
        return f"run={where}"
    return f"runs=({shlex.join(names)}) # one for each run of the array\nrun={where}/${{runs[$SLURM_ARRAY_TASK_ID]}}"


def _srun(cfg: LaunchConfig) -> str:
    words = ["srun", "--kill-on-bad-exit=1", "--wait=0"]
    if cfg.cpus_per_task:
        words.append(
            f"--cpus-per-task={cfg.cpus_per_task}"
        )  # which srun no longer takes over from sbatch since SLURM 22.05
    python = cfg.python or ("python" if cfg.container else sys.executable)
    training = [*shlex.split(cfg.container or ""), python, "-m", "vit_suite", "pretrain"]
    shielded = """bash -c 'trap "" USR1 TERM; exec "$@"' rank"""
    return f'{shlex.join(words)} {shielded} \\\n  {shlex.join(training)} --config "$run/{OPTIONS}"'
