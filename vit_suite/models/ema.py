"""The EMA teacher: start equal, share nothing, follow the student after each optimiser step."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter, in a few fused calls.

    Buffers (BatchNorm statistics) stay the teacher's own, as in DINO `main_dino.py`.
    """
    targets, sources = list(teacher.parameters()), [parameter.detach() for parameter in student.parameters()]
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1.0 - momentum)


def copy_weights(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's weights and take it out of the gradient."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)


def assert_twins(teacher: nn.Module, student: nn.Module) -> None:
    """Check that the two hold the same numbers in different memory.

    A Lightning port whose student and teacher shared storage trained on nothing (dinov2#407), and one whose halves started apart
    never agreed.
    """
    ours = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if parameter.data_ptr() == ours[name].data_ptr() and parameter.numel():
            raise RuntimeError(f"student and teacher share the storage of {name}: the teacher would follow every gradient step")
        if not torch.equal(parameter, ours[name]):
            raise RuntimeError(f"student and teacher start with different {name}")
