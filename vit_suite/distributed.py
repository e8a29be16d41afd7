"""Ranks and reductions; the only file that imports torch.distributed. Everything works without a process group, as rank
0 of 1."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")


_apart = False


def _grouped() -> bool:
    return not _apart and dist.is_available() and dist.is_initialized()


def active() -> bool:
    """Whether a process group of more than one rank is up."""
    return _grouped() and dist.get_world_size() > 1


def rank() -> int:
    """This process among all."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _grouped() else 1


@contextmanager
def apart() -> Iterator[None]:
    """What this process does here it does alone, as rank 0 of 1, while the others do something else or have ended."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def barrier() -> None:
    """Wait until every rank is here."""
    if active():
        dist.barrier()


def local_rank() -> int:
    """This process among those of its machine, as the launcher says it."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


@contextmanager
def launched() -> Iterator[None]:
    """A gloo process group over the processes that torchrun or srun started; none without a launcher, or where there is
    one already.

    For commands whose ranks share nothing but work and files; a trainer sets up its own. Ranks may wait for each other
    for a day.
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

    SLURM_NTASKS, by which Lightning goes, also stands in a batch script that starts one process without srun; the tasks
    of a step are those that run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        return {"init_method": "env://"}
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return {}
    from lightning_fabric.plugins.environments import SLURMEnvironment

    host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(
        os.environ["SLURM_STEP_NODELIST"]
    )
    place = int(os.environ["SLURM_JOB_ID"]) * 7 + int(
        os.environ["SLURM_STEP_ID"]
    )  # steps of a job may run side by side
    port = os.environ.get("MASTER_PORT", 15000 + place % 10000)
    return {"init_method": f"tcp://{host}:{port}", "rank": int(os.environ["SLURM_PROCID"]), "world_size": tasks}


def started() -> tuple[int, int] | None:
    """(machines, processes on each) as torchrun or srun started them; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_WORLD_SIZE" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]) // here, here
    tasks, machines = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    return (machines, tasks // machines) if tasks > 1 else None


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor of one shape over all ranks (no gradient)."""
    if not active():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


@torch.no_grad()
def max_over_ranks(tensor: Tensor) -> Tensor:
    """The largest value over all ranks, place by place, of a tensor of one shape (no gradient)."""
    if not active():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def largest(values: list[int], device: torch.device) -> Callable[[], list[int]]:
    """Begin to find, place by place, the largest of all ranks' `values` (all ranks call this at the same moment of
    their training).

    The function returned gives the answer. On a GPU it waits for the device to come this far, so ask a step later: by
    then there is other work queued behind, and the device does not idle.
    """
    if not active():
        return lambda: values
    tensor = torch.tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)  # a plain copy waits for the device
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    if device.type != "cuda":
        return tensor.tolist
    answer = tensor.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return answer.tolist()

    return read


def mean_in_order(_, bucket):  # DDP compares annotations with objects, and here they are text
    """A communication hook for DDP: the mean of all ranks' gradients, added in the order of ranks wherever in the
    bucket they are."""
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    total = parts[0]
    for part in parts[1:]:
        total += part
    answer: torch.futures.Future[Tensor] = torch.futures.Future()
    answer.set_result(total / len(parts))
    return answer


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is the sum of what every rank's loss says of it."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.count, tensor = (
            len(tensor),
            tensor.contiguous(),
        )  # `empty_like` would repeat the strides of a transposed one
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.float().clone(memory_format=torch.contiguous_format)  # a copy: autograd owns its argument
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count].to(gradient.dtype)


def gather_rows(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank, alike on all, as (world * B, ...) in the order of ranks, with gradient.

    DDP averages gradients over ranks; so a loss that is a mean over a rank's own rows against all rows has the gradient
    that one rank with the whole batch would have.
    """
    return _Gather.apply(tensor) if active() else tensor


class _Sum(torch.autograd.Function):
    """The sum over ranks; the gradient of a rank's part is the sum of what every rank's loss says of it."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all ranks, alike on all, with gradient (`gather_rows` says of which
    scale)."""
    return _Sum.apply(tensor) if active() else tensor


def gather_objects(value: T) -> list[T]:
    """What each rank gives, in the order of ranks: anything that pickles, bit for bit; tensors on the CPU, of any shape
    on each rank."""
    if not active():
        return [value]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def map_over_ranks(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]` on every rank, where each rank computes a share of it; what it returns has
    to pickle."""
    parts = gather_objects([function(item) for item in items[rank() :: world_size()]])
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(items))]


def shard(
    module: nn.Module | list[nn.Module], mesh: dist.DeviceMesh, low: torch.dtype | None = None, forward: str = "forward"
) -> None:
    """Spread the parameters of a module, less those of submodules that are spread already, over the ranks of `mesh`
    (FSDP2).

    They are gathered while its method `forward` runs, in precision `low` where given; gradients are averaged over ranks
    in fp32, and parameters, gradients and the optimizer's state stay fp32. Inputs keep their type, as under autocast.
    Several modules that run one after the other are gathered together.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    if forward != "forward" and isinstance(module, nn.Module):
        register_fsdp_forward_method(module, forward)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of this tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def own_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, in the same memory; all of one that is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def gathered(tensor: Any) -> Tensor:
    """All of a sharded tensor (all ranks call this together); another one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_as(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, sharded as `like` is; nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
