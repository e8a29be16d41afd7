"""Objects without labels from the last block's keys: LOST and TokenCut. Tensors in, tensors out.

LOST (Simeoni et al. 2021, arXiv 2109.14279; valeoai/LOST object_discovery.py): objects are what resembles few patches.
The seed is the patch that correlates positively with the fewest others; of the k patches with the lowest such degree,
those that correlate positively with the seed say what the object is; the mask is what correlates positively with their
sum.

TokenCut (Wang et al. 2022, arXiv 2202.11539; YangtaoWANG95/TokenCut object_discovery.py): a normalized cut of the graph
whose edges are 1 where keys are alike (cosine above tau) and eps elsewhere. The second smallest generalized eigenvector
of (D - A, D) is split at its mean; the object is the side of its largest absolute value, the seed.

Both keep the region (4-connected) of the mask that holds the seed. Deliberate deviations: LOST's k is at most half of
the patches (100 of the 16 to 196 of a small image would be all of them); of equal degrees the first patch is the seed
(the official sort promises no order); a graph of TokenCut in which all pairs are alike, or none, has no cut: its mask
is everything (the official code takes whatever the eigensolver returns).

Axes: B images, N = gh x gw patches (row-major), D width of a key over all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from vit_suite.evaluation.features import frozen
from vit_suite.evaluation.regions import region_at
from vit_suite.models.backbone import Backbone
from vit_suite.models.blocks import queries_and_keys


class Discovery(NamedTuple):
    """One object an image."""

    masks: Tensor
    """bool (B, gh, gw): the region of the object."""
    maps: Tensor
    """float (B, gh, gw): what the mask was cut from, larger where the object is; positive (LOST) or above its mean
    (TokenCut) inside."""
    seeds: Tensor
    """int64 (B,): the patch that the method started from, row-major."""


def last_keys(backbone: Backbone, images: Tensor) -> Tensor:
    """Keys of the patches in the last block, all heads side by side: images (B, C, H, W), normalized -> (B, N, D)
    float32.

    Without gradients; the backbone runs in eval mode and gets its own mode back. A CLS token is not needed. UserError
    when the blocks have no keys to read.
    """
    with torch.no_grad(), frozen(backbone):
        x, grid = backbone.embed(images)
        for after in islice(backbone.blocks(x, grid), backbone.depth - 1):
            x = after
        _, keys = queries_and_keys(backbone.vit.blocks[-1], x, None)  # (B, h, T, D / h), not turned by rotary positions
        return keys[:, :, backbone.prefix_tokens :].transpose(1, 2).flatten(-2).float()


def lost(keys: Tensor, grid: tuple[int, int], k: int = 100) -> Discovery:
    """One object an image by LOST: keys (B, N, D), grid (gh, gw). `k`: patches that may tell what the object is, at
    most N / 2."""
    similarity = keys @ keys.transpose(1, 2)  # (B, N, N)
    alike = similarity > 0
    degree = alike.sum(-1) - alike.diagonal(dim1=1, dim2=2).long()
    order = degree.argsort(dim=-1, stable=True)
    seeds = order[:, 0]
    likely = torch.zeros_like(degree, dtype=torch.bool).scatter_(
        1, order[:, : max(1, min(k, keys.shape[1] // 2))], True
    )
    with_seed = similarity.gather(1, seeds.view(-1, 1, 1).expand(-1, 1, keys.shape[1])).squeeze(1)  # (B, N)
    summed = torch.einsum("bn,bnm->bm", (likely & (with_seed > 0)).to(similarity.dtype), similarity)
    maps = summed.unflatten(1, grid)
    return Discovery(region_at(maps > 0, seeds), maps, seeds)


def tokencut(keys: Tensor, grid: tuple[int, int], tau: float = 0.2, eps: float = 1e-5) -> Discovery:
    """One object an image by TokenCut: keys (B, N, D), grid (gh, gw).

    Costs an eigendecomposition of N x N an image in float64 (one CPU core: 1 ms at N = 64, 0.3 s at 784, 20 s at 4096).
    """
    units = torch.nn.functional.normalize(keys.double(), dim=-1)
    vectors = torch.stack([_second_eigenvector(one @ one.T > tau, eps) for one in units])  # (B, N)
    seeds = vectors.abs().argmax(-1)
    maps = (vectors * vectors.gather(1, seeds.unsqueeze(1)).sign()).unflatten(1, grid)
    everything = (vectors == 0).all(-1).view(-1, 1, 1)
    return Discovery(region_at((maps > maps.mean((-2, -1), keepdim=True)) | everything, seeds), maps, seeds)


def _second_eigenvector(alike: Tensor, eps: float) -> Tensor:
    """(N, N) bool -> (N,) float64, solving (D - A) v = l D v for the second smallest l; zeros where the graph has no
    cut.

    With S = D^-1/2 this is the symmetric problem of S (D - A) S = 1 - S A S, whose eigenvectors are v / S.
    """
    edges = alike.sum() - alike.diagonal().sum()
    if edges == 0 or edges == alike.numel() - len(alike):
        return alike.new_zeros(len(alike), dtype=torch.float64)
    weights = torch.where(alike, 1.0, eps).double()
    scale = weights.sum(-1).rsqrt()
    return scale * torch.linalg.eigh(-scale.unsqueeze(1) * weights * scale).eigenvectors[:, 1]


DISCOVERERS: dict[str, Callable[[Tensor, tuple[int, int]], Discovery]] = {"lost": lost, "tokencut": tokencut}
"""Methods by name: keys (B, N, D) and the grid -> Discovery."""
