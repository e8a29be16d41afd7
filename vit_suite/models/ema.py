"""The EMA teacher: it starts equal to the student, shares no memory, and follows after each optimizer step."""

from __future__ import annotations

import torch
from torch import nn

from vit_suite import distributed


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for each parameter, in a few fused calls.

    The teacher keeps its own buffers (BatchNorm statistics), as in DINO's `main_dino.py`. For sharded networks each
    rank moves its part.
    """
    pairs = [
        (distributed.own_part(target), distributed.own_part(source))
        for target, source in zip(teacher.parameters(), student.parameters(), strict=True)
        if source.requires_grad  # a frozen number (LoRA's base) is its own average, and averaging would only round it
    ]
    targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1.0 - momentum)


@torch.no_grad()
def copy_parameters(to: nn.Module, source: nn.Module) -> None:
    """Copy the parameters of `source` to `to`, of the same architecture. For sharded networks each rank copies its
    part."""
    targets, sources = (
        [distributed.own_part(parameter) for parameter in network.parameters()] for network in (to, source)
    )
    torch._foreach_copy_(targets, sources)


@torch.no_grad()
def copy_buffers(to: nn.Module, source: nn.Module) -> None:
    """Copy the buffers of `source` (BatchNorm statistics) to `to`, of the same architecture."""
    for target, buffer in zip(to.buffers(), source.buffers(), strict=True):
        target.copy_(buffer)


def copy_weights(teacher: nn.Module, student: nn.Module) -> None:
    """Copy the student's weights to the teacher, whose parameters then take no gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


def assert_twins(teacher: nn.Module, student: nn.Module) -> None:
    """Check that the two hold the same numbers in different memory.

    Both faults occurred in other ports: a student and a teacher that shared storage learned nothing (dinov2#407), and a
    student and a teacher that started apart never agreed.
    """
    ours = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        mine, theirs = distributed.own_part(ours[name]), distributed.own_part(parameter)
        if mine.data_ptr() == theirs.data_ptr() and mine.numel():
            raise RuntimeError(
                f"student and teacher share the storage of {name}: the teacher would follow every gradient step"
            )
        if not torch.equal(mine, theirs):
            raise RuntimeError(f"student and teacher start with different {name}")
