"""The EMA teacher: start equal, share nothing, follow the student after each optimizer step."""

from __future__ import annotations

import torch
from torch import nn

from vit_suite import distributed


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter, in a few fused calls.

    Buffers (BatchNorm statistics) stay the teacher's own, as in DINO `main_dino.py`. Of sharded networks each rank
    moves its part.
    """
    pairs = [
        (distributed.own_part(target), distributed.own_part(source))
        for target, source in zip(teacher.parameters(), student.parameters(), strict=True)
        if source.requires_grad  # the average of a number that stays is the number, but for rounding (LoRA's base)
    ]
    targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1.0 - momentum)


@torch.no_grad()
def copy_parameters(to: nn.Module, source: nn.Module) -> None:
    """Give `to` the parameters of `source`, of the same architecture. Of sharded networks each rank copies its part."""
    targets, sources = (
        [distributed.own_part(parameter) for parameter in network.parameters()] for network in (to, source)
    )
    torch._foreach_copy_(targets, sources)


def copy_weights(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's weights and take it out of the gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


def assert_twins(teacher: nn.Module, student: nn.Module) -> None:
    """Check that the two hold the same numbers in different memory.

    A Lightning port whose student and teacher shared storage trained on nothing (dinov2#407), and one whose halves
    started apart never agreed.
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
