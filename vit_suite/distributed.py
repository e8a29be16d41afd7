"""Ranks and reductions. This is the only file that imports torch.distributed. Without a process group every function
works as on rank 0 of 1."""

from __future__ import annotations

import atexit
import itertools
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

torn = False
"""Whether a rank failed while others may wait for it: this process then has to end with `os._exit`."""
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
    """Within this context the process works alone, as rank 0 of 1. The others do something else, or have ended."""
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


def lost_peer(error: BaseException) -> bool:
    """Whether the error only says that another rank is gone, or does not answer."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


def tear() -> None:
    """Note that collectives can no longer be completed, so that this process ends without waiting for any.

    `vit-suite` calls `os._exit` after its last message. Any other program ends with status 1 when Python does.
    """
    global torn
    if not torn:
        torn = True
        atexit.register(os._exit, 1)


def local_rank() -> int:
    """The number of this process among those of its machine, as the launcher gives it."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


PATIENCE = timedelta(days=1)
"""How long ranks wait for each other."""
_GROUPS = itertools.count()


@contextmanager
def launched() -> Iterator[None]:
    """A gloo process group over the processes that torchrun or srun started. Without a launcher, or within another
    group, none is made.

    For commands whose ranks share nothing but work and files; a trainer makes its own group.
    """
    if dist.is_initialized() or not (found := _from_launcher()):
        yield
        return
    found_store, rank, ranks = next(dist.rendezvous(found.pop("init_method"), **found, timeout=PATIENCE))
    # The store of torchrun outlives a group. Without a prefix the next group would find the addresses of this one.
    store = dist.PrefixStore(f"vit-suite {next(_GROUPS)}", found_store)
    dist.init_process_group("gloo", timeout=PATIENCE, store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _from_launcher() -> dict:
    """Arguments of `init_process_group`: the meeting point and the number of this process; empty for a single process.

    SLURM_STEP_NUM_TASKS counts the tasks that srun started. Lightning reads SLURM_NTASKS, which is also set in a batch
    script that starts one process without srun.
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
    # Steps of a job may run side by side, and other jobs on the same machine, so each step gets a port of its own. The
    # kernel hands out ports from 32768 on.
    place = int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ["SLURM_STEP_ID"])
    port = os.environ.get("MASTER_PORT", 15000 + place % 10000)
    return {"init_method": f"tcp://{host}:{port}", "rank": int(os.environ["SLURM_PROCID"]), "world_size": tasks}


def started() -> tuple[int, int] | None:
    """(machines, processes per machine) that torchrun or srun started; None for a single process."""
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
    """The elementwise maximum over all ranks of a tensor of one shape (no gradient)."""
    if not active():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def largest(values: list[int], device: torch.device) -> Callable[[], list[int]]:
    """Start to compute the elementwise maximum of `values` over all ranks (which call this at the same point of their
    training).

    Returns a function that gives the result. On a GPU it waits until the device has come this far. Call it a step
    later: by then more work is queued, and the device does not idle.
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
    """A communication hook for DDP: the mean of all ranks' gradients, always added in the order of ranks."""
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
    """The rows of all ranks. The gradient of a row is the sum of the gradients that all ranks' losses give it."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        ctx.count = len(tensor)
        tensor = tensor.contiguous()  # `empty_like` would repeat the strides of a transposed one
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
    """Concatenate the rows (B, ...) of all ranks, with the same B, to (world * B, ...) in the order of ranks. With
    gradient.

    DDP averages gradients over ranks. So a loss that is a mean over a rank's own rows, each compared with all rows, has
    the gradient of one rank with the whole batch.
    """
    return _Gather.apply(tensor) if active() else tensor


class _Sum(torch.autograd.Function):
    """The sum over ranks. The gradient of a rank's part is the sum of the gradients that all ranks' losses give it."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all ranks. With gradient, of the scale that `gather_rows` describes."""
    return _Sum.apply(tensor) if active() else tensor


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks. A value is anything that pickles; tensors are on the CPU, and may
    have another shape on each rank."""
    if not active():
        return [value]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def map_over_ranks(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]` on every rank, with the work divided over the ranks. Results have to
    pickle."""
    parts = gather_objects([function(item) for item in items[rank() :: world_size()]])
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(items))]


def shard(
    module: nn.Module | list[nn.Module], mesh: dist.DeviceMesh, low: torch.dtype | None = None, forward: str = "forward"
) -> None:
    """Spread the parameters of a module over the ranks of `mesh` (FSDP2), except those of submodules that are spread
    already.

    They are gathered while the module's method `forward` runs, in precision `low` if given. Gradients are averaged over
    ranks in fp32; parameters, gradients and the optimizer's state stay fp32. Inputs keep their type, as under autocast.
    A list of modules, which run one after the other, is gathered together.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    if forward != "forward" and isinstance(module, nn.Module):
        register_fsdp_forward_method(module, forward)


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def own_part(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def gathered(tensor: Any) -> Tensor:
    """All of a sharded tensor (all ranks call this together); any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_as(tensor: Tensor, like: Any) -> Tensor:
    """Shard `tensor`, which every rank has whole, as `like` is sharded. Nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
