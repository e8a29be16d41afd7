"""Gradients that are taken within a training step, for Lightning's one backward pass after it.

They cannot go into `.grad` at once: Lightning sets that to None between the two, and DDP averages what it sees in the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[nn.Parameter, Tensor]


def add_gradients(gradients: Gradients, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Add those of `loss` to `gradients`, and free its graph. Parameters that it does not depend on get none.

    Losses under one autocast share its casts of the weights: a cast keeps nothing for its gradient that the first loss
    could free.
    """
    with torch.autocast(loss.device.type, enabled=False):  # as in Lightning's backward pass
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            if parameter not in gradients:  # memory of its own: autograd may return one tensor for two parameters
                gradients[parameter] = torch.zeros_like(parameter)
            gradients[parameter] += gradient


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * scale for gradient in ctx.saved_tensors)


def with_gradients(value: Tensor, gradients: Gradients) -> Tensor:
    """The scalar `value`, whose backward pass gives the parameters these gradients, times what comes from behind it."""
    return _Known.apply(value, list(gradients.values()), *gradients)
