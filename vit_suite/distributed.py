"""Ranks and reductions; the only file that imports torch.distributed. Everything works without a process group, as rank 0 of 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process among all."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if active():
        dist.barrier()


def local_rank() -> int:
    """This process among those of its machine, as the launcher says it."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


@contextmanager
def launched() -> Iterator[None]:
    """A gloo process group over the processes that torchrun or srun started; none without a launcher, or where there is one already.

    For commands whose ranks share nothing but work and files; a trainer sets up its own. Ranks may wait for each other for a day.
    """
    if dist.is_initialized() or not (found := _from_launcher()):
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=1), **found)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _from_launcher() -> dict:
    """Where the processes meet, and which this one is; empty for a single process.

    SLURM_NTASKS, by which Lightning goes, also stands in a batch script that starts one process without srun; the tasks of a step are
    those that run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        return {"init_method": "env://"}
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return {}
    from lightning_fabric.plugins.environments import SLURMEnvironment

    host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    place = int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ["SLURM_STEP_ID"])  # steps of a job may run side by side
    port = os.environ.get("MASTER_PORT", 15000 + place % 10000)
    return {"init_method": f"tcp://{host}:{port}", "rank": int(os.environ["SLURM_PROCID"]), "world_size": tasks}


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor of one shape over all ranks (no gradient)."""
    if not active():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is the sum of what every rank's loss says of it."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.count = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.float().clone(memory_format=torch.contiguous_format)  # a copy: autograd owns its argument
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count].to(gradient.dtype)


def gather_rows(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank, alike on all, as (world * B, ...) in the order of ranks, with gradient.

    DDP averages gradients over ranks; so a loss that is a mean over a rank's own rows against all rows has the gradient that one rank
    with the whole batch would have.
    """
    return _Gather.apply(tensor) if active() else tensor
