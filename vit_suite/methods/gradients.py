"""Gradients that a method computes inside its training step, before Lightning's backward pass.

They cannot be written into `.grad` at once, for two reasons. Lightning sets `.grad` to None between the training step
and its backward pass, and DDP averages only gradients that come out of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[nn.Parameter, Tensor]


def add_gradients(gradients: Gradients, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Add the gradients of `loss` to `gradients`, and free its graph. Parameters that `loss` does not use get none.

    Several losses may be computed under one autocast, which casts each weight once for all of them. Freeing the graph
    of the first loss does not break the others, because the gradient of a cast needs no saved tensor.
    """
    with torch.autocast(loss.device.type, enabled=False):  # as in Lightning's backward pass
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            if parameter not in gradients:  # a new tensor, because autograd may return one tensor for two parameters
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
    """The scalar `value`. Its backward pass gives the parameters these gradients, times the gradient of `value`."""
    return _Known.apply(value, list(gradients.values()), *gradients)
