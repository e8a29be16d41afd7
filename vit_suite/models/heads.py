"""Heads: DINO's projection head (arXiv 2104.14294, appendix C; facebookresearch/dino vision_transformer.py `DINOHead`),
and SiT's two (arXiv 2104.03602; vision_transformer.py `CLSHead`, `RECHead`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vit_suite.models.batch_norm import BatchNorm1d


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `g v / |v|`.

    `weight_g` (K, 1) and `weight_v` (K, D) have the names of the DINO release. This is a module of its own because
    torch's hook-based `weight_norm` is deprecated, and its parametrization renames both. `trainable_gain=False` keeps g
    at 1 (DINO's `norm_last_layer`).
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
    """MLP -> L2 normalization -> weight-normed linear to K prototypes. (B, dim) -> logits (B, K).

    Hidden layers use exact GELU and, if `batch_norm`, BatchNorm before it. With one layer the MLP is a single linear
    map. Without `weight_norm` the last layer is a plain linear map, as in DINOv3.
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
        weight_norm: bool = True,
    ):
        super().__init__()
        if layers == 1:
            self.mlp: nn.Module = nn.Linear(dim, bottleneck_dim)
        else:
            widths = [dim] + [hidden_dim] * (layers - 1)
            hidden: list[nn.Module] = []
            for before, after in pairwise(widths):
                hidden += [nn.Linear(before, after), *([BatchNorm1d(after)] if batch_norm else []), nn.GELU()]
            self.mlp = nn.Sequential(*hidden, nn.Linear(hidden_dim, bottleneck_dim))
        init_linear_(self.mlp)
        if weight_norm:
            self.last_layer: nn.Module = WeightNormLinear(bottleneck_dim, out_dim, trainable_gain=not norm_last_layer)
        else:  # DINOv3's
            self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
            init_linear_(self.last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim) -> (B, K)."""
        # fp32, because the norm of a bf16 vector has three digits
        return self.last_layer(F.normalize(self.mlp(x).float(), dim=-1))


class ContrastiveHead(nn.Module):
    """SiT's head for its contrastive loss: one linear map (version 1), or three layers with BatchNorm (version 3
    `CLSHead`).

    (B, dim) -> (B, out_dim). The second hidden layer has GELU and the first ReLU, and the last BatchNorm has no
    parameters, as there.
    """

    def __init__(self, dim: int, out_dim: int, kind: Literal["linear", "mlp"], hidden_dim: int = 4096):
        super().__init__()
        if kind == "linear":
            layers: list[nn.Module] = [nn.Linear(dim, out_dim)]
        else:
            layers = [nn.Linear(dim, hidden_dim), BatchNorm1d(hidden_dim), nn.ReLU()]
            layers += [nn.Linear(hidden_dim, hidden_dim), BatchNorm1d(hidden_dim), nn.GELU()]
            layers += [nn.Linear(hidden_dim, out_dim), BatchNorm1d(out_dim, affine=False)]
        self.mlp = nn.Sequential(*layers)
        init_linear_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PatchDecoder(nn.Module):
    """Patch tokens -> pixels by a transposed convolution whose kernel and stride are the patch (SiT).

    (B, N, dim) -> (B, C, h p, w p). Kind `mlp` has three layers before it. It is computed as a matrix product with the
    same parameters, which is 4 times faster on a CPU in bf16.
    """

    def __init__(self, dim: int, channels: int, patch_size: int | tuple[int, int], kind: Literal["linear", "mlp"]):
        super().__init__()
        self.mlp = nn.Sequential(
            *[layer for _ in range(3) for layer in (nn.Linear(dim, dim), nn.GELU())] if kind == "mlp" else []
        )
        init_linear_(self)
        self.conv = nn.ConvTranspose2d(dim, channels, patch_size, patch_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        weight: Tensor = self.conv.weight  # (dim, C, p, p)
        bias: Any = self.conv.bias
        pixels = F.linear(self.mlp(tokens), weight.flatten(1).T).float()  # (B, N, C p p)
        image = rearrange(
            pixels, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=weight.shape[2], q=weight.shape[3]
        )
        return image + bias.float().view(-1, 1, 1)


def init_linear_(module: nn.Module) -> None:
    """Initialize linear layers as in ViTs: truncated normal of 0.02, bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
