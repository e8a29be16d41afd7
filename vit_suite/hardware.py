"""What the machine multiplies natively: device and precision picks, in one place."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.errors import UserError


def cores() -> int:
    """CPU cores this process may use: a limit of SLURM or of a container counts, not the machine's number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Precision = Literal["bf16", "fp32"]
AskedPrecision = Literal["auto", "bf16", "fp32"]


def pick_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """The device of a single-process command."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu, but torch sees no GPU here.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def rank_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """The device of this rank of a command that a launcher may have started many of: GPUs in turn."""
    device = pick_device(accelerator)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run on hardware units: Ampere and newer GPUs, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # The public torch.cpu.get_capabilities differs between releases; these two exist in all that are supported.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def pick_precision(precision: AskedPrecision, device: torch.device) -> Precision:
    """bf16 or fp32; auto takes bf16 where it is native."""
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    return precision


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each tensor operation, whatever the launcher set: on two threads a matrix product may round
    differently. Threads that are started inside follow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """The context a forward pass of that precision runs in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def send(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`. A GPU is not waited for: the copy, from pinned memory, queues behind the work that it
    has."""
    host = values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values
    return host.to(device, non_blocking=True)


def matmul_rate(precision: Precision, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of products of square matrices on this device and number of threads: the best of three tries of `seconds`
    each.

    What a training step can at most come to, which a data sheet does not say. On a CPU by CPU time: what it would be
    without other jobs.
    """
    cuda = device.type == "cuda"
    side, at_once = (8192, 10) if cuda else (2048, 1)  # a GPU is given several before it is waited for
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(3):
        started, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            for _ in range(at_once):
                left @ right
            if cuda:
                torch.cuda.synchronize(device)
            count += at_once
        spent = time.perf_counter() - started if cuda else (time.process_time() - cpu) / torch.get_num_threads()
        best = max(best, 2 * side**3 * count / spent)
    return best
