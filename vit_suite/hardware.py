"""Which device a process computes on and in which precision, by what the machine multiplies natively."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from vit_suite import distributed
from vit_suite.errors import UserError


def cores() -> int:
    """CPU cores that this process may use, within a limit of SLURM or of a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


log = logging.getLogger("vit_suite")
NAMES = {"cuda": "GPU", "cpu": "CPU"}
Precision = Literal["bf16", "fp32"]
AskedPrecision = Literal["auto", "bf16", "fp32"]


def pick_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """The device of a single-process command."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu, but torch sees no GPU here.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def rank_device(accelerator: Literal["auto", "cpu", "gpu"] = "auto") -> torch.device:
    """The device of this rank of a command that a launcher may have started several times: the GPUs in turn."""
    device = own_gpu(pick_device(accelerator))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def own_gpu(device: torch.device) -> torch.device:
    """`device`, or if it is any GPU, the GPU of this rank."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())


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
    """bf16 or fp32; auto takes bf16 where it is native. Says so where a GPU has no bf16."""
    native = native_bf16(device)
    if precision == "auto":
        if not native and device.type == "cuda":
            log.warning("this GPU does not multiply bf16 (it is older than Ampere), so it computes in fp32.")
        return "bf16" if native else "fp32"
    if precision == "bf16" and not native:
        log.warning("this %s emulates bf16, which is slower than precision fp32.", NAMES.get(device.type, device.type))
    return precision


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each tensor operation, also in threads that start inside. Two threads may round a matrix product
    differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """The context of a forward pass in that precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices in TF32 (11 bits of mantissa instead of 24) on a CUDA device; nothing on another."""
    if device.type != "cuda":
        yield
        return
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def send(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`. A GPU is not waited for: the copy is from pinned memory and queues behind its work."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.contiguous().pin_memory()  # of strided memory `to` would make a copy that is not pinned
    return values.to(device, non_blocking=True)


def matmul_rate(precision: Precision, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of products of square matrices on this device and number of threads: the best of three tries of `seconds`.

    A training step cannot be faster than this; the rate of a data sheet is often out of reach. A CPU is measured by CPU
    time, as if it had no other jobs.
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
