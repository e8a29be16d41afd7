"""Parameter groups, clipping and moments (facebookresearch/dino utils.py `get_params_groups`, `clip_gradients`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vit_suite import distributed

EPS = 1e-6
"""Added to a norm before the division, as in torch's `clip_grad_norm_` and in DINO's `clip_gradients`."""


def parameter_groups(
    module: nn.Module,
    layer_decay: float = 1.0,
    decay_tokens: bool = True,
    patch_embed_lr: float = 1.0,
    last_layer_apart: bool = False,
) -> list[dict]:
    """AdamW's parameter groups: weights with weight decay, and biases and other 1-D parameters without.

    Each group has these entries besides torch's:
        decay: whether the weight-decay schedule is written into it.
        lr_scale: factor on the learning rate.
        last_layer: with `last_layer_apart`, whether these are the last layers of heads.

    Args:
        layer_decay: `lr_scale` is this to the power of the number of layers between a parameter and the head (BEiT,
            arXiv 2106.08254; timm `param_groups_layer_decay`). At 1 there are two groups, else two per layer.
        decay_tokens: whether position embedding and tokens have weight decay, as in the DINO release.
        patch_embed_lr: one more factor for the patch embedding, which then has its own groups.
        last_layer_apart: whether the last layers of heads have their own groups (DINOv2
            dinov2/utils/param_groups.py).
    """
    found = [_block(name) for name, _ in module.named_parameters()]
    blocks = 1 + max((block for block in found if block is not None), default=-1)
    groups: dict[tuple[int, int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = not (name.endswith(".bias") or parameter.ndim == 1)
            decay &= decay_tokens or not re.search(r"\b(pos_embed|cls_token|reg_token)$", name)
            depth = 0 if layer_decay == 1 else blocks + 1 - layer_of(name, blocks)
            embedding = patch_embed_lr != 1 and ".patch_embed." in f".{name}"
            last = last_layer_apart and ".last_layer." in f".{name}"
            scale = layer_decay**depth * (patch_embed_lr if embedding else 1)
            group = {"params": [], "decay": decay, "lr_scale": scale} | ({} if decay else {"weight_decay": 0.0})
            if last_layer_apart:
                group["last_layer"] = last
            groups.setdefault((depth, embedding + 2 * last, not decay), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


_DECODER = re.compile(r"\bdecoder\.")
"""MAE's decoder is a head: its blocks and tokens are no layers of the encoder."""


def _block(name: str) -> int | None:
    found = None if _DECODER.search(name) else re.search(r"\bblocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def layer_of(name: str, blocks: int) -> int:
    """The layer of a parameter: 0 = patch embedding, tokens and positions; 1 to `blocks` = the blocks; `blocks` + 1 =
    the last norm and heads."""
    if _DECODER.search(name):
        return blocks + 1
    block = _block(name)
    if block is not None:
        return block + 1
    embedding = re.search(r"\b(patch_embed|pos_embed|cls_token|reg_token|mask_token|norm_pre)\b", name)
    return 0 if embedding else blocks + 1


@torch.no_grad()
def clip_each(gradients: Iterable[Tensor], limit: float) -> list[Tensor]:
    """Scale each gradient in place to an L2 norm of at most `limit`. Returns the norms before (0-d tensors).

    The host reads no value, so a GPU does not wait. Of a sharded gradient each rank scales its part by the norm of the
    whole.
    """
    norms, parts = _norms(gradients)
    factors = (limit / (norms + EPS)).clamp(max=1.0)  # all at once, because one launch per tensor would cost more
    torch._foreach_mul_(parts, list(factors.unbind()))
    return list(norms)


@torch.no_grad()
def clip_networks(gradients: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Scale the gradients of each network in place to an L2 norm of at most `limit`. Returns the norms before.

    Args:
        gradients: name of a parameter -> its gradient. The first word of the name is the network: `head.mlp.0.weight`.
            The mask token counts as part of the backbone, as in DINOv2.
    """
    networks: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        network = name.split(".")[0]
        networks.setdefault("backbone" if network == "mask_token" else network, []).append(gradient)
    return {network: clip_all(parts, limit) for network, parts in networks.items()}


@torch.no_grad()
def clip_all(gradients: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients in place by one factor, so that their common L2 norm is at most `limit`. Returns the norm
    before.

    The same as torch's `clip_grad_norm_`, which for sharded gradients would sum over ranks once per tensor.
    """
    norms, parts = _norms(gradients)
    norm = norms.norm()
    torch._foreach_mul_(parts, (limit / (norm + EPS)).clamp(max=1.0))
    return norm


def _norms(gradients: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The L2 norm of each gradient, and this rank's part of it."""
    gradients = list(gradients)
    parts = [distributed.own_part(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(parts))
    if any(map(distributed.is_sharded, gradients)):
        norms = distributed.sum_over_ranks(norms.square()).sqrt()
    return norms, parts


@torch.no_grad()
def round_first_moments(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook after a step of AdamW: round its first moments to bf16, as optax's `scale_by_adam(mu_dtype="bfloat16")`
    keeps them. Deviation: optax multiplies the rounded moment by beta in bf16 too, which rounds once more."""
    moments = [distributed.own_part(state["exp_avg"]) for state in optimizer.state.values() if "exp_avg" in state]
    torch._foreach_copy_(moments, [moment.bfloat16() for moment in moments])
