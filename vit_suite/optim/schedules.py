"""Schedules: pure functions of the optimizer step (facebookresearch/dino utils.py `cosine_scheduler`)."""

from __future__ import annotations

import math
from typing import Literal


def linear(index: int, count: int, start: float, end: float) -> float:
    """Element `index` of `numpy.linspace(start, end, count)`: the last one is `end`, and a single one is `start`."""
    if count > 1 and index == count - 1:
        return end
    return start + index * ((end - start) / (count - 1) if count > 1 else 0.0)


def cosine(
    step: int, max_steps: int, start: float, end: float, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Linear warm-up from `warmup_start` to `start`, then half a cosine towards `end`.

    As in the release, the last warm-up step has the value `start`, and `end` would be reached one step after the last.
    """
    if step < warmup_steps:
        return linear(step, warmup_steps, warmup_start, start)
    length = max(1, max_steps - warmup_steps)
    done = min(step - warmup_steps, length)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done / length))


def rate_of_epoch(
    epoch: int, epochs: int, peak: float, end: float, warmup_epochs: float, warmup_start: float = 0.0
) -> float:
    """The learning rate of a whole epoch (0-based) as facebookresearch/deit main.py has it: timm's CosineLRScheduler,
    stepped after each epoch with that epoch's number. So the second epoch repeats the rate of the first, and the cosine
    counts from the start of training, not from the end of the warm-up."""
    done = max(0, epoch - 1)
    if done < warmup_epochs:
        return warmup_start + done * (peak - warmup_start) / warmup_epochs
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(done, epochs) / epochs))


def peak_rate(lr: float, batch: int, scaling: Literal["linear", "sqrt"]) -> float:
    """The learning rate after warm-up for a global batch: lr x batch / 256 (DINO), or lr x sqrt(batch / 1024)
    (facebookresearch/dinov2 dinov2/utils/config.py `apply_scaling_rules_to_cfg`)."""
    return lr * batch / 256 if scaling == "linear" else lr * math.sqrt(batch / 1024)


def teacher_temperature(epoch: int, warmup_epochs: int, start: float, end: float) -> float:
    """The temperature of an epoch: linear over the warm-up epochs, the last of which has the value `end`; then
    constant."""
    return linear(epoch, warmup_epochs, start, end) if epoch < warmup_epochs else end
