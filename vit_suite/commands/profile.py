"""`vit-suite profile`: some real steps of a training, and where their time goes.

Three passes over further and further steps of one training, because looking costs time: plain steps (images/s, memory),
steps whose
parts are timed (the table), and a few under torch.profiler (operators, trace). The products of matrices are counted in
the first step.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
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

from vit_suite import distributed
from vit_suite.commands.logs import speak
from vit_suite.commands.pretrain import build_parts, build_trainer
from vit_suite.commands.start import adopt
from vit_suite.config import ProfileConfig, SupervisedConfig
from vit_suite.errors import UserError
from vit_suite.hardware import matmul_rate
from vit_suite.methods.base import Method
from vit_suite.reports.phases import Phases, label, now
from vit_suite.reports.results import table
from vit_suite.weights.checkpoint import load_backbone

TRACED = 3
"""Steps in the trace: more only make a file that viewers are slow to open."""


def run(cfg: ProfileConfig) -> None:
    """Profile, print, and write OUTPUT/trace.json and OUTPUT/profile.json."""
    speak()
    check(cfg)
    output = Path(cfg.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output '{output}' cannot be a folder: {error.strerror}.") from None
    with tempfile.TemporaryDirectory() as folder:
        recorder, about = measure(cfg, Path(folder))
    figures = summary(recorder, cfg.data.batch_size) | about
    rate = matmul_rate(about["precision"], recorder.phases.device)
    figures |= {"matmul_flops_per_second": rate, "share_of_matmul_rate": figures["flops_per_second"] / rate}
    recorder.profiler.export_chrome_trace(str(output / "trace.json"))
    (output / "profile.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(text(figures, cfg.operators))
    print(
        f"\n{output}/trace.json: {recorder.traced} steps, for chrome://tracing or ui.perfetto.dev;"
        f" {output}/profile.json: these figures"
    )


def check(cfg: ProfileConfig) -> None:
    """UserError for options of a training that one process without a run directory cannot follow."""
    if cfg.trainer.nodes != 1 or cfg.trainer.devices not in ("auto", 1) or distributed.started() is not None:
        raise UserError(
            "profile looks at one process: leave trainer.devices and trainer.nodes out, and divide data.batch_size."
        )
    if cfg.trainer.strategy != "ddp":
        raise UserError(
            "trainer.strategy fsdp2 spreads the weights over ranks, and profile looks at one process: leave it out."
        )
    if cfg.drill:
        raise UserError("drill interrupts a training: `vit-suite pretrain` does it.")


def measure(cfg: ProfileConfig, folder: Path) -> tuple[Recorder, dict[str, Any]]:
    """Run the steps of all passes; what was found, and on what."""
    if isinstance(cfg.method, SupervisedConfig) and cfg.method.start:
        cfg = adopt(
            cfg, load_backbone(cfg.method.start)
        )  # speed does not depend on the weights, so they are not taken over
    data, method, device, precision = build_parts(cfg, folder)
    phases = Phases(device)
    label(phases, method, data)
    recorder = Recorder(phases, cfg.warmup, cfg.steps)
    per_epoch = max(1, len(data.plan()) // cfg.trainer.accumulate)
    epochs = max(cfg.trainer.max_epochs, -(-recorder.last // per_epoch))
    trainer = replace(cfg.trainer, max_epochs=epochs, max_steps=-1, max_minutes=None, devices=1, progress=False)
    cfg = replace(cfg, trainer=trainer, logger=replace(cfg.logger, wandb=False))
    data.trainer = trainer = build_trainer(cfg, folder, [recorder], precision)
    trainer.fit(method, data)
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
    """Sends a training through the passes and then ends it. It is a Checkpoint, and Lightning adds none of its own that
    would write one.

    Steps are counted from the end of one to the end of the next, so loading and Lightning's loop are in them.
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

    def on_train_start(self, trainer: pl.Trainer, module: Method) -> None:
        losses = module.losses

        def counted(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            """The first call: networks, loss and, until on_after_backward, their gradients; not the views, which are
            products too."""
            module.losses = losses
            self._counter.__enter__()
            return losses(*args, **kwargs)

        module.losses = counted

    def on_after_backward(self, trainer: pl.Trainer, module: Method) -> None:
        if not self.flops:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops() * trainer.accumulate_grad_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._done:  # a micro-batch with others to follow
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
    """The most bytes there have been: on a GPU of tensors since the warm-up, on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary(recorder: Recorder, batch: int) -> dict[str, Any]:
    """The figures: seconds of a step, of its parts and of its operators (`own`: less what they call), bytes, FLOP."""
    seconds, device = recorder.seconds, recorder.phases.device
    parts = {name: total / recorder.steps for name, total in recorder.phases.seconds.items() if total}
    found = [event for event in recorder.profiler.key_averages() if is_operator(event)]
    own = {
        event: (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6
        for event in found
    }
    operators = [
        {"name": event.key, "own": own[event] / recorder.traced, "calls": event.count / recorder.traced}
        for event in sorted(found, key=own.get, reverse=True)
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
    """Whether it is torch's: not a label of ours, and not a GPU's own record of a kernel, whose time its operator has
    too."""
    return event.device_type == DeviceType.CPU and event.key.startswith(("aten::", "autograd::", "torch"))


def text(figures: dict[str, Any], operators: int) -> str:
    """What is printed: a few sentences, the parts of a step, its operators."""
    head = "{method} on {data}, batch {batch}, {precision}, {device}, torch {torch}".format(**figures)
    wall, cpu = 1e3 * figures["seconds"], 1e3 * figures["cpu_seconds"]
    speed = f"{figures['images_per_second']:.1f} images/s, {wall:.1f} ms a step ({cpu:.1f} of CPU time)"
    work = (
        f"{figures['flops'] / 1e9:.1f} GFLOP of matrix products a step, {figures['flops_per_second'] / 1e9:.1f} GFLOP/s"
    )
    share = (
        f"{figures['share_of_matmul_rate']:.1%} of the {figures['matmul_flops_per_second'] / 1e9:.0f} this machine"
        " multiplies at best"
    )
    memory = f"peak memory {figures['peak_bytes'] / 2**20:.0f} MiB"
    parts, shown = figures["parts"], figures["operators"]
    total, own = sum(parts.values()), sum(operator["own"] for operator in shown)
    rows = [
        [name, 1e3 * seconds, f"{seconds / total:.1%}"]
        for name, seconds in [*parts.items(), ("step, timed by part", total)]
    ]
    below = [
        [row["name"], 1e3 * row["own"], f"{row['own'] / own:.1%}", f"{row['calls']:.0f}"] for row in shown[:operators]
    ]
    return "\n\n".join(
        [
            f"{head}\n{speed}; {memory}\n{work}: {share}",
            table(["part", "ms a step", "share"], rows),
            table(["operator", "own ms a step", "share", "calls"], below),
        ]
    )
