"""What surrounds a training that a signal stops: whose handlers count, and back into SLURM's queue."""

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
"""Environment variable by which a drill tells the training it starts what shall happen to it."""


def cluster_environment() -> list[ClusterEnvironment]:
    """What Lightning would find, except that it leaves SIGUSR1 to us: its own answer is a second checkpoint,
    hpc_ckpt_N.ckpt, which is older than last.ckpt by the next stop.

    UserError in a batch script that starts one process for many.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    if (
        int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_STEP_ID" not in os.environ
    ):  # this process would wait for its peers for ever
        raise UserError(
            f"a SLURM job of {os.environ['SLURM_NTASKS']} tasks, but this is one process: start it with `srun vit-suite"
            " ...`."
        )
    return [SLURMEnvironment(auto_requeue=False)]


def requeued() -> bool:
    """Whether SLURM has started this job before: then run.overwrite has been done, and what is there is this job's own
    work."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def answer(stop: Stopped, overwrite: bool) -> Stopped:
    """Put a stopped run back into the queue, where SLURM warned it; says in `stop` how the run goes on and with what
    status this ends.

    The command of a batch job is repeated by SLURM as it is; a person has to leave `overwrite` out.
    """
    if overwrite:
        stop.advice = "the same command without overwrite goes on"
    if stop.signal != WARNING or "SLURM_JOB_ID" not in os.environ or DRILL in os.environ:
        return stop
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    before = signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # SLURM ends a requeued job with SIGTERM, and it is about to end anyway
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
        failure = (
            None
            if done.returncode == 0
            else " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure is None:
        stop.status, stop.advice = 0, f"job {job} is back in the queue"
    else:
        signal.signal(signal.SIGTERM, before)
        log.warning("job %s could not be requeued: %s", job, failure)
    return stop
