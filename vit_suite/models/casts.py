"""The weights of a block in the lower precision of autocast, by one operator instead of one for each tensor.

Autocast casts each weight and bias of a linear layer when the layer runs, and the backward pass casts each gradient
back: 200 launches a step and network of 12 blocks. A GPU then waits for Python. The numbers are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from vit_suite import distributed


class _CastTogether(torch.autograd.Function):
    """Copies of tensors in another type; the backward pass casts their gradients back together."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        low = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(low, list(weights))
        return tuple(low)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [
            None if gradient is None else torch.empty_like(gradient, dtype=dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        torch._foreach_copy_([one for one in found if one is not None], [one for one in gradients if one is not None])
        return None, *found


def linear_tensors(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights and biases of the linear layers of a block, as (layer, name), but for layers with LoRA pairs."""
    layers = [part for part in block.modules() if isinstance(part, nn.Linear) and not is_parametrized(part)]
    return [(layer, name) for layer in layers for name in ("weight", "bias") if getattr(layer, name) is not None]


def _is_whole_fp32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and not distributed.is_sharded(tensor)


@contextlib.contextmanager
def cast_together(tensors: list[tuple[nn.Module, str]], device_type: str) -> Iterator[None]:
    """Within, the layers read their fp32 tensors in the type of autocast.

    The copy stands in the layer's own dictionary, where Python looks before it asks the module for its parameter.
    Nothing happens without autocast, nor to tensors that are sharded (FSDP2 gathers them later, in that type).
    """
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        yield
        return
    chosen = [(layer, name) for layer, name in tensors if _is_whole_fp32(getattr(layer, name))]
    if not chosen:
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    low = _CastTogether.apply(dtype, *(getattr(layer, name) for layer, name in chosen))
    for (layer, name), weight in zip(chosen, low, strict=True):
        layer.__dict__[name] = weight
    try:
        yield
    finally:
        for layer, name in chosen:
            del layer.__dict__[name]
