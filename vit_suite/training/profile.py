"""Times some real steps of a training in three ways, for `vit-suite profile`.

The steps of one training go through three passes, because timing itself costs time: plain steps (images/s, memory),
steps whose parts are timed (the table), and a few steps under torch.profiler (operators, trace). Floating point
operations are counted in the first step.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from vit_suite.config import ProfileConfig
from vit_suite.training.parts import build_parts
from vit_suite.training.phases import Phases, label, now
from vit_suite.training.start import adopt
from vit_suite.training.trainer import build_trainer
from vit_suite.weights.checkpoint import load_backbone

TRACED = 3
"""Steps in the trace. With more, viewers are slow to open the file."""


def measure(cfg: ProfileConfig, folder: Path) -> tuple[Recorder, dict[str, Any]]:
    """Run the steps of all passes. Returns what they found, and a description of the training."""
    if cfg.start:  # speed does not depend on the weights, so they are not taken over
        adopted: Any = adopt(cfg, load_backbone(cfg.start, cfg))
        cfg = adopted
    data, method, device, precision, _ = build_parts(cfg, None)
    phases = Phases(device)
    label(phases, method, data)
    recorder = Recorder(phases, cfg.warmup, cfg.steps)
    per_epoch = max(1, len(data.plan()) // cfg.trainer.accumulate)
    epochs = max(cfg.trainer.max_epochs, -(-recorder.last // per_epoch))
    trainer = replace(cfg.trainer, max_epochs=epochs, max_steps=-1, max_minutes=None, devices=1, progress=False)
    cfg = replace(cfg, trainer=trainer, logger=replace(cfg.logger, wandb=False))
    data.trainer = lightning = build_trainer(cfg, folder, [recorder], precision)
    lightning.fit(method, data)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    about = {
        "method": cfg.method.name,
        "data": data.name,
        "batch": cfg.data.batch_size,
        "precision": precision,
        "device": where,
    }
    return recorder, about | {"torch": torch.__version__}


class Recorder(pl.callbacks.Checkpoint):
    """Sends a training through the passes, and then ends it.

    A step is timed from the end of the step before it to its own end, so loading and Lightning's loop count too. This
    is a Checkpoint, because Lightning then adds no checkpoint callback of its own.
    """

    def __init__(self, phases: Phases, warmup: int, steps: int) -> None:
        self.phases, self.warmup, self.steps, self.traced = phases, warmup, steps, min(TRACED, steps)
        self.last = warmup + 2 * steps + self.traced
        cuda = [ProfilerActivity.CUDA] if phases.device.type == "cuda" else []
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda])
        self.flops = 0
        self.seconds = self.cpu_seconds = 0.0
        self.peak_bytes = 0
        self._counter = FlopCounterMode(display=False)
        self._done = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        losses = module.losses

        def counted(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            """Counts from here, the first call, until on_after_backward: networks, loss and gradients. The views, which
            are matrix products too, are not counted."""
            module.losses = losses
            self._counter.__enter__()
            return losses(*args, **kwargs)

        module.losses = counted

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if not self.flops:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops() * trainer.accumulate_grad_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._done:  # not the last micro-batch of its step
            return
        self._done = trainer.global_step
        device = self.phases.device
        if self._done == self.warmup:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            self._since, self._cpu_since = now(device), time.process_time()
        elif self._done == self.warmup + self.steps:
            self.seconds = (now(device) - self._since) / self.steps
            self.cpu_seconds = (time.process_time() - self._cpu_since) / self.steps
            self.peak_bytes = peak_memory(device)
            self.phases.start()
        elif self._done == self.warmup + 2 * self.steps:
            self.phases.stop()
            self.profiler.start()
        elif self._done == self.last:
            now(device)
            self.profiler.stop()
            trainer.should_stop = True


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors since the warm-up (GPU), or of this process (CPU; 0 on Windows, which does not
    say it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary(recorder: Recorder, batch: int) -> dict[str, Any]:
    """The figures: seconds of a step, of its parts and of its operators (`own`: without the operators that they call),
    bytes, FLOP."""
    seconds, device = recorder.seconds, recorder.phases.device
    parts = {name: total / recorder.steps for name, total in recorder.phases.seconds.items() if total}
    found = [event for event in recorder.profiler.key_averages() if is_operator(event)]
    own = {
        event: (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6
        for event in found
    }
    operators = [
        {"name": event.key, "own": own[event] / recorder.traced, "calls": event.count / recorder.traced}
        for event in sorted(found, key=own.__getitem__, reverse=True)
    ]
    return {
        "images_per_second": batch / seconds,
        "seconds": seconds,
        "cpu_seconds": recorder.cpu_seconds,
        "flops": recorder.flops,
        "flops_per_second": recorder.flops / seconds,
        "peak_bytes": recorder.peak_bytes,
        "parts": parts,
        "operators": operators,
    }


def is_operator(event: FunctionEventAvg) -> bool:
    """Whether the event is an operator of torch. Our own labels are not. Kernels of a GPU are not either: their time is
    that of their operator."""
    return event.device_type == DeviceType.CPU and str(event.key).startswith(("aten::", "autograd::", "torch"))
