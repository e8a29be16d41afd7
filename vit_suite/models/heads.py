"""DINO's projection head (arXiv 2104.14294, appendix C; facebookresearch/dino vision_transformer.py `DINOHead`)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `g v / |v|`.

    `weight_g` (K, 1) and `weight_v` (K, D) carry the names of the DINO release. Own module, because torch's hook-based `weight_norm` is
    deprecated and its parametrisation renames both. `trainable_gain=False` keeps g at 1 (DINO's `norm_last_layer`).
    """

    def __init__(self, in_features: int, out_features: int, trainable_gain: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=trainable_gain)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = in_features**-0.5  # nn.Linear's default, as in the release
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DINOHead(nn.Module):
    """MLP -> L2 normalisation -> weight-normed linear to K prototypes. (B, dim) -> logits (B, K).

    Hidden layers use exact GELU and, if `batch_norm`, BatchNorm before it. With one layer the MLP is a single linear map.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        if layers == 1:
            self.mlp: nn.Module = nn.Linear(dim, bottleneck_dim)
        else:
            widths = [dim] + [hidden_dim] * (layers - 1)
            hidden: list[nn.Module] = []
            for before, after in pairwise(widths):
                hidden += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if batch_norm else []), nn.GELU()]
            self.mlp = nn.Sequential(*hidden, nn.Linear(hidden_dim, bottleneck_dim))
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, trainable_gain=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim) -> (B, K)."""
        # fp32, because the norm of a bf16 vector has three digits
        return self.last_layer(F.normalize(self.mlp(x).float(), dim=-1))
