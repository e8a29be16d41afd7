"""Parameter groups and clipping (facebookresearch/dino utils.py `get_params_groups`, `clip_gradients`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two AdamW groups: weights that decay, and biases and other 1-D parameters that do not.

    Position embedding and CLS token are decayed (they are not 1-D), as in the release. The first group carries
    `decay=True`: the weight-decay schedule is written into it alone.
    """
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed, "decay": True}, {"params": plain, "decay": False, "weight_decay": 0.0}]


@torch.no_grad()
def clip_each(gradients: Iterable[Tensor], limit: float) -> list[Tensor]:
    """Scale each gradient in place to an L2 norm of at most `limit`, by its own norm; returns the norms before (0-d tensors).

    No value is read on the host, so a GPU does not wait.
    """
    gradients = list(gradients)
    norms = torch._foreach_norm(gradients)
    factors = (limit / (torch.stack(norms) + 1e-6)).clamp(max=1.0)  # together: a launch a tensor would cost more than the arithmetic
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return list(norms)
