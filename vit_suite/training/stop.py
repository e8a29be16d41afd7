"""A training on SLURM that a signal stops: Lightning's own handlers stay out, and the job goes back into the queue."""

from __future__ import annotations

import logging
import os
import signal
import subprocess

from lightning_fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from vit_suite.errors import UserError
from vit_suite.signals import WARNING, Stopped

log = logging.getLogger("vit_suite")

DRILL = "VIT_SUITE_DRILL"
"""Environment variable with the event of a drill, for the training that the drill starts."""


def cluster_environment() -> list[ClusterEnvironment]:
    """The environment that Lightning would find, but without its handler of SIGUSR1. That handler writes a second
    checkpoint, hpc_ckpt_N.ckpt, which at the next stop would be older than last.ckpt.

    Raises:
        UserError: a batch script started one process for a job of many.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    # Such a process would wait forever for the other ranks.
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_STEP_ID" not in os.environ:
        raise UserError(
            f"a SLURM job of {os.environ['SLURM_NTASKS']} tasks, but this is one process: start it with `srun vit-suite"
            " ...`."
        )
    return [SLURMEnvironment(auto_requeue=False)]


def requeued() -> bool:
    """Whether SLURM has started this job before. Then run.overwrite was obeyed already, and the run directory holds
    this job's own work."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def answer(stop: Stopped, overwrite: bool) -> Stopped:
    """Put the job back into the queue if SLURM's warning stopped the run. Returns `stop` with the exit status, and with
    the advice how the run goes on.

    SLURM repeats the command of a batch job unchanged (`requeued`). A person who repeats it has to leave out
    `overwrite`.
    """
    if overwrite:
        stop.advice = "the same command without overwrite goes on"
    if stop.signal != WARNING or "SLURM_JOB_ID" not in os.environ or DRILL in os.environ:
        return stop
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    # SLURM ends a requeued job with SIGTERM. It is ignored, because this process is about to end anyway.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
        words = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        failure = words if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure is None:
        stop.status, stop.advice = 0, f"job {job} is back in the queue"
    else:
        signal.signal(signal.SIGTERM, before)
        log.warning("job %s could not be requeued: %s", job, failure)
    return stop
