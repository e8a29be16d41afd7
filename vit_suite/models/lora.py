"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen network that learns by low-rank pairs beside its linear layers.

W x becomes (W + B A) x with A (rank, in) and B (out, rank). B starts at zero, so the network starts unchanged. Each
block has a pair for qkv, for proj and for both layers of its MLP. The paper's factor alpha / rank is 1.

torch's `parametrize` holds the pair beside the weight. So all code that reads `layer.weight` (fused kernels, the last
block for the CLS token) reads the sum. `merged` writes the sum into the weight and returns the plain network.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Network = TypeVar("Network", bound=nn.Module)

ORIGINAL = ".parametrizations.weight.original"
"""How the name of a frozen weight ends, where the plain network has `.weight`."""


class Pair(nn.Module):
    """The sum of a weight (out, in) and B A."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as nn.Linear, and the paper's code

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.b, self.a)


def linear_layers(vit: nn.Module) -> dict[str, nn.Linear]:
    """Name -> the linear layers of the blocks: qkv, proj and the MLP's."""
    blocks = vit.get_submodule("blocks")
    return {name: part for name, part in blocks.named_modules() if isinstance(part, nn.Linear)}


def add_pairs(vit: nn.Module, rank: int) -> None:
    """Freeze the network and put a pair beside each linear layer of its blocks."""
    vit.requires_grad_(False)
    for layer in linear_layers(vit).values():
        parametrize.register_parametrization(layer, "weight", Pair(layer.weight, rank))


def merged(network: Network) -> Network:
    """The `Backbone` itself, or if it has pairs, a plain copy whose weights are the sums."""
    backbone = cast(Any, network)
    if not backbone.cfg.lora_rank:
        return network
    state = {name: tensor for name, tensor in backbone.vit.state_dict().items() if ".parametrizations." not in name}
    for name, layer in linear_layers(backbone.vit).items():
        state[f"blocks.{name}.weight"] = layer.weight.detach()
    # A new network: a copy would share the classes of its layers with the original, and `weight` belongs to the class.
    with torch.random.fork_rng(devices=[]):
        plain = type(backbone)(replace(backbone.cfg, lora_rank=0, pretrained=False))
    plain.vit.load_state_dict(state)
    return plain.to(next(backbone.parameters()).device).train(backbone.training)


def with_frozen_names(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `state` of a plain network, with the names and the pairs of a network with pairs, whose state is `own`."""
    found = {}
    for name, tensor in state.items():
        frozen = name.removesuffix(".weight") + ORIGINAL
        found[frozen if frozen in own else name] = tensor
    return found | {name: tensor for name, tensor in own.items() if ".parametrizations.weight.0." in name}


def trained_share(module: nn.Module) -> float:
    """Share of the parameters that learn."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(count for count, learns in counts if learns) / max(1, sum(count for count, _ in counts))
